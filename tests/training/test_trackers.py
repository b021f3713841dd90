"""Trackers get the figures of the log; a resumed run continues in its tracker, and a failing one ends no training."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_task import STEPS, TinyTask, config, log, same_weights, train

from search_r3.errors import InputError
from search_r3.training.config import TRACKERS, LoopConfig
from search_r3.training.trackers import RUNS_FILE, Trackers, tracker_names


class FakeRun:
    """What wandb.init and trackio.init give: a run that keeps what it gets, and fails from step `fails_at`."""

    def __init__(self, settings: dict[str, Any], fails_at: int) -> None:
        self.settings, self.fails_at = settings, fails_at
        self.id, self.name = settings.get("id"), settings["name"]
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        if step >= self.fails_at:
            raise ConnectionError("the server is gone\nwith a second line")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


class FakeService(ModuleType):
    """A stand-in for the package wandb or trackio, with what accelerate uses of it."""

    def __init__(self, name: str, fails_at: int = sys.maxsize) -> None:
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, None)
        self.runs: list[FakeRun] = []
        self.configs: list[dict[str, Any]] = []
        self.fails_at = fails_at
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.configs.append(values))

    def init(self, **settings: Any) -> FakeRun:
        self.runs.append(FakeRun(settings, self.fails_at))
        return self.runs[-1]


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    made = FakeService(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


class FakeMlflow(ModuleType):
    """A stand-in for the package mlflow, with what accelerate uses of it; it refuses the names that MLflow refuses."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = importlib.util.spec_from_loader("mlflow", None)
        limits = {"MAX_PARAM_VAL_LENGTH": 6000, "MAX_PARAMS_TAGS_PER_BATCH": 100}
        self.utils = SimpleNamespace(validation=SimpleNamespace(**limits))
        self.started: list[dict[str, Any]] = []
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.params: dict[str, Any] = {}

    def search_experiments(self, filter_string: str) -> list[Any]:
        return []

    def create_experiment(self, name: str, artifact_location: Any, tags: Any) -> str:
        assert name == "search-r3"
        return "1"

    def start_run(self, **settings: Any) -> SimpleNamespace:
        self.started.append(settings)
        return SimpleNamespace(info=SimpleNamespace(run_id=settings["run_id"] or "abc123"))

    def log_params(self, values: dict[str, Any]) -> None:
        clash = [key for key, value in values.items() if self.params.get(key, value) != value]
        assert not clash  # MLflow refuses to change a parameter
        self.params |= values

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-. :/") for name in values)
        self.metrics.append((step, values))

    def end_run(self) -> None:
        self.metrics.append((-1, {}))


def test_a_tracker_gets_every_figure_of_the_log(service: FakeService, tmp_path: Path) -> None:
    train(tmp_path / "first", report_to=service.__name__)
    (run,) = service.runs
    assert run.settings["project"] == "search-r3"
    assert run.name == "first"
    assert run.finished
    records = log(tmp_path / "first", timeless=False)
    assert [step for step, _ in run.logged] == [record["step"] for record in records]
    for record, (_, values) in zip(records, run.logged, strict=True):
        if "dev" in record:
            expected = {f"dev/{name}": value for name, value in record["dev"].items()} | {
                "dev/seconds": record["seconds"]
            }
        else:
            top = {name: value for name, value in record.items() if name not in ("step", "terms")}
            expected = {f"train/{name}": value for name, value in (top | record["terms"]).items()}
        assert values == expected
    (settings,) = service.configs
    assert settings["loop.steps"] == STEPS
    assert settings["loop.betas"] == "[0.9, 0.999]"  # a list, which trackers do not take
    assert not (tmp_path / "first" / "tensorboard").exists()


def test_a_resumed_run_continues_its_run_and_a_new_one_has_its_own(service: FakeService, tmp_path: Path) -> None:
    train(tmp_path, steps=4, schedule="constant", report_to=service.__name__, run_name="mine")
    train(tmp_path, steps=8, schedule="constant", report_to=[service.__name__], run_name="mine")
    first, second = service.runs
    assert (first.name, second.name) == ("mine", "mine")
    assert first.id == second.id
    assert second.settings["resume"] == "allow"
    assert second.logged[0][0] in (4, 5)
    assert len(service.configs) == 1
    assert json.loads((tmp_path / RUNS_FILE).read_text()) == {service.__name__: first.id or "mine"}
    if service.__name__ == "trackio":
        assert first.settings["resume"] == "never"


def test_mlflow_gets_names_that_it_takes_and_is_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS", "MLFLOW_NESTED_RUN"):
        monkeypatch.delenv(name, raising=False)
    settings = {"loop.steps": 2, "dev": ["cosqa"]}
    for start, run in ((0, None), (2, "abc123")):
        trackers = Trackers(["mlflow"], tmp_path, project="search-r3", run_name="r", settings=settings, start=start)
        trackers.open()
        assert mlflow.started[-1]["run_id"] == run
        assert trackers.log("dev", {"ndcg@10.off_se": 0.5, "cosqa.dev.on": 0.25}, 2) == []
        assert trackers.close() == []
        settings["loop.steps"] = 4
    assert mlflow.metrics[0] == (2, {"dev/ndcg_at_10.off_se": 0.5, "dev/cosqa.dev.on": 0.25})
    assert mlflow.metrics[1] == (-1, {})
    assert mlflow.params["dev"] == '["cosqa"]'


def test_a_tracker_that_fails_ends_no_training(
    service: FakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "plain", report_to="none")
    service.fails_at = 6
    train(tmp_path / "run", report_to=service.__name__)
    assert same_weights(tmp_path / "plain" / "adapter", tmp_path / "run" / "adapter")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    (warning,) = warnings
    assert warning.endswith("failed and gets nothing more of this run: the server is gone")


def test_one_that_cannot_start_ends_the_run_before_its_first_step(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(service, "init", refuse)
    task = TinyTask()
    with pytest.raises(InputError, match=r"cannot start: api_key not configured.* or leave it out of loop.report_to"):
        train(tmp_path, task, report_to=["tensorboard", service.__name__])
    assert task.batches == []


def test_a_missing_package_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in TRACKERS else real(name))
    with pytest.raises(InputError, match=r"report_to: wandb needs the package wandb; .* 'search-r3\[wandb\]'"):
        train(tmp_path / "run", report_to="wandb")
    assert not (tmp_path / "run").exists()
    assert tracker_names("auto") == tracker_names("all") == []


def test_what_report_to_names() -> None:
    assert tracker_names("none") == tracker_names([]) == []
    assert tracker_names(["wandb", "mlflow", "wandb"]) == ["wandb", "mlflow"]
    assert set(tracker_names("all")) <= set(TRACKERS)
    for wrong in ("wand", ["auto", "wandb"]):
        with pytest.raises(InputError, match="report_to: unknown tracker"):
            LoopConfig(report_to=wrong)
    with pytest.raises(InputError, match='did you mean "wandb"'):
        LoopConfig(report_to="wand")
    assert config(report_to="all").report_to == "all"

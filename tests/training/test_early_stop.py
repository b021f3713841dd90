"""Patience ends a run at the same evaluation, killed or not; the run is then finished, and says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from tiny_grpo import write_recipe
from tiny_task import TinyTask, config, log, same_weights, train
from torch import nn

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.training import run_checkpoint as checkpoints
from search_r3.training.loop import run_training
from search_r3.training.sft.sft_config import SFTConfig
from search_r3.training_curves import read_log

CURVE = {0: 0.1, 2: 0.5, 4: 0.4, 6: 0.6, 8: 0.6, 10: 0.2, 12: 0.9}
"""Dev metrics: the third best of steps 6 is only equalled at 8 and missed at 10, so patience 2 never sees step 12."""
SETTINGS: dict[str, Any] = {"evaluate_every": 2, "checkpoint_every": 4, "patience": 2}
WHY = "2 evaluations in a row did not improve accuracy beyond 0.6000"


class Killed(Exception):
    pass


class Scripted(TinyTask):
    """Has the dev metrics of `CURVE`, and dies at a moment: ("batch" | "evaluate" | "save", step)."""

    def __init__(self, dies: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.dies = dies
        self.measured: list[int] = []

    def maybe_die(self, moment: str, step: int) -> None:
        if self.dies == (moment, step):
            raise Killed

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        self.maybe_die("batch", step)
        return super().batch(step)

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        self.maybe_die("evaluate", step)
        self.measured.append(step)
        return {"accuracy": CURVE[step]}

    def save(self, folder: Path) -> None:
        if "adapter" in folder.name:
            self.maybe_die("save", int(self.steps_seen))
        super().save(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(folder, Scripted(), **SETTINGS)
    return folder


def test_a_run_stops_after_so_many_evaluations_without_a_better_figure_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Scripted()
    assert train(tmp_path, task, **SETTINGS) == tmp_path / "adapter"
    assert task.measured == [0, 2, 4, 6, 8, 10]  # an equal metric is no improvement
    assert task.batches == list(range(10))
    assert f"stopped early after step 10 of 12: {WHY}" in capsys.readouterr().err
    assert log(tmp_path)[-1] == {"step": 10, "dev": {"accuracy": 0.2}, "stopped": WHY}
    assert sum("stopped" in record for record in log(tmp_path)) == 1
    steps, dev = read_log(tmp_path / "log.jsonl")  # as the plot reads it
    assert (len(steps), len(dev)) == (10, 6)
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert finished == {"step": 10, "best": 0.6, "why": WHY, "patience": 2}
    at_ten = checkpoints.read_checkpoint(tmp_path / "checkpoints" / "step-000010")
    assert (at_ten.best, at_ten.evals_without_improvement) == (0.6, 1)  # before the evaluation that ended the run


def test_a_better_figure_begins_the_count_anew_and_0_never_stops(tmp_path: Path) -> None:
    three = Scripted()
    train(tmp_path / "three", three, **SETTINGS | {"patience": 3})
    assert three.measured == list(CURVE)
    assert json.loads((tmp_path / "three" / "finished.json").read_text())["why"] == "all steps are done"
    never = Scripted()
    train(tmp_path / "never", never, **SETTINGS | {"patience": 0})
    assert never.measured == list(CURVE)


@pytest.mark.parametrize("moment", [("batch", 3), ("evaluate", 8), ("batch", 9), ("evaluate", 10), ("save", 10)])
def test_a_killed_run_takes_the_same_decision(stopped: Path, tmp_path: Path, moment: tuple[str, int]) -> None:
    with pytest.raises(Killed):
        train(tmp_path, Scripted(moment), **SETTINGS)
    again = Scripted()
    train(tmp_path, again, **SETTINGS)
    assert again.measured[-1] == 10
    assert log(tmp_path) == log(stopped)
    assert same_weights(tmp_path / "adapter", stopped / "adapter")
    assert same_weights(tmp_path / "best", stopped / "best")
    assert (tmp_path / "finished.json").read_text() == (stopped / "finished.json").read_text()
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (tmp_path, stopped)]
    assert names[0] == names[1]


def test_a_stopped_run_is_finished_until_it_is_given_more_patience(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, Scripted(), **SETTINGS)
    before = (tmp_path / "log.jsonl").read_bytes()
    for patience in (2, 1):
        task = Scripted()
        assert train(tmp_path, task, **SETTINGS | {"patience": patience}) == tmp_path / "adapter"
        assert task.batches == task.measured == []
        assert f"already stopped early, after step 10 of 12: {WHY}" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_bytes() == before
    task = Scripted()
    train(tmp_path, task, **SETTINGS | {"patience": 3})
    assert task.measured == [10, 12]
    train(tmp_path / "three", Scripted(), **SETTINGS | {"patience": 3})
    assert log(tmp_path) == log(tmp_path / "three")
    assert same_weights(tmp_path / "adapter", tmp_path / "three" / "adapter")
    assert same_weights(tmp_path / "best", tmp_path / "three" / "best")


def test_a_run_begun_before_there_was_patience_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, Scripted(("batch", 9)), **SETTINGS | {"patience": 0})
    state, settings = tmp_path / "checkpoints" / "step-000008" / "state.json", tmp_path / "config.json"
    facts = json.loads(state.read_text())
    del facts["evals_without_improvement"]
    state.write_text(json.dumps(facts | {"format": 1}))
    begun_with = json.loads(settings.read_text())
    del begun_with["loop"]["patience"]
    settings.write_text(json.dumps(begun_with))
    task = Scripted()
    train(tmp_path, task, **SETTINGS | {"patience": 2})
    assert task.measured == [8, 10]  # best 0.6 is known; the equal metric of 8 and that of 10 make two
    assert json.loads((tmp_path / "finished.json").read_text())["step"] == 10


def test_patience_without_a_figure_to_judge_by_is_refused(tmp_path: Path) -> None:
    task = Scripted()
    with pytest.raises(InputError, match=r"loop\.patience is 2, but the run has no validation metric"):
        run_training(task, config(**SETTINGS), tmp_path)
    task.evaluate = lambda module, step: {}  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"loop\.patience is 2, but the run has no validation metric"):
        train(tmp_path, task, **SETTINGS)
    assert task.batches == []
    with pytest.raises(InputError, match=r"loop\.patience is 2, but dev is empty"):
        SFTConfig(pairs=["pairs.jsonl"], output="run", dev=[], loop=config(**SETTINGS))


def test_stage_two_stops_by_its_own_figure(
    stage_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from search_r3.training.grpo.grpo_task import GRPOTask

    monkeypatch.setattr(GRPOTask, "evaluate", lambda task, module, step: {"live.reward": 1.0 - step})
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml")
    sets = ["loop.steps=6", "loop.evaluate_every=1", "loop.patience=2", "loop.checkpoint_every=0"]
    command = ["train", "grpo", str(recipe), *(part for one in sets for part in ("--set", one))]
    assert main(command) == 0
    assert "stopped early after step 2 of 6: 2 evaluations in a row" in capsys.readouterr().err
    assert main(command) == 0
    assert "already stopped early, after step 2 of 6" in capsys.readouterr().err
    assert tiny_task.log(tmp_path / "run")[-1]["step"] == 2


class Collapsing(TinyTask):
    """Says from step 6 on that it has collapsed; what it has seen is part of its state."""

    def collapsed(self, metrics: dict[str, float] | None) -> str | None:
        assert metrics is None or "noise" in metrics
        return "it has collapsed" if int(self.steps_seen) >= 6 else None


def test_a_collapse_is_reported_once_and_ends_only_a_run_that_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "on", Collapsing())
    warned = capsys.readouterr().err
    assert warned.count("warning: step 6: it has collapsed") == warned.count("collapsed") == 1
    assert json.loads((tmp_path / "on" / "finished.json").read_text())["why"] == "all steps are done"
    task = Collapsing()
    train(tmp_path / "stop", task, stop_on_collapse=True)
    assert task.batches == list(range(6))
    said = capsys.readouterr().err
    assert "stopped after step 6 of 12, as loop.stop_on_collapse is set; best/ holds the best adapter" in said
    finished = json.loads((tmp_path / "stop" / "finished.json").read_text())
    assert finished == {"step": 6, "best": finished["best"], "why": "it has collapsed", "collapsed": True}
    again = Collapsing()
    assert train(tmp_path / "stop", again, stop_on_collapse=True) == tmp_path / "stop" / "adapter"
    assert again.batches == []
    assert "already stopped early, after step 6 of 12: it has collapsed" in capsys.readouterr().err
    train(tmp_path / "stop", again)
    assert again.batches == list(range(6, 12)), "told not to stop, it continues where it was stopped"
    assert same_weights(tmp_path / "stop" / "adapter", tmp_path / "on" / "adapter")


def test_a_run_killed_where_it_collapsed_ends_there_when_it_resumes(tmp_path: Path) -> None:
    class Killed6(Collapsing):
        def save(self, folder: Path) -> None:
            if int(self.steps_seen) == 6:
                raise Killed
            super().save(folder)

    with pytest.raises(Killed):
        train(tmp_path, Killed6(), stop_on_collapse=True)
    task = Collapsing()
    train(tmp_path, task, stop_on_collapse=True)
    assert task.batches == []
    assert json.loads((tmp_path / "finished.json").read_text())["step"] == 6

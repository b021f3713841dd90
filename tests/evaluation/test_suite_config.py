"""A suite runs what its file names, goes on where it stopped, and loses nothing to what fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r3.cli import main
from search_r3.config import load_config
from search_r3.errors import InputError
from search_r3.evaluation import suite
from search_r3.evaluation.study import study
from search_r3.evaluation.suite_config import StudyPlan, SuitePlan

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")
ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted((ROOT / "configs/suites").glob("*.yaml"))
TEXT = """
systems: [bm25, mine={model}]
datasets: [tiny, nested/en]
modes: [off, on]
budget: 2
studies: {{datasets: [tiny], controls: [empty], budgets: [0, 2], adaptive: false, latency_queries: 0}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model) -> Path:
    """A working folder with a suite over a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    (tmp_path / "suite.yaml").write_text(TEXT.format(model=tiny_model))
    return tmp_path


@pytest.fixture
def command(place, data_root) -> list[str]:
    return ["evaluate", "suite.yaml", "--data", str(data_root), "--device", "cpu"]


@pytest.fixture
def answered(monkeypatch) -> list[str]:
    """What is answered and not taken from an earlier run, as it happens; "stop" before a name interrupts there."""
    seen: list[str] = []
    real = suite.evaluate_system

    def watched(dataset, split, system, *given, **options):
        if seen[:2] == ["stop", f"{dataset.name} {system.name}"]:
            seen.clear()
            raise KeyboardInterrupt
        record, fresh = real(dataset, split, system, *given, **options)
        if fresh and seen[:1] != ["stop"]:
            seen.append(f"{dataset.name} {system.name}")
        return record, fresh

    monkeypatch.setattr(suite, "evaluate_system", watched)
    monkeypatch.setattr(study, "evaluate_system", watched)
    return seen


def test_an_interrupted_suite_goes_on_and_a_finished_one_repeats_nothing(command, place, answered, capsys):
    answered += ["stop", "nested/en mine.on"]
    assert main(command) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    done = {path.relative_to(place / "results/metrics").as_posix() for path in place.glob("results/metrics/**/*.json")}
    assert done == {
        "tiny/bm25.json",
        "nested/en/bm25.json",
        "tiny/mine.off.json",
        "tiny/mine.on.json",
        "nested/en/mine.off.json",
    }
    assert main(command) == 0
    assert answered == ["nested/en mine.on", "tiny mine.empty"]
    printed = capsys.readouterr()
    assert printed.err.count("(already there)") == 7  # five pairs, and off and on of the study
    assert "| tiny | " in printed.out
    assert "mine on tiny: 3 queries, 4 documents" in printed.out
    assert printed.out.splitlines()[-1].startswith("6 results, 1 studies, 0 failed; ")
    answered.clear()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert answered == []
    assert len(found["records"]) == 6
    assert found["studies"] == [{"dataset": "tiny", "system": "mine"}]
    assert found["failures"] == []


def test_what_fails_is_told_at_the_end_and_loses_nothing(command, place, capsys, data_root, monkeypatch):
    text = (place / "suite.yaml").read_text()
    text = text.replace("[bm25,", "[bm52, bm25,").replace("nested/en]", "nested/en, tyni]")
    (place / "suite.yaml").write_text(text.replace("[tiny], c", "[tyni, tiny, tinny], c"))
    real = suite.load_dataset

    def breaks(name, *given):
        if name == "nested/en":
            raise RuntimeError("a bug of ours")
        return real(name, *given)

    monkeypatch.setattr(suite, "load_dataset", breaks)
    assert main(command) == 1
    printed = capsys.readouterr()
    last = printed.out.splitlines()[-5:]
    assert last[0].startswith("3 results, 1 studies, 4 failed; ")
    assert [line.split(":")[1].strip() for line in last[1:]] == ["bm52", "tyni", "nested/en", f"tinny {_spec(text)}"]
    assert "RuntimeError: a bug of ours" in last[3]
    assert printed.err.count("Traceback") == 1  # ours keeps it; what the user can fix is one line
    assert main([*command, "--set", "systems=[bm25]", "--set", "datasets=[tiny]", "--set", "studies=null"]) == 0


def _spec(text: str) -> str:
    return text.split("bm25, ")[1].split("]")[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("max_lenght: 128", "suite.yaml: unknown key max_lenght; did you mean max_length?"),
        ("studies: {budget: [4]}", "unknown key studies.budget; did you mean studies.budgets?"),
        ("studies: {controls: [emtpy]}", 'studies.controls: unknown mode "emtpy"; did you mean "empty"?'),
        ("studies: {samples: 1}", "samples is 1; expected at least 2"),
        ("studies: {dev_queries: -1}", "dev_queries is -1; expected 0 or more"),
        ("modes: [maybe]", "modes must be one of off, on, latent, given, given.shuffled, read, read+on,"),
        ("dtype: bfloat61", "did you mean bfloat16?"),
        ("datasets: []", "datasets is empty"),
        ("systems: [bm25, bm25]", "systems names bm25 twice"),
        ("max_length: 0", "max_length is 0; expected 1 or more"),
        ("budget: 0\nstudies: {}", "budget is 0; expected at least 1"),
    ],
)
def test_a_wrong_suite_is_refused_before_anything_runs(change, said, place, command, capsys):
    keys = {line.split(":")[0] for line in change.splitlines()}
    given = {"systems": "systems: [bm25]", "datasets": "datasets: [tiny]"}
    rest = [line for key, line in given.items() if key not in keys]
    (place / "suite.yaml").write_text("\n".join([*rest, change]))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (place / "results").exists()


def test_what_the_file_decides_cannot_be_given_beside_it(command, place, capsys):
    assert main([*command, "--dtype", "float32"]) == 2
    assert "--set dtype=VALUE" in (capsys.readouterr().err)
    assert main([*command, "--max-length", "9"]) == 2
    assert "--max-length" in capsys.readouterr().err
    assert main(["evaluate", "--dataset", "tiny", "--set", "dtype=float32"]) == 2
    assert "no suite" in capsys.readouterr().err
    assert main(["evaluate", "nowhere.yaml"]) == 2
    assert "no configuration file at nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_the_suites_of_the_repository_are_whole(file: Path):
    plan = load_config(file, SuitePlan)
    assert {"bm25", "all-minilm-l6-v2"} < set(plan.systems)
    assert plan.modes[0] == "off"  # what the others are compared with
    if file.stem == "sample":
        assert plan.datasets == ["cosqa.small", "scifact.small"]
        assert plan.studies is not None
        assert plan.studies.controls is None  # all of them
        assert plan.studied == [("search-r3-smollm2-135m-grpo", name) for name in plan.datasets]
        assert plan.output != Path("results")
    if file.stem == "small":
        assert all(name.endswith(".small") for name in plan.datasets)


def test_only_models_that_reason_are_studied():
    plan = SuitePlan(
        ["bm25", "b=bm25", "st:some/model", "qwen.yaml", "endpoint:m@http://x/v1", "mine=runs/x", "hub/name"],
        ["a", "b"],
    )
    assert plan.studied == []
    plan.studies = StudyPlan(datasets=["b"])
    assert plan.studied == [("mine=runs/x", "b"), ("hub/name", "b")]
    with pytest.raises(InputError, match="latency_queries is -1"):
        StudyPlan(latency_queries=-1)

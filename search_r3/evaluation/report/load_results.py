"""Everything that a report is made from, read from one folder of results; what is not there is simply empty."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.evaluation.publish.tables import load_records
from search_r3.evaluation.report.comparison import DatasetComparison, against_baseline, measure_dataset, on_against_off
from search_r3.evaluation.study.study import read_study
from search_r3.evaluation.systems import BASELINES


@dataclass(frozen=True)
class TrainingRun:
    """A kept training run: its log's steps and dev metrics, and `about.json` if there is one."""

    name: str
    steps: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    about: dict[str, Any]


@dataclass
class Results:
    """The contents of a folder of results.

    Attributes:
        records: metrics records in the order of the tables.
        baseline: the system that the others are tested against, "" where there is none.
        by_dataset: data set -> its scores query by query.
        tests: (data set, system) -> comparison with the baseline.
        pairs: reasoning on against off, a row a model and data set.
        studies: in the order of their files.
        rollouts: (name of the file below `rollouts/`, contents).
        runs: kept training runs.
        environment: (name, contents) of the benchmarks of the environment.
        trained_on: data set -> the kinds of training pairs that were made from it.
    """

    records: list[dict[str, Any]]
    baseline: str = ""
    by_dataset: dict[str, DatasetComparison] = field(default_factory=dict)
    tests: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    studies: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[tuple[str, Any]] = field(default_factory=list)
    runs: list[TrainingRun] = field(default_factory=list)
    environment: list[tuple[str, Any]] = field(default_factory=list)
    trained_on: dict[str, list[str]] = field(default_factory=dict)


def load_results(
    results: str | Path,
    baseline: str | None = None,
    data_root: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> Results:
    """Read `results`, and measure its runs again wherever their data sets are here.

    Args:
        baseline: the system that others are tested against; by default BM25, else the first of the table.
        report: called with one line a data set, which takes seconds where runs are many.

    Raises:
        InputError: there is no such folder, a file in it is damaged, or the baseline was never measured.
    """
    folder, report = Path(results), report or (lambda line: None)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of results; make one: search-r3 evaluate --help")
    records = load_records(folder) if any((folder / "metrics").rglob("*.json")) else []
    systems = list(dict.fromkeys(record["system"] for record in records))
    if baseline is not None and baseline not in systems:
        raise InputError(
            f"no results of the baseline {baseline!r}; systems in {folder}: {', '.join(systems) or 'none'}"
        )
    chosen = baseline or next((name for name in (*BASELINES, *systems) if name in systems), "")
    found = Results(records, chosen)
    for name in dict.fromkeys(record["dataset"] for record in records):
        report(f"measuring the runs on {name} again")
        found.by_dataset[name] = measure_dataset(name, [r for r in records if r["dataset"] == name], folder, data_root)
    if found.by_dataset:
        report("testing the differences")
        found.tests = against_baseline(found.by_dataset, chosen)
        found.pairs = on_against_off(found.by_dataset)
    # a study's own records stand in a folder of its name beside it
    studies = [path for path in sorted((folder / "studies").rglob("*.json")) if not _belongs_to_study(path)]
    found.studies = [read_study(path) for path in studies]
    found.rollouts = _named(folder / "rollouts")
    found.environment = [
        (path.stem, read_json(path)) for path in sorted((folder / "benchmarks").glob("environment*.json"))
    ]
    found.runs = [read_training(path) for path in sorted((folder / "training").rglob("log.jsonl"))]
    for path in sorted((folder / "training").rglob("pairs.manifest.json")):
        for source in read_json(path).get("sources", []):
            if source.get("dataset"):
                kinds = found.trained_on.setdefault(source["dataset"], [])
                kinds += [source["kind"]] if source.get("kind") not in kinds else []
    return found


def read_json(path: Path) -> Any:
    """A JSON file. Raises InputError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); make it again or delete it") from error


def read_training(path: Path) -> TrainingRun:
    """A kept run's log; a half-written last line is left out.

    Raises:
        InputError: another line is broken.
    """
    steps: list[dict[str, Any]] = []
    dev: list[dict[str, Any]] = []
    text = path.read_bytes().decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            (dev if "dev" in record else steps).append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if not line.endswith("\n"):
                continue
            raise InputError(f"{path}, line {number}: not a record of a training log ({error})") from error
    about = path.with_name("about.json")
    return TrainingRun(path.parent.name, steps, dev, read_json(about) if about.is_file() else {})


def _named(folder: Path) -> list[tuple[str, Any]]:
    files = sorted(folder.rglob("*.json"))
    return [(path.relative_to(folder).with_suffix("").as_posix(), read_json(path)) for path in files]


def _belongs_to_study(path: Path) -> bool:
    return path.parent.with_name(path.parent.name + ".json").is_file()

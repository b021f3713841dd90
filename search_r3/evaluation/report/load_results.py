"""Load everything that a report shows from one folder of results; missing parts are empty."""

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
from search_r3.training_curves import Records, read_log


@dataclass(frozen=True)
class TrainingRun:
    """A training run kept with the results: the steps and dev metrics of its log, and `about.json` if there is one."""

    name: str
    steps: Records
    dev: Records
    about: dict[str, Any]


@dataclass
class Results:
    """The contents of a folder of results.

    Attributes:
        records: metrics records in the order of the tables.
        baseline: the system that the others are tested against; "" if there are no systems.
        by_dataset: data set -> its scores for each query.
        tests: (data set, system) -> comparison with the baseline.
        pairs: with and without reasoning, one row per model and data set.
        studies: in the order of their files.
        rollouts: (name of the file below `rollouts/`, contents).
        runs: kept training runs.
        environment: (name, contents) of the benchmarks of the environment.
        query_modes: benchmarks of what each mode of a query costs (benchmarks/query_modes.py).
        trained_on: data set -> kinds of training pairs that were made from it.
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
    query_modes: list[dict[str, Any]] = field(default_factory=list)
    trained_on: dict[str, list[str]] = field(default_factory=dict)


def load_results(
    results: str | Path,
    baseline: str | None = None,
    data_root: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> Results:
    """Read `results`, and measure its runs again wherever their data sets are available.

    Args:
        baseline: the system that others are tested against; by default BM25, else the first of the table.
        report: called with one line per data set; each can take seconds.

    Raises:
        InputError: there is no such folder, a file in it is damaged, or there are no results of the baseline.
    """
    folder, report = Path(results), report or (lambda line: None)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a results folder; create one: search-r3 evaluate --help")
    records = load_records(folder) if any((folder / "metrics").rglob("*.json")) else []
    systems = list(dict.fromkeys(record["system"] for record in records))
    if baseline is not None and baseline not in systems:
        raise InputError(
            f"no results of the baseline {baseline!r}; systems in {folder}: {', '.join(systems) or 'none'}"
        )
    chosen = baseline or next((name for name in (*BASELINES, *systems) if name in systems), "")
    loaded = Results(records, chosen)
    for name in dict.fromkeys(record["dataset"] for record in records):
        report(f"measuring the runs on {name} again")
        loaded.by_dataset[name] = measure_dataset(name, [r for r in records if r["dataset"] == name], folder, data_root)
    if loaded.by_dataset:
        report("testing the differences")
        loaded.tests = against_baseline(loaded.by_dataset, chosen)
        loaded.pairs = on_against_off(loaded.by_dataset)
    # the records of a study's modes are in a folder of the same name next to it
    studies = [path for path in sorted((folder / "studies").rglob("*.json")) if not _belongs_to_study(path)]
    loaded.studies = [read_study(path) for path in studies]
    loaded.rollouts = _named(folder / "rollouts")
    loaded.environment = [
        (path.stem, read_json(path)) for path in sorted((folder / "benchmarks").glob("environment*.json"))
    ]
    loaded.query_modes = [read_json(path) for path in sorted((folder / "benchmarks").glob("query_modes*.json"))]
    loaded.runs = [read_training(path) for path in sorted((folder / "training").rglob("log.jsonl"))]
    for path in sorted((folder / "training").rglob("pairs.manifest.json")):
        for source in read_json(path).get("sources", []):
            if source.get("dataset"):
                kinds = loaded.trained_on.setdefault(source["dataset"], [])
                kinds += [source["kind"]] if source.get("kind") not in kinds else []
    return loaded


def read_json(path: Path) -> Any:
    """A JSON file. Raises InputError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); create it again or delete it") from error


def read_training(path: Path) -> TrainingRun:
    """A kept run, by the path of its log. Raises InputError if the log or `about.json` is damaged."""
    about = path.with_name("about.json")
    return TrainingRun(path.parent.name, *read_log(path), read_json(about) if about.is_file() else {})


def _named(folder: Path) -> list[tuple[str, Any]]:
    files = sorted(folder.rglob("*.json"))
    return [(path.relative_to(folder).with_suffix("").as_posix(), read_json(path)) for path in files]


def _belongs_to_study(path: Path) -> bool:
    return path.parent.with_name(path.parent.name + ".json").is_file()

"""Recompute metrics from the run files, and compare them with the metrics files and studies.

If a run's data set is available and unchanged, its measures, missing documents and comparisons are computed from the
run and the judgments. Otherwise the metrics file is used as it is and listed as unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset
from search_r3.errors import InputError
from search_r3.evaluation.measures import NDCG, Measured, measure_run
from search_r3.evaluation.publish.tables import TOLERANCE, load_records
from search_r3.evaluation.records import read_record
from search_r3.evaluation.runs import read_run
from search_r3.evaluation.study.controls import study_path
from search_r3.evaluation.study.study import families, read_study
from search_r3.evaluation.suite import VARIANT_RECORDS, dataset_hash, load_dataset, paths


@dataclass
class Check:
    """Problems to fix, and metrics that could not be recomputed because the data set is not available."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


class Rebuilder:
    """Records and studies in one folder of results, each recomputed once, on first use.

    Args:
        output: the folder that holds `runs/`, `metrics/` and `studies/`.
        data_root: where the data sets are (see `find_dataset`).
    """

    def __init__(self, output: str | Path = "results", data_root: str | Path | None = None) -> None:
        self.output, self.data_root = Path(output), data_root
        self.check = Check()
        self._datasets: dict[tuple[str, str], tuple[BeirDataset, str] | None] = {}
        self._measured: dict[Path, Measured] = {}
        self._records: list[dict[str, Any]] | None = None
        self._variants: list[dict[str, Any]] | None = None
        self._studies: dict[tuple[str, str], dict[str, Any]] = {}

    def records(self) -> list[dict[str, Any]]:
        """All metrics files in the order of the tables, except those whose run file is missing (reported as a
        problem).

        Raises:
            InputError: there are none, or one is damaged.
        """
        if self._records is None:
            rebuilt = (self._rebuild(record) for record in load_records(self.output))
            self._records = [record for record in rebuilt if record is not None]
        return self._records

    def variants(self) -> list[dict[str, Any]]:
        """The records of changed queries, in the order of their files; see `records`."""
        if self._variants is None:
            files = sorted((self.output / VARIANT_RECORDS).rglob("*.json"))
            rebuilt = (self._rebuild(read_record(path)) for path in files)
            self._variants = [record for record in rebuilt if record is not None]
        return self._variants

    def study(self, dataset: str, system: str) -> dict[str, Any]:
        """A study with its measures and comparisons recomputed; its latencies and rule are kept as written.

        Raises:
            InputError: there is no such study, or it is damaged.
        """
        if (dataset, system) not in self._studies:
            self._studies[dataset, system] = self._rebuild_study(dataset, system)
        return self._studies[dataset, system]

    def _rebuild(self, record: dict[str, Any]) -> dict[str, Any] | None:
        name, system = record["dataset"], record["system"]
        label, run = f"{name} {system}", paths(self.output, name, system).run
        if not run.is_file():
            self.check.problems.append(f"{label}: its run file {run} is missing; evaluate again")
            return None
        data = self._data(name, record["settings"], label)
        if data is None:
            return record
        measured = self._measure(run, data)
        self._compare(label, record["measures"], measured)
        return {
            **record,
            "measures": measured.mean,
            "num_missing_queries": len(measured.missing_queries),
            "num_missing_documents": len(measured.missing_documents),
        }

    def _rebuild_study(self, dataset: str, system: str) -> dict[str, Any]:
        study = read_study(study_path(self.output, dataset, system))
        data = self._data(dataset, study["settings"], f"{dataset} {system} (study)")
        if data is None:
            return study
        measured: dict[str, Measured] = {}
        for mode in study["modes"]:
            label, run = f"{dataset} {mode['system']}", paths(self.output, dataset, mode["system"]).run
            if not run.is_file():
                raise InputError(f"{label}: its run file {run} is missing; run the study again")
            measured[mode["mode"]] = self._measure(run, data)
            self._compare(label, mode["measures"], measured[mode["mode"]])
        means = {mode: one.mean for mode, one in measured.items()}
        return {
            **study,
            "modes": [{**mode, "measures": means[mode["mode"]]} for mode in study["modes"]],
            "budgets": [
                {**point, "measures": means.get(point["mode"], point["measures"])} for point in study["budgets"]
            ],
            "families": families({mode: one.per_query[NDCG] for mode, one in measured.items()}),
        }

    def _data(self, name: str, settings: Mapping[str, Any], label: str) -> BeirDataset | None:
        """The data set that a metric was computed on, or None (noted as unchecked) if it is not available."""
        key = (name, settings["split"])
        if key not in self._datasets:
            try:
                dataset = load_dataset(*key, self.data_root, allow_missing=True)
                self._datasets[key] = dataset, dataset_hash(dataset)
            except InputError:
                self._datasets[key] = None
        loaded = self._datasets[key]
        if loaded is not None and loaded[1] == settings.get("data_hash"):
            return loaded[0]
        self.check.unchecked.append(label if loaded is None else f"{label} (measured on different data)")
        return None

    def _measure(self, run: Path, data: BeirDataset) -> Measured:
        if run not in self._measured:
            self._measured[run] = measure_run(read_run(run), data.qrels, data.corpus)
        return self._measured[run]

    def _compare(self, label: str, recorded: Mapping[str, float], measured: Measured) -> None:
        for measure, value in measured.mean.items():
            if abs(value - recorded.get(measure, float("inf"))) > TOLERANCE:
                self.check.problems.append(
                    f"{label}: {measure} is {value:.6f} according to its run file, not {recorded.get(measure)}"
                )

"""Scores for each query, significance tests and examples, computed from the run files and the judgments.

A metrics file holds means only. If the data set is available (and is the one that was measured), each run is measured
again, so that differences can be tested (`significance`) and single queries can be shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.evaluation.examples import best_and_worst, read_traces
from search_r3.evaluation.measures import NDCG, measure_run
from search_r3.evaluation.publish.tables import TOLERANCE
from search_r3.evaluation.runs import read_run
from search_r3.evaluation.significance import compare_family, paired
from search_r3.evaluation.suite import dataset_hash, load_dataset, paths
from search_r3.metrics import mean, run_recall

SHOWN = 3
"""Wins and losses shown for each model, at most."""
RECALL_10 = "recall@10"
LEVEL = 0.05
"""A difference counts as significant if its corrected p-value is below this."""


@dataclass
class DatasetComparison:
    """The runs of one data set, measured again.

    Attributes:
        scores: system -> query id -> nDCG@10, for the systems that could be measured again.
        recall: system -> mean recall@10.
        examples: model -> {"best": [...], "worst": [...]}, as in a study.
        remarks: what could not be measured, or contradicts the metrics file.
    """

    dataset: str
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)
    examples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def measure_dataset(
    dataset: str, records: Sequence[Mapping[str, Any]], output: str | Path, data_root: str | Path | None = None
) -> DatasetComparison:
    """Measure the runs of one data set again, for each query.

    Args:
        records: its metrics records; those of another split than the first are left out, with a remark.
        output: the folder that holds `runs/`.
    """
    comparison, split = DatasetComparison(dataset), records[0]["settings"].get("split")
    try:
        missing = any(record.get("num_missing_documents") for record in records)
        data = load_dataset(dataset, split, data_root, missing)
    except InputError:
        comparison.remarks.append(
            f"{dataset}: data set not available, so means are shown without tests, gains or examples"
        )
        return comparison
    present, runs = dataset_hash(data), {}
    for record in records:
        system = record["system"]
        run_path = paths(output, dataset, system).run
        if record["settings"].get("split") != split:
            other = record["settings"].get("split")
            comparison.remarks.append(f"{dataset} {system}: measured on {other}, not on {split}")
        elif record["settings"].get("data_hash") != present:
            comparison.remarks.append(f"{dataset} {system}: measured on different data, so it is not tested")
        elif not run_path.is_file():
            comparison.remarks.append(f"{dataset} {system}: its run file is missing, so it is not tested")
        else:
            runs[system] = read_run(run_path)
            measured = measure_run(runs[system], data.qrels)
            comparison.scores[system] = measured.per_query[NDCG]
            comparison.recall[system] = mean(run_recall(runs[system], data.qrels, 10))
            off = abs(measured.mean[NDCG] - record["measures"].get(NDCG, float("inf")))
            if off > TOLERANCE:
                comparison.remarks.append(
                    f"{dataset} {system}: the metrics file says {record['measures'].get(NDCG)}, its run file "
                    f"{measured.mean[NDCG]:.6f}; evaluate again"
                )
    for model in models_with_both(comparison.scores):
        comparison.examples[model] = best_and_worst(
            data,
            {mode: runs[f"{model}.{mode}"] for mode in ("off", "on")},
            {mode: comparison.scores[f"{model}.{mode}"] for mode in ("off", "on")},
            _traces(output, dataset, model),
            SHOWN,
        )
    return comparison


def models_with_both(systems: Mapping[str, Any]) -> list[str]:
    """The models that have a run with reasoning off and one with it on."""
    return [name.removesuffix(".off") for name in systems if name.endswith(".off") and f"{name[:-4]}.on" in systems]


def against_baseline(datasets: Mapping[str, DatasetComparison], baseline: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Every system against the baseline on every data set that both were measured on: (data set, system) -> the
    comparison as a dictionary. Holm's correction treats all of them as one family."""
    pairs = [
        (one.dataset, system, paired(one.scores[baseline], scores))
        for one in datasets.values()
        if baseline in one.scores
        for system, scores in one.scores.items()
        if system != baseline
    ]
    compared = compare_family([differences for _, _, differences in pairs])
    return {(name, system): row.to_dict() for (name, system, _), row in zip(pairs, compared, strict=True)}


def on_against_off(datasets: Mapping[str, DatasetComparison]) -> list[dict[str, Any]]:
    """With and without reasoning for every model and data set with both runs, as one family: rows with `dataset`,
    `model`, the comparison, and `gains` (for each query, in the order of the judgments)."""
    pairs = [
        (one.dataset, model, paired(one.scores[f"{model}.off"], one.scores[f"{model}.on"]))
        for one in datasets.values()
        for model in models_with_both(one.scores)
    ]
    compared = compare_family([differences for _, _, differences in pairs])
    return [
        {"dataset": name, "model": model, "gains": differences.tolist(), **row.to_dict()}
        for (name, model, differences), row in zip(pairs, compared, strict=True)
    ]


def _traces(output: str | Path, dataset: str, model: str) -> dict[str, dict[str, Any]] | None:
    try:
        return read_traces(paths(output, dataset, f"{model}.on").reasoning)
    except (InputError, ValueError, KeyError, TypeError):
        return None  # the run is still valid without them

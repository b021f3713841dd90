"""What the run files and the judgments say together: scores query by query, who differs from whom, and examples.

A metrics file holds means only. Where the data set is here (and is the one that was measured), each run is measured
again, so that differences can be tested (`significance`) and single queries shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset
from search_r3.errors import InputError
from search_r3.evaluation.measures import NDCG, measure_run
from search_r3.evaluation.publish.tables import TOLERANCE
from search_r3.evaluation.runs import read_gzip_lines, read_run
from search_r3.evaluation.significance import compare_family, paired
from search_r3.evaluation.suite import dataset_hash, load_dataset, paths
from search_r3.metrics import Run, mean, rank_documents, run_recall

SHOWN = 3
"""Examples a side."""
SNIPPET = 240
"""Characters of a document that an example shows."""
RECALL_10 = "recall@10"
LEVEL = 0.05
"""A corrected p-value below this is called a difference."""


@dataclass
class DatasetComparison:
    """A data set through its run files.

    Attributes:
        scores: system -> query id -> nDCG@10, for the systems that could be measured again.
        recall: system -> mean recall@10.
        examples: model -> {"best": [...], "worst": [...]}, as in a study.
        remarks: what could not be done, or does not fit.
    """

    dataset: str
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)
    examples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def measure_dataset(
    dataset: str, records: Sequence[Mapping[str, Any]], output: str | Path, data_root: str | Path | None = None
) -> DatasetComparison:
    """Measure the runs of one data set again, query by query.

    Args:
        records: its metrics records; those of another split than the first are left out, with a remark.
        output: the folder that holds `runs/`.
    """
    found, split = DatasetComparison(dataset), records[0]["settings"].get("split")
    try:
        missing = any(record.get("num_missing_documents") for record in records)
        data = load_dataset(dataset, split, data_root, missing)
    except InputError:
        found.remarks.append(
            f"{dataset}: the data set is not here, so its systems' means stand without tests, gains and examples"
        )
        return found
    present, runs = dataset_hash(data), {}
    for record in records:
        system = record["system"]
        run_path = paths(output, dataset, system).run
        if record["settings"].get("split") != split:
            found.remarks.append(f"{dataset} {system}: measured on {record['settings'].get('split')}, not on {split}")
        elif record["settings"].get("data_hash") != present:
            found.remarks.append(f"{dataset} {system}: measured on other data than those here, so it is not tested")
        elif not run_path.is_file():
            found.remarks.append(f"{dataset} {system}: its run file is missing, so it is not tested")
        else:
            runs[system] = read_run(run_path)
            measured = measure_run(runs[system], data.qrels)
            found.scores[system] = measured.per_query[NDCG]
            found.recall[system] = mean(run_recall(runs[system], data.qrels, 10))
            off = abs(measured.mean[NDCG] - record["measures"].get(NDCG, float("inf")))
            if off > TOLERANCE:
                found.remarks.append(
                    f"{dataset} {system}: the metrics file says {record['measures'].get(NDCG)}, its run file "
                    f"{measured.mean[NDCG]:.6f}; evaluate again"
                )
    for model in models_with_both(found.scores):
        found.examples[model] = _examples(data, model, runs, found.scores, output)
    return found


def models_with_both(systems: Mapping[str, Any]) -> list[str]:
    """The models that have a run with reasoning off and one with it on."""
    return [name.removesuffix(".off") for name in systems if name.endswith(".off") and f"{name[:-4]}.on" in systems]


def against_baseline(datasets: Mapping[str, DatasetComparison], baseline: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Every system against the baseline on every data set that both were measured on: (data set, system) -> the
    comparison as a dictionary. All of them are one family for Holm's correction."""
    asked = [
        (one.dataset, system, paired(one.scores[baseline], scores))
        for one in datasets.values()
        if baseline in one.scores
        for system, scores in one.scores.items()
        if system != baseline
    ]
    compared = compare_family([differences for _, _, differences in asked])
    return {(name, system): row.to_dict() for (name, system, _), row in zip(asked, compared, strict=True)}


def on_against_off(datasets: Mapping[str, DatasetComparison]) -> list[dict[str, Any]]:
    """Reasoning on against off for every model and data set that has both, one family: rows with `dataset`, `model`,
    the comparison, and `gains` (query by query, in the order of the judgments)."""
    asked = [
        (one.dataset, model, paired(one.scores[f"{model}.off"], one.scores[f"{model}.on"]))
        for one in datasets.values()
        for model in models_with_both(one.scores)
    ]
    compared = compare_family([differences for _, _, differences in asked])
    return [
        {"dataset": name, "model": model, "gains": differences.tolist(), **row.to_dict()}
        for (name, model, differences), row in zip(asked, compared, strict=True)
    ]


def _examples(
    data: BeirDataset,
    model: str,
    runs: Mapping[str, Run],
    scores: Mapping[str, Mapping[str, float]],
    output: str | Path,
) -> dict[str, list[dict[str, Any]]]:
    """The queries that reasoning helped most and harmed most, in the form that a study gives its examples."""
    path = paths(output, data.name, f"{model}.on").reasoning
    try:
        written = {record["qid"]: record for record in map(json.loads, read_gzip_lines(path))}
    except (InputError, ValueError, KeyError, TypeError):
        written = {}  # the run stands without it
    gain = {qid: scores[f"{model}.on"][qid] - scores[f"{model}.off"][qid] for qid in data.qrels}

    def one(qid: str) -> dict[str, Any]:
        found: dict[str, Any] = {"qid": qid, "query": data.queries.get(qid, "")}
        found |= {"reasoning": written.get(qid, {}).get("text"), "forced": written.get(qid, {}).get("forced")}
        for mode in ("off", "on"):
            ranked, grades = rank_documents(runs[f"{model}.{mode}"].get(qid, {})), data.qrels[qid]
            found[mode] = {
                NDCG: scores[f"{model}.{mode}"][qid],
                "first_relevant": next((i for i, did in enumerate(ranked, 1) if grades.get(did, 0) > 0), None),
                "top": [
                    {"id": did, "grade": grades.get(did), "text": data.corpus[did].full_text[:SNIPPET]}
                    for did in ranked[:3]
                ],
            }
        return found

    order = sorted(gain, key=lambda qid: (-gain[qid], qid))
    return {
        "best": [one(qid) for qid in order[:SHOWN] if gain[qid] > 0],
        "worst": [one(qid) for qid in order[::-1][:SHOWN] if gain[qid] < 0],
    }

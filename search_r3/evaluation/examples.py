"""Example queries of a study or a report: those that reasoning helped and harmed most, without and with reasoning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset
from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.runs import read_gzip_lines
from search_r3.metrics import Run, rank_documents

MODES = ("off", "on")
SNIPPET = 240
"""Characters of a document that an example shows."""
TOP = 3
"""Documents that an example shows for each mode."""


def read_traces(path: Path) -> dict[str, dict[str, Any]]:
    """The reasoning traces written next to a run: query id -> record with `text` and `forced`.

    Raises:
        InputError: the file is missing or damaged.
        ValueError, KeyError, TypeError: a line is not such a record.
    """
    return {record["qid"]: record for record in map(json.loads, read_gzip_lines(path))}


def best_and_worst(
    data: BeirDataset,
    runs: Mapping[str, Run],
    scores: Mapping[str, Mapping[str, float]],
    traces: Mapping[str, Mapping[str, Any]] | None,
    count: int,
) -> dict[str, list[dict[str, Any]]]:
    """The queries whose nDCG@10 reasoning raised most ("best") and lowered most ("worst"), at most `count` of each.

    Args:
        runs, scores: the runs of modes "off" and "on", and their nDCG@10 by query id.
        traces: see `read_traces`; None where they were not kept.

    Returns:
        For each query `qid`, `query`, `reasoning` (None if not kept), `forced`, `relevant` (the best-ranked relevant
        document, with its rank in each mode; None if no run has one), and for each mode its nDCG@10, the rank of the
        first relevant document, and the top documents.
    """
    gain = {qid: scores["on"][qid] - scores["off"][qid] for qid in data.qrels}

    def example(qid: str) -> dict[str, Any]:
        trace = (traces or {}).get(qid, {})
        results = {
            mode: {NDCG: round(scores[mode][qid], 6), **_top_documents(data, qid, runs[mode].get(qid, {}))}
            for mode in MODES
        }
        return {
            "qid": qid,
            "query": data.queries.get(qid, ""),
            "reasoning": None if traces is None else trace.get("text", ""),
            "forced": trace.get("forced"),
            "relevant": _relevant(data, qid, runs),
            **results,
        }

    order = sorted(gain, key=lambda qid: (-gain[qid], qid))
    return {
        "best": [example(qid) for qid in order[:count] if gain[qid] > 0],
        "worst": [example(qid) for qid in order[::-1][:count] if gain[qid] < 0],
    }


def _top_documents(data: BeirDataset, qid: str, scores: Mapping[str, float]) -> dict[str, Any]:
    ranked, grades = rank_documents(scores), data.qrels[qid]
    first = next((rank for rank, did in enumerate(ranked, 1) if grades.get(did, 0) > 0), None)
    top = [{"id": did, "grade": grades.get(did), "text": data.corpus[did].full_text[:SNIPPET]} for did in ranked[:TOP]]
    return {"first_relevant": first, "top": top}


def _relevant(data: BeirDataset, qid: str, runs: Mapping[str, Run]) -> dict[str, Any] | None:
    """The relevant document of the best rank in either mode, the smaller id if several have it."""
    grades, ranks = data.qrels[qid], {}
    for mode in MODES:
        ranked = enumerate(rank_documents(runs[mode].get(qid, {})), 1)
        ranks[mode] = {did: rank for rank, did in ranked if grades.get(did, 0) > 0}
    best = min(((rank, did) for found in ranks.values() for did, rank in found.items()), default=None)
    if best is None:
        return None
    did = best[1]
    return {"id": did, "text": data.corpus[did].full_text[:SNIPPET], **{mode: ranks[mode].get(did) for mode in MODES}}

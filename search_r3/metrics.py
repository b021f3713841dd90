"""nDCG and recall at k in plain numpy, with the numbers of trec_eval.

Which DCG: linear gain, `sum_i rel_i / log2(i + 1)` over ranks i = 1..k (Järvelin & Kekäläinen 2002, as `ndcg_cut` of
trec_eval computes it), not the exponential gain `2^rel - 1` of web search. Grades of 0 and below gain nothing.

Which order: score descending, compared in float32 as trec_eval does. Equal scores of a run are ordered by document id,
descending, as trec_eval orders them. A matrix has no ids: of its equal scores the lower grade comes first, so that no
tie is a gain (`search_r3.ranking.graded_ranking`).

Shapes: Q queries, N documents. Tested against ir_measures (pytrec_eval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from search_r3.ranking import graded_ranking

Run = Mapping[str, Mapping[str, float]]
"""Query id -> document id -> score (higher is better)."""
Qrels = Mapping[str, Mapping[str, int]]
"""Query id -> document id -> grade (above 0 is relevant)."""


def dcg(relevance_QN: npt.ArrayLike, k: int | None = None) -> np.ndarray:
    """Discounted cumulative gain of grades in ranked order, (Q,) float64; `k=None` uses all ranks.

    A single row, (N,), gives a 0-d array.
    """
    gains = np.maximum(np.asarray(relevance_QN, dtype=np.float64), 0.0)[..., :k]
    return gains @ (1.0 / np.log2(np.arange(gains.shape[-1]) + 2.0))


def ndcg(scores_QN: npt.ArrayLike, relevance_QN: npt.ArrayLike, k: int = 10) -> np.ndarray:
    """nDCG@k of each query, (Q,) float64: DCG of the ranking over DCG of the ideal one; 0 if nothing is relevant.

    `relevance_QN` holds the grades of all N documents, so relevant documents beyond rank k count in the ideal.
    """
    relevance = _same_shape(scores_QN, relevance_QN)
    ideal = dcg(-np.sort(-relevance, axis=1), _cut(k))
    got = dcg(np.take_along_axis(relevance, graded_ranking(scores_QN, relevance), axis=1), k)
    return np.divide(got, ideal, out=np.zeros_like(got), where=ideal > 0)


def rank_documents(scores: Mapping[str, float], k: int | None = None) -> list[str]:
    """Document ids of one query from best to worst in trec_eval's order: float32 score, then id, both descending."""
    return sorted(scores, key=lambda did: (float(np.float32(scores[did])), did), reverse=True)[:k]


def run_ndcg(run: Run, qrels: Qrels, k: int = 10) -> dict[str, float]:
    """nDCG@k of every query in the qrels; a query missing from the run gets 0, one missing from the qrels is
    ignored."""
    ideal = {qid: float(dcg(sorted(grades.values(), reverse=True), _cut(k))) for qid, grades in qrels.items()}
    got = {qid: float(dcg(grades, k)) for qid, grades in _ranked_grades(run, qrels).items()}
    return {qid: got[qid] / best if best > 0 else 0.0 for qid, best in ideal.items()}


def run_recall(run: Run, qrels: Qrels, k: int = 100) -> dict[str, float]:
    """Recall at k of every query in the qrels; 0 for a query missing from the run or without relevant documents."""
    _cut(k)
    totals = {qid: sum(grade > 0 for grade in grades.values()) for qid, grades in qrels.items()}
    ranked = _ranked_grades(run, qrels)
    return {qid: sum(grade > 0 for grade in ranked[qid][:k]) / total if total else 0.0 for qid, total in totals.items()}


def mean(values: Mapping[str, float] | Sequence[float] | np.ndarray) -> float:
    """Mean over queries; 0.0 for none, so that an empty dev set does not give NaN in a log."""
    numbers = list(values.values()) if isinstance(values, Mapping) else list(values)
    return float(np.mean(numbers)) if numbers else 0.0


def _ranked_grades(run: Run, qrels: Qrels) -> dict[str, list[int]]:
    return {qid: [grades.get(did, 0) for did in rank_documents(run.get(qid, {}))] for qid, grades in qrels.items()}


def _same_shape(scores_QN: npt.ArrayLike, relevance_QN: npt.ArrayLike) -> np.ndarray:
    relevance = np.asarray(relevance_QN)
    if np.shape(scores_QN) != relevance.shape:
        raise ValueError(f"scores have shape {np.shape(scores_QN)}, relevance {relevance.shape}; they must be equal")
    return relevance


def _cut(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    return k

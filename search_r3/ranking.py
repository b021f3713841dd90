"""The common order of all searches: score descending, compared in float32, ties by smaller row number.

Every search over a matrix uses this order: the baselines, the live corpus (`environment.topk` is this order in PyTorch,
for a GPU and for shards), mining, and the metrics of a matrix. A search, a merge of shards, a reward and a metric
therefore always agree about the document at rank k. Run files have ids instead of row numbers: `metrics.rank_documents`
is their order.

Shape suffixes: Q queries or R rollouts (rows of a matrix), N documents (columns), K results.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def top_k(scores_QN: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k columns of every row, best first: scores (Q, K) float32 and columns (Q, K) int64, K = min(k, N).

    Selection by partition, then a sort of the candidates only; every column tied with the k-th score is a candidate,
    so that the result does not depend on how a partition happens to break ties. The caller must reject NaN.
    """
    rows, columns = scores_QN.shape
    k = min(k, columns)
    scores = np.empty((rows, k), dtype=np.float32)
    indices = np.empty((rows, k), dtype=np.int64)
    for row in range(rows):
        values = scores_QN[row].astype(np.float32, copy=False)
        threshold = np.partition(values, columns - k)[columns - k]
        candidates = np.flatnonzero(values >= threshold)
        best = candidates[np.argsort(-values[candidates], kind="stable")[:k]]
        scores[row], indices[row] = values[best], best
    return scores, indices


def full_ranking(scores_QN: npt.ArrayLike) -> np.ndarray:
    """All column numbers of every row from best to worst, (Q, N) int64.

    Raises:
        ValueError: the scores are not a matrix, or a score is NaN, which cannot be ordered.
    """
    scores = np.asarray(scores_QN, dtype=np.float32)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {scores.shape}; expected (queries, documents)")
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN; a ranking needs numbers")
    return np.argsort(-scores, axis=1, kind="stable")


def graded_ranking(scores_QN: npt.ArrayLike, grades_QN: npt.ArrayLike) -> np.ndarray:
    """`full_ranking` for metrics: ties go to the lower grade, (Q, N) int64.

    A metric then never benefits from a tie. In any other order, a collapsed embedding space would look perfect if the
    positives happened to come first.

    Raises:
        ValueError: as `full_ranking`.
    """
    by_grade = np.argsort(np.asarray(grades_QN), axis=1, kind="stable")
    ranked = full_ranking(np.take_along_axis(np.asarray(scores_QN, dtype=np.float32), by_grade, axis=1))
    return np.take_along_axis(by_grade, ranked, axis=1)


def rank_of_best_positive(scores_RN: npt.ArrayLike, positive_RN: npt.ArrayLike) -> np.ndarray:
    """The rank, from 1, of the first positive column of every row, (R,) int64; 0 if a row has none.

    Args:
        scores_RN: scores without NaN, compared in float32.
        positive_RN: boolean, the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    scores, positive = np.asarray(scores_RN, dtype=np.float32), np.asarray(positive_RN, dtype=bool)
    if scores.ndim != 2 or scores.shape != positive.shape:
        raise ValueError(f"scores {scores.shape} and positives {positive.shape} must be two equal matrices")
    if not scores.shape[1]:
        return np.zeros(len(scores), dtype=np.int64)
    best_R1 = np.where(positive, scores, -np.inf).max(axis=1, keepdims=True)
    tied = scores == best_R1
    first_R1 = (tied & positive).argmax(axis=1)[:, None]
    ahead = (scores > best_R1) | (tied & (np.arange(scores.shape[1]) < first_R1))
    return np.where(positive.any(axis=1), ahead.sum(axis=1) + 1, 0)

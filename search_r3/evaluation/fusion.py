"""Two ways of making one answer of several: the mean of unit embeddings, and reciprocal rank fusion of rankings.

Rank fusion is Cormack, Clarke & Buettcher 2009 (doi 10.1145/1571941.1572114) with their k = 60: a document scores the
sum over the rankings of 1 / (k + its rank). It needs no scores, so BM25 and cosines can meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from search_r3.metrics import Run, rank_documents

RRF_K = 60
DEPTH = 100


def fuse_runs(runs: Sequence[Run], depth: int = DEPTH, k: int = RRF_K) -> dict[str, dict[str, float]]:
    """Reciprocal rank fusion of the top `depth` of each run; every query of any run, at most `depth` documents each.

    Sums are exact (`math.fsum`), so a tie is a tie whatever the order of the runs.
    """
    fused: dict[str, dict[str, float]] = {}
    for qid in dict.fromkeys(qid for run in runs for qid in run):
        parts: dict[str, list[float]] = {}
        for run in runs:
            for rank, did in enumerate(rank_documents(run.get(qid, {}), depth), 1):
                parts.setdefault(did, []).append(1.0 / (k + rank))
        scores = {did: math.fsum(found) for did, found in parts.items()}
        fused[qid] = {did: scores[did] for did in rank_documents(scores, depth)}
    return fused


def fuse_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The normalised mean of several embeddings of the same queries: each (Q, D), unit rows; float32 (Q, D), unit rows.

    Where the embeddings cancel out, which no mean can mend, the first one stands.

    Raises:
        ValueError: nothing is given, or shapes differ.
    """
    if not rows or any(row.shape != rows[0].shape for row in rows):
        raise ValueError(f"expected matrices of one shape, found {[row.shape for row in rows]}")
    mean_QD = np.mean([np.asarray(row, dtype=np.float64) for row in rows], axis=0)
    norms_Q1 = np.linalg.norm(mean_QD, axis=1, keepdims=True)
    lost_Q1 = norms_Q1 < 1e-6
    unit_QD = np.where(lost_Q1, rows[0], mean_QD / np.where(lost_Q1, 1.0, norms_Q1))
    return unit_QD.astype(np.float32)

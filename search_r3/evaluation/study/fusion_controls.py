"""Fusion of several answers into one: the mean of unit embeddings, and reciprocal rank fusion of whole runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search_r3.metrics import Run, rank_documents
from search_r3.rank_fusion import DEPTH, RRF_K, reciprocal_rank_fusion


def fuse_runs(runs: Sequence[Run], depth: int = DEPTH, k: int = RRF_K) -> dict[str, dict[str, float]]:
    """Reciprocal rank fusion of the top `depth` of each run: all queries of any run, with at most `depth` documents."""
    fused: dict[str, dict[str, float]] = {}
    for qid in dict.fromkeys(qid for run in runs for qid in run):
        scores = dict(reciprocal_rank_fusion([rank_documents(run.get(qid, {}), depth) for run in runs], k))
        fused[qid] = {did: scores[did] for did in rank_documents(scores, depth)}
    return fused


def fuse_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The normalized mean of several embeddings of the same queries.

    Args:
        rows: matrices (Q, D) of unit rows.

    Returns:
        float32 (Q, D), unit rows. Where the embeddings cancel out, the row of the first matrix.

    Raises:
        ValueError: there are no matrices, or their shapes differ.
    """
    if not rows or any(row.shape != rows[0].shape for row in rows):
        raise ValueError(f"expected matrices of the same shape, got {[row.shape for row in rows]}")
    mean_QD = np.mean([np.asarray(row, dtype=np.float64) for row in rows], axis=0)
    norms_Q1 = np.linalg.norm(mean_QD, axis=1, keepdims=True)
    zero_Q1 = norms_Q1 < 1e-6
    unit_QD = np.where(zero_Q1, rows[0], mean_QD / np.where(zero_Q1, 1.0, norms_Q1))
    return unit_QD.astype(np.float32)

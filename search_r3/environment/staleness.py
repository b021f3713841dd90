"""Measures how stale the corpus is: the live vectors of a pool of documents against the same documents re-encoded.

Shape suffixes: N documents of the pool (columns), Q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.live_corpus import check_rows
from search_r3.environment.refresh_policies import candidate_rows
from search_r3.environment.rewards import dcg_scaled
from search_r3.environment.topk import top_k


@dataclass(frozen=True)
class Staleness:
    """The effect of stale vectors within a pool of documents. Recall is higher there than in the whole corpus."""

    pooled_recall: float
    """Fraction of the fresh top k that is also in the stale top k, mean over queries."""
    pooled_reward_error: float
    """|reward on stale vectors - reward on fresh ones|, mean over queries."""
    mean_age: float
    """Steps since a row was encoded, mean over the whole corpus."""


def staleness_pool(top_QK: Any, positives: Any, random_rows: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """The rows to re-encode for the evaluation: the queries' live top rows, their positives, and random others.

    Returns:
        (n,) int64, ascending and distinct. All queries share the pool, because re-encoding is the expensive part.
    """
    known = np.union1d(candidate_rows(top_QK, total), check_rows(positives, total).numpy())
    others = np.setdiff1d(np.arange(total), known, assume_unique=True)
    return np.sort(np.concatenate([known, rng.choice(others, size=min(random_rows, len(others)), replace=False)]))


def staleness(
    stale_QN: Any, fresh_QN: Any, rel_QN: Any, ages: Any, k: int = 10, reward: Callable[..., Tensor] = dcg_scaled
) -> Staleness:
    """Compare the live vectors of a pool with the same rows re-encoded.

        recall = mean_q |top_k(stale_q) & top_k(fresh_q)| / K,    error = mean_q |reward(stale_q) - reward(fresh_q)|

    Args:
        stale_QN: cosines of fixed queries with the live vectors of the pool, columns in ascending row order. In both
            matrices the queries are embedded with the current weights, so that only the documents' age differs.
        fresh_QN: cosines of the same queries with the re-encoded pool.
        rel_QN: grades; every positive of a query must be in the pool.
        ages: ages of all rows of the corpus, not only of the pool (`corpus.ages(step)`).
        k: rank cutoff; K = min(k, N).
        reward: a function (cosines, grades, k=k) -> (Q,).

    Raises:
        ValueError: shapes differ, a value is NaN, or there are no queries, documents or ages.
    """
    stale_QN, fresh_QN = torch.as_tensor(stale_QN), torch.as_tensor(fresh_QN)
    if stale_QN.shape != fresh_QN.shape or stale_QN.dim() != 2 or stale_QN.numel() == 0:
        raise ValueError(
            f"stale cosines have the shape {tuple(stale_QN.shape)}, fresh ones {tuple(fresh_QN.shape)}; "
            "expected two equal (queries, documents) matrices that are not empty"
        )
    age_N = torch.as_tensor(ages, dtype=torch.float64)
    if age_N.numel() == 0:
        raise ValueError("the staleness evaluation needs the ages of the corpus's rows, got none")
    # The rewards check for NaN, so they come first.
    error_Q = (reward(stale_QN, rel_QN, k=k).double() - reward(fresh_QN, rel_QN, k=k).double()).abs()
    kept_QN = _in_top_k(stale_QN, k) & _in_top_k(fresh_QN, k)
    recall_Q = kept_QN.sum(dim=1).double() / min(k, stale_QN.shape[1])
    return Staleness(float(recall_Q.mean()), float(error_Q.mean()), float(age_N.mean()))


def _in_top_k(scores_QN: Tensor, k: int) -> Tensor:
    """A mask that is True for each query's top k."""
    return torch.zeros_like(scores_QN, dtype=torch.bool).scatter_(1, top_k(scores_QN, k)[1], True)

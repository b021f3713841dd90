"""Pairs grouped by topic, so that a batch's own documents are hard negatives of each other at no cost.

Topic-aware sampling (TAS-B, Hofstatter et al. 2021, arXiv 2104.06967) draws each batch from one cluster of queries. Our
topics halve the pairs along their widest direction again and again, so that all are of a size.
"""

from __future__ import annotations

import numpy as np

POWER_STEPS = 8
"""Multiplications by the covariance that find a group's widest direction nearly enough."""


def halve_into_topics(rows_ND: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """A topic's number for each row: (N,) int64, from 0 up.

    Every topic has at most `size` rows and, if there are more than that in all, at least half as many, less one.

    Args:
        rows_ND: embeddings of the pairs, any scale.
        size: rows of a topic at most, 1 or more.
        seed: of the first guess at each direction.
    """
    if size < 1:
        raise ValueError(f"a topic must hold 1 row or more, not {size}")
    topic_N = np.zeros(len(rows_ND), dtype=np.int64)
    waiting = [np.arange(len(rows_ND))]
    done = 0
    while waiting:
        group = waiting.pop()
        if len(group) > size:
            along = rows_ND[group] @ _widest(rows_ND[group], seed)
            order = group[np.argsort(along, kind="stable")]
            waiting += [order[len(order) // 2 :], order[: len(order) // 2]]
        else:
            topic_N[group] = done
            done += 1
    return topic_N


def _widest(rows_ND: np.ndarray, seed: int) -> np.ndarray:
    """The first principal direction, (D,), by power iteration."""
    centred_ND = rows_ND - rows_ND.mean(0)
    direction_D = np.random.default_rng([seed, len(rows_ND)]).standard_normal(rows_ND.shape[1])
    for _ in range(POWER_STEPS):
        direction_D = centred_ND.T @ (centred_ND @ direction_D)
        direction_D = direction_D / max(float(np.linalg.norm(direction_D)), 1e-12)
    return np.asarray(direction_D)

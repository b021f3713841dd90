"""Groups pairs by topic, so that the documents of a batch are hard negatives of each other at no cost.

Topic-aware sampling (TAS-B, Hofstatter et al. 2021, arXiv 2104.06967) draws each batch from one cluster of queries.
Here, topics result from repeatedly halving the pairs along their direction of largest variance, so all have similar
sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search_r3.data.mining.teacher import TeacherRows
from search_r3.data.pairs import TrainingPair
from search_r3.training.sft.sft_config import SFTConfig

POWER_STEPS = 8
"""Number of power iterations that approximate a group's first principal direction."""


def halve_into_topics(rows_ND: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """The topic of each row: (N,) int64, numbered from 0.

    A topic has at most `size` rows and, unless there is only one topic, at least about half that many.

    Args:
        rows_ND: embeddings of the pairs, at any scale.
        size: the maximum number of rows in a topic, 1 or more.
        seed: seed of the initial guess for each direction.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"a topic must have 1 row or more, got {size}")
    topic_N = np.zeros(len(rows_ND), dtype=np.int64)
    waiting = [np.arange(len(rows_ND))]
    done = 0
    while waiting:
        group = waiting.pop()
        if len(group) > size:
            along = rows_ND[group] @ _principal_direction(rows_ND[group], seed)
            order = group[np.argsort(along, kind="stable")]
            waiting += [order[len(order) // 2 :], order[: len(order) // 2]]
        else:
            topic_N[group] = done
            done += 1
    return topic_N


def _principal_direction(rows_ND: np.ndarray, seed: int) -> np.ndarray:
    """The first principal direction, (D,), by power iteration."""
    centered_ND = rows_ND - rows_ND.mean(0)
    direction_D = np.random.default_rng([seed, len(rows_ND)]).standard_normal(rows_ND.shape[1])
    for _ in range(POWER_STEPS):
        direction_D = centered_ND.T @ (centered_ND @ direction_D)
        direction_D = direction_D / max(float(np.linalg.norm(direction_D)), 1e-12)
    return np.asarray(direction_D)


def topics_of(pairs: Sequence[TrainingPair], config: SFTConfig, teacher: TeacherRows) -> list[int]:
    """The topic of each pair within its source, by the teacher's embeddings of query and document together."""
    rows_ND = teacher.queries([pair.query for pair in pairs]) + teacher.documents([pair.positive for pair in pairs])
    topic_N = np.zeros(len(pairs), dtype=np.int64)
    for source in {pair.source for pair in pairs}:
        chosen = np.array([i for i, pair in enumerate(pairs) if pair.source == source])
        size = config.topic_batches * config.global_batch_size
        topic_N[chosen] = halve_into_topics(rows_ND[chosen], size, config.loop.seed)
    return topic_N.tolist()

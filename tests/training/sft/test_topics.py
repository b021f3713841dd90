from __future__ import annotations

import numpy as np
import pytest

from search_r3.data.pairs import TrainingPair
from search_r3.training.sft.batch_sampler import BatchSampler
from search_r3.training.sft.topics import halve_into_topics


def clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four tight clouds of 16 points each, shuffled: rows, and which cloud each is of."""
    rng = np.random.default_rng(seed)
    cloud_N = rng.permutation(np.repeat(np.arange(4), 16))
    centres = 10 * np.array([[1, 0, 0], [-1, 0.2, 0], [0.1, 1, 0], [0, -1.2, 0.3]])
    return centres[cloud_N] + rng.standard_normal((64, 3)), cloud_N


def test_what_is_alike_is_one_topic() -> None:
    rows, cloud_N = clusters()
    topic_N = halve_into_topics(rows, 16)
    assert sorted(np.bincount(topic_N)) == [16] * 4
    assert all(len(set(cloud_N[topic_N == topic])) == 1 for topic in range(4))


@pytest.mark.parametrize(("rows", "size"), [(100, 7), (33, 32), (5, 100), (64, 1)])
def test_topics_are_of_a_size(rows: int, size: int) -> None:
    counts = np.bincount(halve_into_topics(np.random.default_rng(1).standard_normal((rows, 8)), size))
    assert counts.sum() == rows
    assert counts.max() <= size
    assert counts.min() >= min(rows, size) // 2


def test_equal_rows_and_the_same_seed_give_the_same_topics() -> None:
    assert np.bincount(halve_into_topics(np.ones((10, 4)), 5)).tolist() == [5, 5]
    rows, _ = clusters()
    assert (halve_into_topics(rows, 9, 3) == halve_into_topics(rows, 9, 3)).all()


def test_batches_hold_one_topic_and_an_epoch_still_gives_every_pair() -> None:
    pairs = [TrainingPair(f"p{i}", f"q{i}", f"d{i}", source="s") for i in range(64)]
    topic = [i * 7 % 4 for i in range(64)]
    sampler = BatchSampler(pairs, 8, 0, True, topics=topic, lengths=[i % 5 for i in range(64)], bucket=2)
    batches = [sampler.batch(i) for i in range(sampler.per_epoch)]
    assert sorted(pair.id for batch in batches for pair in batch) == sorted(pair.id for pair in pairs)
    assert all(len({topic[int(pair.id[1:])] for pair in batch}) == 1 for batch in batches)
    assert [sampler.batch(i) for i in range(8, 16)] != batches  # another epoch mixes a topic's pairs anew
    with pytest.raises(ValueError, match="topics for 64 pairs"):
        BatchSampler(pairs, 8, 0, True, topics=[1])

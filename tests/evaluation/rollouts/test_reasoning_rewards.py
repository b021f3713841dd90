"""What rollouts earn is what the whole ranking gives, ties and lost documents included; comparisons are paired."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3 import metrics
from search_r3.environment.rewards import MISSING_TOKEN_REWARD
from search_r3.evaluation.rollouts import reasoning_rewards
from search_r3.evaluation.rollouts.reasoning_rewards import (
    EDGES,
    METRICS,
    EmbeddingRewards,
    compare,
    per_query,
    score_embeddings,
    summarize,
)
from search_r3.evaluation.significance import bootstrap_interval, randomization_test

RNG = np.random.default_rng(0)


def unit(*shape: int) -> np.ndarray:
    rows = RNG.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def of(scaled: list[float], plain: list[float]) -> EmbeddingRewards:
    rewards = {"dcg_scaled": np.array(scaled, np.float32), "dcg": np.array(plain, np.float32)}
    return EmbeddingRewards(rewards, np.ones(len(scaled), np.int64))


@pytest.fixture
def few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts are judged two at a time, so that chunks are tested too."""
    monkeypatch.setattr(reasoning_rewards, "_CELLS", 80)


def test_rewards_and_ranks_are_those_of_the_whole_ranking(few_cells: None) -> None:
    documents, queries, number = unit(40, 8), unit(7, 8), [0, 0, 0, 1, 1, 2, 2]
    grades = [{3: 2, 11: 1}, {0: 1, 5: 0}, {39: 1, 1: 3, 20: -1}]
    found = score_embeddings(queries, number, grades, documents, k=10)
    relevance = np.zeros((7, 40))
    for line, query in enumerate(number):
        for row, grade in grades[query].items():
            relevance[line, row] = max(grade, 0)
    cosines = queries @ documents.T
    np.testing.assert_allclose(found.rewards["dcg"], metrics.ndcg(cosines, relevance, 10), atol=1e-6)
    assert (found.rewards["dcg_scaled"] <= found.rewards["dcg"] + 1e-6).all()
    order = np.argsort(-cosines, axis=1)
    expected = [1 + min(i for i, row in enumerate(order[line]) if relevance[line, row] > 0) for line in range(7)]
    assert found.rank_R.tolist() == expected
    assert max(expected) > 10  # a rank is told beyond the top k too


def test_of_equal_cosines_a_search_ranks_the_smaller_row_first_and_a_reward_the_lower_grade() -> None:
    same = np.tile(unit(1, 8), (5, 1))
    found = score_embeddings(same[:2], [0, 1], [{1: 1}, {4: 1}], same, k=3)
    assert found.rank_R.tolist() == [2, 5]
    assert found.rewards["dcg"] == pytest.approx([0.0, 0.0])


def test_an_empty_document_counts_in_the_ideal_and_is_never_found() -> None:
    documents = np.eye(3, dtype=np.float32)
    found = score_embeddings(documents[:2], [0, 1], [{0: 1}, {}], documents, k=10, unfindable_Q=[[1], [2]])
    half = 1 / (1 + 1 / np.log2(3))  # one of two positives, at rank 1
    assert found.rewards["dcg"] == pytest.approx([half, 0.0])
    assert found.rank_R.tolist() == [1, 0]


def test_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 embeddings and 1 query indices"):
        score_embeddings(unit(2, 4), [0], [{0: 1}], unit(3, 4))


def test_every_query_gets_the_mean_of_its_samples_with_and_without_the_penalty() -> None:
    sampled = of([0.2, 0.4, 0.9, 0.7], [0.3, 0.5, 1.0, 0.8])
    rows = per_query(sampled, [True, False, True, True], [3, 8, 4, 6], of([0.1, 0.9], [0.2, 1.0]), of([0, 1], [0, 1]))
    assert rows["sampled.dcg_scaled"] == pytest.approx([0.3, 0.8])
    assert rows["penalized.dcg_scaled"] == pytest.approx([(0.2 + MISSING_TOKEN_REWARD) / 2, 0.8])
    assert rows["penalized.dcg"] == pytest.approx([(0.3 + MISSING_TOKEN_REWARD) / 2, 0.9])
    assert rows["greedy.dcg_scaled"] == pytest.approx([0.1, 0.9])
    assert rows["sampled.emission"] == [0.5, 1.0]
    assert rows["sampled.tokens"] == [5.5, 5.0]
    assert set(METRICS) <= rows.keys()


def test_shares_above_half_and_histograms_count_every_rollout() -> None:
    sampled = of([0.5, 0.51, 0.9, 0.0], [0.5, 0.6, 1.0, 0.0])
    metrics, counts = summarize(sampled, [True, True, False, True], of([0.2, 0.6], [1, 1]), of([0, 1], [0, 1]))
    assert metrics["sampled.dcg_scaled"]["share_above_half"] == 0.5  # 0.5 itself is not above it
    assert metrics["penalized.dcg_scaled"]["share_above_half"] == 0.25
    assert metrics["greedy.dcg"]["share_above_half"] == 1.0
    assert (EDGES[0], EDGES[10], EDGES[-1]) == (MISSING_TOKEN_REWARD, 0.0, 1.0)
    for name in METRICS:
        assert sum(counts[name]) == (4 if name.startswith(("sampled", "penalized")) else 2)
    assert counts["penalized.dcg_scaled"][0] == 1  # the missing token
    assert counts["sampled.dcg"][-1] == 1  # 1.0 is in the last bin


def test_a_comparison_is_paired_by_query_and_corrected_over_the_figures() -> None:
    before = {name: RNG.random(30).tolist() for name in METRICS}
    after = {name: (np.array(row) + 0.02 + RNG.normal(0, 0.05, 30)).tolist() for name, row in before.items()}
    found, differences = compare(before, after, seed=3)
    for name in METRICS:
        row = np.array(after[name]) - np.array(before[name])
        assert differences[name] == pytest.approx(row, abs=1e-6)
        assert found[name].difference == pytest.approx(row.mean())
        interval = bootstrap_interval(row, seed=3, method="percentile", resamples=10_000)
        assert (found[name].low, found[name].high) == interval
        assert found[name].p == randomization_test(row, seed=3)
        assert found[name].p_corrected >= found[name].p
        assert found[name].wins == int((row > 1e-9).sum())
    assert compare(before, before)[0][METRICS[0]].to_dict()["p"] == 1.0

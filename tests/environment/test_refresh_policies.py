"""Refresh policies: what they take, in which order, and never what is fresh; and how staleness is evaluated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.refresh_policies import complete_settings, refresh_policy
from search_r3.environment.rewards import ndcg
from search_r3.environment.staleness import staleness, staleness_pool
from search_r3.errors import InputError

ROWS = 20
VECTORS = torch.nn.functional.normalize(torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.fixture
def corpus() -> LiveCorpus:
    return LiveCorpus.from_vectors(VECTORS)


@pytest.fixture
def graph() -> NeighborGraph:
    """0 - 10 - 12, 1 - 11, 5 - 13."""
    graph = NeighborGraph(ROWS, width=2, links=1)
    for row, near in {0: [10], 10: [12, 0], 12: [10], 1: [11], 11: [1], 5: [13], 13: [5]}.items():
        graph.ids_NM[row, : len(near)] = near
    return graph


def choose(config: dict[str, Any], corpus, graph, *, positives=(0, 1), candidates=((5, 6), (7, 5)), step=3, seed=0):
    policy = refresh_policy(config)
    return policy.choose(positives, candidates, step, corpus, graph, np.random.default_rng(seed)).tolist()


def test_selective_takes_positives_candidates_by_rank_and_neighbors_of_positives(corpus, graph):
    assert choose({}, corpus, graph) == [0, 1, 5, 7, 6, 10, 11]
    assert choose({"hops": 2}, corpus, graph) == [0, 1, 5, 7, 6, 10, 11, 12]
    assert choose({"candidate_neighbors": True}, corpus, graph) == [0, 1, 5, 7, 6, 10, 11, 13]
    assert choose({"hops": 0}, corpus, None) == [0, 1, 5, 7, 6]
    assert choose({}, corpus, graph, candidates=[[-1, 6], [6, -1]]) == [0, 1, 6, 10, 11]
    assert choose({}, corpus, graph, candidates=torch.tensor([[6, 4]])) == [0, 1, 6, 4, 10, 11]
    assert choose({}, corpus, graph, positives=[], candidates=[]) == []


def test_selective_puts_positives_first_then_the_stalest_and_keeps_to_its_budget(corpus, graph):
    corpus.update([5, 0], VECTORS[[5, 0]], step=1)
    corpus.update([10, 7], VECTORS[[10, 7]], step=2)
    by_age = {"first_ranks": 0}
    assert choose(by_age, corpus, graph) == [1, 0, 6, 11, 5, 7, 10]
    for budget in range(1, 9):
        assert choose({"budget": budget, "first_ranks": 0}, corpus, graph) == [1, 0, 6, 11, 5, 7, 10][:budget]
    flat = [5, 7, 6, 5]  # without ranks there are no first ones
    assert choose({}, corpus, graph, candidates=flat) == choose(by_age, corpus, graph)


def test_selective_takes_what_the_reward_looks_at_before_what_is_only_stale(corpus, graph):
    corpus.update([5, 0], VECTORS[[5, 0]], step=1)
    corpus.update([10, 7], VECTORS[[10, 7]], step=2)
    assert choose({"first_ranks": 1}, corpus, graph) == [1, 0, 5, 7, 6, 11, 10]
    assert choose({"first_ranks": 2}, corpus, graph) == [1, 0, 6, 5, 7, 11, 10]
    assert choose({"first_ranks": 1, "budget": 3}, corpus, graph) == [1, 0, 5]
    assert choose({"first_ranks": 1}, corpus, graph, candidates=torch.tensor([[-1, 6], [5, 7]]))[:3] == [
        1,
        0,
        5,
    ]


def test_nothing_fresh_is_chosen_again_by_any_policy(corpus, graph):
    fresh = [0, 5, 10, 19]
    corpus.update(fresh, VECTORS[fresh], step=3)
    assert choose({}, corpus, graph) == [1, 7, 6, 11]
    for config in ({"policy": "random", "budget": 100}, {"policy": "full", "every": 3}):
        assert sorted(choose(config, corpus, None)) == [row for row in range(ROWS) if row not in fresh]
    corpus.update(range(ROWS), VECTORS, step=4)
    for config in ({"policy": "selective"}, {"policy": "random"}, {"policy": "full", "every": 1}, {"policy": "none"}):
        assert choose(config, corpus, graph, step=4) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data(), budget=st.integers(1, 25), hops=st.integers(0, 3), wide=st.booleans(), ranks=st.integers(0, 3))
def test_selective_is_distinct_within_budget_and_leaves_no_positive_for_another(data, budget, hops, wide, ranks):
    corpus = LiveCorpus.from_vectors(VECTORS)
    graph = NeighborGraph.build(corpus, width=4, links=2)
    rows = st.lists(st.integers(0, ROWS - 1), max_size=8)
    positives, candidates, fresh = data.draw(rows), data.draw(rows), sorted(set(data.draw(rows)))
    corpus.update(fresh, VECTORS[fresh], step=2)
    config = {"budget": budget, "hops": hops, "candidate_neighbors": wide, "first_ranks": ranks}
    given = [candidates[:4], candidates[4:]] if len(candidates) == 8 else candidates
    chosen = choose(config, corpus, graph, positives=positives, candidates=given, step=2)
    start = set(positives) | set(candidates) if wide else set(positives)
    allowed = set(positives) | set(candidates) | set(graph.neighbors(sorted(start), hops).tolist())
    assert len(set(chosen)) == len(chosen) == min(budget, len(allowed - set(fresh)))
    assert set(chosen) <= allowed - set(fresh)
    urgent = set(positives) - set(fresh)
    assert set(chosen[: len(urgent)]) <= urgent
    assert len(set(chosen) & urgent) == min(budget, len(urgent))


def test_random_draws_its_budget_evenly_and_from_its_generator_alone(corpus):
    config = {"policy": "random", "budget": 5}
    draws = [choose(config, corpus, None, seed=seed) for seed in range(400)]
    assert all(len(set(draw)) == 5 for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=ROWS)
    assert abs(counts - 100).max() < 50  # 100 expected, standard deviation 8.7
    assert choose(config, corpus, None, seed=7) == draws[7]


def test_full_takes_everything_at_its_steps_and_none_never(corpus):
    config = {"policy": "full", "every": 4}
    assert [len(choose(config, corpus, None, step=step)) for step in range(1, 9)] == [0, 0, 0, 20, 0, 0, 0, 20]
    assert [len(choose({"policy": "none"}, corpus, None, step=step)) for step in range(9)] == [0] * 9


def test_wrong_settings_are_refused_with_the_nearest_name(corpus):
    with pytest.raises(InputError, match="did you mean 'selective'"):
        complete_settings({"policy": "selectiv"})
    with pytest.raises(InputError, match="choose one of: selective, random, full, none"):
        complete_settings({"policy": "x"})
    with pytest.raises(InputError, match=r"policy full has no parameter 'budget' \(it has every\)"):
        complete_settings({"policy": "full", "budget": 3})
    for policy, wrong in (("random", "budget"), ("selective", "hops"), ("full", "every"), ("selective", "first_ranks")):
        with pytest.raises(InputError, match=f"{wrong} must be"):
            complete_settings({"policy": policy, wrong: -1})
        with pytest.raises(InputError, match=f"{wrong} must be int, got '9'"):
            complete_settings({"policy": policy, wrong: "9"})
    with pytest.raises(ValueError, match="a graph is needed"):
        choose({}, corpus, None)
    with pytest.raises(ValueError, match="no row 20"):
        choose({}, corpus, None, positives=[20])


def test_the_gauge_sees_what_staleness_costs():
    fresh = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.2, 0.9, 0.8, 0.1]])
    stale = torch.tensor([[0.9, 0.1, 0.8, 0.0], [0.2, 0.9, 0.8, 0.1]])  # query 0 has documents 1 and 2 swapped
    rel = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]])
    found = staleness(stale, fresh, rel, [0, 2, 4], k=2)
    assert found.pooled_recall == pytest.approx((0.5 + 1.0) / 2)
    assert found.pooled_reward_error == pytest.approx(0.8 / math.log2(3) / 2)
    assert found.mean_age == 2.0
    assert staleness(stale, fresh, rel, [0], k=2, reward=ndcg).pooled_reward_error == pytest.approx(0.5 / math.log2(3))
    same = staleness(fresh, fresh, rel, torch.zeros(5, dtype=torch.int64))
    assert (same.pooled_recall, same.pooled_reward_error, same.mean_age) == (1.0, 0.0, 0.0)
    # The error is of each query: gains and losses must not cancel.
    both = torch.cat([stale, fresh]), torch.cat([fresh, stale]), torch.cat([rel, rel])
    assert staleness(*both, [0], k=2).pooled_reward_error == pytest.approx(found.pooled_reward_error)


def test_the_gauge_refuses_what_it_cannot_measure():
    scores, rel = torch.zeros(2, 3), torch.zeros(2, 3)
    for bad in ((scores, scores[:1]), (scores[:0], scores[:0]), (scores[:, :0], scores[:, :0]), (scores[0], scores[0])):
        with pytest.raises(ValueError, match="two equal"):
            staleness(*bad, rel, [1])
    with pytest.raises(ValueError, match="NaN"):
        staleness(scores * torch.nan, scores, rel, [1])
    with pytest.raises(ValueError, match="ages"):
        staleness(scores, scores, rel, [])


def test_the_gauges_pool_holds_top_rows_positives_and_others_once_each():
    pool = staleness_pool(torch.tensor([[3, 4], [4, 9]]), [9, 7], 5, ROWS, np.random.default_rng(0))
    assert {3, 4, 7, 9} < set(pool.tolist())
    assert len(pool) == 9
    assert (np.diff(pool) > 0).all()
    assert staleness_pool([[3]], [], 99, ROWS, np.random.default_rng(0)).tolist() == list(range(ROWS))

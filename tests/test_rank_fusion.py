"""Fusing lists: the formulas, against independent computations; and that no list is lost by it."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3.rank_fusion import (
    VECTOR_WEIGHT,
    distribution_based,
    fuse,
    fuse_scores,
    reciprocal_rank_fusion,
    relative_scores,
)


def test_reciprocal_rank_fusion_follows_the_formula_and_orders_ties_by_id():
    fused = reciprocal_rank_fusion([["b", "a", "c"], ["a", "b"]])
    assert fused == [("a", 1 / 62 + 1 / 61), ("b", 1 / 61 + 1 / 62), ("c", 1 / 63)]


@pytest.mark.parametrize("matched", [30, 100, 150])
@pytest.mark.parametrize("weight", [0.0, 0.3, VECTOR_WEIGHT, 1.0])
def test_score_fusion_is_the_weighted_sum_of_what_numpy_normalizes(matched, weight):
    rng = np.random.default_rng(matched)
    cosines = {f"d{i}": float(c) for i, c in enumerate(np.sort(rng.normal(0.1, 0.2, 120))[::-1])}
    bm25 = {f"d{i}": float(s) for i, s in zip(rng.permutation(200)[:matched], rng.gamma(2, 3, matched), strict=True)}

    def normalized(scores, padding, least):
        best = np.sort(np.append(list(scores.values()), np.zeros(padding)))[::-1][:100]
        scale = 10 * max(best.std(), least)
        values = np.array([scores.get(f"d{i}", -np.inf) for i in range(200)])
        return np.clip(1 - (best[0] - np.maximum(values, best[-1])) / scale, 0, 1)

    expected = weight * normalized(cosines, 0, 0.01) + (1 - weight) * normalized(bm25, max(0, 100 - matched), 0)
    fused = fuse_scores(cosines, bm25, weight)
    assert {key for key, _ in fused} == cosines.keys() | bm25.keys()
    assert dict(fused) == pytest.approx({key: expected[int(key[1:])] for key, _ in fused})
    scores = [score for _, score in fused]
    assert scores == sorted(scores, reverse=True)
    assert 0 <= min(scores) <= max(scores) <= 1


@pytest.mark.parametrize(
    ("cosines", "bm25", "order", "best"),
    [
        ({"a": 0.5}, {"a": 3.0}, ["a"], 1.0),  # one hit in each
        ({"a": 0.5}, {}, ["a"], VECTOR_WEIGHT),  # no text shares a word with the query
        ({}, {"a": 2.0, "b": 3.0}, ["b", "a"], 1 - VECTOR_WEIGHT),
        ({}, {}, [], None),
        ({"b": 0.5, "a": 0.5, "c": 0.5}, {"a": 1.0, "c": 1.0, "b": 1.0}, ["a", "b", "c"], 1.0),  # all equal
        ({"a": -0.2, "b": -0.6}, {"b": 1.0}, ["a", "b"], None),  # negative cosines
        ({"a": 0.80001, "b": 0.8}, {"b": 7.0}, ["b", "a"], None),  # a hair's breadth of a cosine decides nothing
        ({f"d{i:03d}": 0.5 for i in range(150)}, {"d140": 9.0, "x": 9.0}, ["d140", "x", "d000"], None),
        ({"a": 0.9, "b": 0.1}, {f"d{i:03d}": 4.0 for i in range(150)}, ["a"], None),  # one word that is everywhere
    ],
)
def test_short_and_equal_lists(cosines, bm25, order, best):
    fused = fuse_scores(cosines, bm25)
    assert [key for key, _ in fused][: len(order)] == order
    assert all(0 <= score <= 1 for _, score in fused)
    assert best is None or fused[0][1] == pytest.approx(best)


@pytest.mark.parametrize(
    ("vector", "text", "ranks_fail"),
    [(0.9, 0.1, True), (0.7, 0.3, False), (0.5, 0.5, False), (0.4, 0.7, False), (0.25, 0.9, True)],
)
def test_fusion_is_never_far_below_the_better_of_two_lists(vector, text, ranks_fail):
    """How often the right one of 100 texts is among the first three, when each list finds it with its own power.

    Reciprocal ranks keep to the same bound only where no list is much worse than the other.
    """
    rng = np.random.default_rng(0)
    found = {"vector": 0, "text": 0, "linear": 0, "ranks": 0}
    for _ in range(200):
        lists = {}
        for name, power, scale in (("vector", vector, 0.05), ("text", text, 4.0)):
            scores = rng.normal(size=100)
            scores[0] += 5 * power
            lists[name] = {str(i): float(scale * (4 + scores[i])) for i in np.argsort(-scores)}
            found[name] += "0" in list(lists[name])[:3]
        found["linear"] += "0" in dict(fuse_scores(lists["vector"], lists["text"])[:3])
        found["ranks"] += "0" in dict(reciprocal_rank_fusion([list(scores) for scores in lists.values()])[:3])
    least = 0.8 * max(found["vector"], found["text"])
    assert found["linear"] >= least
    assert (found["ranks"] < least) == ranks_fail


def random_lists(seed=0):
    rng = np.random.default_rng(seed)
    cosines = {f"d{i}": float(c) for i, c in enumerate(rng.normal(0.4, 0.1, 60))}
    bm25 = {f"d{i}": float(s) for i, s in zip(rng.permutation(90)[:50], rng.gamma(2, 3, 50), strict=True)}
    return cosines, bm25


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_dbsf_and_rsf_follow_their_formulas(weight):
    lists = random_lists()

    def dbsf(values):
        return np.clip((values - values.mean() + 3 * values.std()) / (6 * values.std()), 0, 1)

    def rsf(values):
        return (values - values.min()) / np.ptp(values)

    for method, normalize in (("dbsf", dbsf), ("rsf", rsf)):
        normalized = [dict(zip(scores, normalize(np.array([*scores.values()])), strict=True)) for scores in lists]
        expected = {
            key: weight * normalized[0].get(key, 0) + (1 - weight) * normalized[1].get(key, 0)
            for key in {**lists[0], **lists[1]}
        }
        fused = fuse(method, *lists, weight)
        assert dict(fused) == pytest.approx(expected)
        assert [score for _, score in fused] == sorted((score for _, score in fused), reverse=True)


@pytest.mark.slow
def test_dbsf_and_rsf_are_those_of_mteb():
    wrappers = pytest.importorskip("mteb.models.hybrid_wrappers", reason="mteb is not installed")
    lists = random_lists(1)
    for method, theirs in (("dbsf", wrappers.fuse_dbsf), ("rsf", wrappers.fuse_relative_score_fusion)):
        assert dict(fuse(method, *lists, 0.7)) == pytest.approx(dict(theirs(lists, [0.7, 0.3])))


def test_equal_scores_and_empty_lists_have_a_middle_and_no_score():
    for normalize in (distribution_based, relative_scores):
        assert normalize({"a": 2.0, "b": 2.0}) == {"a": 0.5, "b": 0.5}
        assert normalize({"a": -1.0}) == {"a": 0.5}
        assert normalize({}) == {}
    for method in ("linear", "dbsf", "rsf", "rrf"):
        assert fuse(method, {}, {}) == []
        assert [key for key, _ in fuse(method, {"b": 0.5, "a": 0.5}, {})] == ["a", "b"]


@pytest.mark.parametrize("method", ["linear", "dbsf", "rsf"])
def test_the_scores_of_the_best_do_not_depend_on_the_length_of_the_lists(method):
    rng = np.random.default_rng(2)
    lists = [{f"d{i}": float(s) for i, s in enumerate(rng.gamma(2, 3, 300))} for _ in range(2)]
    best = [dict(sorted(scores.items(), key=lambda item: -item[1])[:100]) for scores in lists]
    short, long = (dict(fuse(method, *some)) for some in (best, lists))
    assert {key: long[key] for key in short} == pytest.approx(short)


def test_linear_and_rrf_are_what_they_were_by_name():
    lists = random_lists(3)
    assert fuse("linear", *lists, 0.4) == fuse_scores(*lists, 0.4)
    order = [sorted(scores, key=lambda key: -scores[key]) for scores in lists]
    assert fuse("rrf", *lists) == reciprocal_rank_fusion(order)

"""How hybrid searches are fused: features of a query, a weight by query, and the record that an index keeps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from search_r3.hybrid_fusion import DEFAULT_FUSION, FEATURES, HybridFusion, WeightRule, query_features
from search_r3.model.adaptive_reasoning import score_features
from search_r3.rank_fusion import fuse, fuse_scores

COUNT = len(FEATURES)


def rule(bias=0.0, **more):
    ones = dict.fromkeys(FEATURES, 0.0) | more
    return WeightRule(tuple(ones.values()), (0.0,) * COUNT, (1.0,) * COUNT, bias, 0.2, 0.8)


def named(*arguments):
    return dict(zip(FEATURES, query_features(*arguments), strict=True))


def test_features_of_a_query():
    cosines = {f"d{i}": 0.9 - 0.05 * i for i in range(12)}
    bm25 = {"d3": 8.0, "x": 6.0, "d0": 2.0, "d11": 1.0}
    found = named("The cat the Hat", cosines, bm25)
    assert found["query_words"] == pytest.approx(math.log(4))
    assert found["agreement"] == pytest.approx(0.2)  # d0 and d3
    assert found["nearest_words"] == pytest.approx(2 / 8)
    assert found["first_cosine"] == pytest.approx(1 - 3 / 11)
    _, margin, _, entropy = score_features([sorted(cosines.values(), reverse=True)])[0]
    assert (found["cosine"], found["cosine_margin"], found["cosine_entropy"]) == pytest.approx((0.9, margin, entropy))
    assert found["words_margin"] == pytest.approx(0.25)
    shares = np.array([8, 6, 2, 1]) / 17
    assert found["words_entropy"] == pytest.approx(-(shares * np.log(shares)).sum() / math.log(4))


@pytest.mark.parametrize(("cosines", "bm25"), [({}, {}), ({"a": 0.5}, {}), ({}, {"a": 1.0}), ({"a": 0.5}, {"b": 1.0})])
def test_short_lists_have_finite_features(cosines, bm25):
    assert np.isfinite(query_features("x", cosines, bm25)).all()
    assert HybridFusion(rule=rule(words_entropy=1.0)).fuse("x", cosines, bm25) is not None


def test_a_rule_sets_the_weight_between_its_limits():
    cosines, bm25 = {"a": 0.9, "b": 0.5, "c": 0.4}, {"b": 9.0, "c": 1.0}
    assert rule().weight([0.0] * COUNT) == pytest.approx(0.5)
    assert rule(bias=1e6).weight([0.0] * COUNT) == pytest.approx(0.8)
    assert rule(bias=-1e6).weight([0.0] * COUNT) == pytest.approx(0.2)
    features = query_features("a b c d", cosines, bm25)
    logit = features[0] - 2
    weight = 0.2 + 0.6 / (1 + math.exp(-logit))
    fusion = HybridFusion("dbsf", rule=rule(bias=-2, query_words=1.0))
    assert dict(fusion.fuse("a b c d", cosines, bm25)) == pytest.approx(dict(fuse("dbsf", cosines, bm25, weight)))


def test_the_default_is_the_one_of_rank_fusion():
    cosines, bm25 = {"a": 0.9, "b": 0.5}, {"b": 9.0}
    assert DEFAULT_FUSION.fuse("x", cosines, bm25) == fuse_scores(cosines, bm25)


def test_the_record_reads_back_and_a_damaged_one_is_none():
    fusion = HybridFusion("rsf", 0.4, rule(bias=0.5), True, "a" * 64, {"train_queries": 3})
    assert HybridFusion.from_json(fusion.to_json()) == fusion
    assert HybridFusion.from_json(DEFAULT_FUSION.to_json()) == DEFAULT_FUSION
    record = json.loads(fusion.to_json())
    for change in (
        {"method": "sum"}, {"vector_weight": 2}, {"format": 0}, {"features": ["x"]}, {"rule": 3}, {"more": 1},
        {"rule": record["rule"] | {"bias": float("nan")}}, {"rule": record["rule"] | {"mean": [1.0]}},
        {"rule": record["rule"] | {"scale": [0.0] * COUNT}},
    ):  # fmt: skip
        assert HybridFusion.from_json(json.dumps(record | change)) is None
    for text in ("", "[]", "{", "null"):
        assert HybridFusion.from_json(text) is None


def test_it_says_what_it_is():
    assert str(DEFAULT_FUSION) == "linear, weight of the vectors 0.65"
    assert str(HybridFusion("rrf", reasoning_words=True)) == "rrf, the reasoning's words searched for too"
    assert str(HybridFusion("dbsf", rule=rule())) == "dbsf, weight of the vectors 0.2 to 0.8 by query"

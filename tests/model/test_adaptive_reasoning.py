"""The rule of reasoning="auto": it finds what decides, keeps its decisions on disk, and serves only its own model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from search_r3.errors import InputError
from search_r3.model.adaptive_reasoning import ALWAYS, FEATURES, NEVER, AdaptiveRule, score_features

HASH = "a" * 64


def searched(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (Q, 10), best first, and each query's margin between its first two."""
    rng = np.random.default_rng(seed)
    margin_Q = rng.uniform(0, 0.3, count)
    rest = np.sort(rng.uniform(0.1, 0.5, (count, 9)), axis=1)[:, ::-1]
    return np.column_stack([rest[:, 0] + margin_Q, rest]), margin_Q


def hard_gain_easy_lose(margin_Q: np.ndarray, seed: int = 1) -> np.ndarray:
    """Reasoning helps where the margin is small, harms a little where it is large; half of the queries tie."""
    rng = np.random.default_rng(seed)
    gain = np.where(margin_Q < 0.12, 0.4, -0.1) + rng.normal(0, 0.05, len(margin_Q))
    return np.where(rng.random(len(margin_Q)) < 0.5, gain, 0.0)


def test_features_of_a_worked_example():
    found = score_features([[0.5, 0.9, 0.4], [0.2, 0.2, 0.2]], depth=3, temperature=0.1)
    assert FEATURES == ("top", "margin", "spread", "entropy")
    weights = np.exp([0, -4, -5])
    shares = weights / weights.sum()
    assert found[0] == pytest.approx([0.9, 0.4, 0.45, -(shares * np.log(shares)).sum() / np.log(3)])
    assert found[1] == pytest.approx([0.2, 0, 0, 1])
    assert score_features([[0.7]]) == pytest.approx(np.array([[0.7, 0, 0, 0]]))
    assert score_features([[0.9, 0.5, 0.4, 0.1]], depth=2) == pytest.approx(score_features([[0.9, 0.5]], depth=2))


def test_the_rule_finds_the_queries_that_gain_and_keeps_most_of_the_gain_for_fewer_of_them():
    scores, margin = searched(300)
    rule = AdaptiveRule.fit(scores, hard_gain_easy_lose(margin), contract_hash=HASH)
    unseen, unseen_margin = searched(1000, seed=7)
    chosen = rule.decide(unseen)
    assert chosen.dtype == bool
    assert chosen.shape == (1000,)
    gains = np.where(unseen_margin < 0.12, 0.4, -0.1)
    assert gains[chosen].sum() > 0.75 * gains.sum()  # it aims at 95% on its own queries, and sees 150 that differ
    assert chosen.mean() < 0.35  # chosen by chance, that share would keep a third
    assert rule.priority(unseen)[unseen_margin < 0.05].min() > rule.priority(unseen)[unseen_margin > 0.25].max()


def test_where_reasoning_only_harms_it_never_reasons_and_where_it_only_helps_always():
    scores, _ = searched(200)
    rng = np.random.default_rng(2)
    harm = AdaptiveRule.fit(scores, -rng.uniform(0.1, 0.5, 200), contract_hash=HASH)
    assert harm.threshold == NEVER
    assert not harm.decide(scores).any()
    everywhere = AdaptiveRule.fit(scores, np.full(200, 0.3), contract_hash=HASH, target=1.0)
    assert everywhere.threshold == ALWAYS
    assert everywhere.decide(searched(50, seed=3)[0]).all()


def test_the_regression_is_the_minimum_of_the_weighted_penalized_loss():
    """At the minimum the gradient of the whole loss is 0: by the formula, not by the library that finds it."""
    scores, margin = searched(300)
    gains = hard_gain_easy_lose(margin)
    rule = AdaptiveRule.fit(scores, gains, contract_hash=HASH)
    features = score_features(scores)
    x = np.column_stack([(features - features.mean(0)) / features.std(0), np.ones(300)])
    weights = np.abs(gains) / np.abs(gains)[gains != 0].mean()
    parameters = np.array([*rule.weights, rule.bias])
    chances = 1 / (1 + np.exp(-x @ parameters))
    gradient = x.T @ (weights * (chances - (gains > 0))) + np.array([1.0, 1.0, 1.0, 1.0, 0.01]) * parameters
    assert np.abs(gradient).max() < 1e-6


def test_a_lower_target_reasons_about_fewer_queries():
    scores, margin = searched(300)
    gains = hard_gain_easy_lose(margin)
    shares = [
        AdaptiveRule.fit(scores, gains, contract_hash=HASH, target=target).decide(scores).mean()
        for target in (0.2, 0.5, 0.95)
    ]
    assert 0 < shares[0] < shares[1] < shares[2] < 1


def test_few_queries_that_say_nothing_do_not_make_a_rule_that_looks_good():
    """Judged on the queries that it was fitted to, it would seem to need 65% of them for 95% of the gain."""
    shares = []
    for seed in range(10):
        scores, _ = searched(60, seed)
        gains = np.random.default_rng(seed + 100).choice([-0.4, 0.4], 60, p=[0.3, 0.7])  # whatever the scores
        shares.append(AdaptiveRule.fit(scores, gains, contract_hash=HASH, seed=seed).decide(scores).mean())
    assert np.mean(shares) > 0.8


def test_a_rule_comes_back_from_disk_as_it_was(tmp_path):
    scores, margin = searched(120)
    rule = AdaptiveRule.fit(scores, hard_gain_easy_lose(margin), contract_hash=HASH, about={"dataset": "cosqa.dev"})
    rule.save(tmp_path / "adaptive.json")
    again = AdaptiveRule.load(tmp_path / "adaptive.json", HASH)
    assert again == rule
    assert np.array_equal(again.decide(scores), rule.decide(scores))
    assert again.about["dataset"] == "cosqa.dev"
    assert (tmp_path / "adaptive.json").stat().st_size < 2000
    assert AdaptiveRule.fit(scores, hard_gain_easy_lose(margin), contract_hash=HASH).weights == rule.weights


def test_a_rule_for_another_model_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "adaptive.json"
    scores, margin = searched(120)
    AdaptiveRule.fit(scores, hard_gain_easy_lose(margin), contract_hash=HASH).save(path)
    with pytest.raises(InputError, match="contract aaaaaaaaaaaa, not bbbbbbbbbbbb"):
        AdaptiveRule.load(path, "b" * 64)
    whole = json.loads(path.read_text())
    for change, message in (
        ({"format": 2}, "another version"),
        ({"features": ["top"]}, "another version"),
        ({"weights": [1.0]}, "is not a rule for reasoning"),
        ({"threshold": float("nan")}, "is not a rule for reasoning"),
        ({"bias": "high"}, "is not a rule for reasoning"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(InputError, match=message):
            AdaptiveRule.load(path, HASH)
    path.write_text("{")
    with pytest.raises(InputError, match="is not a rule for reasoning"):
        AdaptiveRule.load(path)
    with pytest.raises(InputError, match="No such file"):
        AdaptiveRule.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("scores", "gains", "options", "message"),
    [
        (np.ones((20, 3)), np.zeros(20), {}, "reasoning changed 0 of 20 queries"),
        (np.ones((20, 3)), np.ones(19), {}, "20 rows of scores"),
        (np.full((20, 3), np.nan), np.ones(20), {}, "finite numbers"),
        (np.ones((20, 0)), np.ones(20), {}, r"shape \(20, 0\)"),
        (np.ones((20, 3)), np.ones(20), {"target": 0.0}, r"target must be above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(scores, gains, options, message):
    with pytest.raises(InputError, match=message):
        AdaptiveRule.fit(scores, gains, contract_hash=HASH, **options)

"""Rewards: trec_eval's numbers, the promised bounds, and what each function does at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3 import metrics
from search_r3.environment import rewards
from search_r3.environment.reward_terms import REGISTRY
from search_r3.environment.rewards import dcg_scaled, log_rank, margin_rank, ndcg
from search_r3.errors import InputError

# Few distinct cosines, so that most rankings hold ties; two of them differ in float64 only, one is minus zero.
COSINES = st.sampled_from([0.0, -0.0, 0.25, 0.25 + 1e-12, 0.5, -0.5, 0.9, 1.0, -1.0])
ALL = (dcg_scaled, ndcg, margin_rank)


@st.composite
def judged(draw, cosines=COSINES, max_documents=14):
    """(cosines (R, N), grades (R, N)), grades from -1 to 3."""
    rollouts, documents = draw(st.integers(1, 4)), draw(st.integers(1, max_documents))
    size = rollouts * documents
    cos = draw(st.lists(cosines, min_size=size, max_size=size))
    rel = draw(st.lists(st.integers(-1, 3), min_size=size, max_size=size))
    return torch.tensor(cos, dtype=torch.float64).view(rollouts, -1), torch.tensor(rel).view(rollouts, -1)


@settings(max_examples=100, deadline=None)
@given(case=judged(), k=st.integers(1, 16))
def test_dcg_is_ir_measures_ndcg(case, k):
    ir_measures = pytest.importorskip("ir_measures")
    cos, rel = case
    provider = ir_measures.providers.registry["pytrec_eval"]
    # Grades below 0 as 0: pytrec_eval 0.5.11 ends the whole process on some sets that hold them.
    grades = rel.clamp(min=0).tolist()
    run, qrels = {}, {}
    for r, (scores, row) in enumerate(zip(cos.tolist(), grades, strict=True)):
        places = sorted(range(len(row)), key=row.__getitem__)
        ids = {n: f"d{99 - place:02d}" for place, n in enumerate(places)}
        run[str(r)] = {ids[n]: score for n, score in enumerate(scores)}
        qrels[str(r)] = {ids[n]: grade for n, grade in enumerate(row)}
    found = {m.query_id: m.value for m in provider.iter_calc([ir_measures.nDCG @ k], qrels, run)}
    expected = [found.get(str(r), 0.0) for r in range(len(cos))]
    assert ndcg(cos, rel, k).tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics.ndcg(cos.numpy(), rel.numpy(), k).tolist() == pytest.approx(expected, abs=1e-6)


def by_hand(cos: list[float], rel: list[int], k: int, delta: float) -> tuple[float, float]:
    """(dcg_scaled, margin_rank) of one row, as in the paper (arXiv:2510.07048)."""
    order = sorted(range(len(cos)), key=lambda n: (-np.float32(cos[n]), max(rel[n], 0), n))[:k]
    ideal = sum(max(g, 0) / math.log2(i + 2) for i, g in enumerate(sorted(rel, reverse=True)[:k]))
    scaled = sum(max(rel[n], 0) * max(cos[n], 0) / math.log2(i + 2) for i, n in enumerate(order))
    plain = sum(max(rel[n], 0) / math.log2(i + 2) for i, n in enumerate(order))
    if ideal == 0:
        return 0.0, 0.0
    best = [c for c, g in zip(cos, rel, strict=True) if g == max(rel)]
    negative = [c for c, g in zip(cos, rel, strict=True) if g <= 0]
    margin = min(max(max(best) - max(negative) - delta, 0), 1) if negative else 0.0
    return scaled / ideal, plain / ideal + margin


@settings(max_examples=150, deadline=None)
@given(case=judged(), k=st.integers(1, 16), delta=st.sampled_from([0.0, 0.1, -0.2, 1.0]))
def test_rewards_follow_their_formulas(case, k, delta):
    cos, rel = case
    expected = [by_hand(c, g, k, delta) for c, g in zip(cos.tolist(), rel.tolist(), strict=True)]
    assert dcg_scaled(cos, rel, k).tolist() == pytest.approx([scaled for scaled, _ in expected], abs=1e-6)
    assert margin_rank(cos, rel, k, delta).tolist() == pytest.approx([margin for _, margin in expected], abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(case=judged(st.floats(-1.0, 1.0) | COSINES), k=st.integers(1, 16))
def test_rewards_are_bounded_and_scaled_is_never_above_plain(case, k):
    for reward, top in ((dcg_scaled, 1.0), (ndcg, 1.0), (margin_rank, 2.0)):
        values = reward(*case, k=k)
        assert values.dtype == torch.float32
        assert values.shape == (len(case[0]),)
        assert bool(((values >= 0) & (values <= top)).all())
    assert bool((dcg_scaled(*case, k=k) <= ndcg(*case, k=k) + 1e-6).all())


@settings(max_examples=100, deadline=None)
@given(data=st.data(), documents=st.integers(2, 12), k=st.integers(1, 12))
def test_rewards_do_not_depend_on_the_order_of_columns_or_rows(data, documents, k):
    cos = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=documents, max_size=documents, unique=True))
    rel = data.draw(st.lists(st.integers(0, 3), min_size=documents, max_size=documents))
    columns = data.draw(st.permutations(range(documents)))
    cos_RN, rel_RN = torch.tensor([cos, cos[::-1]]), torch.tensor([rel, rel[::-1]])
    for reward in ALL:
        plain = reward(cos_RN, rel_RN, k=k)
        assert torch.allclose(reward(cos_RN[:, columns], rel_RN[:, columns], k=k), plain, atol=1e-6)
        assert torch.equal(reward(cos_RN.flip(0), rel_RN.flip(0), k=k), plain.flip(0))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), documents=st.integers(2, 12), k=st.integers(1, 12))
def test_raising_a_positive_never_lowers_a_reward_and_raising_a_negative_never_raises_it(data, documents, k):
    cos = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=documents, max_size=documents))
    positive = data.draw(st.integers(0, documents - 1))
    raised = data.draw(st.integers(0, documents - 1))
    rel = [int(n == positive) for n in range(documents)]
    higher = list(cos)
    higher[raised] = data.draw(st.floats(cos[raised], 1, width=32))
    for reward in ALL:
        before, after = reward([cos, higher], [rel, rel], k=k).tolist()
        assert after >= before - 1e-6 if raised == positive else after <= before + 1e-6


def test_each_rank_earns_less_than_the_one_above_it_and_nothing_beyond_k():
    documents, k = 12, 10
    cos = torch.linspace(0.9, 0.1, documents).repeat(documents, 1)
    rel = torch.eye(documents)  # row r has its only positive at rank r + 1
    for reward in ALL:
        values = reward(cos, rel, k=k)
        assert bool((values[:k].diff() < 0).all())
        assert values[k:].tolist() == [0.0, 0.0]
    assert ndcg(cos, rel)[:3].tolist() == pytest.approx([1.0, 1 / math.log2(3), 0.5])


def test_dcg_scaled_scales_with_the_cosines_and_dcg_does_not():
    cos = torch.tensor([[0.8, 0.6, 0.4]])
    rel = torch.tensor([[0, 2, 1]])
    assert dcg_scaled(cos / 2, rel).item() == pytest.approx(dcg_scaled(cos, rel).item() / 2)
    assert ndcg(cos / 2, rel).item() == pytest.approx(ndcg(cos, rel).item())
    assert ndcg(cos, rel * 7).item() == pytest.approx(ndcg(cos, rel).item())


def test_negative_cosines_gain_nothing_even_at_rank_one():
    cos, rel = torch.tensor([[-0.1, -0.5]]), torch.tensor([[1, 0]])
    assert dcg_scaled(cos, rel).item() == 0.0
    assert ndcg(cos, rel).item() == 1.0
    assert margin_rank(cos, rel).item() == pytest.approx(1.4)


def test_margin_rank_goes_on_rising_when_the_ranks_are_right():
    cos = torch.tensor([[0.6, 0.5], [0.7, 0.5], [0.9, 0.1]])
    rel = torch.tensor([[1, 0]] * 3)
    assert ndcg(cos, rel).tolist() == [1.0, 1.0, 1.0]
    assert margin_rank(cos, rel).tolist() == pytest.approx([1.1, 1.2, 1.8])
    assert margin_rank(cos, rel, delta=0.15).tolist() == pytest.approx([1.0, 1.05, 1.65])


def test_margin_is_of_the_highest_grade_against_the_unjudged_only():
    cos, rel = [[0.5, 0.9, 0.3]], [[2, 1, 0]]
    assert margin_rank(cos, rel).item() == pytest.approx(ndcg(cos, rel).item() + 0.2)


def test_no_tie_is_a_gain_so_a_collapsed_space_earns_nothing():
    cos = torch.full((2, 20), 0.7)
    rel = torch.zeros(2, 20)
    rel[0, 0] = 1
    rel[1, 19] = 1
    assert ndcg(cos, rel).tolist() == [0.0, 0.0]


def test_no_positive_no_document_and_k_beyond_the_documents():
    for reward in ALL:
        assert reward(torch.tensor([[0.5, 0.4]]), torch.tensor([[0, -2]])).tolist() == [0.0]
        assert reward(torch.zeros(3, 0), torch.zeros(3, 0)).tolist() == [0.0] * 3
        assert reward(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
        small = reward(torch.tensor([[0.9, 0.3]]), torch.tensor([[0, 1]]), k=100)
        assert torch.equal(small, reward(torch.tensor([[0.9, 0.3]]), torch.tensor([[0, 1]]), k=2))
    assert margin_rank([[0.9, 0.8]], [[1, 1]]).item() == 1.0  # nothing but positives: no margin to speak of


def test_positives_beyond_rank_k_count_in_the_ideal_only_up_to_k():
    cos = torch.linspace(0.9, 0.1, 12)[None]
    assert ndcg(cos, torch.ones(1, 12), k=10).item() == 1.0
    two = torch.zeros(1, 12)
    two[0, 0] = two[0, 11] = 1
    assert ndcg(cos, two).item() == pytest.approx(1 / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize("reward", ALL)
@pytest.mark.parametrize(
    ("cos", "rel", "k", "words"),
    [
        ([[math.nan, 0.1]], [[1, 0]], 10, "rollout 0 contain NaN"),
        ([[0.2, 0.1]], [[math.nan, 0]], 10, "grades contain NaN"),
        ([[3.0, 0.1]], [[1, 0]], 10, "unit rows"),
        ([[0.2, 0.1]], [[1, 0, 0]], 10, "two equal"),
        ([0.2, 0.1], [1, 0], 10, "two equal"),
        ([[0.2, 0.1]], [[1, 0]], 0, "k must be"),
    ],
)
def test_bad_input_is_refused(reward, cos, rel, k, words):
    with pytest.raises(ValueError, match=words):
        reward(torch.tensor(cos), torch.tensor(rel), k=k)


def test_a_reward_is_a_constant_to_the_gradient():
    cos = torch.tensor([[0.5, 0.4]], requires_grad=True)
    assert not any(reward(cos, [[1, 0]]).requires_grad for reward in ALL)


def test_a_missing_token_earns_the_penalty_whatever_its_ranking():
    values = rewards.missing_token_penalty([1.0, 0.0, 0.3], [False, True, True])
    assert values.tolist() == pytest.approx([-0.5, 0.0, 0.3])
    assert rewards.missing_token_penalty([1.0], [False], penalty=-1.0).tolist() == [-1.0]
    for penalty in (0.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="below 0"):
            rewards.missing_token_penalty([1.0], [False], penalty=penalty)
    with pytest.raises(ValueError, match="boolean"):
        rewards.missing_token_penalty([1.0], [1])
    with pytest.raises(ValueError, match="NaN"):
        rewards.missing_token_penalty([math.nan], [True])


def test_length_costs_nothing_up_to_free_then_rises_to_its_weight_at_the_budget():
    values = rewards.length_shaping([1.0] * 4, [0, 10, 20, 99], budget=30, free=10, weight=0.2)
    assert values.tolist() == pytest.approx([1.0, 1.0, 0.9, 0.8])
    for wrong in ({"budget": 10, "free": 10}, {"budget": 10, "free": -1}, {"budget": 10, "weight": -0.1}):
        with pytest.raises(ValueError, match="must be"):
            rewards.length_shaping([1.0], [3], **wrong)
    with pytest.raises(ValueError, match="tokens_R must be 0 or more"):
        rewards.length_shaping([1.0], [-3], budget=10)


def test_the_gain_changes_the_advantages_of_a_group_which_a_plain_difference_would_not():
    group, direct = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.full((4,), 0.5)

    def advantages(values: torch.Tensor) -> torch.Tensor:
        return (values - values.mean()) / (values.std() + 1e-4)

    assert torch.allclose(advantages(group - direct), advantages(group), atol=1e-5)
    shaped = rewards.gain_over_direct(group, direct, weight=1.0)
    assert shaped.tolist() == pytest.approx([0.2, 0.4, 0.7, 1.1])
    assert not torch.allclose(advantages(shaped), advantages(group), atol=1e-2)
    assert torch.equal(rewards.gain_over_direct(group, direct, weight=0.0), group)
    with pytest.raises(ValueError, match="must be equal"):
        rewards.gain_over_direct(group, direct[:2])
    with pytest.raises(ValueError, match="weight"):
        rewards.gain_over_direct(group, direct, weight=-1.0)


def test_rewards_are_found_by_name():
    assert REGISTRY.create("dcg_scaled", {}) is rewards.REWARDS["dcg_scaled"]
    with pytest.raises(InputError, match="did you mean 'margin_rank'"):
        REGISTRY.create("margin_rnk", {})
    with pytest.raises(InputError, match="choose one of: dcg_scaled, dcg, margin_rank"):
        REGISTRY.create("zzz", {})


@settings(max_examples=100, deadline=None)
@given(case=judged())
def test_log_rank_is_the_mean_over_positives_of_their_rank_among_negatives(case):
    cos, rel = case
    expected = []
    for scores, grades in zip(cos.float().tolist(), rel.tolist(), strict=True):
        negatives = [score for score, grade in zip(scores, grades, strict=True) if grade <= 0]
        ranks = [
            1 + sum(n >= score for n in negatives) for score, grade in zip(scores, grades, strict=True) if grade > 0
        ]
        shares = [1 - math.log(rank) / math.log(max(len(scores), 2)) for rank in ranks]
        expected.append(sum(shares) / len(shares) if shares else 0.0)
    found = log_rank(cos, rel)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert ((found >= 0) & (found <= 1)).all()


def test_log_rank_takes_ranks_in_a_larger_corpus():
    cos, rel = torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0, 1, 2]])
    assert log_rank(cos, rel, torch.tensor([[0, 10, 100]]), 1000).item() == pytest.approx((2 / 3 + 1 / 3) / 2)
    for ranks, documents in (([0, 0, 5], 10), ([0, 2, 11], 10)):
        with pytest.raises(ValueError, match="rank must be from 1 to 10"):
            log_rank(cos, rel, torch.tensor([ranks]), documents)

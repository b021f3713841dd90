"""Losses over graded positives against independent formulas and allRank's, gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.training.losses import info_nce
from search_r3.training.ranking_losses import RANKING_LOSSES, approx_ndcg, lambda_loss, multi_positive

CASES = {
    "batch": st.integers(1, 5), "candidates": st.integers(1, 9), "seed": st.integers(0, 9999),
    "temperature": st.floats(0.05, 2.0),
}  # fmt: skip


def case(batch: int, candidates: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, all different, and grades 0 to 3, at least one of them above 0 in every row."""
    chance = np.random.default_rng(seed)
    cos_BM = chance.permuted(np.linspace(-0.9, 0.9, batch * candidates)).reshape(batch, candidates)
    grade_BM = chance.integers(0, 4, (batch, candidates)) * (chance.random((batch, candidates)) < 0.6)
    grade_BM[np.arange(batch), chance.integers(0, candidates, batch)] = chance.integers(1, 4, batch)
    return torch.from_numpy(cos_BM), torch.from_numpy(grade_BM.astype(np.float64))


def ideal(grades: list[float]) -> float:
    return sum((2**g - 1) / math.log2(2 + i) for i, g in enumerate(sorted(grades, reverse=True)))


# --- multi-positive InfoNCE


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_every_positive_is_a_target_with_its_share_of_the_grades(batch, candidates, seed, temperature):
    cos, grade = case(batch, candidates, seed)
    rows = []
    for c, g in zip(cos.tolist(), grade.tolist(), strict=True):
        total = sum(math.exp(x / temperature) for x in c)
        rows.append(-sum(y / sum(g) * math.log(math.exp(x / temperature) / total) for x, y in zip(c, g, strict=True)))
    assert multi_positive(cos, grade, temperature).item() == pytest.approx(np.mean(rows), abs=1e-9)


def test_equal_grades_give_the_supervised_contrastive_loss():
    """Equation 2 of arXiv 2004.11362: the mean over the positives is outside of the logarithm."""
    cos, grade = case(4, 7, 1)
    positive = grade > 0
    scores = cos / 0.1
    log_p = scores - scores.exp().sum(1, keepdim=True).log()
    expected = -((log_p * positive).sum(1) / positive.sum(1)).mean()
    assert multi_positive(cos, positive.double(), 0.1).item() == pytest.approx(expected.item(), abs=1e-9)


def test_with_one_positive_it_is_info_nce():
    chance = torch.Generator().manual_seed(0)
    q, d = (torch.nn.functional.normalize(torch.randn(n, 6, generator=chance), dim=-1) for n in (4, 9))
    target = torch.tensor([0, 3, 8, 2])
    grade = torch.nn.functional.one_hot(target, 9).float() * torch.tensor([[1.0], [2.0], [1.0], [3.0]])
    assert multi_positive(q @ d.T, grade, 0.05).item() == pytest.approx(info_nce(q, d, target, 0.05).item(), rel=1e-5)


# --- LambdaLoss


def direct_lambda_loss(cos: list[float], grade: list[float], temperature: float, mu: float) -> float:
    """The formula of the paper, pair by pair."""
    rank = {i: 1 + sum(x > cos[i] for x in cos) for i in range(len(cos))}
    best, total = ideal(grade), 0.0
    for i in range(len(cos)):
        for j in range(len(cos)):
            if grade[i] > grade[j]:
                apart = abs(rank[i] - rank[j])
                rho = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
                delta = abs(1 / math.log2(1 + apart) - 1 / math.log2(2 + apart))
                gains = abs(2 ** grade[i] - 2 ** grade[j]) / best
                probability = 1 / (1 + math.exp(-(cos[i] - cos[j]) / temperature))
                total -= math.log2(probability ** ((rho + mu * delta) * gains))
    return total


@settings(max_examples=40, deadline=None)
@given(**CASES, mu=st.sampled_from([0.0, 1.0, 10.0]))
def test_lambda_loss_is_the_papers_sum_over_pairs(batch, candidates, seed, temperature, mu):
    cos, grade = case(batch, candidates, seed)
    rows = [direct_lambda_loss(c, g, temperature, mu) for c, g in zip(cos.tolist(), grade.tolist(), strict=True)]
    assert lambda_loss(cos, grade, temperature, mu).item() == pytest.approx(np.mean(rows), rel=1e-7, abs=1e-9)


def allrank_lambda_loss(y_pred: torch.Tensor, y_true: torch.Tensor, sigma: float, mu: float = 10.0) -> torch.Tensor:
    """allRank's `lambdaLoss` with `ndcgLoss2PP_scheme`, without its padding, k and clamps, summed over a list."""
    y_pred_sorted, indices_pred = y_pred.sort(descending=True, dim=-1)
    y_true_sorted, _ = y_true.sort(descending=True, dim=-1)
    true_sorted_by_preds = torch.gather(y_true, dim=1, index=indices_pred)
    true_diffs = true_sorted_by_preds[:, :, None] - true_sorted_by_preds[:, None, :]
    pos_idxs = torch.arange(1, y_pred.shape[1] + 1)
    D = torch.log2(1.0 + pos_idxs.double())[None, :]
    max_dcgs = torch.sum((torch.pow(2, y_true_sorted) - 1) / D, dim=-1)
    G = (torch.pow(2, true_sorted_by_preds) - 1) / max_dcgs[:, None]
    delta_idxs = torch.abs(pos_idxs[:, None] - pos_idxs[None, :])
    deltas = torch.abs(torch.pow(D[0, delta_idxs - 1], -1.0) - torch.pow(torch.cat([D[0], D[0, :1]])[delta_idxs], -1.0))
    deltas.diagonal().zero_()
    gains = torch.abs(G[:, :, None] - G[:, None, :])
    rhos = torch.abs(torch.pow(D[:, :, None], -1.0) - torch.pow(D[:, None, :], -1.0))
    weights = mu * deltas[None] * gains + rhos * gains
    scores_diffs = y_pred_sorted[:, :, None] - y_pred_sorted[:, None, :]
    losses = torch.log2(torch.sigmoid(sigma * scores_diffs) ** weights)
    return -losses[true_diffs > 0].sum()


def test_lambda_loss_and_its_gradient_are_those_of_allrank():
    cos, grade = case(5, 8, 3)
    ours, theirs = cos.clone().requires_grad_(), cos.clone().requires_grad_()
    mine, other = lambda_loss(ours, grade, 0.25), allrank_lambda_loss(theirs, grade, 4.0) / len(cos)
    assert mine.item() == pytest.approx(other.item(), rel=1e-9)
    (mine.backward(), other.backward())
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-9)


def test_lambda_loss_pushes_a_positive_up_most_where_that_gains_most():
    cos = torch.tensor([[0.9, 0.5, 0.4, 0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    grade = torch.tensor([[0.0, 0.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    lambda_loss(cos, grade, 0.1, mu=0.0).backward()
    assert cos.grad is not None
    pull = cos.grad[0]
    assert pull[3] < 0 < pull[0]
    assert pull[0] == pull.max()  # the first place is worth most


# --- ApproxNDCG


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_approx_ndcg_is_one_minus_the_ndcg_of_smooth_ranks(batch, candidates, seed, temperature):
    cos, grade = case(batch, candidates, seed)
    rows = []
    for c, g in zip(cos.tolist(), grade.tolist(), strict=True):
        found = 0.0
        for i, (x, y) in enumerate(zip(c, g, strict=True)):
            rank = 1 + sum(1 / (1 + math.exp((x - other) / temperature)) for j, other in enumerate(c) if j != i)
            found += (2**y - 1) / math.log2(1 + rank)
        rows.append(1 - found / ideal(g))
    assert approx_ndcg(cos, grade, temperature).item() == pytest.approx(np.mean(rows), abs=1e-9)


def allrank_approx_ndcg(y_pred: torch.Tensor, y_true: torch.Tensor, alpha: float) -> torch.Tensor:
    """allRank's `approxNDCGLoss` without its padding and clamps."""
    y_pred_sorted, indices_pred = y_pred.sort(descending=True, dim=-1)
    y_true_sorted, _ = y_true.sort(descending=True, dim=-1)
    true_sorted_by_preds = torch.gather(y_true, dim=1, index=indices_pred)
    mask = torch.ones(y_pred.shape[1], y_pred.shape[1], dtype=torch.double).fill_diagonal_(0)
    D = torch.log2(1.0 + torch.arange(1, y_pred.shape[1] + 1).double())[None, :]
    max_dcgs = torch.sum((torch.pow(2, y_true_sorted) - 1) / D, dim=-1)
    G = (torch.pow(2, true_sorted_by_preds) - 1) / max_dcgs[:, None]
    scores_diffs = y_pred_sorted[:, :, None] - y_pred_sorted[:, None, :]
    approx_pos = 1.0 + torch.sum(mask * torch.sigmoid(-alpha * scores_diffs), dim=-1)
    return -torch.mean(torch.sum(G / torch.log2(1.0 + approx_pos), dim=-1))


def test_approx_ndcg_and_its_gradient_are_those_of_allrank():
    cos, grade = case(5, 8, 4)
    ours, theirs = cos.clone().requires_grad_(), cos.clone().requires_grad_()
    mine, other = approx_ndcg(ours, grade, 0.25), 1 + allrank_approx_ndcg(theirs, grade, 4.0)
    assert mine.item() == pytest.approx(other.item(), rel=1e-9)
    (mine.backward(), other.backward())
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-9)


def test_at_a_low_temperature_approx_ndcg_is_ndcg():
    cos, grade = case(4, 9, 5)
    binary = (grade > 0).double()
    exact = [
        sum(y / math.log2(2 + i) for i, y in enumerate(g[c.argsort(descending=True)].tolist())) / ideal(g.tolist())
        for c, g in zip(cos, binary, strict=True)
    ]
    assert approx_ndcg(cos, binary, 1e-4).item() == pytest.approx(1 - np.mean(exact), abs=1e-6)


# --- all of them


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_gradients_equal_finite_differences(name):
    cos, grade = case(3, 6, 7)
    assert torch.autograd.gradcheck(lambda x: RANKING_LOSSES[name](x, grade, 0.3), (cos.requires_grad_(),))


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_the_candidates_order_does_not_matter(name):
    cos, grade = case(4, 7, 8)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    found = RANKING_LOSSES[name](cos[:, order], grade[:, order], 0.1)
    assert found.item() == pytest.approx(RANKING_LOSSES[name](cos, grade, 0.1).item(), rel=1e-9)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_queries_without_a_positive_are_left_out(name):
    cos, grade = case(3, 5, 9)
    loss = RANKING_LOSSES[name]
    alone = loss(cos, grade, 0.1).item()
    more_cos, more_grade = torch.cat([cos, cos[:2]]), torch.cat([grade, torch.zeros(2, 5, dtype=grade.dtype)])
    assert loss(more_cos, more_grade, 0.1).item() == pytest.approx(alone, rel=1e-12)
    nothing = loss(cos.requires_grad_(), torch.zeros(3, 5), 0.1)
    assert nothing.item() == 0
    nothing.backward()
    assert cos.grad is not None
    assert not cos.grad.any()


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_nothing_but_positives_of_one_grade_can_not_be_ranked_wrong(name):
    cos, _ = case(2, 4, 10)
    found = RANKING_LOSSES[name](cos, torch.ones(2, 4, dtype=torch.float64), 1e-3).item()
    assert found == pytest.approx(0, abs=1e-6) or name == "multi_positive"


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_half_precision_is_computed_in_float32(name):
    cos, grade = case(3, 6, 11)
    half = cos.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = RANKING_LOSSES[name](half, grade.float(), 0.05)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(RANKING_LOSSES[name](half.double(), grade, 0.05).item(), rel=1e-4)


@pytest.mark.parametrize("name", RANKING_LOSSES)
@pytest.mark.parametrize(
    ("cos", "grade", "temperature", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), 0.1, "one shape of two dimensions"),
        (torch.zeros(3), torch.zeros(3), 0.1, "one shape of two dimensions"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), 0.1, "grade_BM must be a float tensor"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0.0, "temperature must be a finite number above 0"),
        (torch.zeros(2, 3), torch.full((2, 3), -1.0), 0.1, "grades of 0 or above"),
    ],
)
def test_wrong_arguments_are_named(name, cos, grade, temperature, message):
    with pytest.raises(ValueError, match=message):
        RANKING_LOSSES[name](cos, grade, temperature)

"""Soft labels, Matryoshka dimensions, uniformity and alignment: against independent formulas, and at their edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from search_r3.training.losses import alignment, info_nce, matryoshka, score_distillation, truncated, uniformity


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1).to(dtype)


def softmax(values: np.ndarray) -> np.ndarray:
    return np.exp(values) / np.exp(values).sum()


# --- a teacher's scores


def test_distillation_is_the_mean_kl_over_the_candidates_that_both_know():
    student, teacher = random(3, 5), random(3, 5, seed=1)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = True
    teacher[0, 4] = torch.nan
    expected = []
    for b, left in enumerate(([0, 1, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4])):
        p, s = softmax(teacher[b, left].numpy() / 0.3), softmax(student[b, left].numpy() / 0.5)
        expected.append(np.sum(p * np.log(p / s)))
    assert score_distillation(student, teacher, 0.5, 0.3, mask).item() == pytest.approx(np.mean(expected))


def test_distillation_gradient_equals_finite_differences_and_what_is_left_out_gets_none():
    student, teacher = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = True
    teacher[2, 0] = teacher[1, 1:] = torch.nan  # query 1 has one candidate left, and says nothing
    assert torch.autograd.gradcheck(lambda s: score_distillation(s, teacher, 0.2, 0.4, mask), (student,))
    score_distillation(student, teacher, 0.2, 0.4, mask).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad[0, 1] == student.grad[2, 0] == 0
    assert student.grad[1].abs().sum() == 0
    assert (student.grad[0, [0, 2, 3]] != 0).all()


def test_equal_rankings_lose_nothing_and_a_shift_of_a_row_changes_nothing():
    teacher = random(4, 6)
    assert score_distillation(teacher, teacher, 0.05, 0.05).item() == pytest.approx(0, abs=1e-12)
    assert score_distillation(2 * teacher, teacher, 0.1, 0.05).item() == pytest.approx(0, abs=1e-12)
    student, shift = random(4, 6, seed=1), random(4, 1, seed=2)
    value = score_distillation(student, teacher, 0.05, 0.1).item()
    assert value > 0.1
    assert score_distillation(student + shift, teacher - 3 * shift, 0.05, 0.1).item() == pytest.approx(value)


def test_whatever_the_student_says_of_an_unknown_candidate_does_not_matter():
    student, teacher = random(2, 4), random(2, 4, seed=1)
    teacher[0, 1] = torch.nan
    value = score_distillation(student, teacher, 0.1, 0.1).item()
    student[0, 1] = torch.nan
    assert score_distillation(student, teacher, 0.1, 0.1).item() == value


def test_no_teacher_at_all_is_a_zero_that_can_be_backpropagated():
    student = random(2, 3).requires_grad_()
    loss = score_distillation(student, torch.full((2, 3), torch.nan), 0.1, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.abs().sum() == 0


def test_no_gradient_flows_into_the_teacher_and_half_precision_is_computed_in_fp32():
    student, teacher = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    score_distillation(student, teacher, 0.1, 0.1).backward()
    assert teacher.grad is None
    student, teacher = random(2, 3, dtype=torch.bfloat16), random(2, 3, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = score_distillation(student, teacher, 0.02, 0.05)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        score_distillation(student.double(), teacher.double(), 0.02, 0.05).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_BN": random(2, 4)}, "teacher_BN must have the student's shape"),
        ({"teacher_BN": torch.full((2, 3), torch.inf)}, "infinite score"),
        ({"teacher_BN": torch.ones(2, 3, dtype=torch.long)}, "teacher_BN must be a float"),
        ({"temperature": 0.0}, "^temperature must be a finite number above 0"),
        ({"teacher_temperature": float("nan")}, "teacher_temperature must be"),
        ({"mask_BN": torch.zeros(2, 2, dtype=torch.bool)}, "mask_BN must have the shape"),
        ({"student_BN": random(3)}, "student_BN must have 2 dimensions"),
    ],
)
def test_distillation_names_what_is_wrong(change, message):
    arguments = {
        "student_BN": random(2, 3), "teacher_BN": random(2, 3), "temperature": 0.1, "teacher_temperature": 0.1
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        score_distillation(**arguments)


# --- Matryoshka


def test_a_truncated_embedding_is_a_unit_row_in_the_same_direction():
    x = unit(3, 8)
    cut = truncated(x, 5)
    assert torch.allclose(cut, x[:, :5] / x[:, :5].norm(dim=1, keepdim=True))
    assert torch.equal(truncated(x, 8), x)
    assert truncated(x.to(torch.bfloat16), 5).dtype == torch.float32
    for dim in (0, 9):
        with pytest.raises(ValueError, match=f"cannot keep {dim} of 8"):
            truncated(x, dim)


def test_matryoshka_is_the_weighted_mean_of_the_losses_at_each_dimension():
    q, d, target = unit(3, 8).requires_grad_(), unit(5, 8, seed=1).requires_grad_(), torch.tensor([0, 4, 2])

    def loss(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return info_nce(q, d, target, 0.1)

    at = {dim: loss(truncated(q, dim), truncated(d, dim)).item() for dim in (8, 4, 2)}
    assert matryoshka(loss, (8, 2))(q, d).item() == pytest.approx((at[8] + at[2]) / 2)
    assert matryoshka(loss, (2, 8, 4), (1, 3, 0))(q, d).item() == pytest.approx((at[2] + 3 * at[8]) / 4)
    assert matryoshka(loss, (8,))(q, d).item() == at[8] == loss(q, d).item()
    assert torch.autograd.gradcheck(matryoshka(loss, (8, 4, 2), (1, 1, 2)), (q, d))


@pytest.mark.parametrize(
    ("dims", "weights", "message"),
    [
        ((), None, "dims must be"),
        ((4, 4), None, "dims must be"),
        ((4, 0), None, "dims must be"),
        ((4, 2), (1,), "2 dims but 1 weights"),
        ((4, 2), (1, -1), "weights must be"),
        ((4, 2), (0, 0), "weights must be"),
        ((4, 2), (1, float("nan")), "weights must be"),
    ],
)
def test_matryoshka_names_what_is_wrong(dims, weights, message):
    with pytest.raises(ValueError, match=message):
        matryoshka(lambda x: x.sum(), dims, weights)


# --- geometry


def test_uniformity_is_wang_and_isolas_formula():
    x = unit(7, 5)
    expected = torch.pdist(x).square().mul(-2).exp().mean().log()
    assert uniformity(x).item() == pytest.approx(expected.item())
    assert uniformity(x.float()).item() == pytest.approx(expected.item(), abs=1e-5)
    y = unit(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(uniformity, (y,))


def test_uniformity_and_alignment_at_their_ends():
    point = unit(1, 6, dtype=torch.float32)
    assert uniformity(point.repeat(4, 1)).item() == pytest.approx(0, abs=1e-5)
    assert uniformity(torch.cat([point, -point])).item() == pytest.approx(-8)
    assert alignment(point, point).item() == 0
    assert alignment(point, -point).item() == pytest.approx(4)
    q, d = unit(5, 6), unit(5, 6, seed=1)
    assert alignment(q, d).item() == pytest.approx((2 - 2 * F.cosine_similarity(q, d)).mean().item())


def test_uniformity_and_alignment_refuse_what_has_no_pair():
    with pytest.raises(ValueError, match="got 1 of them"):
        uniformity(unit(1, 4))
    with pytest.raises(ValueError, match="alignment is over pairs"):
        alignment(unit(2, 4), unit(3, 4))
    with pytest.raises(ValueError, match="alignment is over pairs"):
        alignment(unit(0, 4), unit(0, 4))

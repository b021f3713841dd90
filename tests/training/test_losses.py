"""Every loss against an independent formula, its gradient against finite differences, and its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.training.losses import info_nce, kl_to_base, sft_cross_entropy, triplet_margin


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1).to(dtype)


def numpy_info_nce(q, d, target, temperature, mask=None) -> float:
    losses = []
    for b in range(len(q)):
        weights = [
            np.exp(np.dot(q[b], d[n]) / temperature) if mask is None or not mask[b, n] else 0.0 for n in range(len(d))
        ]
        losses.append(-np.log(weights[target[b]] / sum(weights)))
    return float(np.mean(losses))


# --- InfoNCE


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5), documents=st.integers(1, 9), dimension=st.integers(1, 6), seed=st.integers(0, 999),
    temperature=st.floats(0.02, 2.0), share=st.floats(0, 1),
)  # fmt: skip
def test_info_nce_is_the_papers_formula_over_the_documents_not_masked(
    batch, documents, dimension, seed, temperature, share
):
    q, d = unit(batch, dimension, seed=seed), unit(documents, dimension, seed=seed + 1)
    chance = np.random.default_rng(seed)
    target = torch.from_numpy(chance.integers(0, documents, batch))
    mask = torch.from_numpy(chance.random((batch, documents)) < share)
    mask[torch.arange(batch), target] = False
    expected = numpy_info_nce(q.numpy(), d.numpy(), target.numpy(), temperature)
    assert info_nce(q, d, target, temperature).item() == pytest.approx(expected, abs=1e-9)
    expected = numpy_info_nce(q.numpy(), d.numpy(), target.numpy(), temperature, mask.numpy())
    assert info_nce(q, d, target, temperature, mask).item() == pytest.approx(expected, abs=1e-9)


def test_info_nce_gradient_equals_finite_differences():
    q, d = unit(3, 4).requires_grad_(), unit(6, 4, seed=1).requires_grad_()
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 3] = mask[2, 0] = True
    target = torch.tensor([0, 1, 5])
    assert torch.autograd.gradcheck(lambda q, d: info_nce(q, d, target, 0.1, mask), (q, d))


def test_a_masked_document_gets_no_gradient_and_changes_nothing():
    q, d = unit(1, 4), unit(3, 4, seed=1).requires_grad_()
    mask = torch.tensor([[False, True, False]])
    loss = info_nce(q, d, torch.tensor([0]), 0.05, mask)
    loss.backward()
    assert d.grad is not None
    assert d.grad[1].abs().sum() == 0
    assert d.grad[2].abs().sum() > 0
    assert loss.item() == pytest.approx(info_nce(q, d[[0, 2]], torch.tensor([0]), 0.05).item())


def test_info_nce_with_only_the_positive_left_is_zero():
    q, d = unit(2, 4), unit(2, 4, seed=1)
    assert info_nce(q, d, torch.tensor([0, 1]), 0.05, ~torch.eye(2, dtype=torch.bool)).item() == 0


def test_info_nce_does_not_depend_on_the_order_of_the_documents():
    q, d, target = unit(4, 8), unit(7, 8, seed=1), torch.tensor([0, 3, 6, 3])
    order = torch.tensor([3, 0, 6, 5, 4, 1, 2])
    place = torch.argsort(order)
    assert info_nce(q, d[order], place[target], 0.05).item() == pytest.approx(info_nce(q, d, target, 0.05).item())


def test_info_nce_stays_finite_where_exp_would_overflow_in_fp32():
    q = unit(2, 4, dtype=torch.float32)
    loss = info_nce(q, torch.cat([-q, q]), torch.tensor([0, 1]), 0.005)
    assert loss.item() == pytest.approx(400, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    q, d, target = unit(4, 16, dtype=dtype), unit(8, 16, seed=1, dtype=dtype), torch.tensor([0, 2, 4, 6])
    loss = info_nce(q, d, target, 0.02)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(info_nce(q.double(), d.double(), target, 0.02).item(), rel=1e-5)
    logits, base, targets = random(5, 9, dtype=dtype), random(5, 9, seed=1, dtype=dtype), torch.arange(5)
    assert kl_to_base(logits, base).dtype == sft_cross_entropy(logits, targets).dtype == torch.float32
    assert triplet_margin(q, d[:4], d[4:]).dtype == torch.float32
    assert kl_to_base(logits, base).item() == pytest.approx(kl_to_base(logits.double(), base.double()).item(), rel=1e-5)


def test_autocast_does_not_round_the_cosines():
    q, d = unit(4, 64, dtype=torch.float32), unit(8, 64, seed=1, dtype=torch.float32)
    target = torch.arange(4)
    plain = info_nce(q, d, target, 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(q, d, target, 0.02), plain)


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), float("inf")])
def test_info_nce_refuses_a_temperature_not_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        info_nce(unit(1, 4), unit(2, 4), torch.tensor([0]), temperature)


@pytest.mark.parametrize(
    ("q", "d", "target", "mask", "message"),
    [
        (unit(4), unit(2, 4), [0], None, "q_BD must have 2 dimensions"),
        (unit(1, 4), unit(2, 5), [0], None, "4 dimensions but documents 5"),
        (unit(1, 4), unit(2, 4), [2], None, "target_B has 2, expected 0 to 1"),
        (unit(1, 4), unit(2, 4), [-1], None, "target_B has -1, expected 0 to 1"),
        (unit(1, 4), unit(2, 4), [0, 1], None, r"target_B must have the shape \(1,\)"),
        (unit(1, 4), unit(2, 4), [0.0], None, "target_B must be an integer"),
        (unit(1, 4), unit(2, 4), [0], [[True, False]], "the positive of query 0"),
        (unit(1, 4), unit(2, 4), [0], [[False]], r"mask_BN must have the shape \(1, 2\)"),
        (unit(1, 4), unit(2, 4), [0], [[0, 1]], "mask_BN must be a boolean"),
        (unit(1, 4).long(), unit(2, 4), [0], None, "q_BD must be a float"),
        (unit(0, 4), unit(2, 4), [], None, "at least one query"),
    ],
)
def test_info_nce_names_what_is_wrong(q, d, target, mask, message):
    with pytest.raises(ValueError, match=message):
        info_nce(q, d, torch.tensor(target), 0.05, None if mask is None else torch.tensor(mask))


# --- triplet


def test_triplet_equals_torchs_own_with_cosine_distance():
    q, positive, negative = unit(5, 8), unit(5, 8, seed=1), unit(5, 8, seed=2)
    peer = torch.nn.TripletMarginWithDistanceLoss(
        distance_function=lambda a, b: 1 - F.cosine_similarity(a, b), margin=0.15
    )
    assert triplet_margin(q, positive, negative).item() == pytest.approx(peer(q, positive, negative).item())


def test_triplet_averages_over_the_negatives_that_are_there():
    q, positive, negatives = unit(2, 4), unit(2, 4, seed=1), unit(2, 3, 4, seed=2)
    missing = torch.tensor([[False, True, True], [False, False, True]])
    negatives[missing] = torch.nan  # whatever stands in a missing row must not matter
    values = [max(0.0, (q[b] @ negatives[b, k] - q[b] @ positive[b]).item() + 0.5) for b, k in [(0, 0), (1, 0), (1, 1)]]
    assert triplet_margin(q, positive, negatives, 0.5, missing).item() == pytest.approx(np.mean(values))


def test_triplet_gradient_equals_finite_differences():
    # Seeds chosen away from the kink of max(0, .): a margin of 3 keeps every pair active, 0 splits them.
    q, positive, negatives = (unit(3, 4), unit(3, 4, seed=1), unit(3, 2, 4, seed=2))
    inputs = tuple(tensor.requires_grad_() for tensor in (q, positive, negatives))
    for margin in (3.0, 0.0):
        assert torch.autograd.gradcheck(lambda q, p, n, m=margin: triplet_margin(q, p, n, m), inputs)


@pytest.mark.parametrize(("nearer", "expected"), [("positive", 0.0), ("negative", 2.15)])
def test_triplet_at_its_ends(nearer, expected):
    q = unit(2, 4)
    positive, negative = (q, -q) if nearer == "positive" else (-q, q)
    assert triplet_margin(q, positive, negative).item() == pytest.approx(expected)


def test_triplet_with_no_negative_left_is_a_zero_that_can_be_backpropagated():
    q = unit(2, 4).requires_grad_()
    for negatives, mask in [(unit(2, 4), torch.ones(2, dtype=torch.bool)), (torch.zeros(2, 0, 4).double(), None)]:
        loss = triplet_margin(q, unit(2, 4, seed=1), negatives, mask_BK=mask)
        loss.backward()
        assert loss.item() == 0
        assert q.grad is not None
        assert q.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive_BD": unit(3, 4)}, "positive_BD must have the queries' shape"),
        ({"negative_BD": unit(2, 5)}, "negatives must have the shape"),
        ({"negative_BD": unit(3, 2, 4)}, "negatives must have the shape"),
        ({"margin": -0.1}, "margin must be"),
        ({"mask_BK": torch.zeros(2, 3, dtype=torch.bool)}, "mask_BK must have the shape"),
    ],
)
def test_triplet_names_what_is_wrong(change, message):
    arguments = {"q_BD": unit(2, 4), "positive_BD": unit(2, 4), "negative_BD": unit(2, 4)} | change
    with pytest.raises(ValueError, match=message):
        triplet_margin(**arguments)


# --- cross-entropy


def test_cross_entropy_is_the_mean_over_kept_positions():
    logits, targets = random(4, 7), torch.tensor([3, -100, 0, 6])
    keep = torch.tensor([True, False, True, True])
    log_p = logits.numpy() - np.log(np.exp(logits.numpy()).sum(-1, keepdims=True))
    expected = -np.mean([log_p[0, 3], log_p[2, 0], log_p[3, 6]])
    assert sft_cross_entropy(logits, targets, keep).item() == pytest.approx(expected)
    assert sft_cross_entropy(logits, targets, keep).item() == pytest.approx(F.cross_entropy(logits, targets).item())


def test_cross_entropy_gradient_equals_finite_differences():
    keep, targets = torch.tensor([True, False, True]), torch.tensor([1, 9, 0])
    logits = random(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: sft_cross_entropy(logits, targets, keep), (logits,))


@pytest.mark.parametrize("loss", [sft_cross_entropy, kl_to_base])
def test_nothing_kept_is_a_zero_that_can_be_backpropagated(loss):
    logits = random(3, 5).requires_grad_()
    other = torch.zeros(3, dtype=torch.long) if loss is sft_cross_entropy else random(3, 5, seed=1)
    value = loss(logits, other, torch.zeros(3, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("targets", "keep", "message"),
    [
        ([0, 5], None, "targets_T has 5, expected 0 to 4"),
        ([0, -100], None, "targets_T has -100"),
        ([0], None, r"targets_T must have the shape \(2,\)"),
        ([0, 1], [True], r"keep_T must have the shape \(2,\)"),
        ([0, 1], [1, 0], "keep_T must be a boolean"),
    ],
)
def test_cross_entropy_names_what_is_wrong(targets, keep, message):
    with pytest.raises(ValueError, match=message):
        sft_cross_entropy(random(2, 5), torch.tensor(targets), None if keep is None else torch.tensor(keep))


# --- KL


def test_kl_equals_torchs_own():
    logits, base = random(6, 9), random(6, 9, seed=1)
    expected = F.kl_div(base.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean")
    assert kl_to_base(logits, base).item() == pytest.approx(expected.item())


def test_excluded_ids_are_as_if_the_vocabulary_never_had_them():
    logits, base, keep = random(4, 6), random(4, 6, seed=1), torch.tensor([True, True, False, True])
    logits[:, 2], base[:, 2], base[:, 5] = 50.0, -60.0, float("-inf")
    rest = [0, 1, 3, 4]
    expected = kl_to_base(logits[:, rest], base[:, rest], keep).item()
    assert kl_to_base(logits, base, keep, exclude_ids=[5, 2, 2]).item() == pytest.approx(expected)


def test_kl_gradient_equals_finite_differences_and_excluded_ids_get_none():
    base, keep = random(3, 6, seed=1), torch.tensor([True, False, True])
    logits = random(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: kl_to_base(logits, base, keep, exclude_ids=(4,)), (logits,))
    kl_to_base(logits, base, keep, exclude_ids=(4,)).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[:, 4].abs().sum() == 0
    assert logits.grad[1].abs().sum() == 0


def test_no_gradient_flows_into_the_base():
    logits, base = random(3, 6).requires_grad_(), random(3, 6, seed=1).requires_grad_()
    kl_to_base(logits, base).backward()
    assert base.grad is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 30), shift=st.floats(-50, 50))
def test_kl_is_never_negative_and_blind_to_a_shift_of_the_logits(seed, scale, shift):
    logits, base = scale * random(4, 8, seed=seed), scale * random(4, 8, seed=seed + 1)
    value = kl_to_base(logits, base).item()
    assert value >= -1e-12
    assert kl_to_base(logits + shift, base - shift).item() == pytest.approx(value, abs=1e-8)
    assert kl_to_base(logits, logits + shift).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("base", "exclude", "message"),
    [
        (random(2, 4), (), "base_logits_TV must have the tuned logits' shape"),
        (random(2, 5), (5,), "exclude_ids has 5"),
        (random(2, 5), (-1,), "exclude_ids has -1"),
        (random(2, 5), range(5), "removes all 5 ids"),
    ],
)
def test_kl_names_what_is_wrong(base, exclude, message):
    with pytest.raises(ValueError, match=message):
        kl_to_base(random(2, 5), base, exclude_ids=exclude)

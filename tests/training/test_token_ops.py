"""The compiled operations against torch's, on rows of several lengths; and torch's as the fallback."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from search_r3.training.kernels import token_ops as module
from search_r3.training.kernels.token_ops import CompiledOps, Group, Rotary, TokenOps, token_ops

pytest.importorskip("numba")
EPS, SCALE, PREFIX = 1e-5, 0.3, 3
HEADS, GROUPS, DIM = 2, 3, 8
TOLERANCE = {torch.float32: {"atol": 2e-6, "rtol": 2e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def both(dtype: torch.dtype) -> tuple[TokenOps, TokenOps]:
    compiled = token_ops(torch.device("cpu"), dtype, torch.float32)
    assert isinstance(compiled, CompiledOps)
    return TokenOps(), compiled


def group() -> Group:
    return Group(np.array([0, 6, 10]), np.array([6, 4, 1]), longest=6, keys=16)


def rotary() -> Rotary:
    angle = torch.rand(6, DIM // 2) * 6
    sin = angle.sin()
    return Rotary(torch.cat([angle.cos()] * 2, 1), torch.cat([-sin, sin], 1))


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.float(), expected.float(), **TOLERANCE[dtype])


@pytest.mark.parametrize("with_low", [False, True])
def test_rms_norm_and_its_gradient(both: tuple[TokenOps, TokenOps], dtype: torch.dtype, with_low: bool) -> None:
    hidden, past, weight = torch.randn(5, 24), torch.randn(5, 24), torch.rand(24)
    delta, dy = torch.randn(5, 24).to(dtype), torch.randn(5, 28).to(dtype)
    low = torch.randn(5, 24).to(dtype) if with_low else None
    found = []
    for ops in both:
        x, y = (torch.full((5, 28), torch.nan, dtype=dtype) for _ in range(2))
        total, plain, dhidden = (torch.empty(5, 24) for _ in range(3))
        ops.norm(hidden, weight, EPS, x)
        ops.add_norm(hidden, delta, weight, EPS, total, y)
        ops.add(hidden, delta, plain)
        ops.norm_backward(dy, low, hidden, weight, EPS, past, dhidden)
        assert not x[:, 24:].any()
        torch.testing.assert_close(plain, total)
        found.append((x, y, total, dhidden, ops.convert(hidden, dtype)))
    for expected, got in zip(*found, strict=True):
        close(got, expected, dtype)
    free = hidden.clone().requires_grad_(True)
    out = torch.nn.functional.rms_norm(free, (24,), weight, EPS)
    (out * (dy[:, :24].float() + (0 if low is None else low.float()))).sum().backward()
    assert free.grad is not None
    close(found[1][3], free.grad + past, torch.float32)


@pytest.mark.parametrize("with_low", [False, True])
def test_swiglu_and_its_gradient(both: tuple[TokenOps, TokenOps], dtype: torch.dtype, with_low: bool) -> None:
    gate_up, dact = (4 * torch.randn(5, 40)).to(dtype), torch.randn(5, 23).to(dtype)
    low = torch.randn(5, 20).to(dtype) if with_low else None
    found = []
    for ops in both:
        act = torch.full((5, 23), torch.nan, dtype=dtype)
        ops.swiglu(gate_up, act)
        assert not act[:, 20:].any()
        dgate_up, again = ops.swiglu_backward(dact, low, gate_up)
        found.append((act, dgate_up, again))
        close(again, act[:, :20], dtype)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got.float(), expected.float(), atol=TOLERANCE[dtype]["atol"] * 4, rtol=2e-2)


def test_extreme_gates_give_finite_results(both: tuple[TokenOps, TokenOps], dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, *[1.0] * 5]]).to(dtype)
    act = torch.empty(1, 5, dtype=dtype)
    both[1].swiglu(gate_up, act)
    torch.testing.assert_close(act.float(), torch.tensor([[0.0, 0.0, 0.0, 90.0, 1e4]]), atol=1e-6, rtol=1e-2)


def test_heads_are_packed_with_the_prefix_s_and_unpacked(both: tuple[TokenOps, TokenOps], dtype: torch.dtype) -> None:
    width = HEADS * (GROUPS + 2) * DIM
    qkv, before = torch.randn(11, width).to(dtype), torch.randn(2, HEADS, PREFIX, DIM).to(dtype)
    tables, some = rotary(), group()
    gradients = [torch.randn(3, HEADS, *size, DIM).to(dtype) for size in ((GROUPS, 6), (16,), (16,))]
    found = []
    for ops in both:
        query, key, value = ops.pack_heads(qkv, tables, before, some, GROUPS)
        assert not query[1, :, :, 4:].any()
        assert not key[1, :, PREFIX + 4 :].any()
        out = torch.full((11, HEADS * GROUPS * DIM + 2), torch.nan, dtype=dtype)
        ops.unpack_heads(query, some, out)
        assert not out[:, -2:].any()
        dqkv = torch.full_like(qkv, torch.nan)
        dbefore = torch.ones(2, HEADS, PREFIX, DIM)
        ops.unpack_gradient(*gradients, tables, some, dqkv, dbefore)
        found.append((query, key, value, out, dqkv, dbefore))
    for expected, got in zip(*found, strict=True):
        close(got, expected, dtype)


@pytest.mark.parametrize("with_low", [False, True])
def test_the_gradient_of_attention_s_output_is_packed(
    both: tuple[TokenOps, TokenOps], dtype: torch.dtype, with_low: bool
) -> None:
    width = HEADS * GROUPS * DIM
    dx, low = torch.randn(11, width + 2).to(dtype), torch.randn(11, width).to(dtype) if with_low else None
    like = torch.empty(3, HEADS, GROUPS, 6, DIM, dtype=dtype)
    expected, got = (ops.pack_gradient(dx, low, group(), like) for ops in both)
    assert not got[2, :, :, 1:].any()
    close(got, expected, dtype)


def test_softmax_is_causal_after_the_prefix(both: tuple[TokenOps, TokenOps], dtype: torch.dtype) -> None:
    scores = (4 * torch.randn(3, HEADS, GROUPS, 6, 16)).to(dtype)
    dshare = torch.randn_like(scores)
    found = []
    for ops in both:
        share, gradient = scores.clone(), dshare.clone()
        ops.softmax_(share, group(), PREFIX, SCALE)
        assert not share[0, 0, 0, 2, PREFIX + 3 :].any()
        assert not share[1, :, :, 4:].any()
        torch.testing.assert_close(share[0].float().sum(-1), torch.ones(HEADS, GROUPS, 6), atol=1e-2, rtol=0)
        ops.softmax_backward_(gradient, share, group(), PREFIX, SCALE)
        found.append((share, gradient))
    for expected, got in zip(*found, strict=True):
        close(got, expected, dtype)


def test_cross_entropy_and_its_gradient(both: tuple[TokenOps, TokenOps], dtype: torch.dtype) -> None:
    logits, target = (3 * torch.randn(4, 50)).to(dtype), torch.tensor([0, 49, 7, 7])
    found = []
    for ops in both:
        gradient, loss = logits.clone(), torch.empty(4)
        ops.cross_entropy_(gradient, target, loss)
        found.append((gradient, loss))
    for expected, got in zip(*found, strict=True):
        close(got, expected, dtype)
    free = logits.float().requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(free, target, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(found[1][1], expected.detach(), atol=1e-5, rtol=1e-5)
    assert free.grad is not None
    close(found[1][0], free.grad, dtype)


def test_nan_and_infinity_stay(both: tuple[TokenOps, TokenOps], dtype: torch.dtype) -> None:
    x = torch.tensor([[torch.nan, torch.inf, 1.0]])
    assert torch.equal(both[1].convert(x, dtype).isfinite(), x.isfinite())
    out = torch.empty(1, 3, dtype=dtype)
    both[1].norm(x, torch.ones(3), EPS, out)
    assert out.isnan().any()


def test_other_devices_dtypes_and_a_missing_numba_get_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert type(token_ops(torch.device("meta"), torch.float32, torch.float32)) is TokenOps
    assert type(token_ops(cpu, torch.float16, torch.float32)) is TokenOps
    assert type(token_ops(cpu, torch.float64, torch.float64)) is TokenOps
    monkeypatch.setattr(module, "_compiled_kernels", lambda: None)
    assert type(token_ops(cpu, torch.float32, torch.float32)) is TokenOps

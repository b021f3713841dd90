"""The parts of a pass of few tokens compute what the plain formulas say (test_int8_engine.py has the whole)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("numba")
from search_r3.model.engines.int8 import amx, avx512, decode_kernels

if not avx512.runs_here():
    pytest.skip("the processor has no AVX-512BW: the engine decodes without this", allow_module_level=True)
decode_kernels.compile_decode()


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def as_bytes(x: np.ndarray) -> np.ndarray:
    """16-bit rows as `product` takes them for tiles: high and low bytes, up to a whole tile of rows."""
    high = (x.astype(np.int32) + 128) >> 8
    rows = -(-len(x) // amx.ROWS) * amx.ROWS
    return np.pad(np.stack([high, x - (high << 8)]).astype(np.int8), ((0, 0), (0, rows - len(x)), (0, 0)))


def outputs(x: np.ndarray, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out, room = np.zeros((len(x), len(w)), dtype=np.float32), np.empty(x.shape, dtype=np.int16)
    sums = np.empty(out.shape, dtype=np.int32)
    best, scales = np.empty((len(x), len(w) // 4), dtype=np.float32), np.empty(len(x), dtype=np.float32)
    decode_kernels.outputs(x, w, scale, out, best, room, scales, sums, 0, 1, 0)
    assert np.array_equal(best, out.reshape(len(x), -1, 4).max(2))
    return out


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_the_product_is_exact(random: np.random.Generator, rows: int) -> None:
    for outputs, inputs in ((4, 32), (12, 96), (64, 576)):
        x = random.integers(-20_000, 20_001, (rows, inputs)).astype(np.int16)
        w = random.integers(-127, 128, (outputs, inputs)).astype(np.int8)
        y = np.zeros((rows, outputs), dtype=np.int32)
        decode_kernels.product(x, rows, w, y, 0, 1)
        assert np.array_equal(y, x.astype(np.int64) @ w.T.astype(np.int64))


@pytest.mark.skipif(not amx.runs_here(), reason="the processor has no AMX: products are made without tiles")
@pytest.mark.parametrize("rows", [1, 5, 15, 16, 17, 33, 48])
@pytest.mark.parametrize("shares", [1, 3])
def test_the_product_of_tiles_is_exact(random: np.random.Generator, rows: int, shares: int) -> None:
    for outputs, inputs in ((32, 64), (96, 192), (64, 576)):
        x = random.integers(-32_639, 32_640, (rows, inputs)).astype(np.int16)
        x[0, :8] = -32_639, -32_513, -129, -128, 127, 128, 32_511, 32_639  # where a byte's rounding turns
        w = random.integers(-127, 128, (3, outputs, inputs)).astype(np.int8)
        y = np.zeros((rows, outputs), dtype=np.int32)
        for layer, laid_out in zip(w, amx.lay_out(w), strict=True):
            for share in range(shares):
                decode_kernels.product(as_bytes(x), rows, laid_out, y, share, shares)
            assert np.array_equal(y, x.astype(np.int64) @ layer.T.astype(np.int64))


@pytest.mark.parametrize("inputs", [32, 576, 1536, 18_944])
def test_no_sum_leaves_32_bits(inputs: int) -> None:
    """All weights at their largest, all activations too: the sum that a careless number of levels would overflow."""
    w = np.full((4, inputs), 127, dtype=np.int8)
    w[1] = -127
    out = outputs(np.full((1, inputs), 3.0, dtype=np.float32), w, np.full(4, 0.5, dtype=np.float32))
    expected = 3.0 * 127 * 0.5 * inputs
    assert np.allclose(out[0], expected * np.array([1, -1, 1, 1]), rtol=1e-3)


def test_the_outputs_are_finer_than_int8(random: np.random.Generator) -> None:
    x = random.standard_normal((3, 96)).astype(np.float32)
    x[:, 5] *= 50  # one that makes a step of int8 coarse for the rest
    w = random.integers(-127, 128, (8, 96)).astype(np.int8)
    scale = random.random(8).astype(np.float32)
    out = outputs(x, w, scale)
    exact = x @ (w * scale[:, None]).T
    assert np.abs(out - exact).max() < 1e-3 * np.abs(exact).max()


def test_a_row_of_zeros_gives_zeros() -> None:
    w = np.ones((4, 32), dtype=np.int8)
    assert not outputs(np.zeros((2, 32), dtype=np.float32), w, np.ones(4, dtype=np.float32)).any()


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("shared", [0, 3])
def test_attention_is_causal_and_leaves_out_what_is_hidden(
    random: np.random.Generator, new: int, hidden: bool, dim: int, shared: int
) -> None:
    size, heads, groups, start = 2, 3, 2, 5
    query = random.standard_normal((size * new, heads, groups, dim)).astype(np.float32)
    keys, values = (random.standard_normal((size, heads, start + new + 4, dim)).astype(np.float32) for _ in range(2))
    keys[1, :, :shared], values[1, :, :shared] = keys[0, :, :shared], values[0, :, :shared]
    keys[:, :, start + new :] = np.nan  # what lies behind is never read
    values[:, :, start + new :] = np.nan
    seen = np.ones((size, start + new), dtype=np.uint8)
    seen[1, 2:4] = 0
    out = np.empty((size * new, heads * groups * dim), dtype=np.float32)
    shown = seen if hidden else np.empty((0, 0), dtype=np.uint8)
    decode_kernels.attend(query, keys, values, start, new, 0, shared, shown, out)
    causal = torch.ones(new, start + new, dtype=torch.bool).tril(start)
    mask = causal & torch.from_numpy(seen).bool()[:, None] if hidden else causal.expand(size, -1, -1)
    whole = torch.from_numpy(query).view(size, new, heads * groups, dim).transpose(1, 2)
    key, value = (torch.from_numpy(x[:, :, : start + new]).repeat_interleave(groups, 1) for x in (keys, values))
    expected = functional.scaled_dot_product_attention(whole, key, value, attn_mask=mask[:, None])
    assert np.allclose(out, expected.transpose(1, 2).reshape(size * new, -1).numpy(), atol=1e-5)

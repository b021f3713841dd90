"""The one-pass kernels between the int8 products compute what the plain formulas say."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")
from search_r3.model.engines.int8 import elementwise_kernels

elementwise_kernels.compile_kernels()
NONE = np.empty(0, dtype=np.float32)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    """float32, some rows a hundred times as large as others."""
    rows = random.standard_normal(shape) * random.choice([0.1, 1.0, 10.0], size=(shape[0], *[1] * (len(shape) - 1)))
    return rows.astype(np.float32)


def room(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((rows, width), 99, dtype=np.int8), np.full(rows, 99, dtype=np.float32)


def check(q: np.ndarray, scale: np.ndarray, expected: np.ndarray) -> None:
    """Every row is `expected` to half a step, and its largest entry uses the whole of int8."""
    assert (np.abs(q * scale[:, None] - expected).max(1) <= 0.501 * scale).all()
    assert (np.abs(q.astype(int)).max(1) == 127).all()


def test_a_row_is_rounded_to_half_a_step(random: np.random.Generator) -> None:
    x = draw(random, 9, 41)
    q, scale = room(9, 41)
    elementwise_kernels.quantize(x, q, scale)
    check(q, scale, x)


def test_a_row_of_zeros_stays_zero() -> None:
    q, scale = room(2, 5)
    elementwise_kernels.quantize(np.zeros((2, 5), dtype=np.float32), q, scale)
    assert not q.any()
    assert not scale.any()


@pytest.mark.parametrize("biased", [False, True])
def test_adding_and_normalizing_in_one_pass(random: np.random.Generator, biased: bool) -> None:
    x, y, weight, bias = draw(random, 7, 40), draw(random, 7, 40), draw(random, 1, 40)[0], draw(random, 1, 40)[0]
    y_scale = random.random(7).astype(np.float32)
    added = x + y * y_scale[:, None] + (bias if biased else 0)
    expected = added / np.sqrt((added**2).mean(1, keepdims=True) + 1e-5) * weight
    (q, scale), (fine, _) = room(7, 40), room(7, 40) if biased else (np.empty((0, 0), dtype=np.int8), None)
    elementwise_kernels.add_norm_quantize(
        x, y, y_scale, bias if biased else NONE, weight, np.float32(1e-5), q, fine, scale
    )
    assert np.allclose(x, added, rtol=1e-5, atol=1e-5)
    check(q, scale, expected)
    if fine.size:
        assert (np.abs((q + fine / elementwise_kernels.FINE) * scale[:, None] - expected).max(1) <= 0.01 * scale).all()


@pytest.mark.parametrize("biased", [False, True])
def test_queries_and_keys_are_turned_and_values_are_not(random: np.random.Generator, biased: bool) -> None:
    """Two rows of three tokens; two key-value heads of two query heads each, of four numbers."""
    y, bias, angle = draw(random, 6, 8 * 4), draw(random, 1, 8 * 4)[0], draw(random, 6, 4)
    scale = random.random(6).astype(np.float32)
    scaled = (y * scale[:, None] + (bias if biased else 0)).reshape(2, 3, 8, 4)
    halves = np.concatenate([-scaled[..., 2:], scaled[..., :2]], -1)
    turned = scaled * np.cos(angle).reshape(2, 3, 1, 4) + halves * np.sin(angle).reshape(2, 3, 1, 4)
    query, keys, values = np.empty((2, 2, 2, 3, 4), np.float32), *np.full((2, 2, 2, 9, 4), 7, np.float32)
    elementwise_kernels.rotate(y, scale, bias if biased else NONE, np.cos(angle), np.sin(angle), query, keys, values, 5)
    assert np.allclose(query.reshape(2, 4, 3, 4), turned[:, :, :4].transpose(0, 2, 1, 3), rtol=1e-5, atol=1e-5)
    assert np.allclose(keys[:, :, 5:8], turned[:, :, 4:6].transpose(0, 2, 1, 3), rtol=1e-5, atol=1e-5)
    assert np.allclose(values[:, :, 5:8], scaled[:, :, 6:].transpose(0, 2, 1, 3), rtol=1e-5, atol=1e-5)
    assert (np.delete(keys, [5, 6, 7], 2) == 7).all()
    assert (np.delete(values, [5, 6, 7], 2) == 7).all()


def test_attentions_heads_are_put_into_rows(random: np.random.Generator) -> None:
    """Two rows of three tokens, three key-value heads of two query heads each."""
    x = draw(random, 2, 2, 3, 3, 4)  # rows, query heads of a key-value head, tokens, key-value heads, numbers
    q, scale = room(6, 3 * 2 * 4)
    elementwise_kernels.quantize_heads(np.ascontiguousarray(x.reshape(2, 6, 3, 4)), q, scale)
    check(q, scale, x.transpose(0, 2, 3, 1, 4).reshape(6, 24))


def test_the_gate_is_silu(random: np.random.Generator) -> None:
    y = draw(random, 6, 2 * 37)
    y_scale = np.array([0.01, 0.5, 1, 2, 5, 20], dtype=np.float32)  # gates of -600 to 600 among them
    gate, up = np.split(y.astype(np.float64) * y_scale[:, None], 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    (q, scale), (fine, _) = room(6, 37), room(6, 37)
    elementwise_kernels.gate_quantize(y, y_scale, q, fine, scale)
    assert np.allclose(y[:, :37], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(1, keepdims=True))
    check(q, scale, expected)
    exact = (q + fine / elementwise_kernels.FINE) * scale[:, None]
    assert (np.abs(exact - expected).max(1) <= 0.01 * scale).all()

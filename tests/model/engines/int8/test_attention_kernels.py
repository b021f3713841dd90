"""Attention by blocks equals torch's, and a token's result depends on nothing but what it sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("numba")
from search_r3.model.engines.int8 import attention_kernels

if not attention_kernels.compile_attention():
    pytest.skip("the processor has no AVX-512BW: the engine attends by torch", allow_module_level=True)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def attended(query: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int) -> np.ndarray:
    size, heads, groups, new, dim = query.shape
    out = np.full((size, groups * new, heads, dim), np.nan, dtype=np.float32)
    attention_kernels.attend(query, keys, values, start, out)
    return out


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("new", [2, 7, 8, 9, 16, 33, 100])
@pytest.mark.parametrize("start", [0, 1, 31, 32, 45])
def test_it_equals_torchs_attention(random: np.random.Generator, new: int, start: int) -> None:
    for heads, groups, dim in ((3, 3, 64), (1, 1, 64), (2, 4, 128)):
        query = normal(random, 2, heads, groups, new, dim)
        keys, values = (normal(random, 2, heads, start + new + 3, dim) for _ in range(2))
        keys[:, :, start + new :] = np.nan  # columns that are allocated, but not written yet
        values[:, :, start + new :] = np.nan
        seen = torch.ones(new, start + new, dtype=torch.bool).tril(start).repeat(groups, 1)
        expected = functional.scaled_dot_product_attention(
            torch.from_numpy(query).flatten(2, 3),
            torch.from_numpy(keys)[:, :, : start + new],
            torch.from_numpy(values)[:, :, : start + new],
            attn_mask=seen,
        )
        assert np.allclose(attended(query, keys, values, start), expected.transpose(1, 2).numpy(), atol=2e-6)


def test_later_tokens_and_other_rows_change_nothing(random: np.random.Generator) -> None:
    query, keys, values = normal(random, 3, 2, 3, 29, 64), normal(random, 3, 2, 40, 64), normal(random, 3, 2, 40, 64)
    whole = attended(query, keys, values, 11).reshape(3, 3, 29, 2, 64)
    for new in (3, 8, 13):
        alone = attended(query[1:2, :, :, :new].copy(), keys[1:2], values[1:2], 11).reshape(3, new, 2, 64)
        assert np.array_equal(alone, whole[1, :, :new])


def test_large_scores_do_not_overflow(random: np.random.Generator) -> None:
    query, keys, values = normal(random, 1, 1, 1, 12, 64), normal(random, 1, 1, 12, 64), normal(random, 1, 1, 12, 64)
    out = attended(query * 1e3, keys * 1e3, values, 0)
    assert np.isfinite(out).all()
    best = np.where(np.tri(12, dtype=bool), query[0, 0, 0] @ keys[0, 0].T, -np.inf).argmax(1)
    assert np.allclose(out[0, :, 0], values[0, 0][best])


def test_only_heads_of_whole_spans_are_taken() -> None:
    assert attention_kernels.takes(64)
    assert attention_kernels.takes(128)
    assert not attention_kernels.takes(16)

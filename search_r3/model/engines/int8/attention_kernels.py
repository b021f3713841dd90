"""Causal attention of many new tokens, by blocks: float32, one thread, compiled by numba like `elementwise_kernels`.

torch's attention takes a mask, so it computes what the mask hides as well, and on small heads it reaches a third of the
processor's float32 speed. Here `ROWS` queries of a head, of tokens that follow each other, are multiplied at once by
`COLUMNS` keys that stay in registers, up to the last column that they see. A row's result does not depend on its block
or its batch, to the last bit.

Letters in shapes: B rows of L new tokens; T columns of the cache, K key-value heads of G query heads each, E dimension
of a head, Q = G * L.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from search_r3.model.engines.int8 import avx512, decode_kernels, elementwise_kernels
from search_r3.model.engines.int8.avx512 import SPAN

ROWS = 8
"""Queries that are processed together."""
COLUMNS = 32
"""Keys whose products with a block of queries are computed together."""
ONE, ZERO = np.float32(1), np.float32(0)
_COMPILED = ("_tiles", "_softmax", "_attend_head", "attend")
_larger: Any = max
_exp: Any = None
_scores: Any = None
_scores_of_one: Any = None
_weighted: Any = None
_weighted_of_one: Any = None


def compile_attention() -> bool:
    """Replace the functions of this module by compiled ones, once. Returns whether this processor runs them."""
    if not avx512.runs_here():
        return False
    names = globals()
    if names["_scores"] is None:
        decode_kernels.compile_decode()
        names |= {"_larger": elementwise_kernels.larger, "_exp": decode_kernels._exp}
        names |= {"_scores": scores_intrinsic(ROWS), "_scores_of_one": scores_intrinsic(1)}
        names |= {"_weighted": weighted_intrinsic(ROWS // 2), "_weighted_of_one": weighted_intrinsic(1)}
        for name in _COMPILED:
            names[name] = elementwise_kernels.compiled(names[name])
    return True


def takes(head_dim: int) -> bool:
    """Whether `attend` can be called for heads of this dimension."""
    return _scores is not None and head_dim % SPAN == 0


def attend(query_BKGLE, keys_BKTE, values_BKTE, start, out_BQKE):
    """Softmax attention of each new token to the columns up to its own, `start` + its number; writes `out`.

    All arrays are float32, and contiguous in their last two dimensions.
    """
    size, heads, groups, new, dim = query_BKGLE.shape
    end = start + new
    tiles_XEC = np.empty(((end + COLUMNS - 1) // COLUMNS, dim, COLUMNS), np.float32)
    score_RT = np.empty((ROWS, tiles_XEC.shape[0] * COLUMNS), np.float32)
    for b in range(size):
        for k in range(heads):
            _tiles(keys_BKTE[b, k], end, tiles_XEC)
            for g in range(groups):
                out_LE = out_BQKE[b, g * new : (g + 1) * new, k]
                _attend_head(query_BKGLE[b, k, g], tiles_XEC, values_BKTE[b, k], start, score_RT, out_LE)


def _tiles(keys_TE, end, tiles_XEC):
    """The first `end` keys, divided by the root of their dimension, transposed in tiles of `COLUMNS`; then zeros."""
    dim = keys_TE.shape[1]
    factor = ONE / np.sqrt(np.float32(dim))
    for x in range(tiles_XEC.shape[0]):
        for c in range(COLUMNS):
            t = x * COLUMNS + c
            for e in range(dim):
                tiles_XEC[x, e, c] = keys_TE[t, e] * factor if t < end else ZERO


def _attend_head(query_LE, tiles_XEC, values_TE, start, score_RT, out_LE):
    """Attention of one head's queries, `ROWS` at a time; the last block may repeat some of the one before."""
    new, dim = query_LE.shape
    four, wide = np.int64(4), np.int64(score_RT.shape[1])
    tile, tile_size = np.int64(tiles_XEC.ctypes.data), np.int64(4 * COLUMNS * dim)
    scores, values = np.int64(score_RT.ctypes.data), np.int64(values_TE.ctypes.data)
    query, out = np.int64(query_LE.ctypes.data), np.int64(out_LE.ctypes.data)
    query_step, out_step = np.int64(query_LE.strides[0]), np.int64(out_LE.strides[0])
    value_step, wide_step = np.int64(values_TE.strides[0]), four * wide
    total_R = np.empty(ROWS, np.float32)
    rows = ROWS if new >= ROWS else 1
    for first in range(0, new, rows):
        l = min(first, new - rows)  # noqa: E741  # the letter of the shapes
        seen = start + l + rows
        for x in range((seen + COLUMNS - 1) // COLUMNS):
            at = scores + np.int64(4 * COLUMNS * x)
            if rows == ROWS:
                _scores(query + l * query_step, query_step, tile + x * tile_size, np.int64(dim), at, wide_step)
            else:
                _scores_of_one(query + l * query_step, query_step, tile + x * tile_size, np.int64(dim), at, wide_step)
        for r in range(rows):
            total_R[r] = _softmax(score_RT[r], start + l + r + 1, seen)
        for e in range(0, dim, SPAN):
            to, of = out + l * out_step + four * e, values + four * e
            if rows == ROWS:
                half = np.int64(ROWS // 2)
                _weighted(scores, wide_step, of, value_step, np.int64(seen), to, out_step)
                _weighted(
                    scores + half * wide_step, wide_step, of, value_step, np.int64(seen), to + half * out_step, out_step
                )
            else:
                _weighted_of_one(scores, wide_step, of, value_step, np.int64(seen), to, out_step)
        for r in range(rows):
            factor = ONE / total_R[r]
            for e in range(dim):
                out_LE[l + r, e] *= factor


def _softmax(score_T, count, seen):
    """Replace `count` scores by their exponentials, whose sum is returned, and those up to `seen` by zeros."""
    largest, total = np.float32(-3e38), ZERO
    for t in range(count):
        largest = _larger(largest, score_T[t])
    for t in range(count):
        share = _exp(score_T[t] - largest)
        score_T[t] = share
        total += share
    for t in range(count, seen):
        score_T[t] = ZERO
    return total


def scores_intrinsic(rows: int) -> Any:
    """Build a numba function (query, query_step, tile, dim, out, out_step): `rows` queries times a tile (E, `COLUMNS`).

    All arguments are addresses of float32, steps in bytes, and `dim`.
    """
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def scores(typing_context, query, query_step, tile, dim, out, out_step):
        def generate(context, builder, signature, arguments):
            query, query_step, tile, dim, out, out_step = arguments
            avx512.products(builder, rows, (query, query_step), (tile, 4 * COLUMNS), COLUMNS, dim, (out, out_step))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return scores


def weighted_intrinsic(rows: int) -> Any:
    """Build a numba function (weights, weights_step, values, values_step, count, out, out_step): `rows` rows of weights
    times `SPAN` dimensions of `count` values.

    All arguments are addresses of float32, steps in bytes, and `count`.
    """
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def weighted(typing_context, weights, weights_step, values, values_step, count, out, out_step):
        def generate(context, builder, signature, arguments):
            weights, weights_step, values, values_step, count, out, out_step = arguments
            left, right = (weights, weights_step), (values, values_step)
            avx512.products(builder, rows, left, right, SPAN, count, (out, out_step))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return weighted

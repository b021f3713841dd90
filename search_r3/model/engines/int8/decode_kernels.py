"""The decode kernel: a Llama's forward pass over a few new tokens in one call, int8 weights by 15-bit activations.

Purpose: a pass over few rows is limited by reading the weights and by calls (about twenty operations per layer, each of
which takes the GIL twice). Here the whole pass, `decode`, is one function compiled by numba that releases the GIL.

Threads: a team of threads (`thread_team`) runs it together, one per core. In a product each thread computes some of the
outputs, in everything else some of the tokens, with a barrier between the steps.

Precision: reading the weights leaves time for finer activations than int8, so they are int16, with as many levels as
keep the sum of a product within 32 bits. Of int8's error, only the rounding of the weights remains. The products come
from `amx` if the processor has tiles, else from `avx512`; both are exact, so they agree to the last bit.

Compilation: as in `elementwise_kernels`, `compile_decode` replaces the functions of this module by compiled ones on
first use; names that are None below are set then.

Letters in shapes: P parts, each B rows of L new tokens; N tokens of all parts, D width of a token, I inputs, O outputs,
C columns of queries, keys and values, E dimension of a head, F width of the MLP, A layers; T columns of the cache, K
key-value heads of G query heads each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from search_r3.model.engines.int8 import amx, avx512, elementwise_kernels, thread_team
from search_r3.model.engines.int8.amx import ROWS, TILE
from search_r3.model.engines.int8.avx512 import OUTPUTS, PIECE, SPAN

ZERO, HALF = np.float32(0), np.float32(0.5)
_COMPILED = (
    "_levels", "_rounded", "_quantize", "_product_rows", "_product_tiles", "product", "outputs", "_exp", "_add",
    "_norm_quantize", "_rotate", "_scores", "_weighted_sum", "_visible", "attend", "_gate", "_range", "_wait", "decode",
)  # fmt: skip
_larger: Any = max
_rotate_head: Any = None
_power_of_two: Any = np.exp2
_pointer: Any = None
_carray: Any = None
_one: Any = None
_two: Any = None
_four: Any = None
_barrier: Any = None
_dots: Any = None
_weighted: Any = None
_CONFIGURATION = amx.configuration()
_tiles: Any = None
_configure: Any = None


def compile_decode() -> None:
    """Replace the functions of this module by compiled ones, once."""
    from numba import carray

    names = globals()
    if names["_four"] is not None:
        return
    elementwise_kernels.compile_kernels()
    names |= {"_larger": elementwise_kernels.larger, "_rotate_head": elementwise_kernels.rotate_head, "_carray": carray}
    names |= {"_power_of_two": avx512.power_of_two_intrinsic(), "_pointer": avx512.pointer_intrinsic()}
    names |= {
        "_one": avx512.block_intrinsic(1),
        "_two": avx512.block_intrinsic(2),
        "_four": avx512.block_intrinsic(4),
        "_tiles": amx.tiles_intrinsic(),
        "_configure": amx.configure_intrinsic(),
        "_barrier": thread_team.barrier_intrinsic(),
        "_dots": avx512.dots_intrinsic(),
        "_weighted": avx512.weighted_intrinsic(),
    }
    for name in _COMPILED:
        names[name] = elementwise_kernels.compiled(names[name])


def _exp(x):
    """exp(x) for x <= 0, to within a few units in the last place of float32: Cephes' expf without branches."""
    x = _larger(x, np.float32(-80))  # below this, floats are subnormal and slow
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = r * np.float32(1.9875691500e-4) + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1)) * _power_of_two(np.int32(n))


def _levels(inputs):
    """The largest level of activations: sums of products with 127 must fit in 32 bits, and high bytes in 8."""
    return np.float32(min(127 * 256 + 127, (2**31 - 1) // (127 * inputs)))


def _rounded(x_D, factor, q, n):
    """Set row `n` of `q` to `x * factor`, rounded: int16 (N, D), or bytes (2, N, D) with value 256 * high + low."""
    for d in range(x_D.size):
        v = x_D[d] * factor
        level = np.int32(v + (HALF if v >= ZERO else -HALF))
        if q.ndim == 3:  # numba compiles only the branch that is taken
            high = (level + np.int32(128)) >> np.int32(8)
            q[0, n, d] = np.int8(high)
            q[1, n, d] = np.int8(level - (high << np.int32(8)))
        else:
            q[n, d] = np.int16(level)


def _quantize(x_ND, first, end, q, scale_N):
    """Quantize rows `first` to `end` of `x` to `q` with one scale per row; see `_rounded`."""
    most = _levels(x_ND.shape[1])
    for n in range(first, end):
        largest = ZERO
        for d in range(x_ND.shape[1]):
            largest = _larger(largest, abs(x_ND[n, d]))
        scale_N[n] = largest / most
        _rounded(x_ND[n], most / largest if largest > ZERO else ZERO, q, n)


def _range(size, share, shares):
    """(start, stop) of a share of `size` items."""
    return size * share // shares, size * (share + 1) // shares


def product(q, size, w, y_NO, share, shares):
    """Multiply int16 by int8, exactly in int32: a share's outputs of `size` rows. `w` is (O, I), or from `amx.lay_out`.

    Rows of `y` may be longer than O: rows whose length is a power of two would compete for a few lines of the L1 cache.
    """
    if w.ndim == 3:
        _product_tiles(q, size, w, y_NO, share, shares)
    else:
        _product_rows(q, size, w, y_NO, share, shares)


def _product_tiles(q_2NI, size, w, y_NO, share, shares):
    """`product` with tiles. Rows up to a whole tile are read, but the sums of those after the last one are ignored."""
    _configure(np.int64(_CONFIGURATION.ctypes.data))
    sums = np.empty((2, 2, ROWS, 16), np.int32)
    high, low, to = np.int64(q_2NI[0].ctypes.data), np.int64(q_2NI[1].ctypes.data), np.int64(sums.ctypes.data)
    wide, pieces, first = np.int64(q_2NI.shape[2]), np.int64(w.shape[1]), np.int64(w.ctypes.data)
    first_o, end_o = _range(w.shape[0], share, shares)
    for o in range(first_o, end_o):
        for rows in range(0, size, ROWS):
            _tiles(high + rows * wide, low + rows * wide, wide, first + o * pieces * 2 * TILE, pieces, to)
            for n in range(min(ROWS, size - rows)):
                for half in range(2):
                    y = y_NO[rows + n, o * 32 + half * 16 : o * 32 + half * 16 + 16]
                    for j in range(16):
                        y[j] = (sums[0, half, n, j] << np.int32(8)) + sums[1, half, n, j]


def _product_rows(q_NI, size, w_OI, y_NO, share, shares):
    inputs, outputs = q_NI.shape[1], y_NO.shape[1]
    first_o, end_o = _range(w_OI.shape[0] // OUTPUTS, share, shares)
    x, w, y = np.int64(q_NI.ctypes.data), np.int64(w_OI.ctypes.data), np.int64(y_NO.ctypes.data)
    wide, high, pieces = np.int64(inputs), np.int64(outputs), np.int64(inputs // PIECE)
    for o in range(first_o * OUTPUTS, end_o * OUTPUTS, OUTPUTS):
        n = 0
        while n + 4 <= size:
            _four(x + n * inputs * 2, wide, w + o * inputs, pieces, y + (n * outputs + o) * 4, high)
            n += 4
        if n + 2 <= size:
            _two(x + n * inputs * 2, wide, w + o * inputs, pieces, y + (n * outputs + o) * 4, high)
            n += 2
        if n < size:
            _one(x + n * inputs * 2, wide, w + o * inputs, pieces, y + (n * outputs + o) * 4, high)


def outputs(x_NI, w, scale_O, out_NO, best_NR, q, x_scale_N, y_NO, share, shares, barrier):
    """Multiply `x` by `w * scale` in float32: a share's outputs, and the maximum of each run of them. q, y: scratch."""
    first, end = _range(x_NI.shape[0], share, shares)
    _quantize(x_NI, first, end, q, x_scale_N)
    _wait(barrier, 0, shares)
    product(q, x_NI.shape[0], w, y_NO, share, shares)
    together = 32 if w.ndim == 3 else OUTPUTS  # the unit in which `product` divides outputs
    first, end = _range(scale_O.size // together, share, shares)
    for n in range(out_NO.shape[0]):
        x_scale = x_scale_N[n]
        for r in range(first, end):
            best = np.float32(-3e38)
            for o in range(r * together, (r + 1) * together):
                out = np.float32(y_NO[n, o]) * scale_O[o] * x_scale
                out_NO[n, o] = out
                best = _larger(best, out)
            best_NR[n, r] = best


def _add(x_ND, y_ND, y_scale_N, scale_D, bias_D):
    """`x += y * y_scale * scale + bias`."""
    for n in range(x_ND.shape[0]):
        for d in range(x_ND.shape[1]):
            x_ND[n, d] += np.float32(y_ND[n, d]) * (scale_D[d] * y_scale_N[n])
        if bias_D.size > 0:
            for d in range(x_ND.shape[1]):
                x_ND[n, d] += bias_D[d]


def _norm_quantize(x_ND, weight_D, eps, first, end, q, scale_N):
    """Quantize RMSNorm(x) times `weight`; the scale includes the norm's division."""
    width = x_ND.shape[1]
    most = _levels(width)
    scaled_D = np.empty(width, np.float32)
    for n in range(first, end):
        total, largest = ZERO, ZERO
        for d in range(width):
            total += x_ND[n, d] * x_ND[n, d]
            scaled_D[d] = x_ND[n, d] * weight_D[d]
        for d in range(width):
            largest = _larger(largest, abs(scaled_D[d]))
        scale_N[n] = largest / most / np.sqrt(total / np.float32(width) + eps)
        _rounded(scaled_D, most / largest if largest > ZERO else ZERO, q, n)


def _rotate(y_NC, y_scale_N, scale_C, bias_C, cos_NE, sin_NE, query_NKGE, keys_BKTE, values_BKTE, start, new, at):
    """Split `y` into queries, keys and values; rotate queries and keys; cache keys and values from `start` on.

    The tokens are those from index `at` on, in rows of `new` tokens each.
    """
    size, heads, groups, dim = query_NKGE.shape
    float_C = np.empty(scale_C.size, np.float32)
    for n in range(size):
        b, t = (at + n) // new, start + (at + n) % new
        for c in range(float_C.size):
            float_C[c] = np.float32(y_NC[n, c]) * (scale_C[c] * y_scale_N[n])
        if bias_C.size > 0:
            for c in range(float_C.size):
                float_C[c] += bias_C[c]
        for k in range(heads):
            for g in range(groups):
                first = (k * groups + g) * dim
                _rotate_head(float_C[first : first + dim], cos_NE[n], sin_NE[n], query_NKGE[n, k, g])
            key, value = (heads * groups + k) * dim, (heads * groups + heads + k) * dim
            _rotate_head(float_C[key : key + dim], cos_NE[n], sin_NE[n], keys_BKTE[b, k, t])
            for e in range(dim):
                values_BKTE[b, k, t, e] = float_C[value + e]


def _scores(query_E, keys_TE, factor, share_T):
    """`share = factor * keys @ query`."""
    dim = query_E.size
    if dim % SPAN == 0:
        share_T[:] = ZERO
        for e in range(0, dim, SPAN):
            query, keys = np.int64(query_E.ctypes.data) + 4 * e, np.int64(keys_TE.ctypes.data) + 4 * e
            _dots(query, keys, np.int64(4 * dim), np.int64(share_T.size), factor, np.int64(share_T.ctypes.data))
    else:
        for t in range(share_T.size):
            total = ZERO
            for e in range(dim):
                total += query_E[e] * keys_TE[t, e]
            share_T[t] = total * factor


def _weighted_sum(share_T, values_TE, out_E):
    """`out += share @ values`."""
    dim = out_E.size
    if dim % SPAN == 0:
        for e in range(0, dim, SPAN):
            values, out = np.int64(values_TE.ctypes.data) + 4 * e, np.int64(out_E.ctypes.data) + 4 * e
            _weighted(np.int64(share_T.ctypes.data), values, np.int64(4 * dim), np.int64(share_T.size), out)
    else:
        for t in range(share_T.size):
            for e in range(dim):
                out_E[e] += share_T[t] * values_TE[t, e]


def _visible(b, end, shared, seen_BT, runs):
    """Fill `runs` with the columns before `end` that row `b` sees, (cache row, start, stop); returns how many."""
    many = 0
    for t in range(end):
        if seen_BT.size == 0 or seen_BT[b, t] != 0:
            row = 0 if t < shared else b
            if many == 0 or runs[many - 1, 2] != t or runs[many - 1, 0] != row:
                runs[many, 0], runs[many, 1] = row, t
                many += 1
            runs[many - 1, 2] = t + 1
    return many


def attend(query_NKGE, keys_BKTE, values_BKTE, start, new, at, shared, seen_BT, out_ND):
    """Causal attention of the tokens given to `_rotate`; columns hidden from their row (0 in the mask) are not read.

    The first `shared` columns are equal in all rows; they are read from row 0, so that they stay in the CPU cache.
    """
    size, heads, groups, dim = query_NKGE.shape
    factor = np.float32(1) / np.sqrt(np.float32(dim))
    share = np.empty(start + new, np.float32)
    runs = np.empty((start + new + 1, 3), np.int64)
    for k in range(heads):
        for n in range(size):
            many = _visible((at + n) // new, start + (at + n) % new + 1, shared, seen_BT, runs)
            for g in range(groups):
                query, first = query_NKGE[n, k, g], (k * groups + g) * dim
                out = out_ND[n, first : first + dim]
                size_T = 0
                for run in range(many):
                    row, begin, end = runs[run, 0], runs[run, 1], runs[run, 2]
                    _scores(query, keys_BKTE[row, k, begin:end], factor, share[size_T : size_T + end - begin])
                    size_T += end - begin
                largest, whole = np.float32(-3e38), ZERO
                for t in range(size_T):
                    largest = _larger(largest, share[t])
                for t in range(size_T):
                    share[t] = _exp(share[t] - largest)
                    whole += share[t]
                out[:] = ZERO
                first_T = 0
                for run in range(many):
                    row, begin, end = runs[run, 0], runs[run, 1], runs[run, 2]
                    _weighted_sum(share[first_T : first_T + end - begin], values_BKTE[row, k, begin:end], out)
                    first_T += end - begin
                for e in range(dim):
                    out[e] /= whole


def _gate(y_N2F, first, end, scale_2F, q, scale_N):
    """Quantize silu(gate) * up; `y` has the gates first, then the ups. `scale` is first that of `y`, then of `q`."""
    width = scale_2F.size // 2
    most = _levels(width)
    inner_F = np.empty(width, np.float32)
    for n in range(first, end):
        largest, y_scale = ZERO, scale_N[n]
        for f in range(width):
            g = np.float32(y_N2F[n, f]) * (scale_2F[f] * y_scale)
            u = np.float32(y_N2F[n, width + f]) * (scale_2F[width + f] * y_scale)
            e = _exp(-abs(g))  # the argument is not positive, so this cannot overflow
            inner_F[f] = g * u * (np.float32(1) if g >= ZERO else e) / (np.float32(1) + e)
        for f in range(width):
            largest = _larger(largest, abs(inner_F[f]))
        scale_N[n] = largest / most
        _rounded(inner_F, most / largest if largest > ZERO else ZERO, q, n)


def decode(
    x_ND, cos_NE, sin_NE, qkv, qkv_scale, qkv_bias, out, out_scale, out_bias, gate_up, gate_up_scale, down,
    down_scale, norm_attention, norm_mlp, eps, heads, cache_PA2, shape_P5, hides_P, seen_X, q_D, y_NC, y_ND, y_N2F, q_F,
    query_NKGE, attended_ND, q_heads, scale_N, share, shares, barrier,
):  # fmt: skip
    """One share of a forward pass, which replaces the embeddings `x` by the last layer's output.

    Args:
        x_ND: float32, the tokens of all parts, part by part.
        cos_NE, sin_NE: float32, the rotation of the tokens.
        qkv ... norm_mlp: the weights of all layers, as in `decode_step.Matrices`.
        eps: epsilon of the norms.
        heads: number of key-value heads.
        cache_PA2: addresses of the keys and values, per part and layer.
        shape_P5: for each part: rows, allocated columns, first new column, new tokens, shared columns.
        hides_P: whether a part hides columns from its rows.
        seen_X: the masks of the parts that hide columns, flattened.
        q_D ... scale_N: scratch memory that the shares exchange (`Decoder._room`).
        share, shares: the number of this share, and the number of shares.
        barrier: the address of the barrier's counter.
    """
    dim, arrived = cos_NE.shape[1], 0
    first, end = _range(x_ND.shape[0], share, shares)
    prompts = False  # whether a token sees others of this pass
    for p in range(shape_P5.shape[0]):
        prompts = prompts or shape_P5[p, 3] > 1
    # The tokens of this share.
    x, size = x_ND[first:end], x_ND.shape[0]
    for a in range(qkv.shape[0]):
        _norm_quantize(x_ND, norm_attention[a], eps, first, end, q_D, scale_N)
        arrived = _wait(barrier, arrived, shares)
        product(q_D, size, qkv[a], y_NC, share, shares)
        arrived = _wait(barrier, arrived, shares)
        for attending in range(2):
            if attending == 1 and prompts:
                arrived = _wait(barrier, arrived, shares)
            token, hidden = 0, 0
            for p in range(shape_P5.shape[0]):
                rows, columns, start, new, shared = shape_P5[p]
                wide = rows * (start + new) if hides_P[p] else 0
                mine, until = max(first, token), min(end, token + rows * new)
                if mine < until:
                    keys_BKTE = _carray(_pointer(cache_PA2[p, a, 0]), (rows, heads, columns, dim))
                    values_BKTE = _carray(_pointer(cache_PA2[p, a, 1]), (rows, heads, columns, dim))
                    query = query_NKGE[mine:until]
                    if attending == 0:
                        _rotate(
                            y_NC[mine:until], scale_N[mine:until], qkv_scale[a], qkv_bias[a], cos_NE[mine:until],
                            sin_NE[mine:until], query, keys_BKTE, values_BKTE, start, new, mine - token,
                        )  # fmt: skip
                    else:
                        seen_BT = seen_X[hidden : hidden + wide].reshape((rows if wide else 0, start + new))
                        attend(
                            query,
                            keys_BKTE,
                            values_BKTE,
                            start,
                            new,
                            mine - token,
                            shared,
                            seen_BT,
                            attended_ND[mine:until],
                        )
                token, hidden = token + rows * new, hidden + wide
        _quantize(attended_ND, first, end, q_heads, scale_N)
        arrived = _wait(barrier, arrived, shares)
        product(q_heads, size, out[a], y_ND, share, shares)
        arrived = _wait(barrier, arrived, shares)
        _add(x, y_ND[first:end], scale_N[first:end], out_scale[a], out_bias[a])
        _norm_quantize(x_ND, norm_mlp[a], eps, first, end, q_D, scale_N)
        arrived = _wait(barrier, arrived, shares)
        product(q_D, size, gate_up[a], y_N2F, share, shares)
        arrived = _wait(barrier, arrived, shares)
        _gate(y_N2F, first, end, gate_up_scale[a], q_F, scale_N)
        arrived = _wait(barrier, arrived, shares)
        product(q_F, size, down[a], y_ND, share, shares)
        arrived = _wait(barrier, arrived, shares)
        _add(x, y_ND[first:end], scale_N[first:end], down_scale[a], out_bias[a][:0])


def _wait(barrier, arrived, shares):
    """Wait for the other threads; returns the new count of the barrier."""
    if shares > 1:
        _barrier(barrier, arrived + shares)
    return arrived + shares

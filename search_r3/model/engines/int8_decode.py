"""A few new tokens in one call: a Llama's whole pass, with int8 weights and 15-bit activations.

A pass over few rows is bound by reading the weights, and by calling: some twenty operations a layer, each of which
wants the GIL twice. Here it is one function that numba compiles and that holds no GIL, so threads run it side by side,
each on a core. Reading the weights leaves time for finer activations than int8: int16, of which a product takes so many
levels that its sum stays within 32 bits. So only the rounding of the weights is left of int8's error. The products are
`int8_amx`'s where the processor has tiles, else `int8_tile`'s; both are exact, so they give the same.

Like `int8_rows`, what is here is compiled by numba when it is first needed, and kept on disk.

Letters in shapes: P parts, each B rows of L new tokens; N tokens of all parts, D width of a token, I inputs, O outputs,
C columns of queries, keys and values, E dimension of a head, F width of the MLP, A layers; T columns of the cache, K
key-value heads of G query heads each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.model.engines import int8_amx, int8_rows, int8_tile
from search_r3.model.engines.int8_amx import ROWS, TILE
from search_r3.model.engines.int8_tile import OUTPUTS, PIECE

FEW, FEW_WITH_TILES = 32, 256
"""Tokens up to which this is at least as fast as the products of `int8_session`."""
ZERO, HALF = np.float32(0), np.float32(0.5)
_COMPILED = (
    "_levels", "_rounded", "_quantise", "_product_rows", "_bytes", "_product_tiles", "product", "outputs", "_exp",
    "_add", "_norm_quantise", "_rotate", "attend", "_gate", "decode",
)  # fmt: skip
_larger: Any = max
_turn: Any = None
_power_of_two: Any = np.exp2
_pointer: Any = None
_carray: Any = None
_one: Any = None
_two: Any = None
_four: Any = None
_CONFIGURATION = int8_amx.configuration()
_tiles: Any = None
_configure: Any = None


@dataclass
class Matrices:
    """One kind of matrix of all layers: int8 (A, O, I), or as `int8_amx.lay_out` gives it; what a step of an output is
    worth float32 (A, O), biases (A, O) or (A, 0)."""

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[np.ndarray]) -> Matrices:
        """Copies, side by side."""
        return cls(torch.stack(list(weights)).numpy(), torch.stack(list(scales)).numpy(), np.stack(biases))

    def laid_out(self) -> Matrices:
        """The same for tiles."""
        return Matrices(int8_amx.lay_out(self.weight), self.scale, self.bias)


@dataclass
class Rows:
    """Rows of one cache, and where their new tokens go in it.

    Attributes:
        keys, values: each layer's (B, K, T, E), float32 and contiguous; columns from `start` on are written.
        start: the new tokens' first column.
        new: new tokens of each row, L.
        seen_BT: uint8 (B, start + L), 0 for columns that a row does not see; None if none is hidden. What comes after a
            token it never sees.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    start: int
    new: int
    seen_BT: Tensor | None = None


class Decoder:
    """A model's weights as `decode` reads them.

    Args:
        qkv, out, gate_up, down: see `Matrices`.
        norm_attention, norm_mlp: float32 (A, D).
        head: one layer's, (1, vocabulary, D).
        heads: key-value heads.
        eps: of the norms.
    """

    def __init__(
        self,
        qkv: Matrices,
        out: Matrices,
        gate_up: Matrices,
        down: Matrices,
        norm_attention: np.ndarray,
        norm_mlp: np.ndarray,
        head: Matrices,
        heads: int,
        eps: float,
    ) -> None:
        self._layers = (
            qkv.weight, qkv.scale, qkv.bias, out.weight, out.scale, out.bias, gate_up.weight, gate_up.scale,
            down.weight, down.scale, norm_attention, norm_mlp,
        )  # fmt: skip
        self._head, self._heads, self._eps = head, heads, np.float32(eps)
        self.few = FEW_WITH_TILES if head.weight.ndim == 4 else FEW
        compile_decode()

    def step(self, x_ND: Tensor, cos_NE: Tensor, sin_NE: Tensor, parts: Sequence[Rows]) -> None:
        """Turn the embeddings `x` into the last layer's output, in place, and write the caches of all parts.

        Args:
            x_ND: float32, contiguous; the parts' tokens one after the other, a row's tokens together.
            cos_NE, sin_NE: float32, the new tokens' rotation.
            parts: of one pass: all but attention sees only tokens.
        """
        cache_PA2 = np.array(
            [[[k.data_ptr(), v.data_ptr()] for k, v in zip(p.keys, p.values, strict=True)] for p in parts]
        )
        shape_P4 = np.array([[len(p.keys[0]), p.keys[0].shape[2], p.start, p.new] for p in parts])
        hidden = [p.seen_BT for p in parts if p.seen_BT is not None]
        seen_X = torch.cat([one.flatten() for one in hidden]).numpy() if hidden else np.empty(0, np.uint8)
        hides_P = np.array([p.seen_BT is not None for p in parts])
        decode(
            x_ND.numpy(), cos_NE.numpy(), sin_NE.numpy(), *self._layers, self._eps, self._heads, cache_PA2, shape_P4,
            hides_P, seen_X,
        )  # fmt: skip

    def logits(self, state_ND: Tensor) -> Tensor:
        """The head's product: float32 (N, vocabulary)."""
        out_NV = torch.empty(len(state_ND), self._head.scale.shape[1])
        outputs(state_ND.float().contiguous().numpy(), self._head.weight[0], self._head.scale[0], out_NV.numpy())
        return out_NV


def prepared(matrices: dict[str, Matrices]) -> dict[str, Matrices] | None:
    """The matrices as `decode` takes them on this machine; None if it cannot run them."""
    shapes = [m.weight.shape for m in matrices.values()]

    def whole(outputs: int, inputs: int) -> bool:
        return all(o % outputs == 0 and i % inputs == 0 for _, o, i in shapes)

    if int8_amx.runs_here() and whole(int8_amx.OUTPUTS, int8_amx.PIECE):
        return {name: one.laid_out() for name, one in matrices.items()}
    return matrices if int8_tile.runs_here() and whole(OUTPUTS, PIECE) else None


def compile_decode() -> None:
    """Put compiled functions in the place of this module's, once."""
    from numba import carray

    names = globals()
    if names["_four"] is not None:
        return
    int8_rows.compile_rows()
    names |= {"_larger": int8_rows._larger, "_turn": int8_rows._turn, "_carray": carray}
    names |= {"_power_of_two": int8_tile.power_of_two_intrinsic(), "_pointer": int8_tile.pointer_intrinsic()}
    names |= {
        "_one": int8_tile.tile_intrinsic(1),
        "_two": int8_tile.tile_intrinsic(2),
        "_four": int8_tile.tile_intrinsic(4),
        "_tiles": int8_amx.tiles_intrinsic(),
        "_configure": int8_amx.configure_intrinsic(),
    }
    for name in _COMPILED:
        names[name] = int8_rows.compiled(names[name])


def _exp(x):
    """e to the x for x up to 0, to a few units of float32's last place: Cephes' expf without a branch."""
    x = _larger(x, np.float32(-87))
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = r * np.float32(1.9875691500e-4) + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1)) * _power_of_two(np.int32(n))


def _levels(inputs):
    """How far 16-bit activations may go: a sum of products with 127 stays within 32 bits, a high byte within 127."""
    return np.float32(min(127 * 256 + 127, (2**31 - 1) // (127 * inputs)))


def _rounded(x_D, factor, q_D):
    for d in range(x_D.size):
        v = x_D[d] * factor
        q_D[d] = np.int16(v + (HALF if v >= ZERO else -HALF))


def _quantise(x_ND, q_ND, scale_N):
    """`x` as int16 `q` times `scale`, a scale a row."""
    most = _levels(x_ND.shape[1])
    for n in range(x_ND.shape[0]):
        largest = ZERO
        for d in range(x_ND.shape[1]):
            largest = _larger(largest, abs(x_ND[n, d]))
        scale_N[n] = largest / most
        _rounded(x_ND[n], most / largest if largest > ZERO else ZERO, q_ND[n])


def product(x_NI, w, y_NO):
    """int16 by int8, exact in int32; `w` is (O, I), or one of `int8_amx.lay_out`."""
    if w.ndim == 3:  # numba drops the branch that is not taken
        _product_tiles(x_NI, w, y_NO)
    else:
        _product_rows(x_NI, w, y_NO)


def _bytes(x_NI, high_NI, low_NI):
    """`x = 256 * high + low`."""
    for n in range(x_NI.shape[0]):
        for i in range(x_NI.shape[1]):
            high = (np.int32(x_NI[n, i]) + np.int32(128)) >> np.int32(8)
            high_NI[n, i] = np.int8(high)
            low_NI[n, i] = np.int8(np.int32(x_NI[n, i]) - (high << np.int32(8)))


def _product_tiles(x_NI, w, y_NO):
    size, inputs = x_NI.shape
    blocks = (size + ROWS - 1) // ROWS
    bytes_2NI = np.empty((2, blocks * ROWS, inputs), np.int8)  # what is behind the last row is never looked at
    _bytes(x_NI, bytes_2NI[0], bytes_2NI[1])
    _configure(np.int64(_CONFIGURATION.ctypes.data))
    sums = np.empty((2, 2, ROWS, 16), np.int32)
    high, low, to = np.int64(bytes_2NI[0].ctypes.data), np.int64(bytes_2NI[1].ctypes.data), np.int64(sums.ctypes.data)
    wide, pieces, first = np.int64(inputs), np.int64(w.shape[1]), np.int64(w.ctypes.data)
    for o in range(w.shape[0]):
        for block in range(blocks):
            rows = block * ROWS
            _tiles(high + rows * wide, low + rows * wide, wide, first + o * pieces * 2 * TILE, pieces, to)
            for n in range(min(ROWS, size - rows)):
                for half in range(2):
                    y = y_NO[rows + n, o * 32 + half * 16 : o * 32 + half * 16 + 16]
                    for j in range(16):
                        y[j] = (sums[0, half, n, j] << np.int32(8)) + sums[1, half, n, j]


def _product_rows(x_NI, w_OI, y_NO):
    size, inputs = x_NI.shape
    outputs = w_OI.shape[0]
    x, w, y = np.int64(x_NI.ctypes.data), np.int64(w_OI.ctypes.data), np.int64(y_NO.ctypes.data)
    wide, high, pieces = np.int64(inputs), np.int64(outputs), np.int64(inputs // PIECE)
    for o in range(0, outputs, OUTPUTS):
        n = 0
        while n + 4 <= size:
            _four(x + n * inputs * 2, wide, w + o * inputs, pieces, y + (n * outputs + o) * 4, high)
            n += 4
        if n + 2 <= size:
            _two(x + n * inputs * 2, wide, w + o * inputs, pieces, y + (n * outputs + o) * 4, high)
            n += 2
        if n < size:
            _one(x + n * inputs * 2, wide, w + o * inputs, pieces, y + (n * outputs + o) * 4, high)


def outputs(x_NI, w_OI, scale_O, out_NO):
    """`x` times `w * scale`, in floats."""
    q_NI, x_scale_N = np.empty(x_NI.shape, np.int16), np.empty(x_NI.shape[0], np.float32)
    y_NO = np.empty(out_NO.shape, np.int32)
    _quantise(x_NI, q_NI, x_scale_N)
    product(q_NI, w_OI, y_NO)
    for n in range(out_NO.shape[0]):
        for o in range(out_NO.shape[1]):
            out_NO[n, o] = np.float32(y_NO[n, o]) * scale_O[o] * x_scale_N[n]


def _add(x_ND, y_ND, y_scale_N, scale_D, bias_D):
    """`x += y * y_scale * scale + bias`."""
    for n in range(x_ND.shape[0]):
        for d in range(x_ND.shape[1]):
            x_ND[n, d] += np.float32(y_ND[n, d]) * (scale_D[d] * y_scale_N[n])
        if bias_D.size > 0:
            for d in range(x_ND.shape[1]):
                x_ND[n, d] += bias_D[d]


def _norm_quantise(x_ND, weight_D, eps, q_ND, scale_N):
    """RMSNorm(x) times `weight`, as `quantise` gives it; the scale swallows the norm's own division."""
    size, width = x_ND.shape
    most = _levels(width)
    scaled_D = np.empty(width, np.float32)
    for n in range(size):
        total, largest = ZERO, ZERO
        for d in range(width):
            total += x_ND[n, d] * x_ND[n, d]
            scaled_D[d] = x_ND[n, d] * weight_D[d]
        for d in range(width):
            largest = _larger(largest, abs(scaled_D[d]))
        scale_N[n] = largest / most / np.sqrt(total / np.float32(width) + eps)
        _rounded(scaled_D, most / largest if largest > ZERO else ZERO, q_ND[n])


def _rotate(y_NC, y_scale_N, scale_C, bias_C, cos_NE, sin_NE, query_NKGE, keys_BKTE, values_BKTE, start):
    """`y` taken apart: queries and keys are rotated, and keys and values go into the cache's columns from `start`."""
    size, heads, groups, dim = query_NKGE.shape
    new, float_C = size // keys_BKTE.shape[0], np.empty(y_NC.shape[1], np.float32)
    for n in range(size):
        b, t = n // new, start + n % new
        for c in range(float_C.size):
            float_C[c] = np.float32(y_NC[n, c]) * (scale_C[c] * y_scale_N[n])
        if bias_C.size > 0:
            for c in range(float_C.size):
                float_C[c] += bias_C[c]
        for k in range(heads):
            for g in range(groups):
                first = (k * groups + g) * dim
                _turn(float_C[first : first + dim], cos_NE[n], sin_NE[n], query_NKGE[n, k, g])
            key, value = (heads * groups + k) * dim, (heads * groups + heads + k) * dim
            _turn(float_C[key : key + dim], cos_NE[n], sin_NE[n], keys_BKTE[b, k, t])
            for e in range(dim):
                values_BKTE[b, k, t, e] = float_C[value + e]


def attend(query_NKGE, keys_BKTE, values_BKTE, start, seen_BT, out_ND):
    """Causal attention of the tokens from column `start` on, columns that their row does not see (0) left out."""
    size, heads, groups, dim = query_NKGE.shape
    new = size // keys_BKTE.shape[0]
    factor = np.float32(1) / np.sqrt(np.float32(dim))
    share = np.empty(start + new, np.float32)
    for n in range(size):
        b, end = n // new, start + n % new + 1
        for k in range(heads):
            keys, values = keys_BKTE[b, k], values_BKTE[b, k]
            for g in range(groups):
                query, first = query_NKGE[n, k, g], (k * groups + g) * dim
                out = out_ND[n, first : first + dim]
                for t in range(end):
                    total = ZERO
                    for e in range(dim):
                        total += query[e] * keys[t, e]
                    share[t] = total * factor
                if seen_BT.size > 0:
                    for t in range(end):
                        if seen_BT[b, t] == 0:
                            share[t] = np.float32(-3e38)
                largest, whole = np.float32(-3e38), ZERO
                for t in range(end):
                    largest = _larger(largest, share[t])
                for t in range(end):
                    share[t] = _exp(share[t] - largest)
                    whole += share[t]
                out[:] = ZERO
                for t in range(end):
                    weight = share[t] / whole
                    for e in range(dim):
                        out[e] += weight * values[t, e]


def _gate(y_N2F, y_scale_N, scale_2F, q_NF, scale_N):
    """silu(gate) * up, as `quantise` gives it: gates in front, ups behind."""
    size, width = q_NF.shape
    most = _levels(width)
    inner_F = np.empty(width, np.float32)
    for n in range(size):
        largest = ZERO
        for f in range(width):
            g = np.float32(y_N2F[n, f]) * (scale_2F[f] * y_scale_N[n])
            u = np.float32(y_N2F[n, width + f]) * (scale_2F[width + f] * y_scale_N[n])
            e = _exp(-abs(g))  # of what is not positive: no overflow
            inner_F[f] = g * u * (np.float32(1) if g >= ZERO else e) / (np.float32(1) + e)
        for f in range(width):
            largest = _larger(largest, abs(inner_F[f]))
        scale_N[n] = largest / most
        _rounded(inner_F, most / largest if largest > ZERO else ZERO, q_NF[n])


def decode(
    x_ND, cos_NE, sin_NE, qkv, qkv_scale, qkv_bias, out, out_scale, out_bias, gate_up, gate_up_scale, down,
    down_scale, norm_attention, norm_mlp, eps, heads, cache_PA2, shape_P4, hides_P, seen_X,
):  # fmt: skip
    size, width = x_ND.shape
    dim, inner = cos_NE.shape[1], gate_up_scale.shape[1] // 2
    groups = qkv_scale.shape[1] // dim // heads - 2
    q_ND, scale_N = np.empty((size, width), np.int16), np.empty(size, np.float32)
    y_NC, y_ND = np.empty((size, qkv_scale.shape[1]), np.int32), np.empty((size, width), np.int32)
    y_N2F, q_NF = np.empty((size, 2 * inner), np.int32), np.empty((size, inner), np.int16)
    query_NKGE = np.empty((size, heads, groups, dim), np.float32)
    attended_ND = np.empty((size, heads * groups * dim), np.float32)
    q_heads_ND = np.empty(attended_ND.shape, np.int16)
    for a in range(qkv.shape[0]):
        _norm_quantise(x_ND, norm_attention[a], eps, q_ND, scale_N)
        product(q_ND, qkv[a], y_NC)
        first, hidden = 0, 0
        for p in range(shape_P4.shape[0]):
            rows, columns, start, new = shape_P4[p]
            end, wide = first + rows * new, rows * (start + new) if hides_P[p] else 0
            keys_BKTE = _carray(_pointer(cache_PA2[p, a, 0]), (rows, heads, columns, dim))
            values_BKTE = _carray(_pointer(cache_PA2[p, a, 1]), (rows, heads, columns, dim))
            seen_BT = seen_X[hidden : hidden + wide].reshape((rows if wide else 0, start + new))
            query = query_NKGE[first:end]
            _rotate(
                y_NC[first:end], scale_N[first:end], qkv_scale[a], qkv_bias[a], cos_NE[first:end], sin_NE[first:end],
                query, keys_BKTE, values_BKTE, start,
            )  # fmt: skip
            attend(query, keys_BKTE, values_BKTE, start, seen_BT, attended_ND[first:end])
            first, hidden = end, hidden + wide
        _quantise(attended_ND, q_heads_ND, scale_N)
        product(q_heads_ND, out[a], y_ND)
        _add(x_ND, y_ND, scale_N, out_scale[a], out_bias[a])
        _norm_quantise(x_ND, norm_mlp[a], eps, q_ND, scale_N)
        product(q_ND, gate_up[a], y_N2F)
        _gate(y_N2F, scale_N, gate_up_scale[a], q_NF, scale_N)
        product(q_NF, down[a], y_ND)
        _add(x_ND, y_ND, scale_N, down_scale[a], out_bias[a][:0])

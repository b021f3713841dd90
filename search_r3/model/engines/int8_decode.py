"""A few new tokens in one call: a Llama's whole pass, with int8 weights and 15-bit activations.

A pass over few rows is bound by reading the weights, and by calling: some twenty operations a layer, each of which
wants the GIL twice. Here it is one function that numba compiles and that holds no GIL, so threads run it side by side,
each on a core. Reading the weights leaves time for finer activations than int8: int16, of which a product takes so many
levels that its sum stays within 32 bits. So only the rounding of the weights is left of int8's error.

Like `int8_rows`, what is here is compiled by numba when it is first needed, and kept on disk.

Letters in shapes: B rows of L new tokens each, N tokens (B * L), D width of a token, I inputs, O outputs, C columns of
queries, keys and values, E dimension of a head, F width of the MLP, A layers; T columns of the cache, K key-value heads
of G query heads each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.model.engines import int8_rows, int8_tile
from search_r3.model.engines.int8_tile import OUTPUTS, PIECE

FEW = 32
"""Tokens up to which this is at least as fast as the products of `int8_session`."""
ZERO, HALF = np.float32(0), np.float32(0.5)
_COMPILED = (
    "_levels", "_rounded", "_quantise", "product", "outputs", "_exp", "_add", "_norm_quantise", "_rotate", "attend",
    "_gate", "decode",
)  # fmt: skip
_larger: Any = max
_turn: Any = None
_power_of_two: Any = np.exp2
_pointer: Any = None
_carray: Any = None
_one: Any = None
_two: Any = None
_four: Any = None


@dataclass
class Matrices:
    """One kind of matrix of all layers: int8 (A, O, I), what a step of an output is worth float32 (A, O), biases (A, O)
    or (A, 0)."""

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[np.ndarray]) -> Matrices:
        """Copies, side by side."""
        return cls(torch.stack(list(weights)).numpy(), torch.stack(list(scales)).numpy(), np.stack(biases))


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
        compile_decode()

    def step(
        self,
        x_ND: Tensor,
        cos_NE: Tensor,
        sin_NE: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        start: int,
        seen_BT: np.ndarray,
    ) -> None:
        """Turn the embeddings `x` into the last layer's output, in place; keys and values go into columns from `start`.

        Args:
            x_ND: float32, contiguous; a row's tokens one after the other.
            cos_NE, sin_NE: float32, the new tokens' rotation.
            keys, values: each layer's (B, K, T, E), float32 and contiguous.
            seen_BT: uint8 (B, start + L), 0 for columns that a row does not see; empty if none is hidden. What comes
                after a token it never sees.
        """
        cache_A2 = np.array([[k.data_ptr(), v.data_ptr()] for k, v in zip(keys, values, strict=True)])
        decode(
            x_ND.numpy(), cos_NE.numpy(), sin_NE.numpy(), *self._layers, self._eps, self._heads, cache_A2,
            len(keys[0]), keys[0].shape[2], start, seen_BT,
        )  # fmt: skip

    def logits(self, state_ND: Tensor) -> Tensor:
        """The head's product: float32 (N, vocabulary)."""
        out_NV = torch.empty(len(state_ND), self._head.weight.shape[1])
        outputs(state_ND.float().contiguous().numpy(), self._head.weight[0], self._head.scale[0], out_NV.numpy())
        return out_NV


def fits(*matrices: Matrices) -> bool:
    """Whether `decode` can run such matrices on this machine."""
    shapes = [m.weight.shape for m in matrices]
    return int8_tile.runs_here() and all(o % OUTPUTS == 0 and i % PIECE == 0 for _, o, i in shapes)


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
    """How far 16-bit activations may go, so that a sum of products with 127 stays within 32 bits."""
    return np.float32(min(32767, (2**31 - 1) // (127 * inputs)))


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


def product(x_NI, w_OI, y_NO):
    """int16 by int8, exact in int32."""
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
    down_scale, norm_attention, norm_mlp, eps, heads, cache_A2, rows, columns, start, seen_BT,
):  # fmt: skip
    size, width = x_ND.shape
    dim, inner = cos_NE.shape[1], down.shape[2]
    groups = qkv.shape[1] // dim // heads - 2
    q_ND, scale_N = np.empty((size, width), np.int16), np.empty(size, np.float32)
    y_NC, y_ND = np.empty((size, qkv.shape[1]), np.int32), np.empty((size, width), np.int32)
    y_N2F, q_NF = np.empty((size, 2 * inner), np.int32), np.empty((size, inner), np.int16)
    query_NKGE = np.empty((size, heads, groups, dim), np.float32)
    attended_ND = np.empty((size, out.shape[2]), np.float32)
    q_heads_ND = np.empty(attended_ND.shape, np.int16)
    for a in range(qkv.shape[0]):
        _norm_quantise(x_ND, norm_attention[a], eps, q_ND, scale_N)
        product(q_ND, qkv[a], y_NC)
        keys_BKTE = _carray(_pointer(cache_A2[a, 0]), (rows, heads, columns, dim))
        values_BKTE = _carray(_pointer(cache_A2[a, 1]), (rows, heads, columns, dim))
        _rotate(y_NC, scale_N, qkv_scale[a], qkv_bias[a], cos_NE, sin_NE, query_NKGE, keys_BKTE, values_BKTE, start)
        attend(query_NKGE, keys_BKTE, values_BKTE, start, seen_BT, attended_ND)
        _quantise(attended_ND, q_heads_ND, scale_N)
        product(q_heads_ND, out[a], y_ND)
        _add(x_ND, y_ND, scale_N, out_scale[a], out_bias[a])
        _norm_quantise(x_ND, norm_mlp[a], eps, q_ND, scale_N)
        product(q_ND, gate_up[a], y_N2F)
        _gate(y_N2F, scale_N, gate_up_scale[a], q_NF, scale_N)
        product(q_NF, down[a], y_ND)
        _add(x_ND, y_ND, scale_N, down_scale[a], out_bias[a][:0])

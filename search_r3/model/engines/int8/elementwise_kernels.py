"""Kernels between two int8 matrix products, each one pass over a row: scale, add, normalize, rotate, gate, quantize.

Each row of activations is rounded to int8 with its own scale (dynamic and symmetric: LLM.int8(), arXiv 2208.07339, and
ZeroQuant, arXiv 2206.01861), so the result of a row does not depend on the other rows. All arrays are C-contiguous
float32, except for the int8 outputs.

Compilation: the functions below are plain Python until `compile_kernels` replaces them in this module by functions
compiled with numba (on first use; cached on disk). They run without the GIL, so threads can run them in parallel. They
are replaced in place because numba looks up a function's helpers in its module when compiling it.

Letters in shapes: N rows, D width of a row, C columns of queries, keys and values, E dimension of a head, F width of
the MLP; B rows of L tokens (N = B * L), T columns of the cache, K key-value heads of G query heads each, Q = G * L.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FINE = 254
"""Number of fine steps per step: half a step, the largest rounding error, is 127 fine steps."""
_SETTINGS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    # Sums in any order, so that they are vectorized, and no guarantees about NaN or the sign of zero.
    "fastmath": {"reassoc", "nsz", "nnan", "contract", "arcp"},
}
_COMPILED = ("rotate_head", "quantize", "add_norm_quantize", "quantize_heads", "rotate", "gate_quantize")
larger: Any = max


def compile_kernels() -> None:
    """Replace the functions of this module by compiled ones, once.

    Raises:
        ModuleNotFoundError: numba is not installed.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    names = globals()
    if names["larger"] is not max:
        return

    @intrinsic
    def larger(typing_context, a, b):
        """The larger of two float32 by an LLVM instruction, because loops with a comparison are not vectorized."""

        def generate(context, builder, signature, arguments):
            kind = ir.FloatType()
            function = builder.module.declare_intrinsic("llvm.maxnum", [kind], ir.FunctionType(kind, [kind, kind]))
            return builder.call(function, arguments, fastmath=("nnan", "nsz"))

        return types.float32(types.float32, types.float32), generate

    names["larger"] = larger
    for name in _COMPILED:
        names[name] = compiled(names[name])


def compiled(function: Any) -> Any:
    """The function as compiled by numba on its first call, without the GIL; cached on disk where possible."""
    from numba import njit

    try:
        return njit(function, cache=True, **_SETTINGS)
    except RuntimeError:  # there is no folder for the cache
        return njit(function, **_SETTINGS)


def quantize(x_ND, q_ND, scale_N):
    """Quantize `x` to int8 `q` with one scale per row; both are outputs."""
    size, width = x_ND.shape
    for n in range(size):
        x, q = x_ND[n], q_ND[n]
        largest = np.float32(0)
        for d in range(width):
            largest = larger(largest, abs(x[d]))
        scale_N[n] = largest * np.float32(1 / 127)
        factor = np.float32(127) / largest if largest > np.float32(0) else np.float32(0)
        for d in range(width):
            v = x[d] * factor
            q[d] = np.int8(v + (np.float32(0.5) if v >= np.float32(0) else np.float32(-0.5)))


def add_norm_quantize(x_ND, y_ND, y_scale_N, bias_D, weight_D, eps, q_ND, fine_ND, scale_N):
    """Add `y * y_scale + bias` (an empty bias means no bias) to `x`; then quantize RMSNorm(x) times `weight`.

    `fine`, unless it is empty, gets the rounding error of `q`, in steps of a `FINE`-th of its own. A row's scale
    includes the norm's division, so the normalized row is never written.
    """
    size, width = x_ND.shape
    biased = bias_D.size > 0
    for n in range(size):
        x, y, q = x_ND[n], y_ND[n], q_ND[n]
        y_scale = y_scale_N[n]
        total = np.float32(0)
        for d in range(width):
            v = x[d] + y[d] * y_scale
            if biased:
                v += bias_D[d]
            x[d] = v
            total += v * v
        largest = np.float32(0)
        for d in range(width):
            largest = larger(largest, abs(x[d] * weight_D[d]))
        scale_N[n] = largest * np.float32(1 / 127) / np.sqrt(total / np.float32(width) + eps)
        factor = np.float32(127) / largest if largest > np.float32(0) else np.float32(0)
        for d in range(width):
            v = x[d] * weight_D[d] * factor
            q[d] = np.int8(v + (np.float32(0.5) if v >= np.float32(0) else np.float32(-0.5)))
        if fine_ND.size > 0:
            fine = fine_ND[n]
            for d in range(width):
                v = (x[d] * weight_D[d] * factor - np.float32(q[d])) * np.float32(FINE)
                fine[d] = np.int8(v + (np.float32(0.5) if v >= np.float32(0) else np.float32(-0.5)))


def quantize_heads(x_BQKE, q_ND, scale_N):
    """Quantize attention's output, whose queries are in the order of `rotate`, as rows of heads."""
    size, queries, heads, dim = x_BQKE.shape
    groups = q_ND.shape[1] // (heads * dim)
    new = queries // groups
    for b in range(size):
        for t in range(new):
            n = b * new + t
            largest = np.float32(0)
            for k in range(heads):
                for g in range(groups):
                    x = x_BQKE[b, g * new + t, k]
                    for e in range(dim):
                        largest = larger(largest, abs(x[e]))
            scale_N[n] = largest * np.float32(1 / 127)
            factor = np.float32(127) / largest if largest > np.float32(0) else np.float32(0)
            for k in range(heads):
                for g in range(groups):
                    x, first = x_BQKE[b, g * new + t, k], (k * groups + g) * dim
                    q = q_ND[n, first : first + dim]
                    for e in range(dim):
                        v = x[e] * factor
                        q[e] = np.int8(v + (np.float32(0.5) if v >= np.float32(0) else np.float32(-0.5)))


def rotate_head(x, cos, sin, out):
    """Rotate one head by RoPE (arXiv 2104.09864), with its halves paired as in transformers."""
    half = out.size // 2
    for e in range(half):
        a, b = x[e], x[half + e]
        out[e] = a * cos[e] - b * sin[e]
        out[half + e] = b * cos[half + e] + a * sin[half + e]


def rotate(y_NC, scale_N, bias_C, cos_NE, sin_NE, query_BKGLE, keys_BKTE, values_BKTE, start):
    """Split `y * scale + bias` (an empty bias means no bias) into queries, keys and values; rotate queries and keys.

    Keys and values are written to the cache from column `start` on. `y` is overwritten.
    """
    _, heads, groups, new, dim = query_BKGLE.shape
    size, width = y_NC.shape
    for n in range(size):
        y, cos, sin = y_NC[n], cos_NE[n], sin_NE[n]
        b, t = n // new, n % new
        scale = scale_N[n]
        if bias_C.size > 0:
            for c in range(width):
                y[c] = y[c] * scale + bias_C[c]
        else:
            for c in range(width):
                y[c] = y[c] * scale
        for k in range(heads):
            for g in range(groups):
                rotate_head(y[(k * groups + g) * dim : (k * groups + g + 1) * dim], cos, sin, query_BKGLE[b, k, g, t])
            key, value = (heads * groups + k) * dim, (heads * groups + heads + k) * dim
            rotate_head(y[key : key + dim], cos, sin, keys_BKTE[b, k, start + t])
            out = values_BKTE[b, k, start + t]
            for e in range(dim):
                out[e] = y[value + e]


def gate_quantize(y_N2F, y_scale_N, q_NF, fine_NF, scale_N):
    """Quantize silu(gate) * up of `y * y_scale`, which has the gates first, then the ups. `y` is overwritten.

    `fine`, unless it is empty, gets the rounding error of `q`, in steps of a `FINE`-th of its own.

    The sigmoid is (1 + tanh(x / 2)) / 2, and tanh the rational function of Eigen (MathFunctionsImpl.h), exact to a few
    units of float32's last place: a loop of it is vectorized, which one that calls exp is not.
    """
    size, width = q_NF.shape
    for n in range(size):
        y, q = y_N2F[n], q_NF[n]
        gate, up = y[:width], y[width:]
        y_scale = y_scale_N[n]
        largest = np.float32(0)
        for f in range(width):
            g = gate[f] * y_scale
            t = g * np.float32(0.5)
            t = min(max(t, np.float32(-7.9)), np.float32(7.9))
            s = t * t
            p = s * np.float32(-2.76076847742355e-16) + np.float32(2.00018790482477e-13)
            p = s * p + np.float32(-8.60467152213735e-11)
            p = s * p + np.float32(5.12229709037114e-08)
            p = s * p + np.float32(1.48572235717979e-05)
            p = s * p + np.float32(6.37261928875436e-04)
            p = s * p + np.float32(4.89352455891786e-03)
            r = s * np.float32(1.19825839466702e-06) + np.float32(1.18534705686654e-04)
            r = s * r + np.float32(2.26843463243900e-03)
            r = s * r + np.float32(4.89352518554385e-03)
            v = g * (np.float32(0.5) + np.float32(0.5) * t * p / r) * (up[f] * y_scale)
            gate[f] = v
            largest = larger(largest, abs(v))
        scale_N[n] = largest * np.float32(1 / 127)
        factor = np.float32(127) / largest if largest > np.float32(0) else np.float32(0)
        for f in range(width):
            v = gate[f] * factor
            q[f] = np.int8(v + (np.float32(0.5) if v >= np.float32(0) else np.float32(-0.5)))
        if fine_NF.size > 0:
            fine = fine_NF[n]
            for f in range(width):
                v = (gate[f] * factor - np.float32(q[f])) * np.float32(FINE)
                fine[f] = np.int8(v + (np.float32(0.5) if v >= np.float32(0) else np.float32(-0.5)))

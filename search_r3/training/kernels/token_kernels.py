"""The fused decoder's elementwise kernels, compiled by numba; each makes one pass over a row.

They run in the calling thread without the GIL; `thread_parts` runs them in parallel. Arrays are C-contiguous, float32
or bfloat16; numba has no bfloat16, so its arrays are uint16 and hold the upper half of a float32. Arithmetic is
float32. Call `compile_kernels` first: it replaces this module's functions by compiled ones.

Letters in shapes: those of `fused_llama`; X and Y are widths of a projection's input and output with the LoRA ranks
beside it, whose columns are set to 0 where a kernel writes whole rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_SUMS_IN_ANY_ORDER = {"reassoc", "nsz", "contract", "arcp"}
"""Lets LLVM vectorize sums; NaN and infinity are preserved."""
_FASTMATH: dict[str, Any] = {
    "_exp": {"contract"},
    **dict.fromkeys(
        (
            "norm",
            "add_norm",
            "add",
            "convert",
            "norm_backward",
            "swiglu",
            "swiglu_backward",
            "_rotate",
            "_rotate_back",
            "pack_heads",
            "softmax",
            "softmax_backward",
            "unpack_heads",
            "pack_gradient",
            "unpack_gradient",
            "cross_entropy",
        ),
        _SUMS_IN_ANY_ORDER,
    ),
}
_widen: Any = None
_narrow: Any = None
_power_of_two: Any = None
_larger: Any = None
_smaller: Any = None


def compile_kernels() -> None:
    """Replace this module's functions by compiled ones, once; each is compiled on its first call and cached on disk.

    Raises:
        ModuleNotFoundError: numba is not installed.
    """
    names = globals()
    if names["_widen"] is not None:
        return
    names.update(_intrinsics())
    for name, fastmath in _FASTMATH.items():
        names[name] = _compiled(names[name], fastmath)


def _compiled(function: Any, fastmath: Any) -> Any:
    from numba import njit

    settings = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return njit(function, cache=True, **settings)
    except RuntimeError:  # the cache folder is not writable
        return njit(function, **settings)


def _intrinsics() -> dict[str, Any]:
    """Operations that numba cannot express, as LLVM instructions."""
    from llvmlite import ir
    from numba import extending, types

    intrinsic: Any = extending.intrinsic

    @intrinsic
    def _widen(typing_context, x):
        """A float32 from an element of an array."""
        if x == types.float32:
            return types.float32(types.float32), lambda context, builder, signature, arguments: arguments[0]

        def generate(context, builder, signature, arguments):
            word = ir.IntType(32)
            bits = builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16))
            return builder.bitcast(bits, ir.FloatType())

        return types.float32(types.uint16), generate

    @intrinsic
    def _narrow(typing_context, x, array):
        """A float32 as an element of `array`: rounded to the nearest bfloat16, ties to even."""
        if array.dtype == types.float32:
            return types.float32(types.float32, array), lambda context, builder, signature, arguments: arguments[0]

        def generate(context, builder, signature, arguments):
            word = ir.IntType(32)
            bits = builder.bitcast(arguments[0], word)
            odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
            rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
            return builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))

        return types.uint16(types.float32, array), generate

    @intrinsic
    def _power_of_two(typing_context, x):
        """2 to the power of a whole float32 from -126 to 127."""

        def generate(context, builder, signature, arguments):
            word = ir.IntType(32)
            exponent = builder.add(builder.fptosi(arguments[0], word), ir.Constant(word, 127))
            return builder.bitcast(builder.shl(exponent, ir.Constant(word, 23)), ir.FloatType())

        return types.float32(types.float32), generate

    found = {"_widen": _widen, "_narrow": _narrow, "_power_of_two": _power_of_two}
    return found | {"_larger": _extreme("llvm.maxnum"), "_smaller": _extreme("llvm.minnum")}


def _extreme(instruction: str) -> Any:
    """The larger or smaller of two float32, as one instruction: LLVM does not vectorize loops with comparisons."""
    from llvmlite import ir
    from numba import extending, types

    intrinsic: Any = extending.intrinsic

    @intrinsic
    def chosen(typing_context, a, b):
        def generate(context, builder, signature, arguments):
            kind = ir.FloatType()
            function = builder.module.declare_intrinsic(instruction, [kind], ir.FunctionType(kind, [kind, kind]))
            return builder.call(function, arguments, fastmath=("nnan", "nsz"))

        return types.float32(types.float32, types.float32), generate

    return chosen


def _exp(x):
    """e^x in float32 to within 2 ulp (Cephes, expf.c); calls of the C library's expf are not vectorized."""
    x = _larger(_smaller(x, np.float32(88.0)), np.float32(-87.0))
    whole = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    x -= whole * np.float32(0.693359375)
    x -= whole * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * x + np.float32(1.3981999507e-3)
    p = p * x + np.float32(8.3334519073e-3)
    p = p * x + np.float32(4.1665795894e-2)
    p = p * x + np.float32(1.6666665459e-1)
    p = p * x + np.float32(5.0000001201e-1)
    return (p * x * x + x + np.float32(1)) * _power_of_two(whole)


def norm(hidden_ND, weight_D, eps, out_NX):
    """RMSNorm."""
    size, width = hidden_ND.shape
    for n in range(size):
        x, out = hidden_ND[n], out_NX[n]
        total = np.float32(0)
        for d in range(width):
            total += x[d] * x[d]
        inverse = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for d in range(width):
            out[d] = _narrow(x[d] * inverse * weight_D[d], out_NX)
        out[width:] = 0


def add_norm(hidden_ND, delta_ND, weight_D, eps, sum_ND, out_NX):
    """The sum of the residual stream and a projection's output, and RMSNorm of it."""
    size, width = hidden_ND.shape
    for n in range(size):
        x, delta, both, out = hidden_ND[n], delta_ND[n], sum_ND[n], out_NX[n]
        total = np.float32(0)
        for d in range(width):
            v = x[d] + _widen(delta[d])
            both[d] = v
            total += v * v
        inverse = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for d in range(width):
            out[d] = _narrow(both[d] * inverse * weight_D[d], out_NX)
        out[width:] = 0


def add(hidden_ND, delta_ND, sum_ND):
    """The sum of the residual stream and a projection's output."""
    size, width = hidden_ND.shape
    for n in range(size):
        x, delta, both = hidden_ND[n], delta_ND[n], sum_ND[n]
        for d in range(width):
            both[d] = x[d] + _widen(delta[d])


def convert(x_ND, out_ND):
    """`x` in the dtype of the matrix products."""
    size, width = x_ND.shape
    for n in range(size):
        x, out = x_ND[n], out_ND[n]
        for d in range(width):
            out[d] = _narrow(x[d], out_ND)


def norm_backward(dy_NX, low_ND, hidden_ND, weight_D, eps, past_ND, out_ND):
    """The gradient of RMSNorm's input plus that of the residual connection; `low`, unless empty, is added to `dy`."""
    size, width = hidden_ND.shape
    gradient = np.empty(width, np.float32)
    for n in range(size):
        dy, x, past, out = dy_NX[n], hidden_ND[n], past_ND[n], out_ND[n]
        if low_ND.size > 0:
            low = low_ND[n]
            for d in range(width):
                gradient[d] = (_widen(dy[d]) + _widen(low[d])) * weight_D[d]
        else:
            for d in range(width):
                gradient[d] = _widen(dy[d]) * weight_D[d]
        total = np.float32(0)
        along = np.float32(0)
        for d in range(width):
            total += x[d] * x[d]
            along += gradient[d] * x[d]
        inverse = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        along *= -inverse * inverse * inverse / np.float32(width)
        for d in range(width):
            out[d] = past[d] + gradient[d] * inverse + x[d] * along


def swiglu(gate_up_N2F, out_NX):
    """silu(gate) * up."""
    size, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
    for n in range(size):
        row, out = gate_up_N2F[n], out_NX[n]
        gate, up = row[:width], row[width:]
        for f in range(width):
            g = _widen(gate[f])
            out[f] = _narrow(g / (np.float32(1) + _exp(-g)) * _widen(up[f]), out_NX)
        out[width:] = 0


def swiglu_backward(dact_NX, low_NF, gate_up_N2F, dgate_up_N2F, act_NF):
    """The gradients of gate and up, and silu(gate) * up, recomputed; its gradient is `dact` plus `low`."""
    size, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
    with_low = low_NF.size > 0
    for n in range(size):
        dact, row, drow, act = dact_NX[n], gate_up_N2F[n], dgate_up_N2F[n], act_NF[n]
        gate, up, dgate, dup = row[:width], row[width:], drow[:width], drow[width:]
        if with_low:
            low = low_NF[n]
            for f in range(width):
                g, u, d = _widen(gate[f]), _widen(up[f]), _widen(dact[f]) + _widen(low[f])
                share = np.float32(1) / (np.float32(1) + _exp(-g))
                swish = g * share
                act[f] = _narrow(swish * u, act_NF)
                dup[f] = _narrow(d * swish, dgate_up_N2F)
                dgate[f] = _narrow(d * u * (share + swish - swish * share), dgate_up_N2F)
        else:
            for f in range(width):
                g, u, d = _widen(gate[f]), _widen(up[f]), _widen(dact[f])
                share = np.float32(1) / (np.float32(1) + _exp(-g))
                swish = g * share
                act[f] = _narrow(swish * u, act_NF)
                dup[f] = _narrow(d * swish, dgate_up_N2F)
                dgate[f] = _narrow(d * u * (share + swish - swish * share), dgate_up_N2F)


def _rotate(x, cos, sin, out, like):
    """One head rotated by RoPE; the first half of `sin` is negated, as in transformers' rotate_half."""
    half = out.size // 2
    for e in range(half):
        a, b = _widen(x[e]), _widen(x[half + e])
        out[e] = _narrow(a * cos[e] + b * sin[e], like)
        out[half + e] = _narrow(b * cos[half + e] + a * sin[half + e], like)


def _rotate_back(x, cos, sin, out, like):
    half = out.size // 2
    for e in range(half):
        a, b = _widen(x[e]), _widen(x[half + e])
        out[e] = _narrow(a * cos[e] - b * sin[e], like)
        out[half + e] = _narrow(b * cos[half + e] - a * sin[half + e], like)


def pack_heads(qkv_NC, cos_LE, sin_LE, start_B, length_B, before_2KPE, query_BKGLE, key_BKTE, value_BKTE):
    """Rotated queries and keys, and values, row by row, after the prefix's (`before`); padding is set to 0."""
    size, heads, groups, _, dim = query_BKGLE.shape
    prefix, total = before_2KPE.shape[2], key_BKTE.shape[2]
    for b in range(size):
        start, length = start_B[b], length_B[b]
        for k in range(heads):
            key_BKTE[b, k, :prefix] = before_2KPE[0, k]
            value_BKTE[b, k, :prefix] = before_2KPE[1, k]
            key_BKTE[b, k, prefix + length : total] = 0
            value_BKTE[b, k, prefix + length : total] = 0
            for g in range(groups):
                query_BKGLE[b, k, g, length:] = 0
        for t in range(length):
            row, cos, sin = qkv_NC[start + t], cos_LE[t], sin_LE[t]
            for k in range(heads):
                for g in range(groups):
                    first = (k * groups + g) * dim
                    _rotate(row[first : first + dim], cos, sin, query_BKGLE[b, k, g, t], query_BKGLE)
                first = (heads * groups + k) * dim
                _rotate(row[first : first + dim], cos, sin, key_BKTE[b, k, prefix + t], key_BKTE)
                first += heads * dim
                value = value_BKTE[b, k, prefix + t]
                for e in range(dim):
                    value[e] = row[first + e]


def softmax(scores_BKGLT, length_B, prefix, scale):
    """In place: causal softmax of the scaled scores over the prefix and the row; 0 at all other positions."""
    size, heads, groups, longest, total = scores_BKGLT.shape
    line = np.empty(total, np.float32)
    for b in range(size):
        for k in range(heads):
            for g in range(groups):
                for t in range(longest):
                    row = scores_BKGLT[b, k, g, t]
                    if t >= length_B[b]:
                        row[:] = 0
                        continue
                    seen = prefix + t + 1
                    largest = _widen(row[0])
                    for j in range(seen):
                        line[j] = _widen(row[j])
                        largest = _larger(largest, line[j])
                    whole = np.float32(0)
                    for j in range(seen):
                        line[j] = _exp((line[j] - largest) * scale)
                        whole += line[j]
                    factor = np.float32(1) / whole
                    for j in range(seen):
                        row[j] = _narrow(line[j] * factor, scores_BKGLT)
                    row[seen:] = 0


def softmax_backward(dshare_BKGLT, share_BKGLT, length_B, prefix, scale):
    """Overwrite the gradient of `softmax`'s output with that of its scores."""
    size, heads, groups, longest, _ = share_BKGLT.shape
    for b in range(size):
        for k in range(heads):
            for g in range(groups):
                for t in range(longest):
                    drow, row = dshare_BKGLT[b, k, g, t], share_BKGLT[b, k, g, t]
                    if t >= length_B[b]:
                        drow[:] = 0
                        continue
                    seen = prefix + t + 1
                    along = np.float32(0)
                    for j in range(seen):
                        along += _widen(drow[j]) * _widen(row[j])
                    for j in range(seen):
                        drow[j] = _narrow((_widen(drow[j]) - along) * _widen(row[j]) * scale, dshare_BKGLT)
                    drow[seen:] = 0


def unpack_heads(attended_BKGLE, start_B, length_B, out_NX):
    """Attention's output, token by token."""
    size, heads, groups, _, dim = attended_BKGLE.shape
    for b in range(size):
        for t in range(length_B[b]):
            out = out_NX[start_B[b] + t]
            for k in range(heads):
                for g in range(groups):
                    first = (k * groups + g) * dim
                    x = attended_BKGLE[b, k, g, t]
                    for e in range(dim):
                        out[first + e] = x[e]
            out[heads * groups * dim :] = 0


def pack_gradient(dx_NX, low_ND, start_B, length_B, out_BKGLE):
    """The gradient of `unpack_heads`' input, from `dx` plus `low`; padding is set to 0."""
    size, heads, groups, _, dim = out_BKGLE.shape
    with_low = low_ND.size > 0
    for b in range(size):
        start, length = start_B[b], length_B[b]
        for k in range(heads):
            for g in range(groups):
                first = (k * groups + g) * dim
                for t in range(length):
                    dx, out = dx_NX[start + t, first : first + dim], out_BKGLE[b, k, g, t]
                    if with_low:
                        low = low_ND[start + t, first : first + dim]
                        for e in range(dim):
                            out[e] = _narrow(_widen(dx[e]) + _widen(low[e]), out_BKGLE)
                    else:
                        for e in range(dim):
                            out[e] = dx[e]
                out_BKGLE[b, k, g, length:] = 0


def unpack_gradient(dquery_BKGLE, dkey_BKTE, dvalue_BKTE, cos_LE, sin_LE, start_B, length_B, dqkv_NC, dbefore_2KPE):
    """The gradient of `pack_heads`' input; those of the prefix's keys and values are accumulated in float32."""
    size, heads, groups, _, dim = dquery_BKGLE.shape
    prefix = dbefore_2KPE.shape[2]
    for b in range(size):
        start = start_B[b]
        for k in range(heads):
            for p in range(prefix):
                dkey, dvalue, into_key, into_value = (
                    dkey_BKTE[b, k, p],
                    dvalue_BKTE[b, k, p],
                    dbefore_2KPE[0, k, p],
                    dbefore_2KPE[1, k, p],
                )
                for e in range(dim):
                    into_key[e] += _widen(dkey[e])
                    into_value[e] += _widen(dvalue[e])
        for t in range(length_B[b]):
            row, cos, sin = dqkv_NC[start + t], cos_LE[t], sin_LE[t]
            for k in range(heads):
                for g in range(groups):
                    first = (k * groups + g) * dim
                    _rotate_back(dquery_BKGLE[b, k, g, t], cos, sin, row[first : first + dim], dqkv_NC)
                first = (heads * groups + k) * dim
                _rotate_back(dkey_BKTE[b, k, prefix + t], cos, sin, row[first : first + dim], dqkv_NC)
                first += heads * dim
                dvalue = dvalue_BKTE[b, k, prefix + t]
                for e in range(dim):
                    row[first + e] = dvalue[e]


def cross_entropy(logits_CV, target_C, loss_C):
    """Write -log softmax(logits)[target] to `loss`, and overwrite the logits with its gradient."""
    size, width = logits_CV.shape
    line = np.empty(width, np.float32)
    for c in range(size):
        row, target = logits_CV[c], target_C[c]
        right = _widen(row[target])
        largest = right
        for v in range(width):
            line[v] = _widen(row[v])
            largest = _larger(largest, line[v])
        whole = np.float32(0)
        for v in range(width):
            line[v] = _exp(line[v] - largest)
            whole += line[v]
        loss_C[c] = np.log(whole) + largest - right
        factor = np.float32(1) / whole
        for v in range(width):
            row[v] = _narrow(line[v] * factor, logits_CV)
        row[target] = _narrow(line[target] * factor - np.float32(1), logits_CV)

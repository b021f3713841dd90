"""The fused decoder's elementwise operations, in PyTorch or compiled (`token_kernels`).

Most operations write into tensors that the caller provides, and read packed tokens without padding; attention pads
the rows of a group to the same length. Letters in shapes: those of `fused_llama` and `token_kernels`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from search_r3.training.kernels import token_kernels


@dataclass
class Group:
    """Rows of similar length, which attention pads to the longest.

    Attributes:
        start_B: index of each row's first token, int64.
        length_B: each row's number of tokens, int64.
        longest: L.
        keys: T, the prefix's length plus L, rounded up.
    """

    start_B: np.ndarray
    length_B: np.ndarray
    longest: int
    keys: int

    @functools.cached_property
    def real_BL(self) -> Tensor:
        """Boolean mask, True at tokens and False at padding."""
        return torch.from_numpy(np.arange(self.longest) < self.length_B[:, None])

    @functools.cached_property
    def place_BL(self) -> Tensor:
        """Each token's index in the packed batch; in the padding, that of the row's last token."""
        within_BL = np.minimum(np.arange(self.longest), self.length_B[:, None] - 1)
        return torch.from_numpy(self.start_B[:, None] + within_BL)


@dataclass
class Rotary:
    """RoPE's tables for positions after the prefix, (L, E); the first half of `sin` is negated, as in rotate_half."""

    cos_LE: Tensor
    sin_LE: Tensor


class TokenOps:
    """Reference implementation in PyTorch, for any device and dtype."""

    def norm(self, hidden_ND: Tensor, weight_D: Tensor, eps: float, out_NX: Tensor) -> None:
        """RMSNorm; 0 in the columns of `out` beyond D."""
        width = hidden_ND.shape[1]
        torch.mul(hidden_ND * _inverse_rms(hidden_ND, eps), weight_D, out=out_NX[:, :width])
        out_NX[:, width:] = 0

    def add(self, hidden_ND: Tensor, delta_ND: Tensor, sum_ND: Tensor) -> None:
        """The sum of the residual stream and a projection's output."""
        torch.add(hidden_ND, delta_ND, out=sum_ND)

    def add_norm(
        self, hidden_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, eps: float, sum_ND: Tensor, out_NX: Tensor
    ) -> None:
        """`add`, then `norm` of the sum."""
        self.add(hidden_ND, delta_ND, sum_ND)
        self.norm(sum_ND, weight_D, eps, out_NX)

    def convert(self, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in the dtype of the products."""
        return x_ND.to(dtype)

    def norm_backward(
        self, dy_NX: Tensor, low_ND: Tensor | None, hidden_ND: Tensor, weight_D: Tensor, eps: float, past_ND: Tensor,
        out_ND: Tensor,
    ) -> None:  # fmt: skip
        """The gradient of RMSNorm's input plus that of the residual connection, `past`.

        Args:
            dy_NX: the gradient of its output, in the first D columns.
            low_ND: added to `dy`; see `Projection.backward`.
        """
        inverse_N1 = _inverse_rms(hidden_ND, eps)
        dy_ND = _both(dy_NX, low_ND, hidden_ND.shape[1]) * weight_D
        along_N1 = (dy_ND * hidden_ND).sum(-1, keepdim=True)
        along_N1.mul_(inverse_N1.pow(3)).div_(-hidden_ND.shape[-1])
        torch.addcmul(past_ND, dy_ND, inverse_N1, out=out_ND).addcmul_(hidden_ND, along_N1)

    def swiglu(self, gate_up_N2F: Tensor, out_NX: Tensor) -> None:
        """silu(gate) * up; 0 in the columns of `out` beyond F."""
        width = gate_up_N2F.shape[1] // 2
        torch.mul(functional.silu(gate_up_N2F[:, :width]), gate_up_N2F[:, width:], out=out_NX[:, :width])
        out_NX[:, width:] = 0

    def swiglu_backward(self, dact_NX: Tensor, low_NF: Tensor | None, gate_up_N2F: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gate and up (N, 2F), and silu(gate) * up again (N, F); `low` as in `norm_backward`."""
        width = gate_up_N2F.shape[1] // 2
        gate, up = gate_up_N2F[:, :width], gate_up_N2F[:, width:]
        dact_NF, swish_NF = _both(dact_NX, low_NF, width), functional.silu(gate)
        dgate = torch.ops.aten.silu_backward(dact_NF * up, gate)
        return torch.cat([dgate, dact_NF * swish_NF], 1), swish_NF * up

    def pack_heads(
        self, qkv_NC: Tensor, rotary: Rotary, before_2KPE: Tensor, group: Group, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, K, G, L, E) and keys, and values (B, K, T, E) after the prefix's; padded with 0."""
        _, heads, prefix, dim = before_2KPE.shape
        real_BL = group.real_BL.to(qkv_NC.device)
        rows_BLHE = qkv_NC[group.place_BL.to(qkv_NC.device)].masked_fill(~real_BL[..., None], 0).unflatten(2, (-1, dim))
        turned_BLHE = _rotated(rows_BLHE[:, :, : heads * (groups + 1)], rotary.cos_LE, rotary.sin_LE)
        query = turned_BLHE[:, :, : heads * groups].unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).contiguous()
        both = qkv_NC.new_zeros(2, len(real_BL), heads, group.keys, dim)
        both[:, :, :, :prefix] = before_2KPE[:, None]
        own = both[:, :, :, prefix : prefix + group.longest]
        own[0] = turned_BLHE[:, :, heads * groups :].transpose(1, 2)
        own[1] = rows_BLHE[:, :, heads * (groups + 1) :].transpose(1, 2)
        return query, both[0], both[1]

    def softmax_(self, scores_BKGLT: Tensor, group: Group, prefix: int, scale: float) -> None:
        """In place: causal softmax of the scaled scores over the prefix and the row; 0 at all other positions."""
        longest, keys = scores_BKGLT.shape[-2:]
        device = scores_BKGLT.device
        hidden_LT = torch.ones(longest, keys, dtype=torch.bool, device=device).triu(prefix + 1)
        scores_BKGLT.mul_(scale).masked_fill_(hidden_LT, -torch.inf)
        scores_BKGLT.copy_(scores_BKGLT.softmax(-1))
        scores_BKGLT.masked_fill_(~group.real_BL.to(device)[:, None, None, :, None], 0)

    def softmax_backward_(
        self, dshare_BKGLT: Tensor, share_BKGLT: Tensor, group: Group, prefix: int, scale: float
    ) -> None:
        """In place: the gradient of the scores from that of `softmax_`'s result."""
        dshare_BKGLT.mul_(scale)
        dshare_BKGLT.copy_(torch._softmax_backward_data(dshare_BKGLT, share_BKGLT, -1, share_BKGLT.dtype))

    def unpack_heads(self, attended_BKGLE: Tensor, group: Group, out_NX: Tensor) -> None:
        """The group's tokens of attention's output; 0 in the columns of `out` beyond all heads'."""
        rows_BLC = attended_BKGLE.permute(0, 3, 1, 2, 4).flatten(2)
        real_BL = group.real_BL.to(out_NX.device)
        place_M = group.place_BL.to(out_NX.device)[real_BL]
        out_NX[place_M] = functional.pad(rows_BLC[real_BL], (0, out_NX.shape[1] - rows_BLC.shape[2]))

    def pack_gradient(self, dx_NX: Tensor, low_ND: Tensor | None, group: Group, like_BKGLE: Tensor) -> Tensor:
        """The gradient of `unpack_heads`' input, padded with 0; `low` as in `norm_backward`."""
        _, heads, groups, _, dim = like_BKGLE.shape
        real_BL, place_BL = group.real_BL.to(dx_NX.device), group.place_BL.to(dx_NX.device)
        width = heads * groups * dim
        rows_BLC = _both(dx_NX, low_ND, width)[place_BL].masked_fill(~real_BL[..., None], 0)
        return rows_BLC.unflatten(2, (heads, groups, dim)).permute(0, 2, 3, 1, 4).contiguous()

    def unpack_gradient(
        self, dquery_BKGLE: Tensor, dkey_BKTE: Tensor, dvalue_BKTE: Tensor, rotary: Rotary, group: Group,
        dqkv_NC: Tensor, dbefore_2KPE: Tensor,
    ) -> None:  # fmt: skip
        """The gradient of `pack_heads`' input; that of the prefix's keys and values is added to `dbefore`."""
        prefix, device = dbefore_2KPE.shape[2], dqkv_NC.device
        dbefore_2KPE[0] += dkey_BKTE[:, :, :prefix].sum(0, dtype=dbefore_2KPE.dtype)
        dbefore_2KPE[1] += dvalue_BKTE[:, :, :prefix].sum(0, dtype=dbefore_2KPE.dtype)
        own = slice(prefix, prefix + group.longest)
        dquery_BLHE = dquery_BKGLE.permute(0, 3, 1, 2, 4).flatten(2, 3)
        dturned_BLHE = torch.cat([dquery_BLHE, dkey_BKTE[:, :, own].transpose(1, 2)], 2)
        drows_BLHE = _rotated(dturned_BLHE, rotary.cos_LE, -rotary.sin_LE)
        drows_BLC = torch.cat([drows_BLHE, dvalue_BKTE[:, :, own].transpose(1, 2)], 2).flatten(2)
        real_BL = group.real_BL.to(device)
        dqkv_NC[group.place_BL.to(device)[real_BL]] = drows_BLC[real_BL]

    def cross_entropy_(self, logits_CV: Tensor, target_C: Tensor, loss_C: Tensor) -> None:
        """Write -log softmax(logits)[target] to `loss`, and overwrite the logits with its gradient."""
        wide_CV = logits_CV.to(loss_C.dtype)
        log_p_CV = wide_CV.log_softmax(-1)
        loss_C.copy_(-log_p_CV.gather(1, target_C[:, None])[:, 0])
        p_CV = log_p_CV.exp_()
        p_CV[torch.arange(len(target_C), device=p_CV.device), target_C] -= 1
        logits_CV.copy_(p_CV)


class CompiledOps(TokenOps):
    """The operations as compiled kernels: on a CPU, residual stream in float32, products in float32 or bfloat16."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels: Any = kernels

    def norm(self, hidden_ND: Tensor, weight_D: Tensor, eps: float, out_NX: Tensor) -> None:
        self._kernels.norm(_array(hidden_ND), _array(weight_D), np.float32(eps), _array(out_NX))

    def add(self, hidden_ND: Tensor, delta_ND: Tensor, sum_ND: Tensor) -> None:
        self._kernels.add(_array(hidden_ND), _array(delta_ND), _array(sum_ND))

    def add_norm(
        self, hidden_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, eps: float, sum_ND: Tensor, out_NX: Tensor
    ) -> None:
        arrays = (_array(hidden_ND), _array(delta_ND), _array(weight_D))
        self._kernels.add_norm(*arrays, np.float32(eps), _array(sum_ND), _array(out_NX))

    def convert(self, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
        if x_ND.dtype == dtype:
            return x_ND
        out_ND = torch.empty_like(x_ND, dtype=dtype)
        self._kernels.convert(_array(x_ND), _array(out_ND))
        return out_ND

    def norm_backward(
        self, dy_NX: Tensor, low_ND: Tensor | None, hidden_ND: Tensor, weight_D: Tensor, eps: float, past_ND: Tensor,
        out_ND: Tensor,
    ) -> None:  # fmt: skip
        self._kernels.norm_backward(
            _array(dy_NX), _array_or_none(low_ND, dy_NX), _array(hidden_ND), _array(weight_D), np.float32(eps),
            _array(past_ND), _array(out_ND),
        )  # fmt: skip

    def swiglu(self, gate_up_N2F: Tensor, out_NX: Tensor) -> None:
        self._kernels.swiglu(_array(gate_up_N2F), _array(out_NX))

    def swiglu_backward(self, dact_NX: Tensor, low_NF: Tensor | None, gate_up_N2F: Tensor) -> tuple[Tensor, Tensor]:
        tokens, width = gate_up_N2F.shape
        dgate_up_N2F, act_NF = torch.empty_like(gate_up_N2F), gate_up_N2F.new_empty(tokens, width // 2)
        self._kernels.swiglu_backward(
            _array(dact_NX), _array_or_none(low_NF, dact_NX), _array(gate_up_N2F), _array(dgate_up_N2F), _array(act_NF)
        )
        return dgate_up_N2F, act_NF

    def pack_heads(
        self, qkv_NC: Tensor, rotary: Rotary, before_2KPE: Tensor, group: Group, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, (_, heads, _, dim) = len(group.start_B), before_2KPE.shape
        query = qkv_NC.new_empty(rows, heads, groups, group.longest, dim)
        key, value = (qkv_NC.new_empty(rows, heads, group.keys, dim) for _ in range(2))
        self._kernels.pack_heads(
            _array(qkv_NC), _array(rotary.cos_LE), _array(rotary.sin_LE), group.start_B, group.length_B,
            _array(before_2KPE), _array(query), _array(key), _array(value),
        )  # fmt: skip
        return query, key, value

    def softmax_(self, scores_BKGLT: Tensor, group: Group, prefix: int, scale: float) -> None:
        self._kernels.softmax(_array(scores_BKGLT), group.length_B, prefix, np.float32(scale))

    def softmax_backward_(
        self, dshare_BKGLT: Tensor, share_BKGLT: Tensor, group: Group, prefix: int, scale: float
    ) -> None:
        arrays = (_array(dshare_BKGLT), _array(share_BKGLT))
        self._kernels.softmax_backward(*arrays, group.length_B, prefix, np.float32(scale))

    def unpack_heads(self, attended_BKGLE: Tensor, group: Group, out_NX: Tensor) -> None:
        self._kernels.unpack_heads(_array(attended_BKGLE), group.start_B, group.length_B, _array(out_NX))

    def pack_gradient(self, dx_NX: Tensor, low_ND: Tensor | None, group: Group, like_BKGLE: Tensor) -> Tensor:
        out_BKGLE = torch.empty_like(like_BKGLE)
        low = _array_or_none(low_ND, dx_NX)
        self._kernels.pack_gradient(_array(dx_NX), low, group.start_B, group.length_B, _array(out_BKGLE))
        return out_BKGLE

    def unpack_gradient(
        self, dquery_BKGLE: Tensor, dkey_BKTE: Tensor, dvalue_BKTE: Tensor, rotary: Rotary, group: Group,
        dqkv_NC: Tensor, dbefore_2KPE: Tensor,
    ) -> None:  # fmt: skip
        self._kernels.unpack_gradient(
            _array(dquery_BKGLE), _array(dkey_BKTE), _array(dvalue_BKTE), _array(rotary.cos_LE), _array(rotary.sin_LE),
            group.start_B, group.length_B, _array(dqkv_NC), _array(dbefore_2KPE),
        )  # fmt: skip

    def cross_entropy_(self, logits_CV: Tensor, target_C: Tensor, loss_C: Tensor) -> None:
        self._kernels.cross_entropy(_array(logits_CV), _array(target_C), _array(loss_C))


def token_ops(device: torch.device, product: torch.dtype, residual: torch.dtype) -> TokenOps:
    """Compiled operations where they are available, else PyTorch's."""
    if device.type != "cpu" or product not in (torch.float32, torch.bfloat16) or residual != torch.float32:
        return TokenOps()
    kernels = _compiled_kernels()
    return TokenOps() if kernels is None else CompiledOps(kernels)


@functools.cache
def _compiled_kernels() -> ModuleType | None:
    try:
        token_kernels.compile_kernels()
    except ImportError:  # numba is not installed
        return None
    return token_kernels


def _array(tensor: Tensor) -> np.ndarray:
    """A view of the tensor's memory; bfloat16 as uint16, as the kernels expect."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _array_or_none(tensor: Tensor | None, like: Tensor) -> np.ndarray:
    return _array(like.new_empty(0, 0) if tensor is None else tensor)


def _both(dy_NX: Tensor, low_ND: Tensor | None, width: int) -> Tensor:
    return dy_NX[:, :width] if low_ND is None else dy_NX[:, :width] + low_ND


def _rotated(x_BLHE: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    """x cos + swapped(x) sin; with -sin, the inverse rotation."""
    longest, half = x_BLHE.shape[1], x_BLHE.shape[-1] // 2
    swapped_BLHE = torch.cat([x_BLHE[..., half:], x_BLHE[..., :half]], -1)
    turned_BLHE = x_BLHE * cos_LE[:longest, None] + swapped_BLHE * sin_LE[:longest, None]
    return turned_BLHE.to(x_BLHE.dtype)


def _inverse_rms(hidden_ND: Tensor, eps: float) -> Tensor:
    norm_N1 = torch.linalg.vector_norm(hidden_ND, dim=-1, keepdim=True)
    return norm_N1.square_().div_(hidden_ND.shape[-1]).add_(eps).rsqrt_()

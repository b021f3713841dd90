"""Cross-entropy of a frozen head's logits, a few positions at a time: the (T, V) logits never exist as a whole.

Loss and gradient are computed together in the forward pass, since the head's matrix is frozen (as Liger's fused linear
cross-entropy, arXiv 2410.10989). Letters in shapes: T positions, C of a chunk, V vocabulary, D dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from search_r3.training.kernels.thread_parts import run_parts
from search_r3.training.kernels.token_ops import TokenOps

POSITIONS = 128
"""Positions of a chunk on a CPU: 12 MB of bf16 logits of 49,000 ids."""
POSITIONS_ELSEWHERE = 1024


def linear_cross_entropy(
    hidden_TD: Tensor, matrix_VD: Tensor, row_1D: Tensor | None, row_id: int, target_T: Tensor, ops: TokenOps
) -> Tensor:
    """-log softmax(hidden matrix')[target] of each position, (T,) float32 (float64 for float64).

    Args:
        hidden_TD: any float dtype.
        matrix_VD: the frozen head, in the dtype of the products.
        row_1D: trained instead of the head's row `row_id`; None if none is.
    """
    return _LinearCrossEntropy.apply(hidden_TD, row_1D, matrix_VD, row_id, target_T, ops)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, row_1D: Any, matrix_VD: Tensor, row_id: int, target_T: Tensor, ops: TokenOps
    ) -> Any:
        dtype = matrix_VD.dtype
        wide = torch.promote_types(dtype, torch.float32)
        x_TD = hidden_TD.to(dtype)
        row_D = None if row_1D is None else row_1D[0].to(dtype)
        loss_T = hidden_TD.new_empty(len(x_TD), dtype=wide)
        dhidden_TD, own_T = torch.empty_like(x_TD), torch.zeros_like(loss_T)
        wanted = any(ctx.needs_input_grad[:2])

        def one(chunk: slice) -> None:
            logits_CV = torch.mm(x_TD[chunk], matrix_VD.T)
            if row_D is not None:
                logits_CV[:, row_id] = torch.mv(x_TD[chunk], row_D)
            ops.cross_entropy_(logits_CV, target_T[chunk], loss_T[chunk])
            if not wanted:
                return
            if row_D is not None:
                own_T[chunk] = logits_CV[:, row_id].to(wide)
                logits_CV[:, row_id] = 0
            dhidden_TD[chunk] = torch.mm(logits_CV, matrix_VD)

        size = POSITIONS if hidden_TD.device.type == "cpu" else POSITIONS_ELSEWHERE
        chunks = [slice(start, start + size) for start in range(0, len(x_TD), size)]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            run_chunks(one, chunks, hidden_TD.device)
        ctx.save_for_backward(hidden_TD, row_1D, dhidden_TD, own_T)
        return loss_T

    @staticmethod
    def backward(ctx: Any, dloss_T: Tensor) -> Any:
        hidden_TD, row_1D, dhidden_TD, own_T = ctx.saved_tensors
        down_T1 = dloss_T[:, None]
        dx_TD = dhidden_TD.to(dloss_T.dtype) * down_T1
        drow_1D = None
        if row_1D is not None:
            own_T1 = own_T[:, None] * down_T1
            dx_TD += own_T1 * row_1D.to(dloss_T.dtype)
            drow_1D = (own_T1.T @ hidden_TD.to(dloss_T.dtype)).to(row_1D.dtype)
        return dx_TD.to(hidden_TD.dtype), drow_1D, None, None, None, None


def run_chunks(function: Any, chunks: list[slice], device: torch.device) -> None:
    """Every chunk, by as many threads as torch has on a CPU."""
    threads = min(torch.get_num_threads(), len(chunks)) if device.type == "cpu" else 1
    shares = [chunks[share::threads] for share in range(threads)]

    def several(share: list[slice]) -> None:
        for chunk in share:
            function(chunk)

    if chunks:
        run_parts(several, shares)

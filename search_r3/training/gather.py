"""Negatives from every process: gathers embeddings so that gradients flow back to the process that made each row.

Each process has its own queries and classifies their positives among the documents of all processes, as OpenCLIP and
GradCache (arXiv 2101.06983) do. Every process must make the same calls in the same order; one without rows joins in.

What is summed and what is averaged, with W processes: the backward pass of `all_gather_with_grad` *sums* what all
processes' losses say of a row, and DDP then *averages* the parameters' gradients. So the gradient is that of the mean
of the W losses. If each process has as many queries, that mean is the loss over the global batch as it stands; if not,
multiply each process's mean loss by `weight_of_rows(its queries)`. (A process may also compute the loss of all queries,
the same in every process: the mean is the global loss then too.)

Shape suffixes: N rows of this process, M rows of all processes in the order of their ranks, D dimensions, B queries.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)


def world_size(group: Any = None) -> int:
    """Processes of the group; 1 where none was set up."""
    return dist.get_world_size(group) if _distributed() else 1


def row_counts(rows: int, device: torch.device | str = "cpu", group: Any = None) -> list[int]:
    """How many rows each process has, by rank. This process's first row in M is `sum(counts[:rank])`. A collective.

    `device` is where the collective's tensors stand: a GPU for NCCL.
    """
    return [int(count) for (count,) in _exchange([rows], device, group)]


def weight_of_rows(rows: int, device: torch.device | str = "cpu", group: Any = None) -> float:
    """W * rows / (rows of all): what makes the mean of the processes' mean losses the global mean. A collective.

    0 for a process without rows; 1 if all have as many, or if nobody has any.
    """
    counts = row_counts(rows, device, group)
    return len(counts) * rows / sum(counts) if sum(counts) else 1.0


def all_gather_with_grad(x_ND: Tensor, group: Any = None) -> Tensor:
    """The rows of all processes, (M, D); its backward pass sums the gradients that all processes have for my rows.

    Both passes are collectives. So every process that takes part must run a backward pass through the result if any
    does: one that has no query to put to it adds `0 * gathered.sum()` to its loss. Gather what belongs to one step in
    as few calls as possible, and in the same order everywhere.

    Args:
        x_ND: this process's rows, on the group's device; N may differ between processes and be 0. An `x_ND` without a
            gradient (as that of an empty process) joins in the backward pass if another process has one.
        group: of torch.distributed; None is all processes.

    Returns:
        (M, D) in x's dtype; `x_ND` itself if there is one process only. Gradients are summed in float32 at least.

    Raises:
        ValueError: on every process, if the processes' dimensions, dtypes or grad modes differ; on this one, a wrong
            rank or a dtype that is none of float16, bfloat16, float32, float64 and int64.
    """
    if x_ND.dim() != 2:
        raise ValueError(f"x_ND must have 2 dimensions, got the shape {tuple(x_ND.shape)}")
    if x_ND.dtype not in _DTYPES:
        raise ValueError(f"cannot gather {x_ND.dtype}; expected one of {', '.join(str(dtype) for dtype in _DTYPES)}")
    if world_size(group) == 1:
        return x_ND
    wanted = torch.is_grad_enabled()
    header = [x_ND.shape[0], x_ND.shape[1], _DTYPES.index(x_ND.dtype), int(wanted), int(wanted and x_ND.requires_grad)]
    headers = _exchange(header, x_ND.device, group)
    for place, what in ((1, "dimensions"), (2, "dtypes"), (3, "grad modes")):
        found = [header[place] for header in headers]
        if len(set(found)) > 1:
            shown = [str(_DTYPES[i]) for i in found] if place == 2 else found
            raise ValueError(f"the processes' rows have different {what}: {shown}, by rank")
    if any(header[4] for header in headers) and not x_ND.requires_grad:
        x_ND = x_ND.detach().requires_grad_()  # else autograd would leave this process out of the backward pass
    gathered: Tensor = _Gather.apply(x_ND, [header[0] for header in headers], group)
    return gathered


def text_keys(texts: Sequence[str]) -> Tensor:
    """A number for each text, the same in every process: (N,) int64 on the CPU. Equal texts have equal keys.

    64 bits of BLAKE2b: two different ones among 10,000 texts share a key with a chance of 3 in 10^12.
    """
    words = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return torch.tensor([int.from_bytes(word, "little", signed=True) for word in words], dtype=torch.int64)


def all_gather_keys(texts: Sequence[str], device: torch.device | str = "cpu", group: Any = None) -> Tensor:
    """`text_keys` of the texts of all processes, by rank: (M,) int64 on the CPU. A collective."""
    keys_N1 = text_keys(texts).unsqueeze(1).to(device)
    with torch.no_grad():
        return all_gather_with_grad(keys_N1, group).squeeze(1).cpu()


def false_negatives(known: Sequence[Collection[str]], target_B: Tensor, keys_M: Tensor) -> Tensor:
    """Which of all processes' texts are right answers although they are not the one asked for: (B, M) bool, CPU.

    For queries against documents, `known[b]` is every positive of query b in the training data and `keys_M` are those
    of the documents; for documents against queries it is the other way round. Goes into `info_nce` as its mask.

    Args:
        known: for each row, the texts that are right for it.
        target_B: the column of each row's own target, which is never masked (a second copy of its text is).
        keys_M: from `all_gather_keys`.
    """
    columns: dict[int, list[int]] = defaultdict(list)
    for column, key in enumerate(keys_M.tolist()):
        columns[key].append(column)
    mask_BM = torch.zeros(len(known), len(keys_M), dtype=torch.bool)
    for row, texts in enumerate(known):
        for key in text_keys(list(texts)).tolist():
            mask_BM[row, columns.get(key, [])] = True
    mask_BM[torch.arange(len(known)), target_B.cpu()] = False
    return mask_BM


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        padded = x_ND.new_zeros(max(counts), x_ND.shape[1])  # NCCL and gloo gather equal shapes only
        padded[: x_ND.shape[0]] = x_ND
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_MD,) = grads
        dtype = torch.float64 if grad_MD.dtype == torch.float64 else torch.float32
        total_MD = grad_MD.to(dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total_MD, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        start = sum(ctx.counts[:rank])
        return total_MD[start : start + ctx.counts[rank]].to(grad_MD.dtype), None, None


def _exchange(numbers: list[int], device: torch.device | str, group: Any) -> list[list[int]]:
    """Every process's numbers, by rank; all have as many."""
    if world_size(group) == 1:
        return [numbers]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    parts = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return [part.tolist() for part in parts]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()

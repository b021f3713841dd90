"""One batch over several processes: which part is whose, and everybody's embeddings with gradients that flow back.

Each process runs the model on its part; then all have the rows of all, and compute the same loss over the whole batch,
as GradCache does (arXiv 2101.06983). Every process must make the same calls in the same order; one without rows joins.

What is summed and what is averaged, with W processes: the backward pass of `all_gather_with_grad` *sums* what all
processes' losses say of a row, and DDP and FSDP then *average* the parameters' gradients. So the gradient is that of
the mean of the W losses. A term that all compute alike over the whole batch is its own mean; one that is a mean
over each process's own rows is multiplied by `shares(its rows)`: then the mean is that over all rows.

Shape suffixes: N rows of this process, M rows of all processes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)


def world_size(group: Any = None) -> int:
    """Processes of the group; 1 where none was set up."""
    return dist.get_world_size(group) if _distributed() else 1


def rank(group: Any = None) -> int:
    """Which process this is, from 0."""
    return dist.get_rank(group) if _distributed() else 0


def dealt(count: int, group: Any = None) -> range:
    """Which of `count` things fall to this process: every W-th, so that sorted ones are shared evenly."""
    return range(rank(group), count, world_size(group))


def piece(count: int, group: Any = None) -> range:
    """Which of `count` things fall to this process if all processes' pieces, one behind another, are to be in order."""
    here, world = rank(group), world_size(group)
    return range(count * here // world, count * (here + 1) // world)


def everyones(parts: Sequence[Tensor], counts: Sequence[int], group: Any = None) -> list[Tensor]:
    """Of several lists of rows that were `dealt`, all rows in their order; gradients flow back. A collective.

    Args:
        parts: (N, D) each, this process's rows.
        counts: rows of each list in all.
    """
    world = world_size(group)
    if world == 1:
        return list(parts)
    every_MD = all_gather_with_grad(torch.cat(list(parts)), group)
    found, first, ahead = [], [], 0
    for process in range(world):  # where each process's rows begin, and each list's among them
        first.append([ahead])
        for count in counts:
            ahead += len(range(process, count, world))
            first[-1].append(ahead)
    for number, count in enumerate(counts):
        places = [first[i % world][number] + i // world for i in range(count)]
        found.append(every_MD[torch.tensor(places, dtype=torch.long, device=every_MD.device)])
    return found


def gathered(value: Any, group: Any = None) -> list[Any]:
    """Every process's value (anything that can be pickled, such as texts), by rank. A collective."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def most(number: int, device: torch.device | str = "cpu", group: Any = None) -> int:
    """The greatest of the processes' numbers. A collective."""
    return max(found for (found,) in _exchange([number], device, group))


def shares(*rows: int, device: torch.device | str = "cpu", group: Any = None) -> list[float]:
    """For each number of rows, W * rows / (rows of all): what makes the mean of the processes' means that of all rows.

    0 for a process without rows; 1 if all have as many, or if nobody has any. A collective; `device` is where its
    tensors stand: a GPU for NCCL.
    """
    counts = _exchange(list(rows), device, group)
    totals = [sum(column) for column in zip(*counts, strict=True)]
    return [len(counts) * mine / total if total else 1.0 for mine, total in zip(rows, totals, strict=True)]


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

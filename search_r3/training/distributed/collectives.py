"""One batch over several processes: which rows belong to this process, and gathering all rows with their gradients.

Each process runs the model on its own rows; then all rows are gathered on all processes, which compute the same loss
over the whole batch, as GradCache does (arXiv 2101.06983). Every process must make the same calls in the same order;
a process without rows takes part too.

Sums and means, with W processes: the backward pass of `all_gather_with_grad` *sums* the gradients that all processes'
losses have for a row, and DDP and FSDP then *average* the parameters' gradients. The result is the gradient of the mean
of the W losses. A term that all processes compute over the whole batch equals its mean. A term that is a mean over each
process's own rows is multiplied by `rank_weights(rows)`, which makes the mean over processes a mean over all rows.

`torch.distributed.nn.functional.all_gather` is not used: torch 2.13 deprecates it, it needs the same number of rows on
every process, and it sums half-precision gradients in half precision.

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
    """The number of processes in the group; 1 without distributed training."""
    return dist.get_world_size(group) if _distributed() else 1


def rank(group: Any = None) -> int:
    """The rank of this process, from 0."""
    return dist.get_rank(group) if _distributed() else 0


def strided_indices(count: int, group: Any = None) -> range:
    """Indices of this process's items out of `count`: every W-th, so that items sorted by length are spread evenly."""
    return range(rank(group), count, world_size(group))


def contiguous_shard(count: int, group: Any = None) -> range:
    """Indices of this process's items out of `count`: a contiguous shard, so that order is kept by rank."""
    return contiguous_share(count, rank(group), world_size(group))


def contiguous_share(count: int, rank: int, processes: int) -> range:
    """`contiguous_shard` for any process and number of processes."""
    return range(count * rank // processes, count * (rank + 1) // processes)


def all_gather_rows(parts: Sequence[Tensor], counts: Sequence[int], group: Any = None) -> list[Tensor]:
    """All rows of several lists in their original order, with gradients. A collective.

    Args:
        parts: for each list, the rows of this process (see `strided_indices`), (N, D).
        counts: for each list, the number of rows on all processes.
    """
    world = world_size(group)
    if world == 1:
        return list(parts)
    gathered_MD = all_gather_with_grad(torch.cat(list(parts)), group)
    rows, offsets, offset = [], [], 0
    for process in range(world):  # where each process's rows begin in the result, and each list's rows within them
        offsets.append([offset])
        for count in counts:
            offset += len(range(process, count, world))
            offsets[-1].append(offset)
    for number, count in enumerate(counts):
        indices = [offsets[i % world][number] + i // world for i in range(count)]
        rows.append(gathered_MD[torch.tensor(indices, dtype=torch.long, device=gathered_MD.device)])
    return rows


def all_gather_object(value: Any, group: Any = None) -> list[Any]:
    """Every process's value, by rank; any picklable object. A collective."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def all_reduce_max(number: int, device: torch.device | str = "cpu", group: Any = None) -> int:
    """The largest of the processes' numbers. A collective."""
    return max(value for (value,) in _all_gather_integers([number], device, group))


def rank_weights(*rows: int, device: torch.device | str = "cpu", group: Any = None) -> list[float]:
    """For each term, the weight that makes a mean of per-process means the mean over all rows. A collective.

    The weight is W * rows / (rows of all processes): 0 for a process without rows; 1 if all processes have the same
    number of rows, or none has any.

    Args:
        rows: the numbers of rows on this process, one per term.
        device: the device of the collective's tensors; a GPU for NCCL.
    """
    counts = _all_gather_integers(list(rows), device, group)
    totals = [sum(column) for column in zip(*counts, strict=True)]
    return [len(counts) * mine / total if total else 1.0 for mine, total in zip(rows, totals, strict=True)]


def all_gather_with_grad(x_ND: Tensor, group: Any = None) -> Tensor:
    """The rows of all processes, (M, D); the backward pass sums all processes' gradients of this process's rows.

    Both passes are collectives, so if one process runs a backward pass through the result, all must; a process whose
    loss does not depend on it adds `0 * gathered.sum()`. Gather everything that a step needs in as few calls as
    possible, and in the same order on every process.

    Args:
        x_ND: this process's rows, on the group's device; N may differ between processes and be 0. An `x_ND` without a
            gradient (such as that of a process without rows) takes part in the backward pass if another has one.
        group: a group of torch.distributed; None means all processes.

    Returns:
        (M, D) in x's dtype; `x_ND` itself if there is only one process. Gradients are summed in float32 or wider.

    Raises:
        ValueError: on every process, if dimensions, dtypes or grad modes differ between processes; on this process, if
            `x_ND` is not two-dimensional or its dtype is not float16, bfloat16, float32, float64 or int64.
    """
    if x_ND.dim() != 2:
        raise ValueError(f"x_ND must have 2 dimensions, got the shape {tuple(x_ND.shape)}")
    if x_ND.dtype not in _DTYPES:
        raise ValueError(f"cannot gather {x_ND.dtype}; expected one of {', '.join(str(dtype) for dtype in _DTYPES)}")
    if world_size(group) == 1:
        return x_ND
    wanted = torch.is_grad_enabled()
    header = [x_ND.shape[0], x_ND.shape[1], _DTYPES.index(x_ND.dtype), int(wanted), int(wanted and x_ND.requires_grad)]
    headers = _all_gather_integers(header, x_ND.device, group)
    for field, what in ((1, "dimensions"), (2, "dtypes"), (3, "grad modes")):
        values = [header[field] for header in headers]
        if len(set(values)) > 1:
            shown = [str(_DTYPES[i]) for i in values] if field == 2 else values
            raise ValueError(f"the processes' rows have different {what}: {shown}, by rank")
    if any(header[4] for header in headers) and not x_ND.requires_grad:
        x_ND = x_ND.detach().requires_grad_()  # else autograd would leave this process out of the backward pass
    gathered: Tensor = _AllGather.apply(x_ND, [header[0] for header in headers], group)
    return gathered


class _AllGather(torch.autograd.Function):
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


def _all_gather_integers(numbers: list[int], device: torch.device | str, group: Any) -> list[list[int]]:
    """Every process's numbers, by rank; the count must be the same on all processes."""
    if world_size(group) == 1:
        return [numbers]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    parts = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return [part.tolist() for part in parts]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()

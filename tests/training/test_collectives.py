"""Collectives: two gloo processes compute the loss and the gradients of one process with the global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from search_r3.training.distributed.collectives import (
    all_gather_object,
    all_gather_rows,
    all_gather_with_grad,
    all_reduce_max,
    contiguous_shard,
    rank_weights,
    strided_indices,
)
from search_r3.training.losses import info_nce

QUERIES, DOCUMENTS = 5, 7
"""Odd numbers: one process has more."""


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.layers(x), dim=-1)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Of the queries and of the documents; the first documents are the queries' answers."""
    generator = torch.Generator().manual_seed(1)
    q, d = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (QUERIES, DOCUMENTS))
    return q, d


def both_ways(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """InfoNCE of the queries among all documents, and of their documents among the queries."""
    target = torch.arange(QUERIES)
    return info_nce(q, d, target, 0.1) + info_nce(d[:QUERIES], q, target, 0.1)


def local(q: torch.Tensor) -> torch.Tensor:
    """A term that each process computes of its own rows: a mean."""
    return q.square().matmul(torch.arange(1.0, 5.0, dtype=q.dtype)).mean()


def loss_of(encoder: nn.Module, tail: int) -> torch.Tensor:
    """The global loss on the queries from `tail` on, over however many processes there are."""
    (q, d), rows = inputs(), range(tail, QUERIES)
    mine = [rows[i] for i in strided_indices(len(rows))]
    counts = [QUERIES, DOCUMENTS, len(rows)]
    embedded = encoder(torch.cat([q[list(strided_indices(QUERIES))], d[list(strided_indices(DOCUMENTS))], q[mine]]))
    parts = embedded.split([len(strided_indices(count)) for count in counts])
    every_q, every_d, every_tail = all_gather_rows(parts, counts)
    assert [len(every_q), len(every_d), len(every_tail)] == counts
    loss = both_ways(every_q, every_d) + every_tail.sum(0).pow(3).sum()
    (share,) = rank_weights(len(mine))
    return loss + share * local(parts[2]) if mine else loss + 0 * parts[2].sum()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    expected = {}
    for tail in (0, 2, 4):
        alone = Encoder()
        loss = loss_of(alone, tail)
        loss.backward()
        expected[tail] = loss.item(), [p.grad for p in alone.parameters() if p.grad is not None]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for tail, (value, gradients) in expected.items():  # of the last tail, one process has no row at all
        encoder = DistributedDataParallel(Encoder())
        loss = loss_of(encoder, tail)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        assert mean.item() / 2 == pytest.approx(value, abs=1e-10)
        for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            assert (parameter.grad - gradient).abs().max() < 1e-10, tail

    # Rows come back in their original order.
    numbers = torch.arange(10)[:, None]
    parts = [numbers[list(strided_indices(count))] for count in (10, 3, 0, 1)]
    for found, count in zip(all_gather_rows(parts, (10, 3, 0, 1)), (10, 3, 0, 1), strict=True):
        assert found[:, 0].tolist() == list(range(count))
    for count in (0, 1, 5, 6):
        assert [i for part in all_gather_object(list(contiguous_shard(count))) for i in part] == list(range(count))
    assert all_gather_object({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert all_reduce_max(5 - rank) == 5
    assert rank_weights(3 * (1 - rank), 1) == [2.0 * (1 - rank), 1.0]
    assert rank_weights(0) == [1.0]  # no process has any

    # A process that has nothing to differentiate joins in the backward pass of the other.
    x = torch.ones(2, 3, requires_grad=True) if rank == 0 else torch.zeros(0, 3)
    y = all_gather_with_grad(x)
    (y * (rank + 1)).sum().backward()
    if rank == 0:
        assert x.grad is not None
        assert (x.grad == 3).all()  # 1 from this process, 2 from the other
    with torch.no_grad():
        assert not all_gather_with_grad(x).requires_grad
    assert not all_gather_with_grad(x.detach()).requires_grad
    half = torch.full((1, 2), 1.5, dtype=torch.bfloat16, requires_grad=True)
    all_gather_with_grad(half).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16

    # Both refuse, so that neither waits for the other for ever.
    with pytest.raises(ValueError, match=r"different dimensions: \[3, 4\]"):
        all_gather_with_grad(torch.zeros(1, 3 + rank))
    with pytest.raises(ValueError, match="different dtypes"):
        all_gather_with_grad(torch.zeros(1, 3, dtype=(torch.float32, torch.float64)[rank]))
    with torch.set_grad_enabled(rank == 0), pytest.raises(ValueError, match="different grad modes"):
        all_gather_with_grad(torch.zeros(1, 3))
    dist.barrier()
    (Path(folder) / f"done-{rank}").touch()
    dist.destroy_process_group()


def test_two_processes_compute_the_loss_and_gradients_of_the_global_batch(tmp_path: Path) -> None:
    run_processes(work, str(tmp_path))
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()


def test_one_process_has_all_there_is() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert all_gather_with_grad(x) is x
    assert all_gather_rows([x], [3])[0] is x
    assert list(strided_indices(3)) == list(contiguous_shard(3)) == [0, 1, 2]
    assert all_gather_object("a") == ["a"]
    assert all_reduce_max(3) == 3
    assert rank_weights(3, 0) == [1.0, 1.0]


def test_what_cannot_be_gathered_is_refused() -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        all_gather_with_grad(torch.zeros(3))
    with pytest.raises(ValueError, match=r"cannot gather torch\.bool"):
        all_gather_with_grad(torch.zeros(3, 2, dtype=torch.bool))

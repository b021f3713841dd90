"""Gathering: two gloo processes compute the loss and the gradients of one process with the global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from search_r3.training.gather import (
    all_gather_keys,
    all_gather_with_grad,
    false_negatives,
    row_counts,
    text_keys,
    weight_of_rows,
)
from search_r3.training.losses import info_nce

TEXTS = ["one", "two", "three", "one", "four", "five", "six"]
"""The positives of seven queries. The first and the fourth are one text, and fall to different processes."""
KNOWN = [{"one"}, {"two"}, {"three"}, {"one"}, {"four", "two"}, {"five"}, {"six", "three"}]
"""What else each query's answer could have been."""
SPLITS = ((5, 2), (3, 4), (7, 0), (0, 7))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.layers(x), dim=-1)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Of seven queries and of their documents, which are negatives of the others."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(7, 6, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore


def both_ways(q: torch.Tensor, d: torch.Tensor, all_q: torch.Tensor, all_d: torch.Tensor, start: int) -> torch.Tensor:
    """InfoNCE of some queries among all documents, and of their documents among all queries."""
    target = torch.arange(start, start + len(q))
    known = KNOWN[start : start + len(q)]
    mask = false_negatives(known, target, text_keys(TEXTS))
    assert mask.any()
    names = [str(i) for i in range(7)]
    right = [{str(i) for i in range(7) if TEXTS[j] in KNOWN[i]} for j in target]
    return info_nce(q, all_d, target, 0.1, mask) + info_nce(
        d, all_q, target, 0.1, false_negatives(right, target, text_keys(names))
    )


def single_process() -> tuple[float, list[torch.Tensor]]:
    encoder, (q, d) = Encoder(), inputs()
    embedded = encoder(torch.cat([q, d]))
    loss = both_ways(embedded[:7], embedded[7:], embedded[:7], embedded[7:], 0)
    loss.backward()
    return loss.item(), [p.grad for p in encoder.parameters() if p.grad is not None]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    expected, gradients = single_process()
    for split in SPLITS:
        start, count = sum(split[:rank]), split[rank]
        mine = slice(start, start + count)
        assert row_counts(count) == list(split)
        keys = all_gather_keys(TEXTS[mine])
        assert torch.equal(keys, text_keys(TEXTS))
        for everywhere in (False, True):  # my queries only, or the loss of all queries in every process
            encoder = DistributedDataParallel(Encoder())
            q, d = (x[mine] for x in inputs())
            embedded = encoder(torch.cat([q, d]))
            q, d = embedded[:count], embedded[count:]
            all_q, all_d = all_gather_with_grad(q), all_gather_with_grad(d)
            assert all_q.shape == all_d.shape == (7, 4)
            if everywhere:
                loss = both_ways(all_q, all_d, all_q, all_d, 0)
            elif count:
                loss = weight_of_rows(count) * both_ways(q, d, all_q, all_d, start)
            else:
                assert weight_of_rows(0) == 0
                loss = 0 * (all_q.sum() + all_d.sum())
            loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            assert mean.item() / 2 == pytest.approx(expected, abs=1e-10)
            for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
                assert parameter.grad is not None
                assert (parameter.grad - gradient).abs().max() < 1e-10, (split, everywhere)

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

    assert len(all_gather_keys([])) == 0
    assert weight_of_rows(0) == 1

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
    assert row_counts(3) == [3]
    assert weight_of_rows(3) == 1
    assert torch.equal(all_gather_keys(["a", "b"]), text_keys(["a", "b"]))


def test_equal_texts_have_equal_keys_in_every_process_and_version() -> None:
    keys = text_keys(["wie", "", "wie", "Wie", "\ud800"])
    assert keys.dtype == torch.int64
    assert keys[0] == keys[2]
    assert len(set(keys.tolist())) == 4
    assert int(text_keys(["abc"])[0]) == 6455300059550759896


def test_other_right_answers_and_copies_of_the_own_one_are_false_negatives() -> None:
    keys = text_keys(["a", "b", "a", "c"])
    mask = false_negatives([{"a"}, {"b", "c", "elsewhere"}, set()], torch.tensor([2, 1, 0]), keys)
    assert mask.tolist() == [[True, False, False, False], [False, False, False, True], [False] * 4]


def test_what_cannot_be_gathered_is_refused() -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        all_gather_with_grad(torch.zeros(3))
    with pytest.raises(ValueError, match=r"cannot gather torch\.bool"):
        all_gather_with_grad(torch.zeros(3, 2, dtype=torch.bool))

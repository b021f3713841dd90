"""ShardedCorpus: one LiveCorpus per process, searched as a single corpus over torch.distributed.

Every process has a contiguous slice of the rows. A search gathers all queries, each process ranks its slice, and the
local top-k are merged; an update gathers the new vectors, and each process keeps those of its slice. Every method
except `ages`, `local_rows` and `load_state_dict` is a *collective*: all processes of the group call it, in the same
order, with the same k or step, but each with its own queries or rows (possibly none). Results equal those of an
unsharded corpus.

Shape suffixes: Q queries, N rows of the whole corpus, R selected rows, D dimensions, K results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from search_r3.environment.live_corpus import LiveCorpus, check_distinct, check_rows, check_unit
from search_r3.environment.topk import merge_top_k
from search_r3.errors import InputError

STATE_BLOCK = 8192
"""Number of rows per process that are gathered at once when the whole corpus is saved."""


def shard_of(total: int, rank: int, processes: int) -> tuple[int, int]:
    """(start, stop) of a process's rows; the slices' sizes differ by at most 1.

    Raises:
        InputError: there are fewer rows than processes.
    """
    if total < processes:
        raise InputError(f"a corpus of {total} rows cannot be shared by {processes} processes; use fewer processes")
    return total * rank // processes, total * (rank + 1) // processes


class ShardedCorpus:
    """The same interface as `LiveCorpus`, with the matrix spread over the processes.

    Attributes:
        local: this process's slice, the rows `[start, stop)`.
        versions_N, steps_N: see `LiveCorpus`; for *all* rows, on every process (8 bytes per row), so that the choice of
            rows to refresh needs no communication and is the same on every process.
    """

    def __init__(
        self,
        total: int,
        dimension: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: Any = None,
    ) -> None:
        """Create an empty corpus of `total` rows; `update` fills it. Raises as `LiveCorpus` and `shard_of`."""
        self.group = group
        self.processes = dist.get_world_size(group)
        self.start, self.stop = shard_of(total, dist.get_rank(group), self.processes)
        self.local = LiveCorpus(self.stop - self.start, dimension, dtype=dtype, device=device)
        self.versions_N = torch.zeros(total, dtype=torch.int32)
        self.steps_N = torch.full((total,), -1, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.steps_N)

    @property
    def dimension(self) -> int:
        return self.local.dimension

    @property
    def device(self) -> torch.device:
        return self.local.device

    @torch.no_grad()
    def search(self, q_QD: Any, k: int) -> tuple[Tensor, Tensor]:
        """Search the whole corpus for this process's queries; see `LiveCorpus.search`."""
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        parts, mine = self._gather(q_QD)
        scores, rows = self.local.search(torch.cat(parts), k)
        short = min(k, len(self)) - scores.shape[1]
        if short > 0:  # a slice with fewer than k rows is padded, so that all processes send the same width
            scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        rows = torch.nn.functional.pad(rows + self.start, (0, max(short, 0)), value=-1)
        all_scores, all_rows = self._gather_equal(scores), self._gather_equal(rows)
        return merge_top_k([(s[mine], r[mine]) for s, r in zip(all_scores, all_rows, strict=True)], min(k, len(self)))

    @torch.no_grad()
    def scores(self, q_QD: Any, rows: Any) -> Tensor:
        """Cosines of this process's queries with these rows, (Q, R) float32, computed where the rows are stored."""
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        queries, _ = self._gather(q_QD)
        asked, _ = self._gather(check_rows(rows, len(self)).to(self.device))
        parts = []
        for process, (theirs_QD, rows_R) in enumerate(zip(queries, asked, strict=True)):
            part_QR = torch.zeros(len(theirs_QD), len(rows_R), device=self.device)
            here_R = (rows_R >= self.start) & (rows_R < self.stop)
            part_QR[:, here_R] = self.local.scores(theirs_QD, rows_R[here_R] - self.start)
            if part_QR.numel():
                dst = process if self.group is None else dist.get_global_rank(self.group, process)
                dist.reduce(part_QR, dst, group=self.group)  # exactly one process has each row, the others add 0
            parts.append(part_QR)
        return parts[dist.get_rank(self.group)]

    @torch.no_grad()
    def count_at_least(self, q_QD: Any, cosines_QM: Any, left_out_QX: Any) -> Tensor:
        """Count rows of the whole corpus for this process's queries; see `LiveCorpus.count_at_least`."""
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        cosines_QM = torch.as_tensor(cosines_QM).to(self.device, torch.float32)
        left_out_QX = torch.as_tensor(left_out_QX).to(self.device)
        width = cosines_QM.shape[1]
        queries, mine = self._gather(q_QD)
        asked, _ = self._gather(self._widened(cosines_QM, torch.inf))
        left_out, _ = self._gather(self._widened(left_out_QX, -1))
        local_rows = torch.cat(left_out)
        here = (local_rows >= self.start) & (local_rows < self.stop)
        counts = self.local.count_at_least(
            torch.cat(queries), torch.cat(asked), torch.where(here, local_rows - self.start, -1)
        )
        dist.all_reduce(counts, group=self.group)
        return counts[mine][:, :width]

    @torch.no_grad()
    def vectors(self, rows: Any) -> Tensor:
        """The given rows, (R, D) float32, wherever they are stored."""
        parts, mine = self._gather(check_rows(rows, len(self)).to(self.device))
        rows_R = torch.cat(parts)
        vectors_RD = torch.zeros(len(rows_R), self.dimension, device=self.device)
        here_R = (rows_R >= self.start) & (rows_R < self.stop)
        vectors_RD[here_R] = self.local.vectors(rows_R[here_R] - self.start)
        dist.all_reduce(vectors_RD, group=self.group)  # exactly one process has each row, the others add 0
        return vectors_RD[mine]

    @torch.no_grad()
    def update(self, rows: Any, vectors: Any, step: int) -> None:
        """Overwrite rows, each passed by *one* of the processes; see `LiveCorpus.update`.

        All processes raise together if a vector does not have length 1 or is NaN, a row is repeated, or the step is too
        early. Only the process that passes it raises for a wrong shape or row number.
        """
        rows_R = check_rows(rows, len(self)).to(self.device)
        vectors_RD = torch.as_tensor(vectors).detach()
        if vectors_RD.shape != (len(rows_R), self.dimension):
            raise ValueError(
                f"vectors have the shape {tuple(vectors_RD.shape)}, expected {(len(rows_R), self.dimension)}: "
                "one per row"
            )
        all_rows = self.all_gather_rows(rows_R)
        all_vectors = check_unit("vectors", self.all_gather_rows(vectors_RD.to(torch.float32)), self.dimension)
        check_distinct(all_rows)
        known = all_rows.cpu()
        if step < 0 or (len(known) and step < int(self.steps_N[known].max())):
            raise ValueError(f"step {step} is earlier than the last refresh of these rows")
        here_R = (all_rows >= self.start) & (all_rows < self.stop)
        self.local.update(all_rows[here_R] - self.start, all_vectors[here_R], step)
        self.versions_N[known] += 1
        self.steps_N[known] = step

    def ages(self, step: int) -> Tensor:
        """The age in steps of every row of the whole corpus at `step`, (N,) int64."""
        return step - self.steps_N.to(torch.int64)

    def all_gather_rows(self, mine: Tensor) -> Tensor:
        """All processes' rows (first dimension) of a tensor, concatenated by rank."""
        return torch.cat(self._gather(mine.to(self.device))[0])

    def local_rows(self, rows: np.ndarray) -> np.ndarray:
        """The part of `rows` that this process encodes: every W-th, so that urgent rows are spread evenly."""
        return rows[dist.get_rank(self.group) :: self.processes]

    def state_dict(self) -> dict[str, Any]:
        """The state of the whole corpus on every process's CPU, which any number of processes can load."""
        vectors_ND = torch.empty(len(self), self.dimension, dtype=self.local.dtype)
        longest = max(stop - start for start, stop in self._slices())
        mine_SD = self.local.state_dict()["vectors"]
        for first in range(0, longest, STATE_BLOCK):
            for (start, stop), part in zip(
                self._slices(), self._gather(mine_SD[first : first + STATE_BLOCK])[0], strict=True
            ):
                vectors_ND[start + first : min(start + first + len(part), stop)] = part.cpu()
        return self.local.state_dict() | {"vectors": vectors_ND, "versions": self.versions_N, "steps": self.steps_N}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this process's slice from the state of a whole corpus.

        Raises:
            InputError: the state has another size, or as `LiveCorpus.load_state_dict`.
        """
        if len(state["vectors"]) != len(self):
            raise InputError(
                f"the saved corpus has {len(state['vectors'])} rows, this one {len(self)}; use the corpus of the run "
                "that saved it"
            )
        mine = {name: state[name][self.start : self.stop] for name in ("vectors", "versions", "steps")}
        self.local.load_state_dict(state | mine)
        self.versions_N.copy_(state["versions"])
        self.steps_N.copy_(state["steps"])

    def _slices(self) -> list[tuple[int, int]]:
        return [shard_of(len(self), process, self.processes) for process in range(self.processes)]

    def _gather(self, mine: Tensor) -> tuple[list[Tensor], slice]:
        """Every process's rows of a tensor (their number may differ), and the slice of this process's rows."""
        count = torch.tensor([len(mine)], device=self.device)
        counts = [int(c) for c in self._gather_equal(count)]
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [part[:size] for part, size in zip(self._gather_equal(padded), counts, strict=True)]
        before = sum(counts[: dist.get_rank(self.group)])
        return parts, slice(before, before + len(mine))

    def _widened(self, mine: Tensor, fill: float) -> Tensor:
        """A matrix padded on the right to the width of the widest process's."""
        widest = max(int(width) for width in self._gather_equal(torch.tensor([mine.shape[1]], device=self.device)))
        return torch.nn.functional.pad(mine, (0, widest - mine.shape[1]), value=fill)

    def _gather_equal(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

"""ShardedCorpus: one LiveCorpus for each process, searched as if it were one, over torch.distributed.

Every process holds a contiguous slice of the rows. A search gathers all queries, each process ranks its own slice, and
the local top-k are merged; an update gathers the new vectors, and each process keeps those of its slice. Every method
but `ages`, `local_rows` and `load_state_dict` is a *collective*: all processes of the group call it, in the same order,
with the same k or step, but each with its own queries or rows (possibly none). Results equal the unsharded ones.

Shape suffixes: Q queries, N rows of the whole corpus, R some rows of it, D dimensions, K results.
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
"""Rows of each process that are gathered at once when the whole corpus is saved."""


def shard_of(total: int, rank: int, processes: int) -> tuple[int, int]:
    """(start, stop) of a process's rows: contiguous, sizes within 1 of each other.

    Raises:
        InputError: fewer rows than processes.
    """
    if total < processes:
        raise InputError(f"a corpus of {total} rows cannot be shared by {processes} processes; use fewer processes")
    return total * rank // processes, total * (rank + 1) // processes


class ShardedCorpus:
    """The same interface as `LiveCorpus`, with the matrix spread over the processes.

    Attributes:
        local: this process's slice, `[start, stop)` of the rows.
        versions_N, steps_N: of *all* rows, on every process (8 bytes a row), so that choosing what to refresh needs no
            communication and has the same result on every process.
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
        """An empty corpus of `total` rows; `update` fills it. Errors as `LiveCorpus` and `shard_of`."""
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
        """This process's queries against the whole corpus; see `LiveCorpus.search`."""
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        parts, mine = self._gather(q_QD)
        scores, rows = self.local.search(torch.cat(parts), k)
        short = min(k, len(self)) - scores.shape[1]
        if short > 0:  # a slice with fewer than k rows: pad, so that all processes send the same width
            scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        rows = torch.nn.functional.pad(rows + self.start, (0, max(short, 0)), value=-1)
        all_scores, all_rows = self._gather_equal(scores), self._gather_equal(rows)
        return merge_top_k([(s[mine], r[mine]) for s, r in zip(all_scores, all_rows, strict=True)], min(k, len(self)))

    @torch.no_grad()
    def scores(self, q_QD: Any, rows: Any) -> Tensor:
        """Cosines of this process's queries with these rows, (Q, R) float32, computed where the rows are."""
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        queries, _ = self._gather(q_QD)
        asked, _ = self._gather(check_rows(rows, len(self)).to(self.device))
        found = []
        for process, (theirs_QD, rows_R) in enumerate(zip(queries, asked, strict=True)):
            part_QR = torch.zeros(len(theirs_QD), len(rows_R), device=self.device)
            here_R = (rows_R >= self.start) & (rows_R < self.stop)
            part_QR[:, here_R] = self.local.scores(theirs_QD, rows_R[here_R] - self.start)
            if part_QR.numel():
                dst = process if self.group is None else dist.get_global_rank(self.group, process)
                dist.reduce(part_QR, dst, group=self.group)  # exactly one process has each row, the others add 0
            found.append(part_QR)
        return found[dist.get_rank(self.group)]

    @torch.no_grad()
    def vectors(self, rows: Any) -> Tensor:
        """The given rows, from whichever process holds them, (R, D) float32."""
        parts, mine = self._gather(check_rows(rows, len(self)).to(self.device))
        rows_R = torch.cat(parts)
        vectors_RD = torch.zeros(len(rows_R), self.dimension, device=self.device)
        here_R = (rows_R >= self.start) & (rows_R < self.stop)
        vectors_RD[here_R] = self.local.vectors(rows_R[here_R] - self.start)
        dist.all_reduce(vectors_RD, group=self.group)  # exactly one process adds to each row, the others add 0
        return vectors_RD[mine]

    @torch.no_grad()
    def update(self, rows: Any, vectors: Any, step: int) -> None:
        """Rewrite rows, each encoded by *one* of the processes; see `LiveCorpus.update`.

        A vector that is no unit row (such as one process's NaN), a row given twice and a step that goes back are
        raised on all processes together. A wrong shape or row number is raised only on the process that passes it.
        """
        rows_R = check_rows(rows, len(self)).to(self.device)
        vectors_RD = torch.as_tensor(vectors).detach()
        if vectors_RD.shape != (len(rows_R), self.dimension):
            raise ValueError(
                f"vectors have the shape {tuple(vectors_RD.shape)}, expected {(len(rows_R), self.dimension)}: "
                "one for each row"
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
        """How many steps old every row of the whole corpus is at `step`, (N,) int64."""
        return step - self.steps_N.to(torch.int64)

    def all_gather_rows(self, mine: Tensor) -> Tensor:
        """All processes' rows (first dimension) of a tensor, concatenated by rank."""
        return torch.cat(self._gather(mine.to(self.device))[0])

    def local_rows(self, rows: np.ndarray) -> np.ndarray:
        """The rows among these that this process encodes: every W-th, so that urgent ones are shared evenly."""
        return rows[dist.get_rank(self.group) :: self.processes]

    def state_dict(self) -> dict[str, Any]:
        """The whole corpus, on every process's CPU, as `LiveCorpus` has it: any number may load it."""
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
        """Take this process's slice of a whole corpus's state.

        Raises:
            InputError: the state is of a corpus of another size, or as `LiveCorpus`.
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
        """Every process's rows of a tensor whose first size differs, and the slice that is this process's."""
        count = torch.tensor([len(mine)], device=self.device)
        counts = [int(c) for c in self._gather_equal(count)]
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [part[:size] for part, size in zip(self._gather_equal(padded), counts, strict=True)]
        before = sum(counts[: dist.get_rank(self.group)])
        return parts, slice(before, before + len(mine))

    def _gather_equal(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

"""ReplicatedCorpus: every process has a copy of the whole corpus, and each encodes its share of the refreshed rows.

For a few processes and up to millions of rows: searching needs no communication, and the main process alone can save
everything. If the matrix does not fit next to the model, use `ShardedCorpus`.

Shape suffixes: N rows of the corpus, R selected rows, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from search_r3.environment.live_corpus import LiveCorpus, check_rows


class ReplicatedCorpus(LiveCorpus):
    """A `LiveCorpus` whose `update` is a collective: each process passes its rows, and all processes write all rows.

    The copies stay bit-identical, because all processes write the same vectors in the same order.
    """

    def update(self, rows: Any, vectors: Any, step: int) -> None:
        """See `LiveCorpus.update`; no two processes may pass the same row, and a process may pass none."""
        rows_R = check_rows(rows, len(self)).to(self.device)
        vectors_RD = torch.as_tensor(vectors).detach().to(self.device, torch.float32)
        super().update(self.all_gather_rows(rows_R), self.all_gather_rows(vectors_RD), step)

    def all_gather_rows(self, mine: Tensor) -> Tensor:
        """All processes' rows (first dimension) of a tensor, concatenated by rank. A collective."""
        mine = mine.to(self.device)
        processes = dist.get_world_size()
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(processes)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=self.device))
        padded = mine.new_zeros(max(int(size) for size in sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(processes)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def local_rows(self, rows: np.ndarray) -> np.ndarray:
        """The part of `rows` that this process encodes: every W-th, so that urgent rows are spread evenly."""
        return rows[dist.get_rank() :: dist.get_world_size()]

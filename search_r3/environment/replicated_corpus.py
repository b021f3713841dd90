"""ReplicatedCorpus: every process holds the whole corpus, each encodes its part of what is refreshed.

For training with a few processes and up to millions of rows: searching needs no communication, and the main process
alone can save everything. `ShardedCorpus` is for a matrix that does not fit beside the model.

Shape suffixes: N rows of the corpus, R some rows of it, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from search_r3.environment.live_corpus import LiveCorpus, check_rows


class ReplicatedCorpus(LiveCorpus):
    """A `LiveCorpus` whose `update` is a collective: each process brings rows, every process writes those of all.

    The copies stay equal to the bit, as all write the same vectors in the same order.
    """

    def update(self, rows: Any, vectors: Any, step: int) -> None:
        """See `LiveCorpus.update`; rows of different processes must differ. None is fine."""
        rows_R = check_rows(rows, len(self)).to(self.device)
        vectors_RD = torch.as_tensor(vectors).detach().to(self.device, torch.float32)
        super().update(self.everyones(rows_R), self.everyones(vectors_RD), step)

    def everyones(self, mine: Tensor) -> Tensor:
        """The rows (first dimension) of a tensor that each process brings, of all processes, by rank. A collective."""
        mine = mine.to(self.device)
        processes = dist.get_world_size()
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(processes)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=self.device))
        padded = mine.new_zeros(max(int(size) for size in sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(processes)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def dealt(self, rows: np.ndarray) -> np.ndarray:
        """The part of these rows that this process is to encode: every n-th, so that urgent ones are shared evenly."""
        return rows[dist.get_rank() :: dist.get_world_size()]

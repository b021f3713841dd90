"""A disk cache for long computations, in shards: an interrupted one resumes after the last finished shard.

Each shard is written atomically as safetensors, under a key of everything that determines its contents, with a checksum
and its computation time in seconds. A shard that is damaged or has another key is recomputed, so nothing stale is read.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from search_r3.files import atomic_path

Tensors = dict[str, np.ndarray]
ProgressBar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Number of remaining items -> a context manager whose value is called with the number done."""


@dataclass(frozen=True)
class Shard:
    """The arrays of a shard, and the seconds that computing them took, possibly in an earlier run."""

    tensors: Tensors
    seconds: float


class ShardCache:
    """The shards of one computation.

    Args:
        folder: the cache folder; this computation's shards are in their own subfolder.
        key: SHA-256 (64 hex digits) of everything that determines the contents.
        sizes: number of items in each shard, the length of its array "rows".
    """

    def __init__(self, folder: Path, key: str, sizes: Sequence[int]) -> None:
        self.key, self.sizes, self.folder = key, list(sizes), folder / key[:32]
        count = len(self.sizes)
        self.paths = [self.folder / f"shard-{n:05d}-of-{count:05d}.safetensors" for n in range(count)]

    def stored(self, number: int) -> Shard | None:
        """A shard from disk; None if it is missing, damaged, or has another key or size."""
        try:
            with safe_open(self.paths[number], framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
                whole = metadata["key"] == self.key and metadata["sha256"] == _digest(tensors)
                whole = whole and len(tensors["rows"]) == self.sizes[number]
                return Shard(tensors, float(metadata["seconds"])) if whole else None
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def complete(self, make: Callable[[int, Callable[[int], None]], Tensors], progress: ProgressBar) -> list[Shard]:
        """All shards: those from disk, and the others computed by `make(number, advance)` and written immediately.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        stored = [self.stored(number) for number in range(len(self.sizes))]
        left = sum(size for size, shard in zip(self.sizes, stored, strict=True) if shard is None)
        with progress(left) as advance:
            return [shard or self._make(number, make, advance) for number, shard in enumerate(stored)]

    def _make(
        self, number: int, make: Callable[[int, Callable[[int], None]], Tensors], advance: Callable[[int], None]
    ) -> Shard:
        started = time.perf_counter()
        tensors = make(number, advance)
        shard = Shard(tensors, time.perf_counter() - started)
        metadata = {"key": self.key, "sha256": _digest(tensors), "seconds": f"{shard.seconds:.3f}"}
        with atomic_path(self.paths[number]) as scratch:
            save_file(tensors, scratch, metadata=metadata)
        return shard


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()

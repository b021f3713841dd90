"""The peak memory of tensors while a block runs: torch's statistics on a GPU, a count of storages on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak:
    """The result of `peak_memory`."""

    bytes: int = 0
    """Peak bytes beyond what was allocated before the block."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block.

    On a CPU, only storages returned by torch's operators are counted, not the scratch space inside an operator.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    with _Watch(peak):
        yield peak


class _Watch(TorchDispatchMode):
    def __init__(self, peak: Peak) -> None:
        super().__init__()
        self.peak, self.now = peak, 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(storage) for storage in self._storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in self._storages(out):
            if id(storage) in inputs or storage in self.seen:  # a view, or modified in place
                continue
            self.seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak.bytes = max(self.peak.bytes, self.now)
            weakref.finalize(storage, self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size

    def _storages(self, values: Any) -> list[Any]:
        return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]

"""Runs parts of a computation in parallel, one core each.

PyTorch starts and joins its threads at every operation. Here each thread runs many operations on its part of the
tokens, and the threads synchronize once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def run_parts(function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """Apply `function` to each part without recording gradients, in parallel with one thread per part.

    A single part runs in the calling thread with all of PyTorch's threads.
    """
    if len(parts) == 1:
        with torch.no_grad():
            return [function(parts[0])]

    def one(part: Part) -> Result:
        with torch.no_grad():
            return function(part)

    return list(_pool(len(parts)).map(one, parts))


def _pool(threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), threads)  # a forked process does not inherit threads
    with _lock:
        if key not in _pools:
            before, started = torch.get_num_threads(), threading.Barrier(threads)
            pool = ThreadPoolExecutor(threads, "training-part", _take_one_core)
            list(pool.map(lambda _: started.wait(), range(threads)))
            torch.set_num_threads(before)  # `_take_one_core` also set the default of threads started later
            _pools[key] = pool
        return _pools[key]


def _take_one_core() -> Any:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread reads the setting on first use and keeps it

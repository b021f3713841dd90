"""Runs parts of a computation side by side, each on one core.

Between two matrix products, torch starts and joins its threads at every operation. Here each thread takes its part of
the tokens through many operations, and they meet once.
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
    """`function` of each part, without gradients; several parts at once, each with one of torch's threads.

    A single part is computed by the caller, with as many threads as torch has there.
    """
    if len(parts) == 1:
        with torch.no_grad():
            return [function(parts[0])]

    def one(part: Part) -> Result:
        with torch.no_grad():
            return function(part)

    return list(_pool(len(parts)).map(one, parts))


def _pool(threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), threads)  # a fork has no threads
    with _lock:
        if key not in _pools:
            before, started = torch.get_num_threads(), threading.Barrier(threads)
            pool = ThreadPoolExecutor(threads, "training-part", _take_one_core)
            list(pool.map(lambda _: started.wait(), range(threads)))
            torch.set_num_threads(before)  # for threads that are started elsewhere
            _pools[key] = pool
        return _pools[key]


def _take_one_core() -> Any:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread adopts the number when it first asks, and keeps it

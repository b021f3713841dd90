"""Test work in several processes that find each other through gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_processes(work: Callable[..., None], *args: Any, processes: int = 2) -> None:
    """`work(rank, *args)` in each of new processes; what one raises is raised here.

    A process that is done ends at once: gloo's threads sometimes abort an interpreter that shuts down in order
    ("terminate called without an active exception"), after all the work.
    """
    mp.spawn(_call, args=(work, args), nprocs=processes)


def _call(rank: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    work(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

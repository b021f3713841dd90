"""Process settings that must be made before torch is loaded: glibc's allocator, OpenMP's threads, torch's log.

Torch allocates the same buffers at every step. By default, buffers of more than a few MB return to the system when they
are freed, and using them again causes a page fault per page: cheap in serving, expensive in training on a CPU (LOG.md).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
KEPT_BYTES = 512 << 20
"""Maximum amount of freed memory that is kept."""
LARGEST_BYTES = 64 << 20
"""Larger allocations come from the system and return to it."""
GARBAGE_THRESHOLD = 50_000
"""New objects between two runs of the garbage collector; one search or batch creates far fewer."""
_OWN_THRESHOLDS = gc.get_threshold()


def keep_freed_memory() -> None:
    """Let this process keep freed memory, unless the user configured the allocator or there is no glibc."""
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    if any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for name, value in ((_MMAP_THRESHOLD, LARGEST_BYTES), (_TRIM_THRESHOLD, KEPT_BYTES), (_TOP_PAD, LARGEST_BYTES)):
        mallopt(name, value)


def collect_garbage_rarely() -> None:
    """Let Python's cyclic garbage collector run every 50,000 new objects instead of every 700.

    Importing torch, transformers and LanceDB creates hundreds of thousands of objects that all stay alive; traversing
    them again and again takes a fifth of the startup time (benchmarks/start.py).
    """
    gc.set_threshold(max(GARBAGE_THRESHOLD, gc.get_threshold()[0]), 20, 20)


def collect_garbage_as_usual() -> None:
    """Restore Python's thresholds, for a long-running process; existing objects are exempt from collection."""
    gc.freeze()
    gc.set_threshold(*_OWN_THRESHOLDS)


def let_idle_threads_sleep() -> None:
    """Let OpenMP's threads sleep between two operations of torch, unless the user has configured this.

    By default they spin for a millisecond, on the cores that the int8 engine's threads need (LOG.md). OpenMP reads this
    setting once, when torch is loaded; changing it later has no effect.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quiet_lost_connections() -> None:
    """Let torch's C++ code log errors only, unless the user has configured this and if several processes train.

    It prints a stack trace as a warning whenever the store of a lost process does not answer, which the watchdog says
    in one line.
    """
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

"""Settings that must be made before torch is loaded: of glibc's allocator, and of OpenMP's threads.

Torch asks for the same buffers at every step. By default what is larger than a few MB goes back to the system when it
is freed, and the next first touch of each page is a fault: little in serving, much in training on a CPU (LOG.md).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""`mallopt`'s names for what is set below (mallopt(3))."""
KEPT_BYTES = 512 << 20
"""Freed memory that is kept, at most."""
LARGEST_BYTES = 64 << 20
"""A larger piece is the system's own, and goes back to it."""
GARBAGE_THRESHOLD = 50_000
"""New objects between two runs of the garbage collector; the objects of one search or batch are far fewer."""
_OWN_THRESHOLDS = gc.get_threshold()


def keep_freed_memory() -> None:
    """Set it for this process, unless the user has set the allocator up, or there is no glibc."""
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

    Importing torch, transformers and LanceDB makes hundreds of thousands of objects that all live on, and walking
    through them again and again takes a fifth of the start (benchmarks/start.py).
    """
    gc.set_threshold(max(GARBAGE_THRESHOLD, gc.get_threshold()[0]), 20, 20)


def collect_garbage_as_usual() -> None:
    """Python's own thresholds again, for a process that runs on; what there is now lives on, and is passed over."""
    gc.freeze()
    gc.set_threshold(*_OWN_THRESHOLDS)


def let_idle_threads_sleep() -> None:
    """Have OpenMP's threads sleep between two of torch's operations, unless the user has set this.

    By default they spin for a millisecond, on the cores that the int8 engine's own threads need (LOG.md). OpenMP asks
    once, when torch is loaded: later this changes nothing.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

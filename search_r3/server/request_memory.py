"""Memory of large requests: limits how much they may use at once, and returns it to the system afterwards.

The C library keeps freed memory in one arena per thread for later allocations. After bodies of many megabytes,
malloc_trim(3) returns it to the system, if available.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from starlette.types import Scope

from search_r3.server.errors import ApiError

QUIET = 1.0
"""Seconds between the last large request and returning memory, which takes milliseconds."""


class LargeBodies:
    """The large bodies of the requests in flight. Use it only from the event loop's thread.

    Args:
        most: maximum of their total size in bytes; a single body is always allowed.
        threads: run `trim`.
        trim: returns memory to the system.
    """

    def __init__(self, most: int, threads: Executor, trim: Callable[[], None] | None = None) -> None:
        self.most, self.bytes_in_use = most, 0
        self._threads, self._trim = threads, trim or return_memory
        self._timer: asyncio.TimerHandle | None = None

    def hold(self, scope: Scope, size: int) -> None:
        """Record that the request's body has `size` bytes so far. Raises ApiError 429 if there is no room."""
        state = scope.setdefault("state", {})
        others = self.bytes_in_use - state.get("body_bytes", 0)
        if others and others + size > self.most:
            message = f"large requests of {others:,} bytes are in flight; try again later"
            raise ApiError(429, message, "queue_full", retry_after=2)
        self.bytes_in_use, state["body_bytes"] = others + size, size

    def release(self, scope: Scope) -> None:
        """Record that the request's body is no longer needed. A second call has no effect."""
        if size := scope.get("state", {}).pop("body_bytes", 0):
            self.bytes_in_use -= size
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(QUIET, self._return_memory)

    def _return_memory(self) -> None:
        self._timer = None
        try:
            self._threads.submit(self._trim)
        except RuntimeError:  # the server is shutting down
            return


def return_memory() -> None:
    """Collect garbage and return free memory to the system."""
    gc.collect()
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

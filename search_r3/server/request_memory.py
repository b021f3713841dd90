"""Memory of large requests: how much of it there may be at once, and giving it back to the system afterwards.

The C library keeps what is freed, in an arena for each thread, for whoever asks next. After bodies of many megabytes it
is asked to let go (malloc_trim(3)); where it cannot be asked, nothing happens.
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
"""Seconds after the last large request until memory is given back, which takes milliseconds."""


class Bodies:
    """The large bodies in hand. To be used from the event loop's thread.

    Args:
        most: bytes that they may have together; a single one may always be had.
        threads: where memory is given back.
    """

    def __init__(self, most: int, threads: Executor, trim: Callable[[], None] | None = None) -> None:
        self.most, self.held = most, 0
        self._threads, self._trim = threads, trim or give_back
        self._timer: asyncio.TimerHandle | None = None

    def hold(self, scope: Scope, size: int) -> None:
        """The body of the request of `scope` has `size` bytes by now. Raises ApiError 429 if there is no room."""
        state = scope.setdefault("state", {})
        others = self.held - state.get("body_bytes", 0)
        if others and others + size > self.most:
            message = f"large requests of {others:,} bytes are in hand; try again later"
            raise ApiError(429, message, "queue_full", retry_after=2)
        self.held, state["body_bytes"] = others + size, size

    def release(self, scope: Scope) -> None:
        """The body of the request of `scope` is needed no more; again has no effect."""
        if size := scope.get("state", {}).pop("body_bytes", 0):
            self.held -= size
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(QUIET, self._give_back)

    def _give_back(self) -> None:
        self._timer = None
        try:
            self._threads.submit(self._trim)
        except RuntimeError:  # the server is ending, and all of its memory with it
            return


def give_back() -> None:
    """Return what is free to the system, and what nobody holds any more but itself."""
    gc.collect()
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

"""Handles SIGINT and SIGTERM during training, so that the current step is finished first."""

from __future__ import annotations

import signal
import threading
from typing import Any

from search_r3.training.distributed.watchdog import hurry


class StopSignals:
    """Records the first SIGINT or SIGTERM, so that the loop can finish its step; a second one acts immediately."""

    received = 0

    def __enter__(self) -> StopSignals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only in this thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._record)
        return self

    def _record(self, number: int, frame: object) -> None:
        self.received = number
        if number == signal.SIGTERM:
            hurry()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()

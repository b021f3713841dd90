"""The reasoned queries of late, so that the same question is not thought about twice.

Greedy reasoning gives the same answer every time, so an answer stays true as long as the contract does.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from search_r3.server.batching.batcher import Embedded

Key = tuple[str, tuple[int, ...], int]
"""Contract hash, the query's tokens, budget."""


class ReasonedCache:
    """At most `size` answers; the one that was not asked for longest goes first. Safe between threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: OrderedDict[Key, Embedded] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> Embedded | None:
        """The answer, which is now the youngest."""
        with self._lock:
            if (found := self._held.get(key)) is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: Key, answer: Embedded) -> None:
        """Remember an answer."""
        with self._lock:
            if self.size:
                self._held[key] = answer
                self._held.move_to_end(key)
                while len(self._held) > self.size:
                    self._held.popitem(last=False)

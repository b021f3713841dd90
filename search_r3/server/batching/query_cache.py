"""A cache of recent queries' embeddings and reasoning, so that a repeated question is not reasoned about again.

Greedy reasoning is deterministic, so an answer stays valid as long as the embedding contract is the same.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from search_r3.server.batching.batcher import Embedded

Key = tuple[str, tuple[int, ...], int]
"""Contract hash, the query's tokens, budget."""


class QueryCache:
    """A least-recently-used cache of at most `size` answers. Thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._answers: OrderedDict[Key, Embedded] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: Key) -> Embedded | None:
        """The answer, or None; marks it as the most recently used."""
        with self._lock:
            if (answer := self._answers.get(key)) is not None:
                self._answers.move_to_end(key)
            return answer

    def put(self, key: Key, answer: Embedded) -> None:
        """Add an answer, dropping the least recently used one if there are too many."""
        with self._lock:
            if self.size:
                self._answers[key] = answer
                self._answers.move_to_end(key)
                while len(self._answers) > self.size:
                    self._answers.popitem(last=False)

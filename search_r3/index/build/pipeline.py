"""Stages that each run in a thread and pass their results to the next one through a bounded queue.

A stage that is ahead waits, so memory use is bounded by the queues, not by the corpus. An error is passed downstream
after the items that precede it, which are still processed. Stages upstream just stop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Abandoned(Exception):
    """The stage that consumes the items has ended."""


class Pipe(Generic[T]):
    """A queue of at most `size` items between two threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = self._abandoned = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Put `item`, waiting while the queue is full. Raises Abandoned if the consumer has ended."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._size or self._abandoned)
            if self._abandoned:
                raise Abandoned
            self._items.append(item)
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """End the items; the consumer gets `error` after the last one."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Stop consuming: the producer gets Abandoned."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if not self._items:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


def run_stage(source: Iterable[T], work: Callable[[T], U], target: Pipe[U]) -> None:
    """Put `work(item)` for every item of `source` into `target`, and close it, with the error if there was one."""
    error: BaseException | None = None
    try:
        for item in source:
            target.put(work(item))
    except Abandoned:
        pass
    except BaseException as caught:
        error = caught
    if isinstance(source, Pipe):
        source.abandon()
    target.close(error)


def start_stage(name: str, source: Iterable[T], work: Callable[[T], U], target: Pipe[U]) -> threading.Thread:
    """`run_stage` in a daemon thread."""
    thread = threading.Thread(target=run_stage, args=(source, work, target), name=name, daemon=True)
    thread.start()
    return thread

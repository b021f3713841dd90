"""A deadline for whole operations on object storage: a search that storage keeps waiting ends in time, with one line.

The deadlines and retries that LanceDB is given (`location.PATIENCE`) are those of one request. An operation makes many,
one after the other, and some of Lance's own retries know no option. A call into Lance cannot be interrupted, so it runs
in a thread of its own, which is left to itself when the deadline has passed.
"""

from __future__ import annotations

import functools
import math
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from search_r3.errors import InputError
from search_r3.index.storage.location import TIMEOUT_VARIABLE, Remote, StorageError

DEADLINE_VARIABLE, DEADLINE_SECONDS = "SEARCH_R3_STORAGE_DEADLINE", 30.0
REQUESTS = 5
"""A deadline leaves time for at least so many requests that each take as long as one may."""
P = ParamSpec("P")
T = TypeVar("T")

_inside = threading.local()


def deadline_of(location: Remote) -> float:
    """Seconds that one operation at `location` may take: 30, or more if a single request may take long.

    Raises:
        InputError: see `given_deadline`.
    """
    return given_deadline() or max(DEADLINE_SECONDS, REQUESTS * _seconds(location.options["read_timeout"]))


def given_deadline() -> float | None:
    """SEARCH_R3_STORAGE_DEADLINE, in seconds; None if it is not set.

    Raises:
        InputError: it is not a number of seconds above 0.
    """
    given = os.environ.get(DEADLINE_VARIABLE, "").strip().removesuffix("s")
    if not given:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InputError(f"{DEADLINE_VARIABLE} is {given!r}; give a number of seconds above 0, as in 60")
    return seconds


def within_deadline(location: object, operation: str, work: Callable[[], T]) -> T:
    """`work()`, given up when the deadline of `location` has passed; a folder has none.

    Args:
        operation: what it is, for the message: "opening the index".

    Raises:
        StorageError: the deadline has passed. The work goes on in its thread, and its result is lost.
        InputError: see `deadline_of`.
    """
    if not isinstance(location, Remote) or getattr(_inside, "deadline", False):
        return work()
    seconds = deadline_of(location)
    wait = in_thread(work)
    try:
        return wait(seconds)
    except queue.Empty:
        raise StorageError(
            f"{location}: {operation} was given up after {seconds:g} s, as the storage is slow or does not answer; "
            f"try again later, or set {DEADLINE_VARIABLE} to more seconds (one request: {TIMEOUT_VARIABLE})"
        ) from None


def in_thread(work: Callable[[], T], inside: bool = True) -> Callable[[float | None], T]:
    """Start `work` in a thread of its own, which ends with the process.

    Args:
        inside: `work` is part of an operation with a deadline: its own operations have none.

    Returns:
        A function that waits for the result at most so many seconds (None: without a limit), and returns it or raises
        what `work` raised. It raises `queue.Empty` if the time has passed, and may be called again.
    """
    outcome: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        _inside.deadline = inside
        try:
            outcome.put((True, work()))
        except BaseException as error:  # raised again by the caller
            outcome.put((False, error))

    def wait(seconds: float | None) -> T:
        done, result = outcome.get(timeout=seconds)
        outcome.put((done, result))
        if not done:
            raise result
        return result

    threading.Thread(target=run, name="storage", daemon=True).start()
    return wait


def bounded(operation: str) -> Callable[[Callable[Concatenate[Any, P], T]], Callable[Concatenate[Any, P], T]]:
    """Let a method end within the deadline of its object's `location`."""

    def decorate(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
        @functools.wraps(method)
        def within(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
            return within_deadline(self.location, operation, lambda: method(self, *args, **kwargs))

        return within

    return decorate


def _seconds(text: str) -> float:
    """A duration as LanceDB reads it, of which only seconds and milliseconds occur here: "4s", "300ms", "30"."""
    unit = 0.001 if text.endswith("ms") else 1.0
    try:
        return float(text.rstrip("ms")) * unit
    except ValueError:  # another unit, which is the user's: "1 minute"
        return 60.0

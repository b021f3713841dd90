"""Searching while one types: by words at every key, and by the model after a pause.

Only the newest question counts. One that waits for another search is dropped when the next key is pressed, and the
answer of one that runs already is thrown away. Searches run in daemon threads, so that a program ends at once while
its model still loads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.index.run_search import SearchResult

T = TypeVar("T")
PAUSE = 0.4
"""Seconds without a key after which the model searches."""


@dataclass(frozen=True)
class Step:
    """One way to search: it begins `wait` seconds after the step before it, with a `note` for the person who waits.

    Attributes:
        search: raises InputError for what the person can change; called by one thread at a time.
        prepare: called once before any search, such as to load a model.
    """

    search: Callable[[str], SearchResult]
    note: Callable[[], str] = lambda: ""
    wait: float = 0.0
    prepare: Callable[[], object] = lambda: None
    lock: Lock = field(default_factory=Lock)


class LiveSearch:
    """The answer to the newest question, one step after the other.

    Args:
        steps: in their order; each replaces the result of the step before it.
        changed: called in the event loop when `result` or `note` has changed.
        failed: called there with an error that is no InputError.

    Attributes:
        result: of the newest step that has answered; None before, and without a question.
        note: what is being done, or what is wrong; "" if neither.
    """

    def __init__(
        self, steps: list[Step], changed: Callable[[], object], failed: Callable[[BaseException], object]
    ) -> None:
        self.steps, self._changed, self._failed = steps, changed, failed
        self.result: SearchResult | None = None
        self.note = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Prepare all steps; must be called in the event loop."""
        for step in self.steps:
            _in_thread(step, step.prepare).add_done_callback(self._ended)

    def ask(self, question: str) -> None:
        """Answer this question from now on; must be called in the event loop."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.ensure_future(self._answer(question.strip()))
        self._task.add_done_callback(self._ended)

    async def _answer(self, question: str) -> None:
        if not question:
            self._show(None, "")
        for step in self.steps if question else ():
            await asyncio.sleep(step.wait)
            self._show(self.result, step.note())
            try:
                self._show(await _in_thread(step, partial(step.search, question)), "")
            except InputError as error:
                self._show(self.result, str(error))

    def _show(self, result: SearchResult | None, note: str) -> None:
        self.result, self.note = result, note
        self._changed()

    def _ended(self, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or (error := future.exception()) is None:
            return
        if isinstance(error, InputError):  # of a preparation; the next search says it too
            self._show(self.result, str(error))
        else:
            self._failed(error)


def _in_thread(step: Step, call: Callable[[], T]) -> asyncio.Future[T]:
    """Call in a daemon thread, after the calls of the same step before it; not at all if cancelled meanwhile."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        with step.lock:
            if future.cancelled():
                return
            try:
                settled = partial(settle, future.set_result, call())
            except BaseException as error:
                settled = partial(settle, future.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits anymore
            loop.call_soon_threadsafe(settled)

    Thread(target=run, daemon=True).start()
    return future

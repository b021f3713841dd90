"""The progress of a build: files of the total, chunks per second, and an estimate of the time left.

Work is measured in bytes of a folder's files, or lines of a file of records, as chunks are not known in advance.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from search_r3.index.readers.path_source import Amount

RECENT_BATCHES = 8
"""Batches that say which share of the remaining work has to be embedded."""
SECONDS_PER_MINUTE, SECONDS_PER_HOUR = 60, 3600
LINE_SECONDS = 30
"""Between two lines of progress where there is no terminal, as in the log of a job."""


class BuildProgress:
    """What a build has done so far. The stages of a build report to it; `show` is called with it each time.

    Args:
        total: the work to be done, once it is known; None until then, or if it is never known.
        show: shows its `text` and `share`, if it is time to.
        clock: the time in seconds.
    """

    def __init__(
        self,
        total: Callable[[], Amount | None] = lambda: None,
        show: Callable[[BuildProgress], None] = lambda progress: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._show, self._clock = total, show, clock
        self._documents = self._chunks = 0
        self._start = self._end = self._now = Amount()
        self._chunks_before = self._chunks_of_batch = 0
        self._new_share = 0.0
        self._last: float | None = None  # when something was reported
        self._busy = 0.0  # seconds of embedding, and of waiting for texts to embed
        self._embedded_size = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_BATCHES)

    def begin_batch(self, end: Amount, texts: int, rows: int) -> None:
        """A batch of documents is to be embedded.

        Args:
            end: how far the source was read when the batch was complete.
            texts: number of texts to embed.
            rows: number of chunks of the batch's documents, of which the others are unchanged.
        """
        self._start, self._end = self._end, end
        self._new_share = min(1.0, texts / rows) if rows else 0.0
        self._chunks_before, self._chunks_of_batch = self._chunks, texts
        self.advance(0.0)

    def advance(self, share: float) -> None:
        """`share` (0 to 1) of the batch's tokens are embedded."""
        before, self._now = self._now, self._start.towards(self._end, share)
        self._chunks = self._chunks_before + round(share * self._chunks_of_batch)
        self._embedded_size += self._new_share * (self._now.size - before.size)
        last, self._last = self._last, self._clock()
        if last is not None and self._chunks_of_batch:
            self._busy += self._last - last
        self._show(self)

    def end_batch(self, documents: int) -> None:
        """The batch, with this many documents, is embedded."""
        self._documents += documents
        self._recent.append((self._end.size - self._start.size, self._new_share * (self._end.size - self._start.size)))
        self.advance(1.0)

    @property
    def share(self) -> float | None:
        """The share of the work that is done, 0 to 1; None if it is unknown."""
        total = self._total()
        return min(1.0, self._now.size / total.size) if total is not None and total.size else None

    @property
    def seconds_left(self) -> float | None:
        """An estimate of the time left, from the rate so far; None before anything was embedded."""
        total = self._total()
        if total is None or not self._embedded_size:
            return None
        read = sum(size for size, _ in self._recent)
        to_embed = sum(size for _, size in self._recent) / read if read else self._new_share
        return max(0.0, total.size - self._now.size) * to_embed * self._busy / self._embedded_size

    @property
    def text(self) -> str:
        """For example "76 of 354 files, 612 chunks, 3.4 chunks/s, about 4 min left"."""
        total, share = self._total(), self.share
        if total is not None and total.count:
            parts = [f"{min(self._now.count, total.count):,} of {total.count:,} files"]
        else:
            parts = [f"{max(self._now.count, self._documents):,} documents" + (f" ({share:.0%})" if share else "")]
        parts.append(f"{self._chunks:,} chunks embedded")
        if self._chunks and self._busy:
            rate = self._chunks / self._busy
            parts.append(f"{rate:.1f} chunks/s" if rate >= 1 else f"{SECONDS_PER_MINUTE * rate:.1f} chunks/min")
        if (left := self.seconds_left) is not None:
            parts.append(f"{in_words(left)} left")
        return ", ".join(parts)


def in_words(seconds: float) -> str:
    """A duration, roughly: "about 40 s", "about 12 min", "about 2.5 h"."""
    if seconds < 2 * SECONDS_PER_MINUTE:
        return f"about {max(1, round(seconds))} s"
    if seconds < 1.5 * SECONDS_PER_HOUR:
        return f"about {round(seconds / SECONDS_PER_MINUTE)} min"
    return f"about {seconds / SECONDS_PER_HOUR:.1f} h"


@contextmanager
def shown_progress(documents: Any, progress: bool | Callable[[str], None]) -> Iterator[BuildProgress]:
    """Show the progress of indexing `documents` on stderr while the context lasts, if it is a terminal.

    A source that can say how much it holds (`PathSource.measure`) is asked in a thread, as that reads folders.

    Args:
        progress: False shows nothing; a function gets a line every `LINE_SECONDS` where there is no terminal.
    """
    on_terminal = sys.stderr.isatty()
    if progress is False or (progress is True and not on_terminal):
        yield BuildProgress()
        return
    found: list[Amount] = []

    def measure() -> None:
        with suppress(OSError):
            found.append(documents.measure())

    def total() -> Amount | None:
        return found[0] if found else None

    if hasattr(documents, "measure"):
        threading.Thread(target=measure, name="measure", daemon=True).start()
    if not on_terminal:
        assert callable(progress)
        yield BuildProgress(total, _in_lines(progress))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(progress: BuildProgress) -> None:
            share = progress.share
            bar.update(task, description=progress.text, total=None if share is None else 1.0, completed=share or 0.0)

        yield BuildProgress(total, show)


def _in_lines(report: Callable[[str], None]) -> Callable[[BuildProgress], None]:
    """A `show` for `BuildProgress` that reports its text every `LINE_SECONDS`."""
    last = time.monotonic()

    def show(progress: BuildProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            report(progress.text)

    return show

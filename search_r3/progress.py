"""Progress bars on standard error, with a uniform look, shown only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def on_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def progress_bar(
    label: str, total: int, show: bool | None = None, *, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar with the count and the remaining time; yields a function that advances it by a number.

    Args:
        label: what is counted, such as "encoding".
        total: the number of items; if it is 0, nothing is shown.
        show: None shows the bar on a terminal only.
        transient: remove the bar at the end.
    """
    if total == 0 or not (on_terminal() if show is None else show):
        yield lambda done: None
        return
    with make_bar(transient=transient) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


def make_bar(*columns: Any, transient: bool = False) -> Any:
    """A rich `Progress` with description, bar and count, then `columns`, then the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    first = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True, markup=False, highlight=False)
    return Progress(*first, *columns, TimeRemainingColumn(), console=console, transient=transient)

"""`search-r3 index --watch`: after the first run, keeps the index up to date until it is stopped."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from search_r3.cli.options import print_progress
from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.index.build.build_report import IndexReport
    from search_r3.index.readers.path_source import PathSource
    from search_r3.model.searchr3 import SearchR3

WAIT_SECONDS = 10.0
"""How long an update waits for another process that is writing to the same index."""
SHOWN = 3
"""Changed paths that are named."""


class Watch:
    """Watches a source from its construction on, so that what changes during the first run is not missed.

    Args:
        target: the index.
        options: of `build_index`, as for the first run.
        backend: of a new index, if one was named.

    Raises:
        InputError: the index's backend cannot update single paths; or see `watch_source`.
    """

    def __init__(
        self, target: str, documents: PathSource, options: dict[str, Any], backend: str | None, as_json: bool
    ) -> None:
        from search_r3.index.backends.backend_registry import choose_backend
        from search_r3.index.build.watch import watch_source
        from search_r3.index.storage.location import location_of

        choose_backend(location_of(target), backend).require("streaming", "--watch")

        self.target, self.documents, self.options, self.as_json = target, documents, options, as_json
        self.stop = threading.Event()
        self._changes = watch_source(documents, self.stop)
        next(self._changes, None)

    def run(self, model: SearchR3) -> None:
        """Update the index until Ctrl-C or SIGTERM, which let an update that has begun finish.

        Raises:
            InputError: the watched folder is moved or removed.
        """
        from search_r3.index.build.build_index import ONE_COMMIT, build_index
        from search_r3.index.build.watch import keep_up_to_date
        from search_r3.index.maintenance import maintain_index

        asks = self.options["may_prune"] is not None

        def update(paths: frozenset[str]) -> IndexReport:
            everything = "." in paths
            self.documents.only = None if everything else paths
            self.documents.may_be_empty = not (everything and asks)
            options = self.options | {"may_prune": (lambda removal: not removal.large) if everything and asks else None}
            more: dict[str, Any] = {} if everything else {"commit_every": ONE_COMMIT, "maintain": False}
            return build_index(self.target, self.documents, model, progress=False, wait=WAIT_SECONDS, **options, **more)

        def updated(paths: frozenset[str], report: IndexReport) -> None:
            self._print(paths, report)
            if report.added or report.updated or report.removed:
                try:
                    maintain_index(self.target, wait=WAIT_SECONDS)
                except InputError as error:  # it is due again after the next update
                    _print_error(error)

        print_progress(f"watching {self.documents.path}; Ctrl-C stops")
        with _stopped_by_signals(self.stop):
            keep_up_to_date(self._changes, update, updated, _print_error)
        print_progress("Stopped.")

    def _print(self, paths: frozenset[str], report: IndexReport) -> None:
        """Print what an update changed, if anything, and on stderr what it left out."""
        from search_r3.index.readers.path_source import summarize_skipped

        counts = {name: getattr(report, name) for name in ("added", "updated", "removed") if getattr(report, name)}
        named = sorted(paths)
        if self.as_json:
            print(json.dumps({"index": self.target, "paths": named, **asdict(report)}, ensure_ascii=False), flush=True)
            return
        if counts:
            shown = str(self.documents.path) if "." in paths else ", ".join(named[:SHOWN])
            more = f" and {len(named) - SHOWN:,} more" if len(named) > SHOWN else ""
            what = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            print(f"{time.strftime('%H:%M:%S')} {shown}{more}: {what}; {report.seconds:.1f} s", flush=True)
        for line in summarize_skipped([*report.skipped, *report.conflicts]):
            print(line, file=sys.stderr, flush=True)
        if report.kept is not None:
            print_progress(f"the source no longer has {report.kept}; they were kept: run the command with --prune")


def _print_error(error: InputError) -> None:
    print_progress(f"error: {error}; it is tried again")


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop`; a second Ctrl-C interrupts."""

    def handle(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

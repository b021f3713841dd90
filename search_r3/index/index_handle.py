"""An index that a server or an agent searches for a long time, while it is written to, moved, or replaced.

LanceDB opens a table by its path and follows whatever is there, so an index that replaces it could be read with the
wrong model. An `IndexHandle` keeps the version it opened and decides itself when to move on: to the next version of the
same index, or to a replacement made with the same model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Unpack

from search_r3.errors import InputError
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.index_info import IndexInfo
from search_r3.index.overview import Overview, overview_of
from search_r3.index.run_search import SearchOptions, SearchResult
from search_r3.index.search_index import DocumentPage, SearchIndex
from search_r3.index.storage.location import Location, StorageError, brief, files_lost, location_of
from search_r3.index.stored_document import StoredDocument

Event = Literal["exchanged", "refused", "unavailable", "available"]
T = TypeVar("T")
EVERY = 1.0
"""Seconds between checks of a folder."""
EVERY_REMOTE = 2.0
"""Seconds between checks of object storage, each of which is a request."""
PATIENCE = 2.0
"""Seconds that a search waits for an index that is being replaced before the index is reported unavailable."""
STEP = 0.05
"""Seconds between checks while a search waits."""
UNSETTLED = 200_000_000
"""Nanoseconds after a commit during which another one might have the same timestamp."""
FAILURES = (RuntimeError, OSError, ValueError)
"""Errors that LanceDB raises."""


class IndexUnavailable(StorageError):
    """The index cannot be searched at the moment. The query was valid, so a server answers 503."""


class _RefusedError(InputError):
    """What replaced the index was not made with the same model."""


class _Fingerprint(NamedTuple):
    """Identifies a folder, a commit, and for a very recent commit the time of the check."""

    folder: tuple[Any, ...]
    commit: int
    instant: int


class IndexHandle:
    """The index at a path, whatever happens there. Thread-safe.

    Args:
        path: the folder, or a location on object storage.
        every: seconds between checks for changes; by default 1 for a folder and 2 for object storage.
        patience: seconds that a search waits while the index is being replaced.
        on_event: called once for each change with "exchanged", "refused", "unavailable" or "available" and a line of
            explanation.

    Raises:
        InputError: as for `SearchIndex.open`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: float | None = None,
        patience: float = PATIENCE,
        on_event: Callable[[Event, str], None] = lambda event, line: None,
    ) -> None:
        self.path = location_of(path)
        self.patience, self.on_event = patience, on_event
        self.every = every if every is not None else EVERY if isinstance(self.path, Path) else EVERY_REMOTE
        self._checking = threading.Lock()
        self._checked = time.monotonic()
        self._backend = type(self._open().backend)  # raises the clearest error
        self._seen = self._fingerprint()
        self._current = self._open()
        self._newest: SearchIndex | None = None  # used to look for a newer version
        self._made_with = self._current.info
        self._refused: tuple[_Fingerprint, str] | None = None  # the refused index, and why it was refused
        self._suspect = False  # a search failed: reopen even if the fingerprint is unchanged
        self._problem: tuple[str, float] | None = None  # what is wrong, and the time from which it is reported
        self._reported = False
        self._overview: tuple[Any, Overview] | None = None  # with the state of the index that it describes

    def __len__(self) -> int:
        return len(self._current)

    @property
    def info(self) -> IndexInfo:
        """What the index was made with, as of the last check."""
        return self._current.info

    @property
    def columns(self) -> dict[str, str]:
        """See `SearchIndex.columns`; as of the last check."""
        return self._current.columns

    @property
    def table(self) -> Any:
        """The LanceDB table, as last opened; unlike with `run`, direct reads from it are not retried."""
        return self._current.table

    @property
    def problem(self) -> str | None:
        """Why the index cannot be searched, in one line; None if it can. As of the last check."""
        problem = self._problem
        return problem[0] if problem is not None and self._reported else None

    @property
    def refusal(self) -> str | None:
        """Why the index that is now at the path is not used while its predecessor still is; else None."""
        return self._refused[1] if self._refused is not None and self._problem is None else None

    @property
    def index(self) -> SearchIndex:
        """The current index, checked again if the last check is too old. Raises IndexUnavailable."""
        if time.monotonic() - self._checked >= self.every and self._checking.acquire(blocking=False):
            try:
                self._check()
            finally:
                self._checking.release()
        if (problem := self.problem) is not None:
            raise IndexUnavailable(problem)
        return self._current

    def check_model(self, model: Encoder) -> None:
        """See `SearchIndex.check_model`."""
        self._current.check_model(model)

    def search(self, query: str, model: Encoder | None, **options: Unpack[SearchOptions]) -> SearchResult:
        """`SearchIndex.search`, retried as `run` does."""
        return self.run(lambda index: index.search(query, model, **options))

    def list_documents(self, limit: int = 100, after: str = "") -> DocumentPage:
        """`SearchIndex.list_documents`, retried as `run` does."""
        return self.run(lambda index: index.list_documents(limit, after))

    def document(
        self,
        identifier: str,
        start_line: int | None = None,
        end_line: int | None = None,
        max_characters: int | None = None,
    ) -> StoredDocument:
        """`SearchIndex.document`, retried as `run` does."""
        return self.run(lambda index: index.document(identifier, start_line, end_line, max_characters))

    def overview(self) -> Overview:
        """`overview_of` the index; read again once the index has another number of chunks."""

        def read(index: SearchIndex) -> Overview:
            state = index.info.identity, len(index)
            if self._overview is None or self._overview[0] != state:
                self._overview = state, overview_of(index.pinned())
            return self._overview[1]

        return self.run(read)

    def check(self) -> None:
        """Check now whether the index has changed, and reopen it if so. Never raises."""
        asked = time.monotonic()
        with self._checking:
            if self._checked < asked:  # else another thread has checked while this one waited
                self._check()

    def run(self, read: Callable[[SearchIndex], T]) -> T:
        """Return `read(index)`, repeated if the index was replaced meanwhile.

        Raises:
            IndexUnavailable: the index is missing or unreadable, and did not come back within `patience` seconds.
        """
        end: float | None = None
        again = False
        error: Exception | None = None
        try:
            while True:
                index, error = self.index, None
                try:
                    answer = read(index)
                except (InputError, *FAILURES) as caught:
                    error = caught
                    if isinstance(caught, StorageError) and not files_lost(
                        caught
                    ):  # LanceDB has already tried for long enough
                        self._suspect = True
                        self._fail(str(caught))
                        raise
                exchanged = not index.unchanged()
                if error is None and not exchanged:
                    return answer
                end = time.monotonic() + self.patience if end is None else end
                broken = exchanged or files_lost(error) or not (isinstance(error, InputError) or _answers(index))
                self._suspect = self._suspect or broken
                self.check()
                another = broken or self._current.info.identity != index.info.identity
                if self._current is not index and (another or not again) and time.monotonic() < end + self.patience:
                    again = True  # only once for a newer version: mistakes of the user stay mistakes
                    continue
                if error is not None and not broken:
                    raise error  # nothing happened to the index
                if time.monotonic() >= end:
                    reason = brief(error) if error is not None else "it keeps being replaced"
                    line = self._problem[0] if self._problem else self._unreadable(reason)
                    self._fail(line, at_once=True)
                    raise IndexUnavailable(line)
                time.sleep(STEP)
        finally:
            error = None  # its traceback would keep this frame alive, and with it the arguments of `read`

    def writable(self) -> Location:
        """Where to write a change now: for a folder its real path, even if a symbolic link to it changes meanwhile.

        Raises:
            IndexUnavailable: the path has an index of another model; or the index is missing or unreadable, and did not
                come back within `patience` seconds.
        """
        self.check()
        while self._problem is not None and self.problem is None:  # it may be in the middle of a replacement
            time.sleep(STEP)
            self.check()
        if (line := self.problem or self.refusal) is not None:
            raise IndexUnavailable(line)
        return Path(os.path.realpath(self.path)) if isinstance(self.path, Path) else self.path

    def unavailable(self, error: BaseException) -> IndexUnavailable | None:
        """The error to raise if LanceDB reported missing files; None for any other error."""
        if not files_lost(error):
            return None
        self._suspect = True
        self.check()
        line = self._problem[0] if self._problem else f"the index {self.path} was replaced meanwhile; try again"
        return IndexUnavailable(line)

    def _check(self) -> None:
        self._checked = time.monotonic()
        fingerprint = None
        try:
            fingerprint = self._fingerprint()
            self._follow(fingerprint)
        except _RefusedError as error:
            line = str(error)
            if self._refused is None or self._refused[1] != line:
                self.on_event("refused", line)
            assert fingerprint is not None  # `_follow` raised
            self._refused = fingerprint, line
            if _answers(self._current, thorough=False):  # the old index was moved, and can still be read
                self._recover()
            else:
                self._fail(line, at_once=True)
        except InputError as error:
            self._fail(str(error))
        except FAILURES as error:
            self._fail(self._unreadable(brief(error)))

    def _follow(self, fingerprint: _Fingerprint) -> None:
        """Move on to the index that is now at the path."""
        same = fingerprint.folder == self._seen.folder
        if (
            same
            and fingerprint == self._seen
            and isinstance(self.path, Path)
            and not self._suspect
            and not self._problem
        ):
            self._refused = None  # a link that was changed leads back to this index
            return
        if self._refused is not None and fingerprint == self._refused[0] and isinstance(self.path, Path):
            raise _RefusedError(self._refused[1])
        if same and not self._suspect:
            newest = (self._current.reopened() if self._newest is None else self._newest).latest()
            commits = newest.backend.version - self._current.backend.version
            of_the_same = newest.info.identity == self._current.info.identity and newest.unchanged() and commits >= 0
            if of_the_same and (self._problem is None or _answers(newest)):
                if commits or self._problem is not None:  # running searches stay at their version
                    self._current, self._newest = newest, None
                else:
                    self._newest = newest
                self._seen, self._refused = fingerprint, None
                self._recover()
                return
        opened = self._open()
        made_with, now = self._made_with, opened.info
        if now.dimension != made_with.dimension or not now.same_space(made_with):
            raise _RefusedError(
                f"{self.path} now has an index that was made with {opened.info.model_name} (contract "
                f"{opened.info.contract_hash[:12]}), not with {self._current.info.model_name} (contract "
                f"{self._made_with.contract_hash[:12]}); put an index of the same model there, or restart with this one"
            )
        opened.backend.probe()
        if opened.info.identity != self._current.info.identity and not opened.complete and self._waits_for_a_build():
            raise InputError(f"the index {self.path} is being built")  # it may lack its rows, or its full-text index
        if self._fingerprint()[:2] != fingerprint[:2]:
            raise InputError(f"the index {self.path} is being replaced")  # the next check will pick it up
        before, self._current, self._newest, self._seen = self._current, opened, None, fingerprint
        self._suspect, self._refused = False, None
        self._recover()
        if not same or before.info.identity != opened.info.identity:
            self.on_event("exchanged", f"{self.path} holds another index of the same model, made {opened.info.created}")

    def _waits_for_a_build(self) -> bool:
        """Whether to wait for an incomplete replacement to be built: for half of `patience` since the old index was
        first missing. After that it is searched as it is."""
        now = time.monotonic()
        missed = self._problem[1] - self.patience if self._problem is not None else now
        return now < missed + self.patience / 2

    def _open(self) -> SearchIndex:
        """Open the index that the path leads to now. It stays readable if a symbolic link changes."""
        location = self.path if not isinstance(self.path, Path) else Path(os.path.realpath(self.path))
        try:
            opened = SearchIndex.open(location, follow=False)
        except InputError as error:
            raise InputError(str(error).replace(str(location), str(self.path))) from error
        return opened.with_display_path(self.path)

    def _fingerprint(self) -> _Fingerprint:
        """Identify what is at the path now. Cheap, as no file is read.

        Raises:
            InputError: there is nothing at the path.
        """
        if not isinstance(self.path, Path):
            return _Fingerprint((), 0, 0)
        try:
            known, commit = self._backend.fingerprint(Path(os.path.realpath(self.path)))
        except OSError as error:
            if not self.path.exists():
                raise InputError(f"the index {self.path} is missing") from error
            reason = error.strerror or error
            raise InputError(f"the index {self.path} cannot be read ({reason})") from error
        settled = abs(time.time_ns() - commit) >= UNSETTLED  # if not, look again next time: timestamps are coarse
        return _Fingerprint(known, commit, 0 if settled else time.monotonic_ns())

    def _unreadable(self, reason: str) -> str:
        return f"the index {self.path} cannot be read ({reason}); if this persists, restore a copy or index again"

    def _fail(self, line: str, at_once: bool = False) -> None:
        now = time.monotonic()
        since = now if at_once else now + self.patience
        if self._problem is not None:
            since = min(since, self._problem[1])
        self._problem = line, since
        if now >= since and not self._reported:
            self._reported = True
            self.on_event("unavailable", line)

    def _recover(self) -> None:
        self._problem = None
        if self._reported:
            self._reported = False
            self.on_event("available", f"{self.path} can be searched again")


def _answers(index: SearchIndex, thorough: bool = True) -> bool:
    try:
        index.backend.probe(thorough)
        return index.unchanged()
    except (InputError, *FAILURES):
        return False


@contextmanager
def damage_explained(path: str | Path) -> Iterator[None]:
    """Turn LanceDB's errors about missing or damaged files into an InputError with a one-line message; others pass.

    Raises:
        InputError: files of the index at `path` cannot be read.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError) or not files_lost(error):
            raise
        raise InputError(
            f"{path}: files of the index are missing or damaged ({brief(error)}); restore a copy or index again"
        ) from error

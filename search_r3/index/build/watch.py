"""Watching a folder or a file with watchfiles, so that what changes on disk changes in the index.

What watchfiles reports only says where to look; what is there is asked of the disk. A folder that is moved in or out is
reported by its own name alone, a batch of changes has no order, and a watch on a file ends once the file is replaced by
a rename, so the file's folder is watched instead.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath

from search_r3.errors import InputError
from search_r3.index.build.build_report import IndexReport
from search_r3.index.readers.file_filter import IGNORE_FILE
from search_r3.index.readers.path_source import PathSource, is_ignored_folder, outermost
from search_r3.optional import optional_imports

QUIET_MS, LONGEST_MS = 100, 1000
"""Changes are joined until there was none for so long, or for at most so long."""
TICK_MS = 500
"""How often the watcher looks whether it is to stop, or to try again what has failed."""
RETRY, LONGEST_RETRY = 2.0, 60.0
"""Seconds until an update that has failed is tried again; doubled each time."""
EVERYTHING = frozenset(["."])
MANY = 2000
"""More changed paths at once mean that everything is read again: the system drops events beyond its limit (16,384 in
Linux by default)."""
GIT_EXCLUDE = (".git", "info", "exclude")


def watch_source(source: PathSource, stop: threading.Event) -> Iterator[frozenset[str]]:
    """Yield the changed paths of a source, relative to its folder, as they come; `EVERYTHING` for a file's.

    The first set is empty and says that from now on no change is missed, even those made while the caller is busy. Then
    a set, perhaps empty, follows at least every half second.

    Args:
        stop: ends the iteration.

    Raises:
        InputError: watchfiles is not installed, the system cannot watch so many folders, or the watched folder is moved
            or removed.
    """
    with optional_imports("files", "watching"):
        import watchfiles
    folder = source.kind == "folder"
    roots = [_real(source.path)] if folder else _folders_of(source.path)
    identity = [_identity(root) for root in roots]
    state = None if folder else _state(source.path)
    batches = watchfiles.watch(
        *roots,
        watch_filter=None,
        debounce=LONGEST_MS,
        step=QUIET_MS,
        rust_timeout=TICK_MS,
        yield_on_timeout=True,
        stop_event=stop,
        recursive=folder,
        ignore_permission_denied=True,
    )
    began = False
    while True:
        try:
            batch = next(batches, None)
        except OSError as error:
            raise InputError(
                f"{source.path} cannot be watched ({error}); raise the system's limit (fs.inotify.max_user_watches in "
                "Linux), or set WATCHFILES_FORCE_POLLING=true"
            ) from error
        if batch is None:
            return
        if [_identity(root) for root in roots] != identity:
            raise InputError(
                f"{source.path} was moved or removed; what was indexed of it is kept: start again when it is back"
            )
        if not began:
            began = True
            yield frozenset()
        if folder:
            yield changed_paths(roots[0], (path for _, path in batch))
            continue
        before, state = state, _state(source.path) or state
        yield frozenset() if state == before else EVERYTHING


def changed_paths(root: Path, changed: Iterable[str]) -> frozenset[str]:
    """The paths of a folder, relative to it, that may be read differently after changes; not those that never are.

    A changed `.gitignore` concerns all of its folder.

    Args:
        root: the folder.
        changed: absolute paths in it.
    """
    paths: set[str] = set()
    for path in changed:
        parts = PurePath(path).relative_to(root).parts
        if parts[-3:] == GIT_EXCLUDE:
            return EVERYTHING
        if not parts or any(map(is_ignored_folder, parts[:-1])):
            continue
        if parts[-1] == IGNORE_FILE:
            paths.add("/".join(parts[:-1]) or ".")
        elif not is_ignored_folder(parts[-1]):
            paths.add("/".join(parts))
    return EVERYTHING if len(paths) > MANY else frozenset(outermost(paths))


def keep_up_to_date(
    changes: Iterable[frozenset[str]],
    update: Callable[[frozenset[str]], IndexReport],
    on_update: Callable[[frozenset[str], IndexReport], None],
    on_error: Callable[[InputError], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Update an index for each set of changed paths, until `changes` ends. A failed update is tried again.

    Args:
        changes: as of `watch_source`.
        update: brings the index up to date with these paths.
        on_update: called after each update.
        on_error: called if one fails, once for each message in a row.
    """
    pending: set[str] = set()
    said, delay, due = "", RETRY, 0.0
    for paths in changes:
        pending |= paths
        if not pending or (not paths and clock() < due):
            continue
        now = frozenset(outermost(pending))
        try:
            report = update(now)
        except InputError as error:
            if str(error) != said:
                on_error(error)
            said, due, delay = str(error), clock() + delay, min(2 * delay, LONGEST_RETRY)
            continue
        pending.clear()
        said, delay = "", RETRY
        on_update(now, report)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _folders_of(file: Path) -> list[Path]:
    """The folders in which a file can be replaced: its own, and that of the file that it links to."""
    return list(dict.fromkeys([_real(file.absolute().parent), _real(file).parent]))


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder; None if it is not there."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _state(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None if it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

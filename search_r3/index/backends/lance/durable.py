"""Flushing commits to disk: Lance leaves that to the operating system, which may take half a minute.

Without it, a power cut could undo a write that was reported as done; and after old files were removed, it could lose
both them and the files that replaced them.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.index.storage.location import Location, StorageError

CLOCK = 2.0  # seconds; the coarsest clock of a common file system (FAT)
WRITTEN_BACK = 120.0  # seconds within which operating systems write files back on their own
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP}  # a file system without fsync of such a file
_since: dict[str, float] = {}
"""Folder -> time (seconds since 1970) since which its files may not yet be on disk."""
_failed: set[str] = set()
"""Files whose fsync failed. Linux reports that only once: the next fsync of the same file succeeds although nothing was
written (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020)."""


class DiskError(StorageError):
    """The disk is full or failing. The request was valid, so a server answers 503."""


def flush(location: Location, since: float) -> None:
    """Flush the files in a folder that were written at or after `since` (seconds since 1970) to disk.

    This includes files written since this process's last flush, as another process may have been killed after its
    commit; at the first flush, all files that the operating system may not have written back yet. Object storage keeps
    what it accepted, so nothing is done there.

    Raises:
        DiskError: the disk is full or failing.
    """
    if not isinstance(location, Path):
        return
    name, now = os.path.realpath(location), time.time()
    _since[name] = min(since, _since.get(name, now - WRITTEN_BACK))  # stays if this flush fails
    _sync_files(location, _since[name])
    _since[name] = now


def _sync_files(location: Path, since: float) -> None:
    folders: set[str] = set()
    for folder, _, names in os.walk(location):
        for name in names:
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):
                if os.stat(path).st_mtime >= since - CLOCK:
                    _sync(path, location)
                    folders.add(folder)
    for folder in folders | {os.path.dirname(folder) for folder in folders}:
        with suppress(PermissionError, FileNotFoundError):  # Windows cannot open folders, and does not need this
            _sync(folder, location)


def _sync(path: str, location: Path) -> None:
    try:
        if path in _failed and os.path.isfile(path):
            with atomic_path(path) as copy:  # `atomic_path` flushes the copy before it replaces the file
                shutil.copyfile(path, copy)
        else:
            _fsync(path)
    except (PermissionError, FileNotFoundError):
        raise
    except (OSError, InputError) as error:
        if getattr(error, "errno", None) in _UNSUPPORTED:
            return
        _failed.add(path)
        reason = getattr(error, "strerror", None) or error
        raise DiskError(f"{location}: cannot flush to disk ({reason}); the disk may be full or failing") from error
    _failed.discard(path)


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" or os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What was committed reaches the disk: Lance leaves that to the operating system, which may take half a minute.

Without it a power cut could take back a write that was reported as done; and where old files are removed, both the old
ones and those that took their place.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from search_r3.errors import InputError
from search_r3.index.storage import Place

CLOCK = 2.0  # seconds; the coarsest clock of a common file system (FAT)
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP}  # a file system without fsync of such a file


def flush(place: Place, since: float) -> None:
    """Wait until the disk has the files in a folder that were written at or after `since` (seconds since 1970).

    Object storage has what it has accepted, so there is nothing to do.

    Raises:
        InputError: the disk fails or is full.
    """
    if not isinstance(place, Path):
        return
    folders: set[str] = set()
    for folder, _, names in os.walk(place):
        for name in names:
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):
                if os.stat(path).st_mtime >= since - CLOCK:
                    _sync(path, place)
                    folders.add(folder)
    for folder in folders | {os.path.dirname(folder) for folder in folders}:
        with suppress(PermissionError, FileNotFoundError):  # Windows opens no folders, and needs no such thing
            _sync(folder, place)


def _sync(path: str, place: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" or os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise InputError(
                f"{place}: the disk does not take what was written ({error.strerror}); it may be full or broken"
            ) from error
    finally:
        os.close(descriptor)

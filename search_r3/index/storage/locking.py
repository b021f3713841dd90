"""One writer of an index at a time: the operating system's lock on a file, and a second file that names the holder.

The lock ends with its process, so a killed process does not block others. Readers need no lock: they see LanceDB's
commits. On object storage, which has no locks, a lease replaces it (`lease`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from search_r3.errors import InputError
from search_r3.index.storage.lease import Lease, WriteLock
from search_r3.index.storage.location import IndexBusy, Remote

LOCK, HOLDER = ".build.lock", ".build.pid"
SPOOL, ENCODED = "spool.lance", "encoded.lance"  # left by a distributed build whose driver was killed
OURS = {LOCK, HOLDER, SPOOL, ENCODED}


@contextmanager
def writing(path: Path | str, *, make: bool = False, wait: float = 0.0) -> Iterator[WriteLock]:
    """Lock the index in the folder `path`, or at the URI, for writing.

    Args:
        make: create the folder if it does not exist; it is removed again if it is still empty at the end.
        wait: seconds to wait for another writer to finish.

    Yields:
        The lock, whose `check()` is to be called before each commit.

    Raises:
        IndexBusy: another process is writing; the message names it.
        StorageError: object storage cannot be reached, or refuses.
        InputError: `path` is a file, or is not writable.
    """
    if isinstance(path, Remote):
        lease = Lease(path)
        lease.acquire(wait)
        try:
            yield lease
        finally:
            lease.release()
        return
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder for the index")
    made = not path.exists()
    if made and not make:
        raise InputError(f"{path} does not exist; make an index there first (search-r3 index SOURCE --into {path})")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=wait)
        lock.acquire()
    except Timeout as error:
        raise IndexBusy(f"another build is writing to {path}{_holder(path)}; wait until it is done") from error
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; choose a folder you may write to") from error
    try:
        _record_holder(path)
        yield WriteLock()
    finally:
        (path / HOLDER).unlink(missing_ok=True)
        lock.release()
        if made and not any(item.name not in OURS for item in path.iterdir()):
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()


def _record_holder(path: Path) -> None:
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    try:
        (path / HOLDER).write_text(f"{os.getpid()} {since}", encoding="ascii")
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror}; free some space or change its permissions"
        ) from error


def _holder(path: Path) -> str:
    """ " (process 123, since ...)" if the holder has recorded itself already."""
    try:
        number, _, since = (path / HOLDER).read_text(encoding="ascii").partition(" ")
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (process {number}, since {since})" if number.isdigit() else ""

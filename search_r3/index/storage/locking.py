"""One writer of an index at a time: the operating system's lock on a file, and beside it who holds it.

The lock ends with its process, so a killed process blocks no other. Readers need no lock: they see LanceDB's commits.
On object storage, where there are no locks, a lease takes its place (`lease`).
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
SPOOL = "spool.lance"  # of a build by many processes, see `distributed`; there only if its driver was killed
OURS = {LOCK, HOLDER, SPOOL}


@contextmanager
def writing(path: Path | str, *, make: bool = False, wait: float = 0.0) -> Iterator[WriteLock]:
    """Hold the index in the folder `path`, or at the URI, for writing.

    Args:
        make: make the folder if there is none; one that was made and is left without a table is removed again.
        wait: seconds to wait for another writer to end.

    Yields:
        What to `check()` before each commit.

    Raises:
        IndexBusy: another process is writing (it is named).
        StorageError: object storage cannot be reached, or refuses.
        InputError: `path` is a file, or it may not be written.
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
        _sign(path)
        yield WriteLock()
    finally:
        (path / HOLDER).unlink(missing_ok=True)
        lock.release()
        if made and not any(item.name not in OURS for item in path.iterdir()):
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()


def _sign(path: Path) -> None:
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
    try:
        (path / HOLDER).write_text(f"{os.getpid()} {since}", encoding="ascii")
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror}; free some space or change its permissions"
        ) from error


def _holder(path: Path) -> str:
    """ " (process 123, since ...)" where the other one has signed already."""
    try:
        number, _, since = (path / HOLDER).read_text(encoding="ascii").partition(" ")
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (process {number}, since {since})" if number.isdigit() else ""

"""Writing files so that a crash never leaves half of one: write aside, flush to disk, rename.

Everything the project writes (checkpoints, runs, caches, logs' final form) goes through `atomic_path`.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search_r3.errors import InputError


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; on a clean exit it replaces `target` in one rename, else it is removed.

    Works for a file or a folder: whichever the block creates at the scratch path. A folder that already stands at
    `target` is moved away first, so for folders there is an instant in which neither name exists.

    Raises:
        InputError: the disk is full or the place cannot be written; `target` is as it was before.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; choose a folder you may write to") from error
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp{target.suffix}"
    try:
        yield scratch
        _sync(scratch)
        if scratch.is_dir() and target.exists():
            old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
            os.replace(target, old)
            os.replace(scratch, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(scratch, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"cannot write {target}: the disk is full; free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"cannot write {target}: {error.strerror}; choose a folder you may write to") from error
        raise
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def atomic_write_text(target: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `target` in one rename."""
    with atomic_path(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())

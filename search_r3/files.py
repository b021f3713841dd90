"""Writing files so that a crash never leaves half of one: write aside, flush to disk, rename. And what is UTF-8 text.

Everything the project writes (checkpoints, runs, caches, logs' final form) goes through `atomic_path`; a disk that is
full becomes one line, whichever library met it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from search_r3.errors import InputError

BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which Windows programs put in front of a text; it is no part of it."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system answers where a place may not be written."""
_WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def expand_user(path: str | Path) -> Path:
    """`path` with a `~` at its beginning replaced by the user's home folder.

    Raises:
        InputError: there is no home folder, as in a container whose user has no entry in /etc/passwd.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: this user has no home folder; set HOME, or give the path without ~") from error


def allow_no_temporary_folder() -> None:
    """Let libraries be imported where no temporary folder can be written, as in a container with a read-only root.

    torch (by dill, if that is installed, and by its compiler) and others ask where temporary files go as they are
    imported, and fail though they would write none. Who then does write one meets the system's own error, see
    `no_temporary_folder`.
    """
    try:
        if tempfile.gettempdir() != "/tmp":  # a folder that Python found to be better; libraries in Rust take /tmp
            os.environ.setdefault("TMPDIR", tempfile.gettempdir())
    except FileNotFoundError:
        named = (os.environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP"))
        tempfile.tempdir = next(filter(os.path.isdir, (*named, "/tmp")), os.path.abspath(os.sep))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.tempdir)


def check_temporary_folder(purpose: str) -> None:
    """Raise InputError where no temporary file can be written; `purpose` begins the message."""
    try:
        with tempfile.TemporaryFile():
            return
    except OSError as error:
        reason = no_temporary_folder(error) or f"{error.strerror}; set TMPDIR to a folder with space to write"
        raise InputError(f"{purpose} needs temporary files: {reason}") from error


def no_temporary_folder(error: BaseException) -> str | None:
    """A line that says what to set where `error` came about because no temporary file could be written; else None."""
    if not isinstance(error, OSError) or error.errno not in (*UNWRITABLE, errno.ENOENT):
        return None
    if "No usable temporary directory" in str(error.strerror):
        where = "no folder for temporary files can be written"
    elif error.errno in UNWRITABLE and Path(str(error.filename)).parent == Path(tempfile.gettempdir()):
        where = f"{tempfile.gettempdir()} cannot be written ({error.strerror})"
    else:
        return None
    return f"{where}; set TMPDIR to a folder you may write to"


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; on a clean exit it replaces `target` in one rename, else it is removed.

    Works for a file or a folder: whichever the block creates at the scratch path. A folder that already stands at
    `target` changes places with the scratch one at once; only where the system cannot do that (Linux can) is it moved
    away first, and for an instant neither name exists.

    Raises:
        InputError: the disk is full or the place cannot be written; `target` is as it was before.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_is_full(error):
            raise InputError(f"cannot write {target}: no space left; free some space and run again") from error
        raise InputError(f"cannot write {target}: {error.strerror}; choose a folder you may write to") from error
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp{target.suffix}"
    try:
        yield scratch
        _sync(scratch)
        if scratch.is_dir() and target.exists():
            if not _exchange(scratch, target):
                old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
                os.replace(target, old)
                os.replace(scratch, target)
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(scratch, target)
    except InputError:
        raise
    except Exception as error:
        if disk_is_full(error):
            raise InputError(
                f"cannot write {target}: no space left, the disk is full; free some space and run the same command "
                "again"
            ) from error
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise InputError(f"cannot write {target}: {error.strerror}; choose a folder you may write to") from error
        raise
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            with suppress(OSError):  # a read-only file system says so even of a file that is not there
                scratch.unlink(missing_ok=True)


def atomic_write_text(target: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `target` in one rename."""
    with atomic_path(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_missing(path: str | Path) -> str:
    """What is to be said of a path where nothing is: that it does not exist, or that it is a link to such a place."""
    try:
        return f"is a link to {os.readlink(path)}, which does not exist"
    except OSError:
        return "does not exist"


def decode_text(data: bytes, name: str | Path) -> str:
    """The text that a file's bytes hold: UTF-8, without the byte order mark that may stand in front.

    Raises:
        InputError: they are not UTF-8 text; `name` begins the message.
    """
    if (problem := text_problem(data)) is not None:
        raise InputError(f"{name}: {problem}; save the file as UTF-8")
    return data.removeprefix(BOM).decode("utf-8")


def text_problem(data: bytes, at: str = "at") -> str | None:
    """What keeps bytes from being UTF-8 text: another encoding (see `encoding_problem`), or a NUL byte; else None."""
    nul = "binary data or UTF-16 (a NUL byte), expected UTF-8 text" if b"\0" in data else None
    return encoding_problem(data, at) or nul


def encoding_problem(data: bytes, at: str = "at") -> str | None:
    """What keeps bytes from being UTF-8, in a few words ("UTF-16 text, expected UTF-8"); None where they are.

    `at` stands before the number, from 1, of the first byte that does not fit ("at column").
    """
    if (encoding := wide_encoding(data)) is not None:
        return f"{encoding} text, expected UTF-8"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte 0x{data[error.start]:02x} {at} {error.start + 1})"
    return None


def wide_encoding(data: bytes) -> str | None:
    """ "UTF-16" or "UTF-32" where the bytes begin with its byte order mark, else None."""
    return next((encoding for mark, encoding in _WIDE.items() if data.startswith(mark)), None)


def remove_leftovers(*targets: str | Path) -> None:
    """Remove what killed writers of `targets` left beside them, and put back a folder that one had moved away.

    Only for who holds the lock of the place: a writer that is alive would lose its file.
    """
    for target in map(Path, targets):
        scratch = rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(?:tmp{re.escape(target.suffix)}|old)"
        for left in sorted(target.parent.glob(".*")):
            if not re.fullmatch(scratch, left.name):
                continue
            if left.suffix == ".old" and not target.exists():
                left.rename(target)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def disk_is_full(error: BaseException) -> bool:
    """Whether `error` came about because there is no space (or quota) left.

    Libraries in Rust (safetensors, Lance) raise errors of their own, with the system's words in their text.
    """
    met: BaseException | None = error
    while met is not None:
        if isinstance(met, OSError) and met.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"No space left on device|Disk quota exceeded|os error (28|122)\b", str(met)):
            return True
        met = met.__cause__ or met.__context__
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step (Linux's renameat2); False where that cannot be had."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or a C library without it
        return False
    working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(working_folder, os.fsencode(one), working_folder, os.fsencode(other), exchange) == 0


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())

"""Atomic file writes (write to a temporary file, flush, rename), and decoding of UTF-8 text.

Everything the project writes (checkpoints, runs, caches, logs' final form) goes through `atomic_path`; a full disk
becomes a one-line error, whichever library reports it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from search_r3.errors import InputError

BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which Windows programs prepend to a text; it is not part of the text."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of paths that cannot be written."""
_WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def expand_user(path: str | Path) -> Path:
    """`path` with a leading `~` replaced by the user's home folder.

    Raises:
        InputError: there is no home folder, as in a container whose user has no entry in /etc/passwd.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: this user has no home folder; set HOME, or give the path without ~") from error


def allow_no_temporary_folder() -> None:
    """Allow libraries to be imported without a writable temporary folder, as in a container with a read-only root.

    torch (through dill, if installed, and its compiler) and others look up the temporary folder on import, and fail
    although they write nothing. Code that then does write a file gets the system's own error, see
    `no_temporary_folder`.
    """
    try:
        if tempfile.gettempdir() != "/tmp":  # Python found a better folder; libraries in Rust use /tmp
            os.environ.setdefault("TMPDIR", tempfile.gettempdir())
    except FileNotFoundError:
        named = (os.environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP"))
        tempfile.tempdir = next(filter(os.path.isdir, (*named, "/tmp")), os.path.abspath(os.sep))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.tempdir)


def check_temporary_folder(purpose: str) -> None:
    """Raise InputError if no temporary file can be written; the message starts with `purpose`."""
    try:
        with tempfile.TemporaryFile():
            return
    except OSError as error:
        reason = no_temporary_folder(error) or f"{error.strerror}; set TMPDIR to a folder with space to write"
        raise InputError(f"{purpose} needs temporary files: {reason}") from error


def no_temporary_folder(error: BaseException) -> str | None:
    """What to do, in one line, if `error` was caused by an unwritable temporary folder; else None."""
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
    """Yield a temporary path next to `target`; on success it replaces `target` atomically, otherwise it is removed.

    Works for files and folders, whichever the block creates there. An existing folder at `target` is exchanged
    atomically with the new one; if the system does not support that (Linux does), it is moved away first, and for an
    instant neither exists.

    Raises:
        InputError: the disk is full, the path cannot be written or is a device or a pipe; `target` is unchanged.
    """
    target = Path(target)
    if target.exists() and not (target.is_file() or target.is_dir()):  # root could exchange /dev/null
        raise InputError(f"cannot write {target}: it is a device, a pipe or a socket; name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_is_full(error):
            raise InputError(f"cannot write {target}: no space left; free some space and run again") from error
        raise InputError(f"cannot write {target}: {error.strerror}; choose a folder you may write to") from error
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp{target.suffix}"
    try:
        yield scratch
        _use_default_mode(scratch)
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
            with suppress(OSError):  # a read-only file system reports this even for a missing file
                scratch.unlink(missing_ok=True)


def atomic_write_text(target: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `target` atomically."""
    with atomic_path(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_missing(path: str | Path) -> str:
    """Why there is nothing at a path: it does not exist, or it is a dangling link."""
    try:
        return f"is a link to {os.readlink(path)}, which does not exist"
    except OSError:
        return "does not exist"


def decode_text(data: bytes, name: str | Path) -> str:
    """A file's bytes decoded as UTF-8, without a leading byte order mark.

    Raises:
        InputError: they are not UTF-8 text; the message starts with `name`.
    """
    if (problem := text_problem(data)) is not None:
        raise InputError(f"{name}: {problem}; save the file as UTF-8")
    return data.removeprefix(BOM).decode("utf-8")


def text_problem(data: bytes, at: str = "at") -> str | None:
    """Why bytes are not UTF-8 text: another encoding (see `encoding_problem`), or a NUL byte; else None."""
    nul = "binary data or UTF-16 (a NUL byte), expected UTF-8 text" if b"\0" in data else None
    return encoding_problem(data, at) or nul


def encoding_problem(data: bytes, at: str = "at") -> str | None:
    """Why bytes are not UTF-8, in a few words ("UTF-16 text, expected UTF-8"); None if they are.

    `at` precedes the number (from 1) of the first invalid byte ("at column").
    """
    if (encoding := wide_encoding(data)) is not None:
        return f"{encoding} text, expected UTF-8"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte 0x{data[error.start]:02x} {at} {error.start + 1})"
    return None


def wide_encoding(data: bytes) -> str | None:
    """ "UTF-16" or "UTF-32" if the bytes begin with its byte order mark, else None."""
    return next((encoding for mark, encoding in _WIDE.items() if data.startswith(mark)), None)


def remove_leftovers(*targets: str | Path) -> None:
    """Remove temporary files of killed writers of `targets`, and restore a folder that one had moved away.

    Call this only while holding the lock of `targets`: a running writer would lose its file.
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
    """Whether `error` was caused by a full disk or quota.

    Libraries in Rust (safetensors, Lance) raise their own errors, which contain the system's message.
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
    """Exchange two paths atomically (Linux's renameat2); False if not supported."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or a C library without it
        return False
    working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(working_folder, os.fsencode(one), working_folder, os.fsencode(other), exchange) == 0


def _use_default_mode(scratch: Path) -> None:
    """Give the safetensors files at or in `scratch` the mode of any new file.

    safetensors (0.8) makes them readable for their owner alone, whatever the umask (findings/safetensors-mode.sh): a
    server that runs as another user could not open an adapter.
    """
    found = [scratch] if scratch.is_file() else scratch.rglob("*")
    files = [file for file in found if file.suffix == ".safetensors" and file.is_file() and not file.is_symlink()]
    if not files or os.name == "nt":
        return
    probe = scratch.parent / f"{scratch.name}.mode"
    probe.touch()  # the umask can only be read by changing it, which other threads would see
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    for file in files:
        file.chmod(mode)


def _sync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())

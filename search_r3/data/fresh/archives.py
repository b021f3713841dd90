"""The files inside a wheel, a source archive or a folder, read into memory: nothing is unpacked, imported or run.

Archives come from strangers. A member that would escape its folder, or more than the bounds below once decompressed,
makes the whole archive refused; links and devices are passed over and counted.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from search_r3.errors import InputError

MAX_FILE = 2_000_000
"""Bytes of one file that is read: no README and no module that people wrote is longer."""
MAX_FILES = 50_000
MAX_UNPACKED = 300_000_000
"""Bytes that an archive may say, or turn out, to hold."""
MAX_READ = 200_000_000
"""Bytes of text that is kept in memory for one package."""
TEXTS = (".py", ".md", ".markdown", ".rst")
"""What is read, beside the metadata; everything else is only counted."""
METADATA = ("METADATA", "PKG-INFO")
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, ValueError)


@dataclass
class Contents:
    """What was read of one package.

    Attributes:
        files: path inside the package, with "/" -> bytes; in the paths' order.
        sha256: of the archive, or over the paths and contents read where there is no archive.
        newest: the newest date that the archive gives one of its files, or None for a folder: copying changes those.
        passed_over: what was not read, by reason.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    sha256: str = ""
    newest: datetime | None = None
    passed_over: Counter[str] = field(default_factory=Counter)


class _TooMuch(ValueError):
    """More than an archive may hold."""


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of a wheel or a source archive."""
    return path.name.lower().endswith(ARCHIVES)


def read_archive(path: Path) -> Contents:
    """The texts inside a wheel or source archive.

    Raises:
        InputError: it is no archive, is cut off or encrypted, has a member outside its own folder, or holds more than
            the bounds of this module.
    """
    contents = Contents()
    try:
        with open(path, "rb") as handle:
            contents.sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        members = _zip_members(path) if path.name.lower().endswith((".whl", ".zip")) else _tar_members(path)
        _gather(members, path.name, contents)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the path, or fetch the package first") from error
    except InputError:
        raise
    except _TooMuch as error:
        raise InputError(f"{path} {error}; it is no ordinary package and is refused") from error
    except (*_BROKEN, NotImplementedError, RuntimeError) as error:  # the last two: zip's odd compressions, passwords
        said = str(error).rstrip(".") or type(error).__name__
        raise InputError(f"{path} cannot be read as an archive ({said}); fetch it again") from error
    return contents


def read_folder(folder: Path, only: list[str] | None = None) -> Contents:
    """The texts below a folder, or only those of its files that are named; links are not followed.

    Raises:
        InputError: a file cannot be read, or they are more than the bounds of this module.
    """
    contents = Contents()
    names = only if only is not None else [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*"))]
    try:
        _gather(_folder_members(folder, names), str(folder), contents)
    except _TooMuch as error:
        raise InputError(f"{folder} {error}; name a smaller folder") from error
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"{where} cannot be read: {error.strerror or error}; fix it or name another folder") from error
    contents.newest = None
    digest = hashlib.sha256()
    for name, data in contents.files.items():
        digest.update(f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode())
    contents.sha256 = digest.hexdigest()
    return contents


def safe_name(name: str) -> str | None:
    """A member's name in its plain form; None where it would leave the folder that it is unpacked in."""
    plain = name.replace("\\", "/")
    path = PurePosixPath(plain)
    if path.is_absolute() or ".." in path.parts or "\0" in name or (len(plain) > 1 and plain[1] == ":"):
        return None
    return path.as_posix()


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    kind: str  # "file", "link" or "other"
    date: datetime | None
    handle: Any  # () -> a file that can be read


def _gather(members: Iterator[_Member], where: str, contents: Contents) -> None:
    total = kept = 0
    found: dict[str, bytes] = {}
    for number, member in enumerate(members, start=1):
        name = safe_name(member.name)
        if name is None:
            raise InputError(f"{where} has a member {member.name[:80]!r}, outside its own folder; it is refused")
        total += max(0, member.size)
        if number > MAX_FILES:
            raise _TooMuch(f"holds more than {MAX_FILES:,} files")
        if total > MAX_UNPACKED:
            raise _TooMuch(f"unpacks to more than {MAX_UNPACKED:,} bytes")
        if member.kind != "file":
            contents.passed_over[f"{member.kind}, not followed"] += 1
            continue
        if member.date and (contents.newest is None or member.date > contents.newest):
            contents.newest = member.date
        if not name.lower().endswith(TEXTS) and PurePosixPath(name).name not in METADATA:
            contents.passed_over["not a text that is read"] += 1
        elif name in found:
            contents.passed_over["second file of that name"] += 1
        elif member.size > MAX_FILE:
            contents.passed_over["file over 2 MB"] += 1
        else:
            with member.handle() as handle:
                data = handle.read(MAX_FILE + 1)
            kept += len(data)
            if len(data) > MAX_FILE or kept > MAX_READ:
                raise _TooMuch("holds more text than it says" if len(data) > MAX_FILE else "holds too much text")
            found[name] = data
    contents.files = dict(sorted(found.items()))


def _zip_members(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                if safe_name(info.filename) is None:
                    yield _Member(info.filename, 0, "other", None, None)
                continue
            mode = info.external_attr >> 16
            # A wheel made on Windows has no mode at all; then it is an ordinary file.
            kind = "link" if stat.S_ISLNK(mode) else "file" if not stat.S_IFMT(mode) or stat.S_ISREG(mode) else "other"
            yield _Member(info.filename, info.file_size, kind, _date(info.date_time), _opener(archive, info))


def _opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    return lambda: archive.open(info)


def _date(parts: tuple[int, ...]) -> datetime | None:
    try:
        return datetime(*parts, tzinfo=UTC)  # type: ignore[misc, arg-type]
    except ValueError:
        return None  # month 0, as some tools write


def _tar_members(path: Path) -> Iterator[_Member]:
    opens: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    # Streaming, through a reader that stops: a header may claim any size, and so may what pads it.
    with (
        opens[path.suffix.lower()](path, "rb") as packed,
        tarfile.open(fileobj=_Bounded(packed), mode="r|", errorlevel=1) as archive,
    ):
        for info in archive:
            if info.isdir() and safe_name(info.name) is not None:
                continue
            kind = "file" if info.isreg() else "link" if info.issym() or info.islnk() else "other"
            try:
                date = datetime.fromtimestamp(info.mtime, UTC)
            except (ValueError, OverflowError, OSError):
                date = None
            yield _Member(info.name, info.size, kind, date, lambda one=info: archive.extractfile(one))


class _Bounded(io.RawIOBase):
    """A decompressed stream that ends in an error once more than `MAX_UNPACKED` bytes came out of it."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self._left = source, MAX_UNPACKED

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size > self._left:
            raise _TooMuch(f"unpacks to more than {MAX_UNPACKED:,} bytes")
        data = self._source.read(self._left + 1 if size < 0 else size)
        self._left -= len(data)
        return data


def _folder_members(folder: Path, names: list[str]) -> Iterator[_Member]:
    for name in names:
        path = folder / name
        if path.is_symlink() or any(
            (folder / parent).is_symlink() for parent in list(PurePosixPath(name).parents)[:-1]
        ):
            yield _Member(name, 0, "link", None, None)
        elif path.is_file():
            yield _Member(name, path.stat().st_size, "file", None, lambda one=path: open(one, "rb"))  # noqa: SIM115

"""The files inside a wheel, a source archive or a folder, read into memory: nothing is unpacked, imported or run.

Archives are untrusted. An archive with a member outside its own folder, or beyond the limits below once decompressed,
is refused; links and devices are skipped and counted.
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
"""Largest file read, in bytes; no handwritten README or module is longer."""
MAX_FILES = 50_000
MAX_UNPACKED = 300_000_000
"""Largest unpacked size of an archive in bytes, declared or actual."""
MAX_READ = 200_000_000
"""Bytes of text kept in memory for one package."""
TEXTS = (".py", ".md", ".markdown", ".rst")
"""Suffixes of the files that are read, besides the metadata; all others are only counted."""
METADATA = ("METADATA", "PKG-INFO")
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, ValueError)


@dataclass
class Contents:
    """The files read from one package.

    Attributes:
        files: path inside the package, with "/" -> bytes; sorted by path.
        sha256: of the archive, or over the paths and contents read if there is no archive.
        newest: the newest date of a file in the archive; None for a folder, where copying changes the dates.
        passed_over: number of files not read, by reason.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    sha256: str = ""
    newest: datetime | None = None
    passed_over: Counter[str] = field(default_factory=Counter)


class _TooMuch(ValueError):
    """An archive exceeds a limit."""


def is_archive(path: Path) -> bool:
    """Whether a file name is that of a wheel or source archive."""
    return path.name.lower().endswith(ARCHIVES)


def read_archive(path: Path) -> Contents:
    """The texts inside a wheel or source archive.

    Raises:
        InputError: it is not an archive, is truncated or encrypted, has a member outside its own folder, or exceeds the
            limits of this module.
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
        raise InputError(f"{path} {error}; it is not an ordinary package, so it is refused") from error
    except (*_BROKEN, NotImplementedError, RuntimeError) as error:  # the last two: zip compression, passwords
        said = str(error).rstrip(".") or type(error).__name__
        raise InputError(f"{path} cannot be read as an archive ({said}); download it again") from error
    return contents


def read_folder(folder: Path, only: list[str] | None = None) -> Contents:
    """The texts in a folder and its subfolders, or only the named files; links are not followed.

    Raises:
        InputError: a file cannot be read, or the limits of this module are exceeded.
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
    """A member's normalized name; None if it would escape the folder it is unpacked into."""
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
    handle: Any  # () -> a readable file


def _gather(members: Iterator[_Member], where: str, contents: Contents) -> None:
    total = kept = 0
    found: dict[str, bytes] = {}
    for number, member in enumerate(members, start=1):
        name = safe_name(member.name)
        if name is None:
            raise InputError(f"{where} has a member {member.name[:80]!r}, outside its own folder; it is refused")
        total += max(0, member.size)
        if number > MAX_FILES:
            raise _TooMuch(f"contains more than {MAX_FILES:,} files")
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
                raise _TooMuch("has more text than it declares" if len(data) > MAX_FILE else "has too much text")
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
            # Wheels built on Windows have no mode; such a member is an ordinary file.
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
    # Streamed through a reader with a limit: headers and padding may claim any size.
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
    """A decompressed stream that raises once more than `MAX_UNPACKED` bytes have been read from it."""

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

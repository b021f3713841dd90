"""Untrusted files read in bounded memory: lines and files of any length, plain or compressed.

Data beyond the limit is skipped in chunks and reported by its size, so a line of 100 MB takes time but no memory; a
truncated compressed file yields everything before the break.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any

from search_r3.errors import InputError
from search_r3.files import BOM as BOM  # re-exported for readers of lines
from search_r3.files import encoding_problem, why_missing

MAX_LINE = 10_000_000
"""Maximum length of a line in bytes; no document of a collection is longer."""
CHUNK = 1 << 20
MAX_COUNTED = 1_000_000_000
"""Bytes up to which an oversized file's length is counted; a small compressed file may expand to far more."""
_HTML_PAGE = re.compile(rb"\s*(<!doctype html|<html[\s>]|<head[\s>])", re.IGNORECASE)
_OPEN: dict[str, Any] = {".gz": gzip.open, ".dz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error)


class MissingSource(InputError):
    """The files do not exist; with `optional: true` the source is skipped, and the manifest says so."""


class BrokenFile(InputError):
    """The file exists but cannot be read to its end: it is compressed and truncated, or not readable.

    Attributes:
        problem: what is wrong, without the file name.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be read to its end ({problem}); download it again")
        self.problem = problem


@dataclass(frozen=True, slots=True)
class TooLong:
    """Represents a line or file beyond the limit; `size` is its length in bytes."""

    size: int


def bounded_lines(handle: IO[bytes] | BufferedIOBase, limit: int = MAX_LINE) -> Iterator[tuple[int, bytes | TooLong]]:
    """Yield (number from 1, line with its line end) for each line; a line of more than `limit` bytes as a `TooLong`."""
    number = 0
    while raw := handle.readline(limit + 1):
        number += 1
        if len(raw) <= limit or raw.endswith(b"\n"):
            yield number, raw
            continue
        size = len(raw)
        while raw and not raw.endswith(b"\n"):
            raw = handle.readline(CHUNK)
            size += len(raw)
        yield number, TooLong(size)


def read_lines(path: Path, limit: int = MAX_LINE) -> Iterator[tuple[int, bytes | TooLong]]:
    """The lines of a file, decompressed by its suffix (.gz, .dz, .bz2, .xz); see `bounded_lines`.

    Raises:
        MissingSource: there is no such file.
        BrokenFile: it cannot be read or decompressed, perhaps after some lines.
    """
    with _opened(path) as handle:
        lines = bounded_lines(handle, limit)
        while True:
            try:
                found = next(lines, None)
            except _BROKEN as error:
                raise BrokenFile(path, _said(error)) from error
            if found is None:
                return
            yield found


def read_whole(path: Path, limit: int) -> bytes | TooLong:
    """A file's content, decompressed by its suffix; a `TooLong` if it has more than `limit` bytes.

    Raises:
        MissingSource: there is no such file.
        BrokenFile: it cannot be read or decompressed to its end.
    """
    with _opened(path) as handle:
        try:
            content = handle.read(limit + 1)
            if len(content) <= limit:
                return content
            size = len(content)
            while size < MAX_COUNTED and (more := handle.read(CHUNK)):
                size += len(more)
        except _BROKEN as error:
            raise BrokenFile(path, _said(error)) from error
    return TooLong(size)


def read_up_to(path: Path, limit: int) -> tuple[bytes, str | None]:
    """At most `limit` bytes of a file, decompressed by its suffix, and why it was not read to its end (None if it was).

    Raises:
        MissingSource: there is no such file.
        BrokenFile: it cannot be opened.
    """
    parts: list[bytes] = []
    left, problem = limit, None
    with _opened(path) as handle:
        try:
            while left and (part := handle.read1(min(left, CHUNK))):  # data before a break is kept
                parts.append(part)
                left -= len(part)
            if not left and handle.read(1):
                problem = f"it holds more than {limit:,} bytes"
        except _BROKEN as error:
            problem = _said(error)
    return b"".join(parts), problem


def defect(raw: bytes | TooLong) -> tuple[str, str] | None:
    """Why bytes are not a line of text: (short label to count by, message); None if they are text."""
    if isinstance(raw, TooLong):
        return "line too long", f"a line of {raw.size:,} bytes, expected at most {MAX_LINE:,}"
    if (problem := encoding_problem(raw)) is not None:
        return "not UTF-8", problem
    if b"\0" in raw:
        return "binary", "binary data (a NUL byte), expected text"
    if is_html_page(raw):
        return "HTML", "an HTML page, expected data"
    return None


def is_html_page(raw: bytes) -> bool:
    """Whether bytes begin like a web page, often an error page that was saved instead of the file."""
    return bool(_HTML_PAGE.match(raw.removeprefix(BOM)))


def _opened(path: Path) -> BufferedIOBase:
    if path.suffix in (".lz4", ".zst"):
        raise InputError(f"{path}: {path.suffix} cannot be read here; decompress it first")
    try:
        handle: BufferedIOBase = _OPEN.get(path.suffix, open)(path, "rb")
    except FileNotFoundError as error:
        raise MissingSource(f"{path} {why_missing(path)}; check the path") from error
    except OSError as error:
        raise BrokenFile(path, _said(error)) from error
    return handle


def _said(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".").lower()

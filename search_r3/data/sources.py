"""What the readers of other people's files share: decompressing, judging whether a record is sound, cutting, hashing.

A record that is damaged (not UTF-8, far too long, HTML where prose belongs) is refused or skipped and counted, as the
recipe's `damaged` says.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.data.beir import refuse_unknown
from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError

DAMAGED = ("refuse", "skip")
MAX_RECORD = 1_000_000
"""Bytes: no description, entry or page of prose is longer, so a longer one is something else."""
MAX_FILE = 1_000_000_000
"""Bytes after decompression: a bound for what a small file may blow up to."""
GENERIC_AFTER = 3
"""A query that more documents than this share says too little about any of them."""
_HTML = re.compile(r"<!doctype html|<html[\s>]|</(html|body|div|p|td|span|script)>", re.IGNORECASE)
_OPEN: dict[str, Any] = {".gz": gzip.open, ".dz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class MissingSource(InputError):
    """The files are not there: with `optional: true` the source is left out, and the manifest says so."""


@dataclass
class Built:
    """What one source gave: its pairs, why others were dropped, and where it is from."""

    pairs: list[TrainingPair]
    dropped: Counter[str]
    origin: dict[str, Any]


@dataclass
class Records:
    """Judges the raw records of a source.

    Attributes:
        damaged: "refuse" or "skip".
        dropped: told of what is skipped.
        html_allowed: whether HTML is what the records should be.
    """

    damaged: str = "refuse"
    html_allowed: bool = False
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        refuse_unknown([self.damaged], DAMAGED, "damaged", what="value")

    def text(self, raw: bytes, where: str) -> str | None:
        """The record's text, or None where it is damaged and skipped.

        Raises:
            InputError: it is damaged, and such records are refused; `where` begins the message.
        """
        text = ""
        found: tuple[str, str] | None = None
        if len(raw) > MAX_RECORD:
            found = "record over 1 MB", f"{len(raw):,} bytes in one record, expected prose"
        else:
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"byte 0x{raw[error.start]:02x} at {error.start + 1}"
                found = "not UTF-8", f"not UTF-8 text ({place})"
        if "\0" in text:
            found = "binary", "binary data, expected text"
        elif not self.html_allowed and _HTML.search(text):
            found = "HTML", "HTML, expected plain text"
        if found:
            self.fault(where, *found)
            return None
        return text

    def fault(self, where: str, reason: str, problem: str) -> None:
        """Count a damaged record, or refuse it.

        Raises:
            InputError: damaged records are refused.
        """
        if self.damaged == "refuse":
            raise InputError(f'{where}: {problem}; mend it, or set "damaged: skip" to leave such records out')
        self.dropped[f"damaged: {reason}"] += 1


def read_bytes(path: Path) -> bytes:
    """A file's content, decompressed by its suffix (.gz, .dz, .bz2, .xz).

    Raises:
        MissingSource: there is no such file.
        InputError: it cannot be read or decompressed, or is beyond all measure.
    """
    if path.suffix in (".lz4", ".zst"):
        raise InputError(f"{path}: {path.suffix} cannot be read here; decompress it first")
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as handle:
            content: bytes = handle.read(MAX_FILE + 1)
    except FileNotFoundError as error:
        raise MissingSource(f"{path} does not exist; check the path") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from error
    if len(content) > MAX_FILE:
        raise InputError(f"{path} holds more than {MAX_FILE:,} bytes; give a smaller file")
    return content


def fingerprint(contents: dict[str, bytes]) -> str:
    """SHA-256 over names and contents, in the names' order: what a manifest identifies its input by."""
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name}\t{len(contents[name])}\n".encode())
        digest.update(contents[name])
    return digest.hexdigest()


def clip(text: str, max_chars: int) -> str:
    """The text, cut at the last space within `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    cut = max(text.rfind(mark, 0, max_chars + 1) for mark in " \n")
    return text[: cut if cut > 0 else max_chars].rstrip()


def without_generic(pairs: list[TrainingPair], dropped: Counter[str]) -> list[TrainingPair]:
    """The pairs whose query at most `GENERIC_AFTER` of them share; the others are counted."""
    shared = Counter(pair.query.casefold() for pair in pairs)
    kept = [pair for pair in pairs if shared[pair.query.casefold()] <= GENERIC_AFTER]
    if len(kept) < len(pairs):
        dropped["query shared by too many"] += len(pairs) - len(kept)
    return kept

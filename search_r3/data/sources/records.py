"""Shared by the readers of external files: checking records, counting damaged ones, and cutting texts.

A damaged record (not UTF-8, binary, far too long, HTML instead of prose, truncated) is refused, or skipped and counted,
depending on the recipe's `damaged`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.data.io.line_reader import BrokenFile, TooLong, read_whole
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.data_source import BuiltPairs
from search_r3.errors import InputError
from search_r3.files import BOM, encoding_problem
from search_r3.hints import refuse_unknown

DAMAGED = ("refuse", "skip")
MAX_RECORD = 1_000_000
"""Maximum size of a record in bytes; no description, entry or page of prose is longer."""
PLACES = 3
"""Number of locations per kind of damage listed in a manifest."""
GENERIC_AFTER = 3
"""Maximum number of documents with the same query; a query shared by more is too generic."""
_HTML = re.compile(r"<!doctype html|<html[\s>]|</(html|body|div|p|td|span|script)>", re.IGNORECASE)


@dataclass
class Records:
    """Checks the raw records of a source.

    Attributes:
        damaged: "refuse" or "skip".
        folder: the folder of the source's files; locations are relative to it.
        html_allowed: whether the records may contain HTML.
        dropped: number of skipped records by reason.
        places: the first locations of each kind of damage.
    """

    damaged: str = "refuse"
    folder: Path = Path()
    html_allowed: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_unknown([self.damaged], DAMAGED, "damaged", what="value")

    def text(self, raw: bytes | TooLong, where: str) -> str | None:
        """The record's text, or None if it is damaged and skipped.

        Raises:
            InputError: it is damaged and such records are refused; the message starts with folder and `where`.
        """
        text = ""
        found: tuple[str, str] | None = None
        size = raw.size if isinstance(raw, TooLong) else len(raw)
        if isinstance(raw, TooLong) or size > MAX_RECORD:
            found = "record over 1 MB", f"{size:,} bytes in one record, expected prose"
        else:
            problem = encoding_problem(raw)
            found = None if problem is None else ("not UTF-8", problem)
            text = raw.removeprefix(BOM).decode("utf-8", "replace")
        if not found and "\0" in text:
            found = "binary", "binary data, expected text"
        elif not found and not self.html_allowed and _HTML.search(text):
            found = "HTML", "HTML, expected plain text"
        if found:
            self.fault(where, *found)
            return None
        return text

    def file(self, path: Path, where: str) -> str | None:
        """The text of a file that is one record, or None if it is damaged and skipped.

        Raises:
            MissingSource: there is no such file.
            InputError: it is damaged, and such records are refused.
        """
        try:
            content = read_whole(path, MAX_RECORD)
        except BrokenFile as error:
            self.fault(where, "broken file", f"it cannot be read to its end ({error.problem})")
            return None
        if content == b"":
            self.fault(where, "empty file", "an empty file")
            return None
        return self.text(content, where)

    def fault(self, where: str, reason: str, problem: str) -> None:
        """Count a damaged record, or refuse it.

        Raises:
            InputError: damaged records are refused.
        """
        if self.damaged == "refuse":
            place = self.folder / where
            raise InputError(f'{place}: {problem}; fix it, or set "damaged: skip" to leave such records out')
        self._count(reason, where)

    def caught(self, error: InputError, reason: str, where: str) -> None:
        """Like `fault`, for an error whose message already names file and line.

        Raises:
            InputError: damaged records are refused.
        """
        if self.damaged == "refuse":
            raise InputError(f'{error}; or set "damaged: skip" to leave such records out') from error
        self._count(reason, where)

    def built(self, pairs: list[TrainingPair], origin: dict[str, Any]) -> BuiltPairs:
        """The source's pairs, with what was dropped and where it was damaged."""
        return BuiltPairs(pairs, self.dropped, origin, self.places)

    def _count(self, reason: str, where: str) -> None:
        self.dropped[f"damaged: {reason}"] += 1
        named = self.places.setdefault(reason, [])
        if len(named) < PLACES:
            named.append(where)


def clip(text: str, max_chars: int) -> str:
    """The text, cut at the last space within `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    cut = max(text.rfind(mark, 0, max_chars + 1) for mark in " \n")
    return text[: cut if cut > 0 else max_chars].rstrip()


def without_generic(pairs: list[TrainingPair], dropped: Counter[str]) -> list[TrainingPair]:
    """The pairs whose query is shared by at most `GENERIC_AFTER` pairs; the others are counted as dropped."""
    shared = Counter(pair.query.casefold() for pair in pairs)
    kept = [pair for pair in pairs if shared[pair.query.casefold()] <= GENERIC_AFTER]
    if len(kept) < len(pairs):
        dropped["query shared by too many"] += len(pairs) - len(kept)
    return kept

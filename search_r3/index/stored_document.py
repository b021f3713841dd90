"""A document as an index stores it: its chunks put together again, whole or by lines.

Chunks are contiguous parts of a document (`search_r3.index.chunking`), so nothing is missing but white space between
them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search_r3.errors import InputError
from search_r3.index.backends.index_backend import IndexBackend, Row
from search_r3.index.chunking.chunk_ids import NUMBERED
from search_r3.index.row_keys import METADATA
from search_r3.index.row_ranking import text_of


@dataclass(frozen=True)
class StoredDocument:
    """A document, or a part of it.

    Attributes:
        id: the document's, also if it was asked for by a passage's.
        title: of its first passage.
        start_line, end_line: the lines of the file that `text` has, from 1, both included; 0 if its lines are not
            those of a file.
        next_line: the line with which the rest begins that was left out; 0 if nothing was, or it has no lines.
        truncated: whether the end was left out.
        passages: the number of its passages in the index.
    """

    id: str
    title: str
    path: str
    text: str
    start_line: int
    end_line: int
    next_line: int
    truncated: bool
    metadata: dict[str, Any]
    passages: int


def stored_document(
    backend: IndexBackend,
    identifier: str,
    start_line: int | None = None,
    end_line: int | None = None,
    max_characters: int | None = None,
) -> StoredDocument:
    """The document of this id; or of a passage of this id, that passage only, unless lines are given.

    Args:
        start_line, end_line: only these lines of its file, from 1, both included.
        max_characters: leave out lines at the end so that `text` is no longer; a single longer line is cut.

    Raises:
        InputError: nothing has this id, the lines are no such range or beyond the end, or the document has no lines.
    """
    rows = backend.document_rows(identifier)
    if not rows and (number := NUMBERED.search(identifier)):
        rows = backend.document_rows(identifier[: number.start()])
        chosen = [row for row in rows if row["id"] == identifier]
        rows = chosen if chosen and start_line is None and end_line is None else rows if chosen else []
    if not rows:
        raise InputError(f"the index has no document or passage {identifier[:200]!a}; take an id from a search")
    rows = sorted(rows, key=_number)
    first = rows[0]
    lines, has_lines = _lines(rows), first["start_line"] > 0
    if start_line is not None or end_line is not None:
        lines = _between(lines, start_line, end_line, has_lines)
    kept = _fitting(lines, max_characters)
    text = "\n".join(line for _, line in kept)
    cut = max_characters is not None and len(text) > max_characters
    truncated = cut or len(kept) < len(lines)
    return StoredDocument(
        id=first["document"],
        title=first["title"],
        path=first["path"],
        text=text[:max_characters] if cut else text,
        start_line=kept[0][0] if has_lines else 0,
        end_line=kept[-1][0] if has_lines else 0,
        next_line=lines[len(kept)][0] if has_lines and len(kept) < len(lines) else 0,
        truncated=truncated,
        metadata=json.loads(first[METADATA]),
        passages=len(rows),
    )


def _number(row: Row) -> int:
    """The place of a chunk among its document's (`chunk_id`)."""
    number = NUMBERED.search(row["id"]) if row["id"] != row["document"] else None
    return int(number.group()[1:]) if number else 0


def _lines(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """(number, text) of each line of the chunks; empty lines where the chunks leave lines out."""
    lines: list[tuple[int, str]] = []
    for row in rows:
        number = row["start_line"]
        texts = text_of(row).split("\n")
        if lines and lines[-1][0] == number > 0:  # a long line that was split
            lines[-1] = number, f"{lines[-1][1]} {texts[0]}"
            number, texts = number + 1, texts[1:]
        elif lines:
            missing = range(lines[-1][0] + 1, number) if number else range(1)
            lines += [(line if number else 0, "") for line in missing]
        lines += [(line if row["start_line"] else 0, text) for line, text in enumerate(texts, start=number)]
    return lines


def _between(
    lines: Sequence[tuple[int, str]], start: int | None, end: int | None, has_lines: bool
) -> list[tuple[int, str]]:
    if not has_lines:
        raise InputError("this document's lines are not those of a file; get it without start_line and end_line")
    first = 1 if start is None else start
    last = max(first, lines[-1][0]) if end is None else end
    if first < 1 or last < first:
        raise InputError(
            f"lines {first} to {last} are no range; lines count from 1, and end_line is not before start_line"
        )
    chosen = [line for line in lines if first <= line[0] <= last]
    if not chosen:
        raise InputError(f"the document has the lines {lines[0][0]} to {lines[-1][0]}, none of {first} to {last}")
    return chosen


def _fitting(lines: Sequence[tuple[int, str]], most: int | None) -> Sequence[tuple[int, str]]:
    """The first lines, at least one, that have together at most so many characters."""
    if most is None:
        return lines
    length = 0
    for count, (_, text) in enumerate(lines):
        length += len(text) + (count > 0)
        if length > most:
            return lines[: max(1, count)]
    return lines

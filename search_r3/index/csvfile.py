"""A table with a header (CSV, TSV, semicolons, pipes), read into typed rows.

Such a file knows only text, but a filter such as `year > 2020` needs numbers: a column whose every filled cell is a
whole number, a number, or true/false is given that type. The file is read twice for that, one row in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from search_r3.data.delimited import describe_delimiter, find_delimiter, parse_delimiter, read_rows, split_start
from search_r3.data.jsonl import text_lines
from search_r3.errors import InputError

Scalar = str | int | float | bool
# "007" is an identifier, "1e5" a number, and "1_000" neither: stricter than int() and float() are. "3,50" is a text, as
# nobody can tell a decimal comma from one between thousands.
WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})", re.ASCII)
NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)?(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
OWN = ("id", "text", "title")
"""Columns that a document is made of; the others are metadata."""


def read_csv(path: str | Path, delimiter: str | None = None) -> Iterator[tuple[int, dict[str, Scalar]]]:
    """Yield (line, row) for each row; a row holds `id`, `text`, perhaps `title`, and every other filled cell, typed.

    Args:
        delimiter: as `data.delimited.parse_delimiter` takes it; None finds it out from the header and the first rows.

    The header's `id` may be spelled `_id` or `ID`.

    Raises:
        InputError: the file cannot be read or is not UTF-8, the header lacks `id` or `text` or names a column twice,
            a row has too many or too few cells, or the delimiter is none.
    """
    path = Path(path)
    given = parse_delimiter(delimiter)
    types: dict[str, Callable[[str], Scalar]] = {}
    candidates: dict[str, list[Callable[[str], Scalar | None]]] = {}
    for _, row in _rows(path, given):
        for name, cell in row.items():
            readers = candidates.setdefault(name, [_whole, _number, _truth])
            if cell.strip():
                candidates[name] = [reader for reader in readers if reader(cell.strip()) is not None]
    for name, readers in candidates.items():
        types[name] = readers[0] if readers and name not in OWN else str  # type: ignore[assignment]
    for line, row in _rows(path, given):
        yield (
            line,
            {
                name: cell if types[name] is str else types[name](cell.strip())
                for name, cell in row.items()
                if cell.strip() or name in OWN
            },
        )


def _rows(path: Path, given: str | None) -> Iterator[tuple[int, dict[str, str]]]:
    def broken(number: int, problem: str) -> NoReturn:
        raise InputError(f"{path}, line {number}: {problem}; fix that row")

    start, lines = split_start(text_lines(path))
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = given or find_delimiter(start, usual, lambda cells: {"id", "text"} <= set(_named(cells)))
    header: list[str] | None = None
    for line, cells in read_rows(lines, delimiter, broken):
        if header is None:
            header = _header(path, cells, delimiter)
        elif len(cells) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, but the header names {len(header)} (split at "
                f"{describe_delimiter(delimiter)}); put quotes around cells that hold the delimiter, or name another "
                "with --delimiter"
            )
        else:
            yield line, dict(zip(header, cells, strict=True))
    if header is None:
        raise InputError(f"{path} is empty; the first line must name the columns: id, text and perhaps title")


def _named(cells: list[str]) -> list[str]:
    """The header's names, with `id`, `text` and `title` as we write them."""
    names = [cell.strip() for cell in cells]
    return [name.lower().removeprefix("_") if name.lower() in {*OWN, "_id"} else name for name in names]


def _header(path: Path, cells: list[str], delimiter: str) -> list[str]:
    names = _named(cells)
    for name in names:
        if not name:
            raise InputError(f"{path}: column {names.index(name) + 1} of the header has no name; give it one")
        if names.count(name) > 1:
            raise InputError(f'{path}: the header names "{name}" twice; rename one')
    for name in ("id", "text"):
        if name not in names:
            found = f"columns found, split at {describe_delimiter(delimiter)}: {', '.join(names)}"
            raise InputError(
                f'{path}: the header has no "{name}" ({found}); add it, or name another delimiter with --delimiter'
            )
    return names


def _whole(cell: str) -> int | None:
    return int(cell) if WHOLE.fullmatch(cell) else None


def _number(cell: str) -> float | None:
    value = float(cell) if NUMBER.fullmatch(cell) and any(c.isdigit() for c in cell) else math.inf
    return value if math.isfinite(value) else None


def _truth(cell: str) -> bool | None:
    return {"true": True, "false": False}.get(cell.lower())

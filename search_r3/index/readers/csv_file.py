"""A table with a header (CSV, TSV, semicolons, pipes), read into typed rows.

Such a file knows only text, but a filter such as `year > 2020` needs numbers: a column whose every filled cell is a
whole number, a number, or true/false is given that type, if it holds each exactly. The file is read twice for that, one
row in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NoReturn

from search_r3.data.io.delimited import describe_delimiter, find_delimiter, parse_delimiter, read_rows, split_start
from search_r3.data.io.jsonl import text_lines
from search_r3.errors import InputError
from search_r3.index.source_document import Scalar

# "007" is an identifier, "1e5" a number, and "1_000" neither: stricter than int() and float() are. "3,50" is a text, as
# a decimal comma cannot be told from one between thousands.
WHOLE = re.compile(r"[+-]?(0|[1-9]\d*)", re.ASCII)
NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d+)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LONGEST_WHOLE = 20  # characters of a 64-bit integer, with its sign
OWN = ("id", "text", "title")
"""Columns that a document is made of; the others are metadata."""
Misfits = dict[str, dict[str, tuple[str, str]]]
"""Column -> type -> (place, cell): the first cell for which the column is not of that type."""


def read_csv(
    path: str | Path,
    delimiter: str | None = None,
    text: Container[str] = (),
    misfits: Misfits | None = None,
) -> Iterator[tuple[int, dict[str, Scalar]]]:
    """Yield (line, row) for each row; a row holds `id`, `text`, perhaps `title`, and every other filled cell, typed.

    Args:
        delimiter: as `data.io.delimited.parse_delimiter` takes it; None finds it from the header and the first rows.
        text: columns that are left as they are, by their names as `plain_name` makes them.
        misfits: is filled before the first row comes.

    The header's `id` may be spelled `_id` or `ID`.

    Raises:
        InputError: the file cannot be read or is not UTF-8, the header lacks `id` or `text` or names a column twice,
            a row has too many or too few cells, or the delimiter is none.
    """
    path = Path(path)
    given = parse_delimiter(delimiter)
    types: dict[str, Callable[[str], Scalar]] = {}
    found: Misfits = {}
    names: list[str] = []
    for line, row in _rows(path, given):
        names = list(row)
        for name, cell in row.items():
            held = found.setdefault(name, {})
            for kind, reader in READERS.items() if cell.strip() and len(held) < len(READERS) else ():
                if kind not in held and reader(cell.strip()) is None:
                    held[kind] = (f'{path.name} line {line} (document "{row["id"]}")', cell)
    if misfits is not None:
        misfits |= found
    for name in names:
        fitting = [reader for kind, reader in READERS.items() if kind not in found[name]]
        as_it_is = not fitting or name in OWN or plain_name(name) in text
        types[name] = str if as_it_is else fitting[0]  # type: ignore[assignment]
    for line, row in _rows(path, given):
        yield (
            line,
            {
                name: cell if types[name] is str else types[name](cell.strip())
                for name, cell in row.items()
                if cell.strip() or name in OWN
            },
        )


def plain_name(name: str) -> str:
    """A column's name as the index writes it: in small letters, with "_" for what SQL allows in no name."""
    return re.sub(r"\W", "_", name).lower()


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
    """The cell as an integer of 64 bits."""
    value = int(cell) if WHOLE.fullmatch(cell) and len(cell) <= LONGEST_WHOLE else None
    return value if value is not None and -(2**63) <= value < 2**63 else None


def _number(cell: str) -> int | float | None:
    """The cell as a float of 64 bits, or an integer where it is one, so that it does not depend on the other cells;
    None for a whole number of more than 64 bits, or one that no float holds."""
    value = float(cell) if NUMBER.fullmatch(cell) else math.inf
    if not math.isfinite(value):
        return None
    if not WHOLE.fullmatch(cell):
        return value
    return whole if (whole := _whole(cell)) == int(value) else None


def _truth(cell: str) -> bool | None:
    return {"true": True, "false": False}.get(cell.lower())


READERS: dict[str, Callable[[str], Scalar | None]] = {"integer": _whole, "number": _number, "true/false": _truth}

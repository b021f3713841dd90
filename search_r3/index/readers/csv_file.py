"""A table with a header (CSV, TSV, semicolons, pipes), read into typed rows.

Such a file contains only text, but a filter such as `year > 2020` needs numbers. So a column gets a type if every
filled cell is a whole number, a number, or true/false and can be represented exactly. The file is read twice for that,
with one row in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from search_r3.data.io.delimited import describe_delimiter, find_delimiter, parse_delimiter, read_rows, split_start
from search_r3.data.io.jsonl import text_lines
from search_r3.errors import InputError
from search_r3.index.source_document import Scalar

# "007" is an identifier, "1e5" a number, and "1_000" neither: stricter than int() and float(). "3,50" is text, as a
# decimal comma cannot be told from a thousands separator.
WHOLE = re.compile(r"[+-]?(0|[1-9]\d*)", re.ASCII)
NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d+)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LONGEST_WHOLE = 20  # characters of a 64-bit integer, including its sign
OWN = ("id", "text", "title")
"""Columns that make up a document; all others are metadata."""
Misfits = dict[str, dict[str, tuple[str, str]]]
"""Column -> type -> (place, cell): the first cell that does not fit that type."""


def read_csv(
    path: str | Path,
    delimiter: str | None = None,
    text: Container[str] = (),
    misfits: Misfits | None = None,
    fields: Mapping[str, str] = {},
) -> Iterator[tuple[int, dict[str, Scalar]]]:
    """Yield (line, row) for each row; a row holds `id`, `text`, perhaps `title`, and every other filled cell, typed.

    Args:
        delimiter: as for `data.io.delimited.parse_delimiter`; None detects it from the header and the first rows.
        text: columns to keep as text, by the names that `plain_name` gives them.
        misfits: filled before the first row is yielded.
        fields: {"id", "text" or "title": the column that is it}, where the header has another name for it.

    The header's `id` may be spelled `_id` or `ID`.

    Raises:
        InputError: the file cannot be read or is not UTF-8, the header lacks `id` or `text` or names a column twice,
            a row has too many or too few cells, or the delimiter is invalid.
    """
    path = Path(path)
    given = parse_delimiter(delimiter)
    types: dict[str, Callable[[str], Scalar]] = {}
    unfit: Misfits = {}
    names: list[str] = []
    for line, row in _rows(path, given, fields):
        names = list(row)
        for name, cell in row.items():
            ruled_out = unfit.setdefault(name, {})
            for kind, reader in READERS.items() if cell.strip() and len(ruled_out) < len(READERS) else ():
                if kind not in ruled_out and reader(cell.strip()) is None:
                    ruled_out[kind] = (f'{path.name} line {line} (document "{row["id"]}")', cell)
    if misfits is not None:
        misfits |= unfit
    for name in names:
        fitting = [reader for kind, reader in READERS.items() if kind not in unfit[name]]
        as_it_is = not fitting or name in OWN or plain_name(name) in text
        types[name] = str if as_it_is else fitting[0]  # type: ignore[assignment]
    for line, row in _rows(path, given, fields):
        yield (
            line,
            {
                name: cell if types[name] is str else types[name](cell.strip())
                for name, cell in row.items()
                if cell.strip() or name in OWN
            },
        )


def plain_name(name: str) -> str:
    """A column's name in the index: in lower case, with "_" for characters that SQL does not allow in names."""
    return re.sub(r"\W", "_", name).lower()


def _rows(path: Path, given: str | None, fields: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    def broken(number: int, problem: str) -> NoReturn:
        raise InputError(f"{path}, line {number}: {problem}; fix that row")

    start, lines = split_start(text_lines(path))
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = given or find_delimiter(start, usual, lambda cells: {"id", "text"} <= set(_named(cells, fields)))
    header: list[str | None] | None = None
    for line, cells in read_rows(lines, delimiter, broken):
        if header is None:
            header = _header(path, cells, delimiter, fields)
        elif len(cells) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, but the header names {len(header)} (split at "
                f"{describe_delimiter(delimiter)}); put quotes around cells that hold the delimiter, or name another "
                "with --delimiter"
            )
        else:
            yield line, {name: cell for name, cell in zip(header, cells, strict=True) if name is not None}
    if header is None:
        raise InputError(f"{path} is empty; the first line must name the columns: id, text and perhaps title")


def _named(cells: list[str], fields: Mapping[str, str]) -> list[str | None]:
    """The header's names, with `id`, `text` and `title` in their usual spelling; None for a column that one of `fields`
    replaces."""
    named: list[str | None] = []
    own = {given: name for name, given in fields.items()}
    for cell in cells:
        name = cell.strip()
        if name in own:
            named.append(own[name])
        elif (usual := name.lower().removeprefix("_") if name.lower() in {*OWN, "_id"} else name) in fields:
            named.append(None)
        else:
            named.append(usual)
    return named


def _header(path: Path, cells: list[str], delimiter: str, fields: Mapping[str, str]) -> list[str | None]:
    names = _named(cells, fields)
    for number, name in enumerate(names):
        if name == "":
            raise InputError(f"{path}: column {number + 1} of the header has no name; give it one")
        if name is not None and names.count(name) > 1:
            raise InputError(f'{path}: the header names "{name}" twice; rename one')
    for name in ("id", "text", *fields):
        if name not in names:
            columns = f"columns found, split at {describe_delimiter(delimiter)}: {', '.join(map(str.strip, cells))}"
            raise InputError(
                f'{path}: the header has no "{fields.get(name, name)}" ({columns}); name the column with --field '
                f"{name}=COLUMN, or another delimiter with --delimiter"
            )
    return names


def _whole(cell: str) -> int | None:
    """The cell as a 64-bit integer, or None."""
    value = int(cell) if WHOLE.fullmatch(cell) and len(cell) <= LONGEST_WHOLE else None
    return value if value is not None and -(2**63) <= value < 2**63 else None


def _number(cell: str) -> int | float | None:
    """The cell as a 64-bit float, or as an integer if it is one, whatever the other cells are; None for whole numbers
    of more than 64 bits or without an exact float."""
    value = float(cell) if NUMBER.fullmatch(cell) else math.inf
    if not math.isfinite(value):
        return None
    if not WHOLE.fullmatch(cell):
        return value
    return whole if (whole := _whole(cell)) == int(value) else None


def _truth(cell: str) -> bool | None:
    return {"true": True, "false": False}.get(cell.lower())


READERS: dict[str, Callable[[str], Scalar | None]] = {"integer": _whole, "number": _number, "true/false": _truth}

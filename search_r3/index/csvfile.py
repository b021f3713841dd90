"""A CSV file with a header, read into typed rows.

CSV knows only text, but a filter such as `year > 2020` needs numbers: a column whose every filled cell is a whole
number, a number, or true/false is given that type. The file is read twice for that, one row in memory at a time.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from search_r3.errors import InputError

Scalar = str | int | float | bool
MAX_CELL = 2**31 - 1  # characters; csv's own default of 131,072 is less than many a document
# "007" is an identifier, "1e5" a number, and "1_000" neither: stricter than int() and float() are.
WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})", re.ASCII)
NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)?(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


def read_csv(path: str | Path) -> Iterator[tuple[int, dict[str, Scalar]]]:
    """Yield (line, row) for each row; a row holds `id`, `text`, perhaps `title`, and every other filled cell, typed.

    A `.tsv` file is split at tabs, any other at commas. The header's `id` may be spelled `_id` or `ID`.

    Raises:
        InputError: the file cannot be read or is not UTF-8, the header lacks `id` or `text` or names a column twice,
            or a row has too many or too few cells.
    """
    path = Path(path)
    types: dict[str, Callable[[str], Scalar]] = {}
    candidates: dict[str, list[Callable[[str], Scalar | None]]] = {}
    for _, row in _rows(path):
        for name, cell in row.items():
            readers = candidates.setdefault(name, [_whole, _number, _truth])
            if cell.strip():
                candidates[name] = [reader for reader in readers if reader(cell.strip()) is not None]
    for name, readers in candidates.items():
        types[name] = readers[0] if readers and name not in {"id", "text", "title"} else str  # type: ignore[assignment]
    for line, row in _rows(path):
        yield (
            line,
            {
                name: cell if types[name] is str else types[name](cell.strip())
                for name, cell in row.items()
                if cell.strip() or name in {"id", "text", "title"}
            },
        )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(MAX_CELL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header: list[str] | None = None
            line = 1
            for cells in reader:
                if not cells:
                    pass
                elif header is None:
                    header = _header(path, cells)
                elif len(cells) != len(header):
                    raise InputError(
                        f"{path}, line {line}: {len(cells)} cells, but the header names {len(header)}; "
                        "put quotes around cells that hold the separator"
                    )
                else:
                    yield line, dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x}); save it so") from error
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error}); mend the quotes there") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file you may read") from error
    if header is None:
        raise InputError(f"{path} is empty; the first line must name the columns: id, text and perhaps title")


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    for position, name in enumerate(names):
        if name.lower() in {"id", "_id", "text", "title"}:
            names[position] = name.lower().removeprefix("_")
    for name in names:
        if not name:
            raise InputError(f"{path}: column {names.index(name) + 1} of the header has no name; give it one")
        if names.count(name) > 1:
            raise InputError(f'{path}: the header names "{name}" twice; rename one')
    for name in ("id", "text"):
        if name not in names:
            raise InputError(f'{path}: the header has no "{name}" (columns found: {", ".join(names)}); add it')
    return names


def _whole(cell: str) -> int | None:
    return int(cell) if WHOLE.fullmatch(cell) else None


def _number(cell: str) -> float | None:
    value = float(cell) if NUMBER.fullmatch(cell) and any(c.isdigit() for c in cell) else math.inf
    return value if math.isfinite(value) else None


def _truth(cell: str) -> bool | None:
    return {"true": True, "false": False}.get(cell.lower())

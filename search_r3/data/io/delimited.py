"""Rows of delimited text (CSV, TSV, semicolons, pipes): the reader shared by `index` and `data build`.

A quoted cell may contain the delimiter, line ends and doubled quotes (RFC 4180). In tab-separated text a quote is an
ordinary character, as in MS MARCO's files, unless it encloses a whole cell, as spreadsheets and pandas write it. If the
delimiter is not given, it is detected from the header and first rows.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from search_r3.errors import InputError

NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
"""The delimiters that are tried, and the names accepted for them."""
SAMPLE_LINES, SAMPLE_CHARACTERS = 50, 1_000_000
MAX_CELL = 2**31 - 1
"""Maximum number of characters in a cell; many documents exceed csv's default of 131,072."""
MAX_JOINED = 1_000
"""Maximum number of lines in one cell of tab-separated text."""
_ENCLOSED = re.compile(r'"(?:[^"]|"")*"')
_SEP_LINE = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)
_AFTER_RETURN = re.compile(r"(?<=\r)(?!\n)")

Lines = Iterable[tuple[int, str]]
"""(line number from 1, line with its line end)."""
Broken = Callable[[int, str], None]
"""Called with the number of the line on which an unreadable row begins, and what is wrong with it."""


def parse_delimiter(given: str | None) -> str | None:
    """The delimiter a user gives: one character, or "comma", "semicolon", "tab" or "pipe"; None stays None.

    Raises:
        InputError: it is neither a usable character nor one of these names.
    """
    if given is None:
        return None
    found = {"\\t": "\t", **{name: mark for mark, name in NAMES.items()}}.get(given.strip(" ").lower(), given)
    if len(found) != 1 or found in '"\r\n\0' or found.isalnum():
        raise InputError(
            f"the delimiter {given!r} cannot be used; give one character (not a letter, digit or quote) or one of: "
            f"{', '.join(NAMES.values())}"
        )
    return found


def describe_delimiter(delimiter: str) -> str:
    """The delimiter as named in messages: "commas", "tabs", "'^'"."""
    return f"{NAMES[delimiter]}s" if delimiter in NAMES else repr(delimiter)


def split_start(lines: Lines) -> tuple[list[tuple[int, str]], Iterator[tuple[int, str]]]:
    """The first lines, enough to detect the delimiter, and all lines."""
    rest = iter(lines)
    start: list[tuple[int, str]] = []
    size = 0
    for line in itertools.islice(rest, SAMPLE_LINES):
        start.append(line)
        size += len(line[1])
        if size > SAMPLE_CHARACTERS:
            break
    return start, itertools.chain(start, rest)


def find_delimiter(start: Sequence[tuple[int, str]], usual: str, fits: Callable[[list[str]], bool]) -> str:
    """The delimiter of a file whose first lines are `start`.

    Args:
        usual: the default if no other fits better.
        fits: whether the first row's cells are what the reader needs, such as a header that names its columns.

    Returns:
        The delimiter whose first row fits, that gives most rows of the same width, and that gives most cells, in this
        order. A first line `sep=;`, which spreadsheets write, takes precedence.
    """
    if start and (said := _SEP_LINE.fullmatch(start[0][1])):
        return said[1]

    def rank(delimiter: str) -> tuple[bool, float, bool, int]:
        rows = [cells for _, cells in read_rows(start, delimiter, lambda number, problem: None)]
        width = len(rows[0]) if rows else 0
        alike = sum(len(cells) == width for cells in rows) / len(rows) if width > 1 else 0.0
        return bool(rows) and fits(rows[0]), alike, delimiter == usual, width

    return max(NAMES, key=rank)


def read_rows(
    lines: Lines, delimiter: str, broken: Broken, max_cell: int = MAX_CELL
) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line number, cells) for each row that is not blank, with any number of cells.

    `broken` is called for a row that cannot be read, or that has a cell of more than `max_cell` characters; if it does
    not raise, reading continues after the first line of that row.
    """
    read = _between_tabs if delimiter == "\t" else _quoted
    yield from read(_Lines(_rows_lines(lines)), delimiter, broken, max_cell)


class _Lines:
    """Lines that can be pushed back."""

    def __init__(self, lines: Lines) -> None:
        self._rest = iter(lines)
        self._again: deque[tuple[int, str]] = deque()

    def next(self) -> tuple[int, str] | None:
        return self._again.popleft() if self._again else next(self._rest, None)

    def give_back(self, lines: Sequence[tuple[int, str]]) -> None:
        self._again.extendleft(reversed(lines))


def _rows_lines(lines: Lines) -> Iterator[tuple[int, str]]:
    """The lines without a `sep=` line, split at carriage returns if only those end the first line, as on old Macs."""
    rest = iter(lines)
    first = next(rest, None)
    if first is None:
        return
    if "\r" in first[1].rstrip("\r\n"):
        pieces = (piece for _, line in itertools.chain([first], rest) for piece in _AFTER_RETURN.split(line) if piece)
        rest = enumerate(pieces, first[0])
        first = next(rest)
    if not _SEP_LINE.fullmatch(first[1]):
        yield first
    yield from rest


def _quoted(lines: _Lines, delimiter: str, broken: Broken, max_cell: int) -> Iterator[tuple[int, list[str]]]:
    """Rows by RFC 4180."""
    taken: list[tuple[int, str]] = []

    def feed() -> Iterator[str]:
        while (found := lines.next()) is not None:
            taken.append(found)
            yield found[1]

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        csv.field_size_limit(max_cell)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number, rest = taken[0][0], taken[1:]
            lines.give_back(rest)
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
            why = "a carriage return outside quotes" if "new-line" in str(error) else f"{error}; a quote not closed?"
            broken(number, f"not valid CSV ({why})")
            continue
        if cells:
            yield taken[0][0], cells


def _between_tabs(lines: _Lines, delimiter: str, broken: Broken, max_cell: int) -> Iterator[tuple[int, list[str]]]:
    """Rows split at tabs, with quotes removed only if they enclose a cell; the first row gives the width."""
    width = 0
    while (found := lines.next()) is not None:
        number, line = found
        if not line.strip():
            continue
        cells = line.rstrip("\r\n").split(delimiter)
        if any(cell.startswith('"') for cell in cells):
            cells = _enclosed(lines, line, cells, width or len(cells), delimiter)
        width = width or len(cells)
        if max(map(len, cells)) > max_cell:
            broken(number, f"a cell of {max(map(len, cells)):,} characters, expected at most {max_cell:,}")
            continue
        yield number, cells


def _enclosed(lines: _Lines, line: str, split: list[str], width: int, delimiter: str) -> list[str]:
    """The cells of a row in which some cells begin with a quote; `split` is the line split at its tabs.

    A quote that is not closed on its line continues only if the next line is not a row by itself, so that a stray quote
    never swallows a row.
    """
    cells, is_open = _one_row(line, delimiter)
    if cells is not None and (len(cells) == width or len(split) != width):
        return cells
    taken: list[tuple[int, str]] = []
    joined = line
    while is_open and len(taken) < MAX_JOINED and (more := lines.next()) is not None:
        taken.append(more)
        following, _ = _one_row(more[1], delimiter)
        is_row = following is not None and len(following) == width
        if is_row and len(split) == width:
            break
        joined += more[1]
        cells, is_open = _one_row(joined, delimiter)
        if cells is not None and len(cells) == width:
            return cells
        is_open = is_open and not is_row
    lines.give_back(taken)
    return [cell[1:-1].replace('""', '"') if _ENCLOSED.fullmatch(cell) else cell for cell in split]


def _one_row(text: str, delimiter: str) -> tuple[list[str] | None, bool]:
    """The cells of a row by RFC 4180, or None if it is invalid; and whether only a closing quote is missing."""
    csv.field_size_limit(MAX_CELL)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), []), False
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)

"""A user's own pairs from one JSONL, CSV or TSV file: a query, its positive and optionally negatives.

Tables are read by `data.io.delimited`. Lines that are damaged or contain no pair are refused, or skipped and counted,
depending on the recipe's `damaged`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from search_r3.data.io.delimited import describe_delimiter, find_delimiter, parse_delimiter, read_rows, split_start
from search_r3.data.io.jsonl import parse_object
from search_r3.data.io.line_reader import BOM, BrokenFile, defect, read_lines
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.records import BuiltPairs, Records
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv")
PACKED = (".gz", ".bz2", ".xz")
MAX_CELL = 1_000_000
"""Maximum number of characters in a cell, since an unclosed quote swallows the lines after it."""


def own_pairs(
    path: str,
    *,
    license: str,
    query: str = "query",
    positive: str = "positive",
    negatives: Sequence[str] = (),
    header: bool = True,
    delimiter: str | None = None,
    name: str | None = None,
    damaged: str = "refuse",
) -> BuiltPairs:
    """The pairs of a file, in order and without duplicates.

    Args:
        path: a .jsonl, .csv or .tsv file, optionally compressed (.gz, .bz2, .xz).
        license: for the manifest.
        query, positive: names of the columns (or fields).
        negatives: names of columns with a negative each, or with a list of them (in CSV and TSV written as JSON).
        header: whether a CSV or TSV file names its columns in its first line; otherwise they are "1", "2", ...
        delimiter: of a CSV or TSV file, a character or "comma", "semicolon", "tab" or "pipe"; None detects it from the
            first rows.
        name: the source's name in the pairs ("pairs:NAME"); by default the file name without its suffixes.
        damaged: "refuse" or "skip" lines that are not text or contain no pair.

    Raises:
        MissingSource: there is no such file.
        InputError: the suffix is unknown, the delimiter is invalid, the header lacks a column, or a line is damaged and
            `damaged` is "refuse".
    """
    file = Path(path)
    kind = Path(file.stem).suffix if file.suffix in PACKED else file.suffix
    if kind.lower() not in FORMATS:
        raise InputError(f"{file}: expected a file ending in {', '.join(FORMATS)}, optionally compressed (.gz)")
    check_license(license)
    name = name or default_name(path)
    records = Records(damaged, file.parent, html_allowed=True)
    if kind.lower() in FORMATS[:2]:
        rows = _objects(file, records)
    else:
        usual = "\t" if kind.lower() == ".tsv" else ","
        rows = _table(file, usual, parse_delimiter(delimiter), header, (query, positive, *negatives), records)
    pairs = collect_pairs(
        rows,
        source=f"pairs:{name}",
        query=query,
        positive=positive,
        negatives=negatives,
        records=records,
        place=lambda number: f"{file.name}, line {number}",
    )
    return records.built(pairs, {"license": license})


def check_license(license: str) -> None:
    """Raise InputError for an empty license."""
    if not isinstance(license, str) or not license.strip():
        raise InputError('"license" is empty; give the license of the pairs, or "unknown"')


def collect_pairs(
    rows: Iterable[tuple[int, dict[str, Any]]],
    *,
    source: str,
    query: str,
    positive: str,
    negatives: Sequence[str],
    records: Records,
    place: Callable[[int], str],
) -> list[TrainingPair]:
    """The pairs of a table's rows, in order and without duplicates; `records` gets what was dropped.

    Args:
        rows: (number, column -> value); a pair's id is SOURCE:NUMBER.
        query, positive, negatives: names of columns.
        place: a row's number -> where it is, for messages.
    """
    pairs: list[TrainingPair] = []
    seen: set[tuple[str, str]] = set()
    for number, row in rows:
        try:
            asked, answer = (_text(row, column) for column in (query, positive))
            others = tuple(dict.fromkeys(text for column in negatives for text in _texts(row, column)))
            if answer in others:
                raise InputError("the positive is among the negatives")
        except InputError as error:
            records.fault(place(number), "no pair", str(error))
            continue
        if (asked, answer) in seen:
            records.dropped["duplicate"] += 1
            continue
        seen.add((asked, answer))
        pairs.append(TrainingPair(f"{source}:{number}", asked, answer, others, source=source))
    return pairs


def default_name(path: str) -> str:
    """A file name without its suffixes, the default name of the source."""
    return Path(path).name.split(".")[0]


def _objects(file: Path, records: Records) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _sound_lines(file, records):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            value = parse_object(line, str(file.parent / where))
        except InputError as error:
            records.caught(error, "not a JSON object", where)
            continue
        yield number, value


def _table(
    file: Path, usual: str, delimiter: str | None, header: bool, needed: Sequence[str], records: Records
) -> Iterator[tuple[int, dict[str, Any]]]:
    def fits(cells: list[str]) -> bool:
        return set(needed) <= set(_columns(cells, header))

    def broken(number: int, problem: str) -> None:
        records.fault(f"{file.name}, line {number}", "not CSV", problem)

    start, lines = split_start(_sound_lines(file, records))
    delimiter = delimiter or find_delimiter(start, usual, fits)
    columns: list[str] | None = None
    for number, cells in read_rows(lines, delimiter, broken, MAX_CELL):
        where = f"{file.name}, line {number}"
        if columns is None:
            columns = _columns(cells, header)
            doubled = next((column for column in columns if columns.count(column) > 1), None)
            if doubled is not None:
                raise InputError(f'{records.folder / where}: the header names "{doubled}" twice; rename one')
            try:
                refuse_unknown(needed, columns, str(records.folder / where), what="column")
            except InputError as error:
                how = f'split at {describe_delimiter(delimiter)}; "delimiter" in the recipe names another'
                raise InputError(f"{error} ({how})") from error
            if header:
                continue
        if len(cells) != len(columns):
            records.fault(where, "wrong number of cells", f"{len(cells)} cells, expected {len(columns)}")
        else:
            yield number, dict(zip(columns, cells, strict=True))


def _columns(cells: list[str], header: bool) -> list[str]:
    """The columns' names: the first row's cells, or "1", "2", ..."""
    return [cell.strip() for cell in cells] if header else [str(i) for i in range(1, len(cells) + 1)]


def _sound_lines(file: Path, records: Records) -> Iterator[tuple[int, str]]:
    """The text lines of a file; `records` counts the others."""
    number = 0
    try:
        for number, raw in read_lines(file):
            where = f"{file.name}, line {number}"
            if found := defect(raw):
                records.fault(where, *found)
            elif isinstance(raw, bytes):
                yield number, (raw.removeprefix(BOM) if number == 1 else raw).decode("utf-8")
    except BrokenFile as error:
        where = f"{file.name}, line {number + 1}"
        records.fault(where, "broken file", f"it cannot be read to its end ({error.problem}); download it again")
    if not number:
        records.fault(file.name, "empty file", "an empty file")


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if column not in row:
        raise InputError(f'no column "{column}" (found: {", ".join(row) or "none"}); name yours in the recipe')
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'the column "{column}" must contain a text, got {str(value)[:80]!r}')
    _check(value, column)
    return value.strip()


def _texts(row: dict[str, Any], column: str) -> list[str]:
    if column not in row:
        raise InputError(f'no column "{column}" (found: {", ".join(row) or "none"}); name yours in the recipe')
    value = row[column]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            listed = json.loads(value)
            value = listed if isinstance(listed, list) else value
        except (ValueError, RecursionError):
            pass  # a text that starts with a bracket
    if value is None or value == "":
        return []
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f'the column "{column}" must contain texts, none empty, got {str(value)[:80]!r}')
        _check(text, column)
    return [text.strip() for text in texts]


def _check(text: str, column: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f'the column "{column}" contains half of a surrogate pair; fix it') from error
    if "\0" in text:
        raise InputError(f'the column "{column}" contains a NUL character; fix it')

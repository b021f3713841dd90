"""The columns of an index's table: the fixed ones, and those added for the documents' metadata.

Only names, types and values: no table is opened here. A metadata column is text, a 64-bit integer, a number (float64)
or true/false, depending on its first value; `ColumnTypes` enforces that, or widens integers to numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.readers.csv_file import Misfits, plain_name
from search_r3.index.row_keys import COLUMNS, CONTENT, METADATA, PLACE, ROW_HASH, SOURCE, TEXT_HASH, VECTOR
from search_r3.index.source_document import Scalar

IDS_AT_ONCE = 5000  # in one SQL condition
MAX_METADATA_COLUMNS = 200  # more distinct field names than this are probably data
VISIBLE = dict.fromkeys(["id", "document", "title", "path"], "text") | dict.fromkeys(
    ["start_line", "end_line"], "integer"
)
TYPE_NAMES = {pa.string(): "text", pa.int64(): "integer", pa.float64(): "number", pa.bool_(): "true/false"}
TYPES = {name: kind for kind, name in TYPE_NAMES.items()}
DECLARED = "r3_type"  # in a column's metadata: the type that the user gave it, to which values are converted
LONGEST_SHOWN = 60  # characters of a value in a message
EXACT = 2**53  # float64 represents every whole number up to here exactly
WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_OF_PYTHON = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


def table_schema(dimension: int) -> pa.Schema:
    """The columns that every index has; metadata adds others."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("document", pa.string()),
            ("title", pa.string()),
            ("path", pa.string()),
            ("start_line", pa.int64()),
            ("end_line", pa.int64()),
            (CONTENT, pa.string()),
            (METADATA, pa.string()),
            (TEXT_HASH, pa.string()),
            (ROW_HASH, pa.string()),
            (SOURCE, pa.string()),
            (VECTOR, pa.list_(pa.float32(), dimension)),
        ]
    )


def column_name(field_name: str) -> str:
    """The column for a metadata field: its name in lower case, as SQL ignores case, with "_" for characters that SQL
    does not allow, and the prefix "meta_" if the name is taken by one of our columns.
    """
    name = plain_name(field_name)
    if name in VISIBLE or name.startswith(("r3_", "_")) or not name or name[0].isdigit():
        name = f"meta_{name}"
    return name


def metadata_columns(metadata: dict[str, Scalar], where: str) -> dict[str, Scalar]:
    """A chunk's metadata by column name. `where` names the chunk in errors.

    Raises:
        InputError: two fields map to the same column, or a number is NaN or infinite.
    """
    columns: dict[str, Scalar] = {}
    for name, value in metadata.items():
        column = column_name(name)
        if column in columns:
            raise InputError(f'{where}: the metadata field "{name}" and another share the column {column}; rename one')
        if type(value) is float and not math.isfinite(value):
            raise InputError(f'{where}: the metadata field "{name}" is {value}, which is not a finite number; omit it')
        columns[column] = value
    return columns


def as_text(value: Scalar) -> str:
    """A value as stored in a text column: text unchanged, numbers and booleans as in JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def as_type(value: Scalar, kind: pa.DataType) -> Scalar | None:
    """`value` as stored in a column of type `kind`, or None if that would change the value."""
    if kind == pa.string():
        return as_text(value)
    if type(value) is str:
        if kind == pa.bool_():
            return {"true": True, "false": False}.get(value.strip().lower())
        if WHOLE.fullmatch(value.strip()):
            value = int(value)
        elif NUMBER.fullmatch(value.strip()):
            value = float(value)
    if type(value) is int:
        if kind == pa.int64():
            return value if -(2**63) <= value < 2**63 else None
        return float(value) if kind == pa.float64() and is_exact(value) else None
    if type(value) is float:
        if kind == pa.int64():
            return int(value) if value.is_integer() and abs(value) <= EXACT else None
        return value if kind == pa.float64() and math.isfinite(value) else None
    return value if type(value) is bool and kind == pa.bool_() else None


def is_exact(value: int) -> bool:
    """Whether float64 represents this whole number exactly."""
    if abs(value) <= EXACT:
        return True
    try:
        return int(float(value)) == value
    except OverflowError:
        return False


def parse_types(types: Mapping[str, str] | None) -> dict[str, pa.DataType]:
    """The types that a user gives to metadata fields ({"year": "text"}), by column.

    Raises:
        InputError: there is no such type.
    """
    for name, kind in (types or {}).items():
        if kind not in TYPES:
            raise InputError(f'the type of "{name}" is "{kind}"; choose one of: {", ".join(TYPES)}')
    return {column_name(name): TYPES[kind] for name, kind in (types or {}).items()}


def declared_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    """The types that the user gave to columns of a table."""
    return {column.name: column.type for column in schema if DECLARED.encode() in (column.metadata or {})}


def new_columns(types: Mapping[str, pa.DataType], declared: Container[str]) -> pa.Schema:
    """A schema of columns to add to a table; `declared` columns record that the user gave their type."""
    kept = {name: {DECLARED: TYPE_NAMES[kind]} for name, kind in types.items() if name in declared}
    return pa.schema([pa.field(name, kind, metadata=kept.get(name)) for name, kind in types.items()])


def user_columns(schema: pa.Schema) -> dict[str, pa.DataType]:
    """The metadata columns of a table, with their types."""
    ours = set(table_schema(1).names)
    return {column.name: column.type for column in schema if column.name not in ours}


def text_fields(schema: pa.Schema, declared: Mapping[str, pa.DataType]) -> set[str]:
    """Fields whose columns are text, in the table or as declared now, under every name that `plain_name` may give
    them."""
    types = user_columns(schema) | dict(declared)
    columns = {name for name, kind in types.items() if kind == pa.string()}
    inner = {name.removeprefix("meta_") for name in columns}
    return columns | {name for name in inner if column_name(name) in columns}


class ColumnTypeError(InputError):
    """A value does not fit its column. The message ends with an option of `search-r3 index` that solves it.

    Attributes:
        problem: the message without that option.
        remedy: the option.
    """

    def __init__(self, problem: str, column: str) -> None:
        super().__init__(problem, column)
        self.problem, self.remedy = problem, f"--type {column}=text"

    def __str__(self) -> str:
        return f"{self.problem} make the column text: {self.remedy}"


class ColumnTypes:
    """The types of a table's columns while rows are added: finds new columns, columns to widen, and misfits.

    Args:
        schema: the table's schema; columns whose type the user gave say so in their metadata.
        declared: types that the user gives now, by column.
    """

    def __init__(self, schema: pa.Schema, declared: Mapping[str, pa.DataType] | None = None) -> None:
        self.known = user_columns(schema)
        self.declared = declared_types(schema) | dict(declared or {})
        self.misfits: Misfits = {}  # why columns of a CSV file are text
        self._fractions: dict[str, str] = {}  # column -> where it has a number that is not an integer
        self.large: dict[str, tuple[str, int]] = {}  # column -> (place, value) of an integer inexact as float64

    def fit(self, rows: list[dict[str, Any]]) -> tuple[dict[str, pa.DataType], set[str]]:
        """The columns that the table lacks for `rows`, and the integer columns that must become columns of numbers.

        Raises:
            ColumnTypeError: a value does not fit its column; the message names the row.
            InputError: there are too many fields.
        """
        new: dict[str, pa.DataType] = {}
        widened: set[str] = set()
        for row in rows:
            for name, value in row[COLUMNS].items():
                kind = self.known.get(name)
                if kind is None:
                    kind = self.declared.get(name) or _OF_PYTHON.get(type(value), pa.string())
                    new[name] = self.known[name] = kind
                if kind == pa.int64() and type(value) is float and name not in self.declared:
                    self._widen(name, row, new, widened)
                elif not self._fits(name, value, kind):
                    raise self._misfit(row, name, value, kind)
                elif type(value) is int and kind == pa.int64() and name not in self.large and not is_exact(value):
                    self.large[name] = (_place(row), value)
        if len(self.known) > MAX_METADATA_COLUMNS:
            raise InputError(
                f"{len(self.known)} different metadata fields (among them {', '.join(sorted(new)[:3])}), but at "
                f"most {MAX_METADATA_COLUMNS} can be columns; put fields that few documents have into one text field"
            )
        return new, widened

    def _fits(self, name: str, value: Scalar, kind: pa.DataType) -> bool:
        if as_type(value, kind) is None:
            return False
        plain = _OF_PYTHON.get(type(value), pa.string())
        return name in self.declared or plain == kind or (plain == pa.int64() and kind == pa.float64())

    def _widen(self, name: str, row: dict[str, Any], new: dict[str, pa.DataType], widened: set[str]) -> None:
        self._fractions[name] = f"{_place(row)} has {row[COLUMNS][name]!r}"
        if name in self.large:
            raise self.not_widened(name, *self.large[name])
        self.known[name] = pa.float64()
        if name in new:
            new[name] = pa.float64()
        else:
            widened.add(name)

    def not_widened(self, name: str, place: str, value: int, remove: str = "") -> ColumnTypeError:
        """The error for an integer that prevents its column from becoming a column of numbers.

        Args:
            remove: how to remove it, if it is only in the index.
        """
        return ColumnTypeError(
            f"{place}: {name} is {value}, too large to be exact in a column of numbers, but {self._fractions[name]}, "
            f"which is not an integer; {remove}give the field one kind of number, or",
            name,
        )

    def _misfit(self, row: dict[str, Any], name: str, value: Scalar, kind: pa.DataType) -> ColumnTypeError:
        place = _place(row)
        for field, misfits in self.misfits.items():
            if type(value) is str and column_name(field) == name:
                place, value = misfits.get(TYPE_NAMES.get(kind, ""), (place, value))
        shown = repr(value) if len(repr(value)) <= LONGEST_SHOWN else repr(value)[:LONGEST_SHOWN] + "..."
        if type(value) is int and kind in (pa.int64(), pa.float64()):
            why = "beyond 64-bit integers" if kind == pa.int64() else "too large to be exact in a column of numbers"
            return ColumnTypeError(f"{place}: the metadata field {name} is {shown}, {why};", name)
        here = TYPE_NAMES[_OF_PYTHON.get(type(value), pa.string())]
        elsewhere = TYPE_NAMES.get(kind, str(kind))
        return ColumnTypeError(
            f"{place}: the metadata field {name} is {here} ({shown}), but elsewhere it is {elsewhere}; correct it, or",
            name,
        )


def _place(row: dict[str, Any]) -> str:
    named = f'document "{row["document"]}"'
    return f"{row[PLACE]} ({named})" if row.get(PLACE) and row[PLACE] != named else named


def quoted(identifiers: Iterable[str]) -> str:
    """Ids as the list of an SQL `IN (...)`."""
    return ", ".join("'" + identifier.replace("'", "''") + "'" for identifier in identifiers)


def in_parts(ids: Iterable[str], size: int = IDS_AT_ONCE) -> Iterator[list[str]]:
    """`ids` in lists small enough for one SQL condition."""
    listed = list(ids)
    return (listed[start : start + size] for start in range(0, len(listed), size))

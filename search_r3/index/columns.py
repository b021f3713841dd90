"""The columns of an index's table: ours, and those that the documents' metadata gets beside them.

Only names, types and values: no table is opened here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.readers import Scalar

MAX_METADATA_COLUMNS = 200  # more distinct field names than this are data, not fields
# Ours. The user's metadata gets columns of its own names beside them, hence the prefix on what is not for filtering.
VECTOR, CONTENT, METADATA = "r3_vector", "r3_content", "r3_metadata"
TEXT_HASH, ROW_HASH = "r3_text_hash", "r3_row_hash"
COLUMNS = "r3_columns"  # not a column: where a row in the making keeps its metadata's columns
VISIBLE = dict.fromkeys(["id", "document", "title", "path"], "text") | dict.fromkeys(
    ["start_line", "end_line"], "number"
)
TYPE_NAMES = {pa.string(): "text", pa.float64(): "number", pa.bool_(): "true/false"}


def table_schema(dimension: int) -> pa.Schema:
    """The columns that every index has; the user's metadata adds others."""
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
            (VECTOR, pa.list_(pa.float32(), dimension)),
        ]
    )


def column_name(field_name: str) -> str:
    """The column for a metadata field: its own name where SQL allows, other characters becoming "_".

    SQL does not tell capitals from small letters, so columns are in small letters; a field called like a column of
    ours gets "meta_" in front.
    """
    name = re.sub(r"\W", "_", field_name).lower()
    if name in VISIBLE or name.startswith(("r3_", "_")) or not name or name[0].isdigit():
        name = f"meta_{name}"
    return name


def metadata_columns(metadata: dict[str, Scalar], where: str) -> dict[str, Scalar]:
    """A chunk's metadata by column name, numbers as float64. `where` names the chunk in errors.

    Raises:
        InputError: two fields fall on one column, or a number is too large.
    """
    columns: dict[str, Scalar] = {}
    for name, value in metadata.items():
        column = column_name(name)
        if column in columns:
            raise InputError(f'{where}: the metadata field "{name}" and another share the column {column}; rename one')
        if not isinstance(value, bool) and isinstance(value, int | float):
            try:
                value = float(value)
            except OverflowError as error:
                raise InputError(f'{where}: the metadata field "{name}" is too large a number; make it text') from error
        columns[column] = value
    return columns


def missing_columns(schema: pa.Schema, rows: list[dict[str, Any]]) -> dict[str, pa.DataType]:
    """The metadata columns that `rows` need and `schema` lacks.

    Raises:
        InputError: a field's type differs from its column's, or there are too many fields.
    """
    known = {column.name: column.type for column in schema}
    new: dict[str, pa.DataType] = {}
    for row in rows:
        for name, value in row[COLUMNS].items():
            wanted = {bool: pa.bool_(), float: pa.float64()}.get(type(value), pa.string())
            held = known.get(name) or new.setdefault(name, wanted)
            if held != wanted:
                raise InputError(
                    f'document "{row["id"]}": the metadata field {name} is {TYPE_NAMES[wanted]} ({value!r}), but '
                    f"elsewhere it is {TYPE_NAMES.get(held, str(held))}; give it one type everywhere"
                )
    total = len(known) - len(table_schema(1)) + len(new)
    if total > MAX_METADATA_COLUMNS:
        raise InputError(
            f"{total} different metadata fields (among them {', '.join(sorted(new)[:3])}), at most "
            f"{MAX_METADATA_COLUMNS} can be columns; put fields that few documents have into one text field"
        )
    return new


def quoted(identifiers: Iterable[str]) -> str:
    """Ids as the inside of an SQL `IN (...)`."""
    return ", ".join("'" + identifier.replace("'", "''") + "'" for identifier in identifiers)

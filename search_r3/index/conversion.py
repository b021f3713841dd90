"""A metadata column given another type in place: nothing is embedded again, and no other column is rewritten.

The new values are read from the row's metadata, which keeps them as the user wrote them (2020, not 2020.0), and are
written beside the old column; one commit then swaps the two names, so a reader sees either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.columns import DECLARED, METADATA, TYPE_NAMES, as_type, column_name, is_exact

NEW, OLD = "r3_new_", "r3_old_"


def give_types(table: Any, types: Mapping[str, pa.DataType]) -> bool:
    """Convert those of the columns `types` that the table has and that are of another type, and note that the user
    chose it; returns whether anything changed.

    Raises:
        InputError: a value cannot be converted; its document is named, and nothing is changed.
    """
    changed = False
    for name, kind in types.items():
        if name not in table.schema.names:
            continue
        if table.schema.field(name).type != kind:
            convert(table, name, kind)
            changed = True
        kept = {DECLARED: TYPE_NAMES[kind]}
        if (table.schema.field(name).metadata or {}).get(DECLARED.encode()) != TYPE_NAMES[kind].encode():
            annotate(table, name, kept)
            changed = True
    return changed


def convert(table: Any, name: str, kind: pa.DataType) -> None:
    """Make the metadata column `name` one of type `kind`.

    Raises:
        InputError: a value cannot be converted; its document is named, and nothing is changed.
    """
    from lance.udf import batch_udf

    fields = _check_values(table, name, kind)
    schema = pa.schema([(NEW + name, kind)])

    @batch_udf(schema)
    def converted(rows: pa.RecordBatch) -> pa.RecordBatch:
        found = (_value(metadata, fields) for metadata in rows[METADATA].to_pylist())
        values = [None if value is None else as_type(value, kind) for value in found]
        return pa.record_batch([pa.array(values, kind)], schema)

    table.to_lance().add_columns(converted, read_columns=[METADATA])
    table.checkout_latest()
    _replace(table, name)


def widen(table: Any, name: str) -> None:
    """Make a column of integers, all of which a float64 holds, one of numbers."""
    table.add_columns({NEW + name: f"CAST(`{name}` AS DOUBLE)"})
    _replace(table, name)


def _replace(table: Any, name: str) -> None:
    """Give the new column the name of the old one, in one commit, and drop the old one."""
    if lost := table.count_rows(f"`{name}` IS NOT NULL AND `{NEW}{name}` IS NULL"):
        table.drop_columns([NEW + name])
        raise InputError(f"{lost:,} values of {name} cannot be converted; index into a new folder instead")
    table.alter_columns({"path": name, "rename": OLD + name}, {"path": NEW + name, "rename": name})
    table.drop_columns([OLD + name])


def clear_unfinished(table: Any) -> None:
    """Drop what a conversion left that was killed on the way."""
    if left := [name for name in table.schema.names if name.startswith((NEW, OLD))]:
        table.drop_columns(left)


def first_inexact(table: Any, name: str) -> tuple[str, int] | None:
    """A document of the table whose integer in column `name` no float64 holds, with the integer."""
    large = f"`{name}` > {2**53} OR `{name}` < -{2**53}"
    for batch in table.search().where(large).select(["document", name]).to_batches():
        for document, value in zip(batch["document"].to_pylist(), batch[name].to_pylist(), strict=True):
            if not is_exact(value):
                return document, value
    return None


def _check_values(table: Any, name: str, kind: pa.DataType) -> list[str]:
    """The metadata fields that the column is of, if all of their values can be of type `kind`."""
    fields: set[str] = set()
    rows = table.search().where(f"`{name}` IS NOT NULL").select(["document", METADATA]).to_batches()
    for batch in rows:
        for document, metadata in zip(batch["document"].to_pylist(), batch[METADATA].to_pylist(), strict=True):
            for field, value in json.loads(metadata).items():
                if column_name(field) != name:
                    continue
                fields.add(field)
                if as_type(value, kind) is None:
                    raise InputError(
                        f'document "{document}": {name} is {value!r}, which is no {TYPE_NAMES[kind]}; correct it, or '
                        f"give the column another type (--type {name}=text)"
                    )
    return sorted(fields)


def _value(metadata: str | None, fields: list[str]) -> Any:
    """What a row's metadata has under one of `fields`; None where it has nothing."""
    held = json.loads(metadata or "{}")
    return next((held[field] for field in fields if field in held), None)


def annotate(table: Any, name: str, kept: dict[str, str]) -> None:
    """Keep `kept` in the metadata of the column `name`, beside what is there."""
    if hasattr(table, "update_field_metadata"):
        table.update_field_metadata({"path": name, "metadata": kept})
    else:  # before LanceDB 0.33.1
        held = {key.decode(): value.decode() for key, value in (table.schema.field(name).metadata or {}).items()}
        table.replace_field_metadata(name, held | kept)

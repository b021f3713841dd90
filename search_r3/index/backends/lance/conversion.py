"""Changing the type of a metadata column in place: nothing is embedded again, and no other column is rewritten.

The new values are read from the row's metadata, which keeps them as the user wrote them (2020, not 2020.0), and are
written to a new column. One commit then swaps the two names, so readers see either the old column or the new one.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from search_r3.errors import InputError
from search_r3.hints import nearest
from search_r3.index.backends.lance.table_columns import (
    DECLARED,
    TYPE_NAMES,
    as_type,
    column_name,
    is_exact,
    user_columns,
)
from search_r3.index.readers.csv_file import OWN
from search_r3.index.readers.path_source import PathSource
from search_r3.index.row_keys import METADATA, SOURCE
from search_r3.index.source_document import SourceDocument

NEW, OLD = "r3_new_", "r3_old_"
MOST_REPLACED = 100_000  # documents looked up among those of a run: their ids are kept in memory


@dataclass(frozen=True)
class Replacing:
    """The documents of a run, which replace documents of the index.

    Attributes:
        documents: reads them again, under the ids that they have in the index.
        sources: names of the sources whose documents are replaced.
        everything: whether documents of other sources are replaced too.
    """

    documents: Callable[[], Iterable[SourceDocument]]
    sources: Collection[str]
    everything: bool = False

    def reaches(self, source: str | None) -> bool:
        """Whether the run may replace a document of this source."""
        return self.everything or source is None or source in self.sources


def check_fields(schema: pa.Schema, types: Mapping[str, str], documents: PathSource) -> None:
    """Check that the fields in `types` exist in the index or in the documents.

    The documents are read only for fields that the index lacks, and only until those are found.

    Raises:
        InputError: a field is in neither; the message suggests the nearest name.
    """
    known = user_columns(schema)
    missing = {column_name(name): name for name in types if column_name(name) not in known}
    given: set[str] = set()
    for document in documents if missing and documents.kind not in ("folder", "file") else ():
        new = {*document.metadata, *(name for name in documents.misfits if name not in OWN)} - given
        given |= new
        for name in new:
            missing.pop(column_name(name), None)
        if not missing:
            return
    for name in missing.values():
        if name.lower().removeprefix("_") in OWN:
            raise InputError(f'"{name}" is part of every document and is not metadata, so it takes no --type; omit it')
        near = nearest(name, sorted(given | known.keys()))
        there = f'did you mean "{near}"?' if near else f"fields: {', '.join(sorted(given | known.keys())) or 'none'}"
        raise InputError(
            f"--type {name}={types[name]}: neither {documents.path} nor the index has a metadata field of that name; "
            f"{there}"
        )


def give_types(table: Any, types: Mapping[str, pa.DataType], replacing: Replacing | None = None) -> bool:
    """Convert the table's columns to `types` where they differ, and record that the user chose the type.

    A value that cannot be converted is tolerated if the run replaces its document by one without such a value; until
    then it is null.

    Returns:
        Whether anything changed.

    Raises:
        InputError: a value cannot be converted; the message names its document, and nothing is changed.
    """
    changed = False
    for name, kind in types.items():
        if name not in table.schema.names:
            continue
        if table.schema.field(name).type != kind:
            convert(table, name, kind, replacing)
            changed = True
        kept = {DECLARED: TYPE_NAMES[kind]}
        if (table.schema.field(name).metadata or {}).get(DECLARED.encode()) != TYPE_NAMES[kind].encode():
            annotate(table, name, kept)
            changed = True
    return changed


def convert(table: Any, name: str, kind: pa.DataType, replacing: Replacing | None = None) -> None:
    """Convert the metadata column `name` to the type `kind`.

    Raises:
        InputError: a value cannot be converted; the message names its document, and nothing is changed.
    """
    from lance.udf import batch_udf

    fields, outdated = _check_values(table, name, kind, replacing)
    schema = pa.schema([(NEW + name, kind)])

    @batch_udf(schema)
    def converted(rows: pa.RecordBatch) -> pa.RecordBatch:
        written = (_value(metadata, fields) for metadata in rows[METADATA].to_pylist())
        values = [None if value is None else as_type(value, kind) for value in written]
        return pa.record_batch([pa.array(values, kind)], schema)

    table.to_lance().add_columns(converted, read_columns=[METADATA])
    table.checkout_latest()
    _replace(table, name, outdated)


def widen(table: Any, name: str) -> None:
    """Convert an integer column, whose values must all be exact as float64, to a column of numbers."""
    table.add_columns({NEW + name: f"CAST(`{name}` AS DOUBLE)"})
    _replace(table, name)


def _replace(table: Any, name: str, outdated: int = 0) -> None:
    """Rename the new column to the old one's name, in one commit, and drop the old one. At most `outdated` rows may
    lose their value."""
    if (lost := table.count_rows(f"`{name}` IS NOT NULL AND `{NEW}{name}` IS NULL") - outdated) > 0:
        table.drop_columns([NEW + name])
        raise InputError(f"{lost:,} values of {name} cannot be converted; index into a new folder instead")
    table.alter_columns({"path": name, "rename": OLD + name}, {"path": NEW + name, "rename": name})
    table.drop_columns([OLD + name])


def clear_unfinished(table: Any) -> None:
    """Drop the columns that a killed conversion left behind."""
    if left := [name for name in table.schema.names if name.startswith((NEW, OLD))]:
        table.drop_columns(left)


def first_inexact(table: Any, name: str, excluded: Container[str] = ()) -> tuple[str, int] | None:
    """A document whose integer in column `name` is not exact as a float64, and the integer; None if there is none.
    Chunks whose ids are in `excluded` do not count."""
    large = f"`{name}` > {2**53} OR `{name}` < -{2**53}"
    columns = ["id", "document", name]
    for batch in table.search().where(large).select(columns).to_batches():
        for chunk, document, value in zip(*(batch[column].to_pylist() for column in columns), strict=True):
            if not is_exact(value) and chunk not in excluded:
                return document, value
    return None


def _check_values(table: Any, name: str, kind: pa.DataType, replacing: Replacing | None) -> tuple[list[str], int]:
    """Check that all values of the column can be of type `kind`; returns its metadata fields, and the number of rows
    whose values cannot but whose documents are replaced."""
    fields: set[str] = set()
    outdated: dict[str, Any] = {}
    count = 0
    columns = ["document", METADATA, SOURCE]
    rows = table.search().where(f"`{name}` IS NOT NULL").select(columns).to_batches()
    for batch in rows:
        for document, metadata, source in zip(*(batch[column].to_pylist() for column in columns), strict=True):
            for field, value in json.loads(metadata).items():
                if column_name(field) != name:
                    continue
                fields.add(field)
                if as_type(value, kind) is None:
                    outdated[document] = value
                    count += 1
                    if replacing is None or not replacing.reaches(source) or len(outdated) > MOST_REPLACED:
                        raise InputError(_stored_misfit(document, name, value, kind))
    for given in replacing.documents() if replacing is not None and outdated else ():
        if given.id in outdated:
            for field, value in given.metadata.items():
                if column_name(field) == name and as_type(value, kind) is None:
                    raise InputError(
                        f'{given.place} (document "{given.id}"): {name} is {value!r}, which is not of type '
                        f"{TYPE_NAMES[kind]}; "
                        f"correct it, or give the column another type (--type {name}=text)"
                    )
            del outdated[given.id]
    for document, value in outdated.items():
        raise InputError(_stored_misfit(document, name, value, kind))
    return sorted(fields), count


def _stored_misfit(document: str, name: str, value: Any, kind: pa.DataType) -> str:
    return (
        f'document "{document}" of the index: {name} is {value!r}, which is not of type {TYPE_NAMES[kind]}; if that is '
        "out of "
        f"date, remove it ({delete_command(document)}) and run this again, or give the column another type "
        f"(--type {name}=text)"
    )


def delete_command(document: str, index: str = "INDEX") -> str:
    """The command that removes a document from an index, for messages."""
    return f"search-r3 delete {shlex.quote(index)} {'-- ' if document.startswith('-') else ''}{shlex.quote(document)}"


def _value(metadata: str | None, fields: list[str]) -> Any:
    """The value of the first of `fields` that a row's metadata has; None if it has none of them."""
    known = json.loads(metadata or "{}")
    return next((known[field] for field in fields if field in known), None)


def annotate(table: Any, name: str, kept: dict[str, str]) -> None:
    """Add `kept` to the metadata of the column `name`."""
    if hasattr(table, "update_field_metadata"):
        table.update_field_metadata({"path": name, "metadata": kept})
    else:  # before LanceDB 0.33.1
        old = {key.decode(): value.decode() for key, value in (table.schema.field(name).metadata or {}).items()}
        table.replace_field_metadata(name, old | kept)

"""The sources of an index in its LanceDB table: the records kept with the schema, and the rows that belong to each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from search_r3.index.backends.lance.conversion import annotate
from search_r3.index.backends.lance.table_columns import quoted
from search_r3.index.index_sources import UNKNOWN, SourceCount, SourceRecord
from search_r3.index.row_keys import SOURCE

FIELD = "r3_sources"
HOLDER = "document"
"""The column whose metadata has the records."""


def read_sources(schema: pa.Schema) -> dict[str, SourceRecord]:
    """The sources recorded in an index's schema, by name."""
    kept = (schema.field(HOLDER).metadata or {}).get(FIELD.encode())
    records = [SourceRecord(**record) for record in json.loads(kept or "[]")]
    return {record.name: record for record in records}


def with_sources(schema: pa.Schema, records: Iterable[SourceRecord]) -> pa.Schema:
    """`schema` with the sources recorded in it."""
    position = schema.get_field_index(HOLDER)
    return schema.set(position, schema.field(position).with_metadata(_metadata(records)))


def write_sources(table: Any, records: Iterable[SourceRecord]) -> None:
    """Record the sources in the table, in a separate commit, unless they are recorded already."""
    records = list(records)
    if list(read_sources(table.schema).values()) != records:
        annotate(table, HOLDER, _metadata(records))


def _metadata(records: Iterable[SourceRecord]) -> dict[str, str]:
    kept = [asdict(record) for record in records]
    for record in kept:
        if not record["unfinished"]:
            del record["unfinished"]
    return {FIELD: json.dumps(kept, ensure_ascii=False)}


def count_sources(table: Any) -> list[SourceCount]:
    """The sources of the table's rows and those that are recorded in it, by name."""
    columns = [name for name in ("document", SOURCE) if name in table.schema.names]
    rows = table.search().select(columns).to_arrow()
    if SOURCE not in columns:
        rows = rows.append_column(SOURCE, pa.nulls(len(rows), pa.string()))
    counts = rows.group_by(SOURCE).aggregate([("document", "count"), ("document", "count_distinct")]).to_pylist()
    sources = {name: SourceCount(**asdict(record)) for name, record in read_sources(table.schema).items()}
    for row in counts:
        name = row[SOURCE] or UNKNOWN
        source = sources.get(name, SourceCount(name, UNKNOWN))
        sources[name] = replace(source, documents=row["document_count_distinct"], chunks=row["document_count"])
    return sorted(sources.values(), key=lambda source: source.name)


def count_unknown(table: Any) -> int:
    """The number of documents of unknown source: from an index of format 1, and not in any run since."""
    unknown = f"{SOURCE} IS NULL"
    if SOURCE not in table.schema.names or not table.count_rows(unknown):
        return 0
    return len(table.search().where(unknown).select(["document"]).to_arrow()["document"].unique())


def source_condition(names: Iterable[str], prefix: str = "") -> str:
    """SQL for the rows of these sources whose documents' ids begin with `prefix`."""
    condition = f"{SOURCE} IN ({quoted(names)})"
    return f"{condition} AND {prefix_condition(prefix)}" if prefix else condition


def prefix_condition(prefix: str) -> str:
    """SQL for the rows whose documents' ids begin with `prefix`."""
    return f"starts_with(document, {quoted([prefix])})"

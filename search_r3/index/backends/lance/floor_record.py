"""The relevance floor of an index (`build/relevance_floor.py`) as its table records it."""

from __future__ import annotations

from typing import Any

from search_r3.index.backends.index_backend import FloorRecord
from search_r3.index.backends.lance.conversion import annotate
from search_r3.index.row_keys import VECTOR

FIELD = "r3_relevance_floor"


def read_floor(table: Any) -> FloorRecord | None:
    """The table's record; None if it has none, or another version wrote it."""
    kept = (table.schema.field(VECTOR).metadata or {}).get(FIELD.encode())
    return FloorRecord.from_json(kept.decode()) if kept else None


def write_floor(table: Any, record: FloorRecord) -> None:
    """Record the floor in the table, in a commit of its own."""
    annotate(table, VECTOR, {FIELD: record.to_json()})

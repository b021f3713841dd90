"""The relevance floor of an index (`build/relevance_floor.py`) as its table records it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, NamedTuple

from search_r3.index.backends.index_backend import RelevanceFloor
from search_r3.index.backends.lance.conversion import annotate
from search_r3.index.row_keys import VECTOR

FIELD = "r3_relevance_floor"


class FloorRecord(NamedTuple):
    """A floor, and the number of rows when it was measured."""

    floor: RelevanceFloor
    rows: int


def read_floor(table: Any) -> FloorRecord | None:
    """The table's record, or None if it has none."""
    kept = (table.schema.field(VECTOR).metadata or {}).get(FIELD.encode())
    try:
        value = json.loads(kept or "null")
        return None if value is None else FloorRecord(RelevanceFloor(**value["floor"]), int(value["rows"]))
    except (ValueError, TypeError, KeyError):  # written by another version
        return None


def write_floor(table: Any, record: FloorRecord) -> None:
    """Record the floor in the table, in a commit of its own."""
    annotate(table, VECTOR, {FIELD: json.dumps({"floor": asdict(record.floor), "rows": record.rows})})

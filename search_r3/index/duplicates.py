"""Rows that share an id, as two writers leave behind that nothing kept apart: found, and removed.

Every search would show such a document twice, and an update would not find which of its rows is meant.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def count_duplicate_ids(ids: pa.ChunkedArray) -> int:
    """How many ids come more than once in a column of ids."""
    counts = pc.value_counts(ids).field("counts")
    return int(pc.sum(pc.greater(counts, 1)).as_py() or 0)


def remove_duplicates(table: Any) -> int:
    """Keep one row for each id, the one written last, in one commit; returns how many rows were removed.

    Reads the whole column of ids. Rows are told apart by LanceDB's row ids, which grow with each commit.
    """
    rows = table.search().select(["id"]).with_row_id(True).to_arrow()
    if count_duplicate_ids(rows["id"]) == 0:
        return 0
    newest = rows.group_by("id").aggregate([("_rowid", "max")])["_rowid_max"]
    others = pc.filter(rows["_rowid"], pc.invert(pc.is_in(rows["_rowid"], value_set=newest)))
    table.delete(f"_rowid IN ({', '.join(map(str, others.to_pylist()))})")
    return len(others)

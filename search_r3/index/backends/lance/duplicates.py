"""Rows that share an id, left behind by two unsynchronized writers: counted, and equal copies removed.

Every search would show such a document twice. The table does not tell which of two different rows is the right one:
LanceDB's row ids are positions in files, and a compaction or an update may move an old row behind a newer one. Only the
source knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from search_r3.index.index_sources import UNKNOWN
from search_r3.index.row_keys import ROW_HASH, SOURCE

MOST_NAMED = 3  # sources named in a message
AT_ONCE = 50_000  # rows in one SQL condition


@dataclass(frozen=True)
class Differing:
    """Ids whose rows differ: their number, one document that has such an id, and the sources of all those rows."""

    ids: int
    document: str
    sources: list[str]

    def __str__(self) -> str:
        have = "1 id has" if self.ids == 1 else f"{self.ids:,} ids have"
        names = ", ".join(f'"{name}"' for name in self.sources[:MOST_NAMED])
        more = f" and {len(self.sources) - MOST_NAMED} others" if self.sources[MOST_NAMED:] else ""
        sources = "source" if len(self.sources) == 1 else "sources"
        return f'{have} rows that differ (one is of the document "{self.document}"; {sources}: {names}{more})'


def count_duplicate_ids(table: Any) -> int:
    """The number of ids that more than one row has."""
    return len(_repeated(table.search().select(["id"]).to_arrow()["id"]))


def remove_equal_copies(table: Any) -> tuple[int, Differing | None]:
    """Remove all but one of equal rows (same id, row hash and source). Rows that share an id but differ all stay.

    Reads the whole id column, and hashes only of ids that occur more than once.

    Returns:
        The number of removed rows, and the ids that still occur more than once.
    """
    repeated = _repeated(table.search().select(["id"]).to_arrow()["id"])
    if not len(repeated):
        return 0, None
    keys = [name for name in ("id", ROW_HASH, SOURCE) if name in table.schema.names]  # format 1 has no source
    batches = table.search().select([*keys, "document"]).with_row_id(True).to_batches()
    rows = pa.Table.from_batches([batch.filter(pc.is_in(batch["id"], value_set=repeated)) for batch in batches])
    kept = rows.group_by(keys).aggregate([("_rowid", "min"), ("document", "min")])
    copies = pc.filter(rows["_rowid"], pc.invert(pc.is_in(rows["_rowid"], value_set=kept["_rowid_min"]))).to_pylist()
    for start in range(0, len(copies), AT_ONCE):
        table.delete(f"_rowid IN ({', '.join(map(str, copies[start : start + AT_ONCE]))})")
    return len(copies), _differing(kept)


def _differing(kept: pa.Table) -> Differing | None:
    """The ids that occur more than once among the rows `kept`, no two of which are equal."""
    repeated = _repeated(kept["id"])
    if not len(repeated):
        return None
    rows = kept.filter(pc.is_in(kept["id"], value_set=repeated))
    sources = rows[SOURCE].unique().to_pylist() if SOURCE in rows.column_names else [None]
    return Differing(len(repeated), pc.min(rows["document_min"]).as_py(), sorted(name or UNKNOWN for name in sources))


def _repeated(ids: pa.ChunkedArray) -> pa.Array:
    """The ids that occur more than once."""
    counts = pc.value_counts(ids)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))

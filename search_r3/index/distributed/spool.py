"""The changes a corpus makes, written next to the index before any worker starts: the driver reads the corpus once.

So a malformed line is found before GPUs are paid for, workers need not see the corpus, and any part of the work can be
repeated from its file. The spool is a Lance table with many small fragments, removed when the build ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from search_r3.index.backends.lance.lance_table import FOLLOW_WRITES
from search_r3.index.backends.lance.table_columns import table_schema
from search_r3.index.build.index_diff import ChangeBatch, IndexDiff
from search_r3.index.distributed.ray_worker import STORED_VECTOR
from search_r3.index.row_keys import TEXT_HASH, VECTOR
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import Location, connect, options_of

SPOOL = "spool"
BATCH_CHUNKS = 256
"""Chunks that are compared with the table at a time."""
FIRST_ROWS, FIRST_FRAGMENT, FRAGMENT = 65_536, 1_024, 16_384
"""Number of rows in small fragments, and the sizes of small and of later fragments."""


@dataclass
class Spooled:
    """What was spooled for the workers, and what the commit has to remove.

    Attributes:
        rows: number of spooled rows.
        replaced: ids of rows that the new rows replace, and of chunks that their documents no longer have.
        columns: metadata columns that the table lacks.
        widened: integer columns that must become columns of numbers.
        documents, unchanged, updated, stale: counts.
        embedded: number of rows whose text the index did not have.
    """

    rows: int = 0
    replaced: list[str] = field(default_factory=list)
    columns: dict[str, pa.DataType] = field(default_factory=dict)
    widened: set[str] = field(default_factory=set)
    documents: int = 0
    unchanged: int = 0
    updated: int = 0
    stale: int = 0
    embedded: int = 0


def spool_schema() -> pa.Schema:
    """A row of the table without vector and metadata columns, plus the vector if the index already had it."""
    kept = [column for column in table_schema(1) if column.name != VECTOR]
    return pa.schema([*kept, (STORED_VECTOR, pa.list_(pa.float32()))])


def write_spool(
    location: Location, diff: IndexDiff, documents: Iterable[SourceDocument], part_rows: int | None = None
) -> Spooled:
    """Write the changes that `documents` make to the spool at `location`.

    Args:
        part_rows: rows of a fragment; None makes the first ones small, so that all workers share a small corpus, and
            the rest larger, so that a large corpus does not have too many.

    Raises:
        InputError: a document is malformed, or an id is used twice.
    """
    drop_spool(location)  # left by a killed driver
    spooled = Spooled()
    batches = _RecordBatches(diff.batches(documents, BATCH_CHUNKS), spooled)
    if part_rows is not None:
        _write(location, batches, "create", part_rows)
    else:
        batches.most = FIRST_ROWS
        _write(location, batches, "create", FIRST_FRAGMENT)
        batches.most = None
        if not batches.done:
            _write(location, batches, "append", FRAGMENT)
    return spooled


class _RecordBatches:
    """Change batches as Arrow record batches, consumed in one or two passes. Keeps the error that ended them, as Lance
    passes on only its text."""

    def __init__(self, changes: Iterator[ChangeBatch], spooled: Spooled) -> None:
        self.changes, self.spooled = changes, spooled
        self.most: int | None = None
        self.done = False
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            while self.most is None or self.spooled.rows < self.most:
                batch = next(self.changes, None)
                if batch is None:
                    self.done = True
                    return
                _count(self.spooled, batch)
                if rows := [row | {STORED_VECTOR: batch.stored_vectors.get(row[TEXT_HASH])} for row in batch.rows]:
                    yield pa.RecordBatch.from_pylist(rows, schema=spool_schema())
        except BaseException as error:
            self.error = error
            raise


def _write(location: Location, batches: _RecordBatches, mode: str, fragment_rows: int) -> None:
    import lance

    reader = pa.RecordBatchReader.from_batches(spool_schema(), iter(batches))
    try:
        lance.write_dataset(
            reader,
            spool_uri(location),
            mode=mode,
            max_rows_per_file=fragment_rows,
            storage_options=options_of(location),
        )
    except Exception:
        if batches.error is not None:
            raise batches.error from None
        raise


def spool_uri(location: Location) -> str:
    """The URI of the spool of the index at `location`."""
    return f"{location}/{SPOOL}.lance"


def drop_spool(location: Location) -> None:
    """Remove the spool, if there is one."""
    connect(location, FOLLOW_WRITES).drop_table(SPOOL, ignore_missing=True)


def _count(spooled: Spooled, batch: ChangeBatch) -> None:
    given = {row["id"] for row in batch.rows}
    if not batch.fresh:
        spooled.replaced.extend(given)
    spooled.replaced.extend(identifier for identifier in batch.stale if identifier not in given)
    spooled.columns.update(batch.columns | {name: pa.float64() for name in batch.widened & spooled.columns.keys()})
    spooled.widened |= batch.widened - spooled.columns.keys()
    spooled.rows += len(batch.rows)
    spooled.documents += batch.documents
    spooled.unchanged += batch.unchanged
    spooled.updated += batch.updated
    spooled.stale += len(batch.stale)
    spooled.embedded += sum(row[TEXT_HASH] not in batch.stored_vectors for row in batch.rows)

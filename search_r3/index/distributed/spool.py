"""The diff of a corpus, written down beside the index before a worker starts: read once, on the driver.

So a broken line is met before a GPU is paid for, workers need not see the corpus, and any part of the work can be done
again from its own file. The spool is a Lance table itself, in many small fragments, removed when the build ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from search_r3.index.backends.lance.lance_table import FOLLOW_WRITES
from search_r3.index.backends.lance.table_columns import table_schema
from search_r3.index.build.index_diff import ChangeBatch, IndexDiff
from search_r3.index.distributed.ray_worker import HELD
from search_r3.index.row_keys import TEXT_HASH, VECTOR
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import Place, connect, options_of

SPOOL = "spool"
BATCH_CHUNKS = 256
"""Chunks that are compared with the table at once."""
FIRST_ROWS, FIRST_FRAGMENT, FRAGMENT = 65_536, 1_024, 16_384
"""Rows that are put into small fragments, and the size of small and of later fragments."""


@dataclass
class Spooled:
    """What was written down: `rows` for the workers, and what the commit has to take away.

    Attributes:
        replaced: ids of rows that the new ones stand in for, and of chunks that their documents no longer have.
        columns: metadata columns that the table lacks.
        widened: columns of integers that must hold other numbers.
        documents, unchanged, updated, stale: counts; `embedded` of rows whose text the index did not have.
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
    """A row of the table without its vector and metadata columns, and the vector that the index may have held."""
    kept = [column for column in table_schema(1) if column.name != VECTOR]
    return pa.schema([*kept, (HELD, pa.list_(pa.float32()))])


def write_spool(
    place: Place, diff: IndexDiff, documents: Iterable[SourceDocument], part_rows: int | None = None
) -> Spooled:
    """Write what `documents` change to the spool in `place`.

    Args:
        part_rows: rows of a fragment; None makes the first few small, so that all workers have some of a small corpus,
            and the rest larger, so that a large one has no more fragments than it needs.

    Raises:
        InputError: a document is broken, or an id comes twice.
    """
    drop_spool(place)  # of a driver that was killed
    found = Spooled()
    batches = _Batches(diff.batches(documents, BATCH_CHUNKS), found)
    if part_rows is not None:
        _write(place, batches, "create", part_rows)
    else:
        batches.most = FIRST_ROWS
        _write(place, batches, "create", FIRST_FRAGMENT)
        batches.most = None
        if not batches.done:
            _write(place, batches, "append", FRAGMENT)
    return found


class _Batches:
    """Windows as record batches, to be taken in one or two goes; keeps the error that ended them, of which Lance
    gives back only the text."""

    def __init__(self, batches: Iterator[ChangeBatch], found: Spooled) -> None:
        self.batches, self.found = batches, found
        self.most: int | None = None
        self.done = False
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            while self.most is None or self.found.rows < self.most:
                batch = next(self.batches, None)
                if batch is None:
                    self.done = True
                    return
                _count(self.found, batch)
                if rows := [row | {HELD: batch.stored_vectors.get(row[TEXT_HASH])} for row in batch.rows]:
                    yield pa.RecordBatch.from_pylist(rows, schema=spool_schema())
        except BaseException as error:
            self.error = error
            raise


def _write(place: Place, batches: _Batches, mode: str, fragment_rows: int) -> None:
    import lance

    reader = pa.RecordBatchReader.from_batches(spool_schema(), iter(batches))
    try:
        lance.write_dataset(
            reader, spool_uri(place), mode=mode, max_rows_per_file=fragment_rows, storage_options=options_of(place)
        )
    except Exception:
        if batches.error is not None:
            raise batches.error from None
        raise


def spool_uri(place: Place) -> str:
    """Where the spool of the index in `place` is."""
    return f"{place}/{SPOOL}.lance"


def drop_spool(place: Place) -> None:
    """Remove the spool, if there is one."""
    connect(place, FOLLOW_WRITES).drop_table(SPOOL, ignore_missing=True)


def _count(found: Spooled, batch: ChangeBatch) -> None:
    given = {row["id"] for row in batch.rows}
    if not batch.fresh:
        found.replaced.extend(given)
    found.replaced.extend(identifier for identifier in batch.stale if identifier not in given)
    found.columns.update(batch.columns | {name: pa.float64() for name in batch.widened & found.columns.keys()})
    found.widened |= batch.widened - found.columns.keys()
    found.rows += len(batch.rows)
    found.documents += batch.documents
    found.unchanged += batch.unchanged
    found.updated += batch.updated
    found.stale += len(batch.stale)
    found.embedded += sum(row[TEXT_HASH] not in batch.stored_vectors for row in batch.rows)

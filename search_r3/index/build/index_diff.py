"""The difference between a corpus and an index, computed in batches: new rows, changed rows, and texts to embed.

A batch is a few hundred chunks of whole documents. Only the rows that a batch concerns are looked up, so neither the
corpus nor the index has to fit into memory.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.backends.lance.conversion import delete_command, first_inexact
from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.backends.lance.table_columns import ColumnTypes
from search_r3.index.backends.lance.table_rows import make_row
from search_r3.index.build.build_report import Removal
from search_r3.index.chunking.chunker import Chunk, chunk_document
from search_r3.index.chunking.chunking_cache import ChunkingCache, Cut, document_digest, rows_digest
from search_r3.index.chunking.token_limit import TokenLimit
from search_r3.index.index_sources import API, Scope
from search_r3.index.readers.path_source import Amount, outermost, printable
from search_r3.index.row_keys import CONTENT, METADATA, ROW_HASH, SOURCE, TEXT_HASH
from search_r3.index.seen_ids import SeenIds
from search_r3.index.source_document import Skipped, SourceDocument

LOOKED_UP_EACH = 32
"""Paths whose rows are looked up one path after the other; for more of them, all rows of the source are read."""
SAME = ("title", CONTENT, METADATA)
"""Columns that must be equal for documents of two sources with the same id not to conflict."""


@dataclass
class ChangeBatch:
    """What some documents change in the index.

    Attributes:
        rows: new and changed rows as they will be stored, without vectors.
        stale: ids of chunks to remove: their documents no longer have them.
        fresh: none of the rows' ids is in the table.
        columns: metadata columns that the table lacks.
        widened: integer columns that must become columns of numbers.
        stored_vectors: vectors that the index already has, by text hash; each (dimension,) float32.
        texts: texts to embed, by text hash.
        names: for each of `texts`, the id of the first chunk that has it, for messages.
        vectors: of `rows`, (rows, dimension) float32, once they are known.
        documents, unchanged, updated: counts.
        position: how far the source was read when the batch was complete.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    fresh: bool = True
    columns: dict[str, pa.DataType] = field(default_factory=dict)
    widened: set[str] = field(default_factory=set)
    stored_vectors: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    vectors: np.ndarray | None = None
    documents: int = 0
    unchanged: int = 0
    updated: int = 0
    position: Amount = field(default_factory=Amount)


@dataclass(slots=True)
class _Given:
    """A document of a batch with its digest, and its chunks or what it was cut into before."""

    document: SourceDocument
    digest: bytes
    chunks: list[Chunk] = field(default_factory=list)
    known: Cut | None = None


@dataclass(frozen=True, slots=True)
class StoredRow:
    """What is compared of a row that the index has."""

    document: str
    row_hash: str
    source: str | None = None


class IndexDiff:
    """Compares the documents of one run with the index as it was when the run began.

    Args:
        before: the index, pinned at that version; None if there is none yet.
        types: types of its metadata columns; updated with new columns.
        max_length: tokens a text is truncated to; part of its hash.
        scope: the documents' source, and what belongs to it.
        tokens: the token limit of chunks; None does not measure them.
        cuts: what documents were cut into before; None remembers nothing. It is closed with this object.

    Attributes:
        conflicts: documents that were left out because another source has their ids.
    """

    def __init__(
        self,
        before: LanceBackend | None,
        types: ColumnTypes,
        max_length: int | None,
        scope: Scope,
        tokens: TokenLimit | None = None,
        cuts: ChunkingCache | None = None,
    ) -> None:
        self._before, self._types, self.max_length, self._scope = before, types, max_length, scope
        self._tokens = tokens
        self._cuts = cuts or ChunkingCache(None)
        self.seen, self.removed, self._documents = SeenIds(), SeenIds(), SeenIds()
        self.conflicts: list[Skipped] = []
        self._only: frozenset[str] | None = None
        self._skipped: list[Skipped] = []

    def batches(self, documents: Iterable[SourceDocument], count: int) -> Iterator[ChangeBatch]:
        """Batches of whole documents, of at least `count` chunks each except for the last.

        Raises:
            InputError: an id is used twice, or metadata values of incompatible types share a column.
        """
        self._types.misfits = getattr(documents, "misfits", {})
        self._skipped = getattr(documents, "skipped", [])
        self._only = getattr(documents, "only", None)
        waiting: list[_Given] = []
        chunks = 0
        for document in self._scope.documents(documents):
            if (first := self._documents.add(document.id, document.place)) is not None:
                raise InputError(
                    f'the id "{document.id}" is used twice: at {first} and at {document.place}; make ids unique'
                )
            given = _Given(document, document_digest(document))
            if self._before is not None:
                given.known = self._cuts.get(given.digest)
            if given.known is None:
                given.chunks = chunk_document(document, tokens=self._tokens)
            waiting.append(given)
            chunks += len(given.chunks) if given.known is None else given.known.chunks
            if chunks >= count:
                yield self._compare(waiting, getattr(documents, "position", Amount()))
                waiting, chunks = [], 0
        if waiting:
            yield self._compare(waiting, getattr(documents, "position", Amount()))

    def gone(self, lost: bool = True) -> Iterator[list[str]]:
        """After all batches: the ids of chunks that the source no longer has, in lists.

        Args:
            lost: False yields only chunks of documents that are now in the index under another id.
        """
        for rows in self._gone() if lost or self._scope.absorbed else ():
            if ids := [identifier for identifier, _, moved in rows if lost or moved]:
                yield ids

    def removal(self) -> Removal:
        """How much `gone` would remove."""
        documents, chunks = SeenIds(), 0
        for rows in self._gone():
            for _, document, moved in rows:
                if not moved:
                    chunks += 1
                    documents.add(document)
        had = self._before.count_of_sources(self._scope.own) if self._before is not None and chunks else 0
        removal = Removal(chunks, len(documents), had)
        documents.close()
        return removal

    def _gone(self) -> Iterator[list[tuple[str, str, bool]]]:
        """Rows of the source that were in no batch: (id, document, whether that document now has another id).

        Rows of files that could not be read are left out, and so are rows whose new id belongs to another source. If
        only some paths were read, only rows of these count.
        """
        if self._before is None or self._scope.part is None:
            return
        unread = {self._scope.start + skipped.path for skipped in self._skipped if skipped.unread}
        left_out = {conflict.path for conflict in self.conflicts}
        for rows in self._rows_of_what_was_read():
            row_of = {identifier: (document, source) for identifier, document, source in rows}
            now = {
                identifier: self._scope.moved_to(source=row_of[identifier][1], document=row_of[identifier][0])
                for identifier in self.removed.missing(self.seen.missing(identifier for identifier, _, _ in rows))
            }
            if left_out:  # documents that conflict under their new ids are not in the index under those
                now = {one: name for one, name in now.items() if name not in left_out}
            if unread:
                now = {one: name for one, name in now.items() if not lies_in(name or row_of[one][0], unread)}
            absent = set(self._documents.missing({name for name in now.values() if name is not None}))
            yield [(one, row_of[one][0], name is not None and name not in absent) for one, name in now.items()]

    def _rows_of_what_was_read(self) -> Iterator[list[tuple[Any, ...]]]:
        """(id, document, source) of the index's rows that the run may remove."""
        assert self._before is not None
        assert self._scope.part is not None
        columns = ["id", "document", SOURCE]
        if self._only is None or "." in self._only:
            yield from self._before.rows_of_sources(self._scope.own, self._scope.part, columns)
            return
        start = self._scope.start
        paths = {start + printable(name) for name in self._only}
        few = outermost(paths) if len(paths) <= LOOKED_UP_EACH else [self._scope.part]
        for prefix in few:
            for rows in self._before.rows_of_sources(self._scope.own, prefix, columns):
                yield [row for row in rows if lies_in(row[1], paths)]

    def close(self) -> None:
        """Release the sets of seen ids, and close the cache."""
        for opened in (self.seen, self.removed, self._documents, self._cuts):
            opened.close()

    def _compare(self, given: list[_Given], position: Amount) -> ChangeBatch:
        batch = ChangeBatch(documents=len(given), position=position)
        rows: dict[str, dict[str, Any]] = {}
        new: list[tuple[bytes, Cut]] = []
        for one in self._without_unchanged(given, batch):
            for chunk in one.chunks:
                self.seen.add(chunk.id)
                rows[chunk.id] = make_row(chunk, self.max_length, self._scope.record.name, one.document.place)
            if len(one.chunks) > 1:
                digest = rows_digest((chunk.id, rows[chunk.id][ROW_HASH]) for chunk in one.chunks)
                new.append((one.digest, Cut(digest, len(one.chunks))))
        self._cuts.put(new)
        stored = self._stored_rows(rows)
        if not self._scope.take_over:
            self._leave_to_others(batch, rows, stored)
        batch.stale = self.seen.missing(identifier for identifier in stored if identifier not in rows)
        for identifier in batch.stale:  # `missing` left out chunks that now belong to another document
            self.removed.add(identifier)
        batch.rows = [row for row in rows.values() if not _is_stored(row, stored.get(row["id"]))]
        batch.updated = sum(row["id"] in stored for row in batch.rows)
        batch.unchanged += len(rows) - len(batch.rows)
        batch.fresh = not batch.updated
        self._fit(batch)
        if self._before is not None:
            batch.stored_vectors = self._before.vectors_where(TEXT_HASH, sorted({row[TEXT_HASH] for row in batch.rows}))
        for row in batch.rows:
            if row[TEXT_HASH] not in batch.stored_vectors and row[TEXT_HASH] not in batch.texts:
                batch.texts[row[TEXT_HASH]] = row[CONTENT].strip()
                batch.names.append(row["id"])
        return batch

    def _without_unchanged(self, given: list[_Given], batch: ChangeBatch) -> list[_Given]:
        """The documents but those whose stored rows are known to be what they are cut into; all others are cut."""
        names = sorted(one.document.id for one in given if one.known is not None)
        stored: dict[str, list[tuple[str, str, str | None]]] = {}
        if names and self._before is not None:
            columns = ["id", "document", ROW_HASH, SOURCE]
            for identifier, document, *rest in self._before.rows_where("document", names, columns):
                stored.setdefault(document, []).append((identifier, *rest))
        changed: list[_Given] = []
        for one in given:
            if one.known is not None:
                rows = stored.get(one.document.id, [])
                same = all(source == self._scope.record.name for _, _, source in rows)
                if same and one.known.digest == rows_digest((identifier, row_hash) for identifier, row_hash, _ in rows):
                    batch.unchanged += len(rows)
                    for identifier, _, _ in rows:
                        self.seen.add(identifier)
                    continue
                one.chunks = chunk_document(one.document, tokens=self._tokens)
            changed.append(one)
        return changed

    def _stored_rows(self, rows: dict[str, dict[str, Any]]) -> dict[str, StoredRow]:
        """The index's rows that have the ids of `rows`, or belong to their documents."""
        stored: dict[str, StoredRow] = {}
        if self._before is None:
            return stored
        columns = ["id", "document", ROW_HASH, SOURCE]
        for column, values in (("document", {row["document"] for row in rows.values()}), ("id", set(rows))):
            wanted = sorted(values - stored.keys() if column == "id" else values)
            for identifier, *rest in self._before.rows_where(column, wanted, columns):
                row = StoredRow(*rest)
                stored[identifier] = self._one_of(stored.get(identifier, row), row)
        return stored

    def _one_of(self, one: StoredRow, other: StoredRow) -> StoredRow:
        """One row for two that share an id. If they differ, it has no hash, so it is always rewritten (`merge_insert`
        replaces both), and if either belongs to another source, so does it."""
        if one == other:
            return one
        source = one.source if one.source not in {None, *self._scope.own} else other.source
        return StoredRow(one.document, "", source)

    def _leave_to_others(
        self, batch: ChangeBatch, rows: dict[str, dict[str, Any]], stored: dict[str, StoredRow]
    ) -> None:
        """Remove documents whose ids belong to another source from `rows` and `stored`. Those that differ in text,
        title or metadata are conflicts; their path and lines do not matter."""
        own = {None, *self._scope.own}
        owner: dict[str, str | None] = {}
        for identifier, there in stored.items():
            if there.source not in own:
                owner[rows[identifier]["document"] if identifier in rows else there.document] = there.source
        theirs = self._contents(owner)
        for document, source in owner.items():
            given = {
                name: tuple(row[column] for column in SAME) for name, row in rows.items() if row["document"] == document
            }
            for identifier in given:
                del rows[identifier]
            for identifier in given.keys() | {name for name, there in stored.items() if there.document == document}:
                stored.pop(identifier, None)
            if given == theirs.get(document):
                batch.unchanged += len(given)
            else:
                batch.documents -= 1
                self.conflicts.append(Skipped(document, _conflict(source)))

    def _contents(self, documents: Iterable[str]) -> dict[str, dict[str, tuple[str, ...]]]:
        """The index's contents of these documents: document -> chunk -> its values of `SAME`."""
        contents: dict[str, dict[str, tuple[str, ...]]] = {}
        if self._before is None:
            return contents
        for identifier, document, *values in self._before.rows_where(
            "document", sorted(set(documents)), ["id", "document", *SAME]
        ):
            contents.setdefault(document, {})[identifier] = tuple(values)
        return contents

    def _fit(self, batch: ChangeBatch) -> None:
        """Find the columns that the table lacks for the batch's rows, and those that must be widened."""
        batch.columns, batch.widened = self._types.fit(batch.rows)
        if self._before is None:
            return
        for name in batch.widened.intersection(self._before.table.schema.names):
            replaced = {row["id"] for row in batch.rows}.union(batch.stale)
            if (inexact := first_inexact(self._before.table, name, replaced)) is not None:
                document, value = inexact
                remove = f"remove it if the index's value is out of date ({delete_command(document)}), "
                raise self._types.not_widened(name, f'document "{document}" of the index', value, remove)


def lies_in(document: str, paths: Container[str]) -> bool:
    """Whether a document's id is one of `paths`, or lies in one of them as a folder."""
    ends = [position for position, character in enumerate(document) if character == "/"]
    return document in paths or any(document[:end] in paths for end in ends)


def _is_stored(row: dict[str, Any], stored: StoredRow | None) -> bool:
    return stored is not None and (stored.row_hash, stored.source) == (row[ROW_HASH], row[SOURCE])


def _conflict(source: str | None) -> str:
    """Why a document is left out whose id belongs to `source`."""
    reason = f'the source "{source}" has a document of this id; --take-over replaces it'
    return reason if source == API else f'{reason}, --source "{source}" says that this is the same source'

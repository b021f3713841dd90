"""Building an index of any backend: its rows are compared with the documents in memory, and differences are written.

LanceDB has a separate build (`search_r3.index.build.build_run`), which looks up only the rows that a batch of documents
concerns. Here an index knows its sources only from its rows, and ids are the documents' own: no source gets a prefix.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from search_r3.errors import InputError
from search_r3.index.backends.backend_registry import MARKER, create_backend, open_portable
from search_r3.index.backends.index_backend import IndexBackend, Row
from search_r3.index.backends.lance.durable import flush
from search_r3.index.backends.lance.table_rows import make_row
from search_r3.index.build.build_progress import BuildProgress, shown_progress
from search_r3.index.build.build_report import IndexReport, Removal
from search_r3.index.build.embedding import BATCH_TOKENS, embed, prepare, token_limit
from search_r3.index.build.index_diff import lies_in
from search_r3.index.build.relevance_floor import keep_floor
from search_r3.index.chunking.chunker import chunk_document
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.index_info import IndexInfo
from search_r3.index.index_sources import API, Sources
from search_r3.index.readers.path_source import Amount, PathSource
from search_r3.index.row_keys import COLUMNS, CONTENT, PLACE, ROW_HASH, SOURCE, TEXT_HASH
from search_r3.index.source_document import Skipped, SourceDocument
from search_r3.index.storage.location import Location
from search_r3.index.storage.locking import OURS

COMMIT_ROWS = 8192  # rows embedded and written together


class PortableBuild:
    """One run over an index of any backend.

    Args:
        location: the folder, or the collection.
        kind: the backend.
        model: embeds the chunks; an existing index must have been made with it.
        max_length: maximum number of tokens of a chunk.
        batch: maximum numbers of tokens and of texts of a forward pass.
        beside: build a new index, which `finish` puts in the place of the one that is there.
    """

    def __init__(
        self,
        location: Location,
        kind: type[IndexBackend],
        model: Encoder,
        max_length: int | None,
        batch: tuple[int, int | None],
        beside: bool = False,
    ) -> None:
        self.location, self.kind, self.model, self.max_length, self._batch = location, kind, model, max_length, batch
        self.report, self._beside = IndexReport(), beside
        self.backend = None if beside else open_portable(kind, location)
        if self.backend is not None:
            self.backend.info.check_model(model, location)
        elif isinstance(location, Path) and not beside:
            others = [item.name for item in location.iterdir() if item.name not in {*OURS, MARKER}]
            if others:
                raise InputError(
                    f"{location} contains other files ({', '.join(sorted(others)[:3])}); give a new folder"
                )
        stored = () if self.backend is None else self.backend.compared_rows()
        self._stored: dict[str, Row] = {row["id"]: row for row in stored}
        self._chunks_of: defaultdict[str, set[str]] = defaultdict(set)  # document -> ids of its chunks
        for row in self._stored.values():
            self._chunks_of[row["document"]].add(row["id"])
        self._id_of_text = {row[TEXT_HASH]: row["id"] for row in self._stored.values()}
        self._given: dict[str, str] = {}  # document -> where it was read
        self._limit = token_limit(model, max_length)

    def write(
        self,
        documents: Iterable[SourceDocument],
        source: str | None,
        take_over: bool,
        commit_rows: int,
        shown: BuildProgress,
    ) -> None:
        """Write the changes that the source's documents make, `commit_rows` rows at a time.

        Raises:
            InputError: a document is malformed, its id is used twice, or the model returned NaN or the wrong dimension.
        """
        scope = Sources().scope(documents, source, self.location, take_over)
        name = self.report.source = scope.record.name
        if isinstance(documents, PathSource):
            documents.may_be_empty &= any(row[SOURCE] == name for row in self._stored.values())
        rows: dict[str, Row] = {}
        stale: set[str] = set()
        for document in documents:
            if (first := self._given.get(document.id)) is not None:
                raise InputError(
                    f'the id "{document.id}" is used twice: at {first} and at {document.place}; make ids unique'
                )
            self._given[document.id] = document.place
            new = {row["id"]: row for row in self._rows_of(document, name)}
            stored = self._chunks_of.get(document.id, set())
            owners = {self._stored[identifier][SOURCE] for identifier in stored} - {name}
            if owners and not take_over:
                if {(one, self._stored[one][ROW_HASH]) for one in stored} == {(one, new[one][ROW_HASH]) for one in new}:
                    self.report.documents += 1
                    self.report.unchanged += len(new)
                else:
                    reason = f'the source "{min(owners)}" has a document of this id; --take-over replaces it'
                    self.report.conflicts.append(Skipped(document.id, reason))
                continue
            self.report.documents += 1
            rows |= new
            stale |= stored - new.keys()
            if len(rows) >= commit_rows:
                self._commit(rows, stale, shown, getattr(documents, "position", Amount()))
                rows, stale = {}, set()
        self._commit(rows, stale, shown, getattr(documents, "position", Amount()))

    def prune(self, skipped: Iterable[Skipped], may_prune: Callable[[Removal], bool] | None) -> None:
        """Remove documents that the source no longer has, if `may_prune` allows it; unreadable ones stay."""
        unread = {item.path for item in skipped if item.unread}
        own = [row for row in self._stored.values() if row[SOURCE] == self.report.source]
        gone = [row for row in own if row["document"] not in self._given and not lies_in(row["document"], unread)]
        removal = Removal(len(gone), len({row["document"] for row in gone}), len(own))
        if gone and may_prune is not None and not may_prune(removal):
            self.report.kept = removal
        elif gone:
            self._delete({row["id"] for row in gone})

    def finish(self, measure: bool) -> None:
        """Publish what was built beside the index in use.

        Args:
            measure: measure the relevance floor again if that is due.

        Raises:
            InputError: there were no documents.
        """
        if self.backend is None:
            raise InputError("no documents were given; the index is unchanged")
        changed = self.report.added or self.report.updated or self.report.removed
        if measure and changed and "records" in self.kind.capabilities:
            keep_floor(self.backend, self.model)
        if self._beside:
            self.backend.publish()

    def _rows_of(self, document: SourceDocument, source: str) -> Iterable[Row]:
        for chunk in chunk_document(document, tokens=self._limit):
            row = make_row(chunk, self.max_length, source, document.place)
            yield {name: value for name, value in row.items() if name not in (COLUMNS, PLACE)}

    def _commit(self, rows: dict[str, Row], stale: set[str], shown: BuildProgress, position: Amount) -> None:
        new = [row for row in rows.values() if not _is_stored(row, self._stored.get(row["id"]))]
        updated = sum(row["id"] in self._stored for row in new)
        self.report.unchanged += len(rows) - len(new)
        self.report.updated += updated
        self.report.added += len(new) - updated
        unknown = {row[TEXT_HASH] for row in new} - self._id_of_text.keys()
        shown.begin_batch(position, len(unknown), len(rows))
        if new:
            vectors = self._vectors(new, shown)
            if self.backend is None:
                create = self.kind.create_beside if self._beside else None
                self.backend = create_backend(self.kind, self.location, IndexInfo.of(self.model), create)
            self.backend.add(new, vectors)
            self._stored |= {row["id"]: row for row in new}
        self._delete(stale - rows.keys())
        shown.end_batch(len({row["document"] for row in rows.values()}))

    def _vectors(self, rows: Sequence[Row], shown: BuildProgress) -> np.ndarray:
        """Vectors of `rows`, (rows, dimension) float32: the index's own where it has the same text, else new ones."""
        texts: dict[str, str] = {}
        names: list[str] = []
        for row in rows:
            if row[TEXT_HASH] not in self._id_of_text and row[TEXT_HASH] not in texts:
                texts[row[TEXT_HASH]] = row[CONTENT].strip()
                names.append(row["id"])
        prepared = prepare(self.model, list(texts.values()), self.max_length, *self._batch)
        matrix = embed(self.model, prepared, names, self.max_length, shown.advance)
        vector_of = dict(zip(texts, matrix, strict=True))
        known = {row[TEXT_HASH]: self._id_of_text[row[TEXT_HASH]] for row in rows if row[TEXT_HASH] in self._id_of_text}
        if known and self.backend is not None:
            vector_of |= dict(zip(known, self.backend.vectors(list(known.values())), strict=True))
        self.report.embedded += len(texts)
        self.report.truncated += prepared.truncated
        return np.stack([vector_of[row[TEXT_HASH]] for row in rows])

    def _delete(self, ids: Collection[str]) -> None:
        if ids and self.backend is not None:
            self.backend.delete(ids)
            self.report.removed += len(ids)
            for identifier in ids:
                self._stored.pop(identifier, None)
            self._id_of_text = {row[TEXT_HASH]: row["id"] for row in self._stored.values()}


def build_portable(
    location: Location,
    kind: type[IndexBackend],
    documents: Iterable[SourceDocument],
    model: Encoder,
    *,
    batch_tokens: int,
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: bool | Callable[[str], None] = True,
    prune: bool = True,
    commit_every: int | None = None,
    wait: float = 0.0,
    source: str | None = None,
    take_over: bool = False,
    may_prune: Callable[[Removal], bool] | None = None,
    exchange: bool = False,
) -> IndexReport:
    """`build_index` for an index of the backend `kind`, with the same options.

    Raises:
        IndexBusy: another process is writing.
        InputError: as `build_index`.
    """
    started, began = time.perf_counter(), time.time()
    with kind.writing(location, make=True, wait=wait):
        build = PortableBuild(location, kind, model, max_length, (batch_tokens, batch_size), exchange)
        with shown_progress(documents, progress) as shown:
            build.write(documents, source, take_over, commit_every or COMMIT_ROWS, shown)
        build.report.skipped = list(getattr(documents, "skipped", []))
        if prune:
            build.prune(build.report.skipped, may_prune)
        build.finish(measure=prune or commit_every is None)  # not after each write of a server
        flush(location, began)
    build.report.seconds = time.perf_counter() - started
    return build.report


def missing_vectors(
    backend: IndexBackend, documents: Sequence[SourceDocument], model: Encoder
) -> tuple[dict[str, np.ndarray], int]:
    """Embed the documents' texts that an index lacks; returns the embeddings by text, and the number of chunks."""
    limit = token_limit(model, None)
    known = {row[TEXT_HASH] for row in backend.compared_rows()}
    texts: dict[str, str] = {}  # text -> id of the first chunk that has it
    chunks = 0
    for document in documents:
        for chunk in chunk_document(document, tokens=limit):
            row = make_row(chunk, None, API, document.place)
            chunks += 1
            if row[TEXT_HASH] not in known:
                texts.setdefault(row[CONTENT].strip(), chunk.id)
    matrix = embed(model, prepare(model, list(texts), None, BATCH_TOKENS, None), list(texts.values()), None)
    return dict(zip(texts, matrix, strict=True)), chunks


def delete_rows(
    location: Location, kind: type[IndexBackend], unwanted: Callable[[Row], bool], wait: float = 0.0
) -> list[Row]:
    """Remove the rows for which `unwanted` is true, in one call of the backend; returns them.

    Raises:
        IndexBusy: another process is writing.
    """
    began = time.time()
    with kind.writing(location, wait=wait):
        backend = open_portable(kind, location)
        gone = [] if backend is None else [row for row in backend.compared_rows() if unwanted(row)]
        if backend is not None and gone:
            backend.delete({row["id"] for row in gone})
        flush(location, began)
    return gone


def _is_stored(row: Row, stored: Row | None) -> bool:
    return stored is not None and (stored[ROW_HASH], stored[SOURCE]) == (row[ROW_HASH], row[SOURCE])

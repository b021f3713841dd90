"""Building an index and keeping it up to date: only what changed is embedded, and work done is never done twice.

Reading, tokenizing, embedding and writing go on side by side (`flow`), with so little between them that memory does not
grow with the corpus. What was committed is kept whatever happens; run again, a build recognises it and goes on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.approximate import APPROXIMATE_FROM, encoder_of, keep_approximate
from search_r3.index.build_report import IndexReport, Removal, progress_line
from search_r3.index.changes import Changes, Window
from search_r3.index.chunk_ids import rename_old_ids
from search_r3.index.compaction import Tidied, forget_is_due, forget_versions, tidy
from search_r3.index.conversion import Replacing, check_fields, give_types, widen
from search_r3.index.duplicates import remove_equal_copies
from search_r3.index.durable import DiskError, flush
from search_r3.index.embedding import BATCH_TOKENS, Prepared, embed, prepare, token_limit
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.full_text import ensure_full_text, full_text_state
from search_r3.index.index_sources import (
    DOCUMENTS,
    Scope,
    SourceRecord,
    Sources,
    count_unknown,
    keep_sources,
    read_sources,
    source_condition,
)
from search_r3.index.locking import OURS, Held, writing
from search_r3.index.pipeline import Pipe, run_stage, start_stage
from search_r3.index.readers import Source
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage import Place, brief, explained, for_writing
from search_r3.index.table import (
    COMPLETE,
    TABLE,
    IndexInfo,
    SearchIndex,
    create_table,
    ensure_complete,
    ensure_lookups,
    location,
    mark_complete,
    migrate_rows,
    open_table,
)
from search_r3.index.table_columns import (
    TEXT_HASH,
    ColumnTypes,
    new_columns,
    parse_types,
    quoted,
    table_schema,
    text_fields,
)
from search_r3.index.table_rows import as_arrow

COMMIT_CHUNKS = 256  # on two CPU cores some ten seconds of embedding
COMMIT_SECONDS = 10.0  # the most that an interruption costs; a fast GPU must not make a version for every 256 chunks
COMMIT_AT_MOST = 8192  # chunks that wait for a commit: about 50 MB
ONE_COMMIT = 10**9  # chunks; `commit_every` for changes that are made all at once
WAITING, STOP_SECONDS = 2, 1.0  # windows between two stages; the wait for a source that does not answer
IDS_A_COMMIT = 5000  # ids in one SQL condition of a deletion


def build_index(
    path: str | Path,
    documents: Iterable[SourceDocument],
    model: Encoder,
    *,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    progress: bool = True,
    prune: bool = True,
    commit_every: int | None = None,
    approximate_from: int | None = APPROXIMATE_FROM,
    queries: Sequence[str] = (),
    wait: float = 0.0,
    maintain: bool = True,
    source: str | None = None,
    take_over: bool = False,
    may_prune: Callable[[Removal], bool] | None = None,
    types: Mapping[str, str] | None = None,
) -> IndexReport:
    """Make the index in the folder `path`, or bring its documents of one source up to date with `documents`.

    Each document belongs to a source: the folder or file that it was read from, or what `source` says. Documents of
    other sources stay as they are. A folder inside one that the index has is a part of that source, and a folder around
    some takes them over. The second folder of an index has its name in front of its ids.

    A chunk whose text, title and `max_length` are as before is not embedded again, even if its metadata changed or it
    moved to another place in its file. A document that is given replaces what the index has under its id: all of its
    chunks change in one commit.

    Args:
        path: a new or empty folder, or an index that a model of the same contract made; or a URI ("s3://bucket/index").
        documents: what to index, usually `open_source(...)`; its `skipped` goes into the report. Read in a thread.
        model: embeds the chunks: "title text", as documents.
        batch_size: most texts per forward pass; None leaves it to `batch_tokens`.
        batch_tokens: most tokens per forward pass, padding included.
        max_length: tokens that a chunk, with its title, may have; 512 by default. Longer text is put into more chunks.
        progress: show a line on stderr if that is a terminal.
        prune: remove the documents that `documents` no longer has, of those of the same source. False keeps them.
        commit_every: chunks per commit; a document is never in two. None commits every ten seconds, 256 to 8,192
            chunks, and what is ready when a build is interrupted. With `ONE_COMMIT` and without `prune` an index that
            was whole is whole at every moment.
        approximate_from: rows from which on the index gets an approximate one (`search_r3.index.approximate`); None
            builds none.
        queries: real queries, at most 200 of which the approximate index's recall is measured with, besides rows.
        wait: seconds to wait for another writer to end.
        maintain: compact files, fold new rows into the indexes and remove old versions where that is due
            (`search_r3.index.compaction`). With False somebody else must call `maintain_index` now and then; only for
            an index that is whole, written with `ONE_COMMIT`.
        source: a name for the source, which stays the same wherever the documents are read from.
        take_over: replace documents of other sources that have the same ids. Otherwise such documents are left out and
            reported in `conflicts`, unless they are equal.
        may_prune: asked before anything is removed that the source no longer has; False keeps it.
        types: of metadata fields, by name: "text", "integer", "number" or "true/false". A column of another type is
            converted in place.

    Raises:
        IndexBusy: another process is writing, or took over while this one was paused.
        StorageError: object storage failed or did not answer, or the disk is full or fails (DiskError); what was
            committed is kept.
        InputError: a document is broken or its id comes twice, the index was made with another model, the folder holds
            something else, the source's name cannot be used, metadata does not fit its column, or the model gave NaN
            or the wrong dimension (nothing of that batch is written).
    """
    started = time.perf_counter()
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("commit_every", commit_every)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    report = IndexReport()
    place = for_writing(location(path))
    with explained(place), writing(place, make=True, wait=wait) as held:
        build = _Build(place, held, model, commit_every, report, at_once=commit_every == ONE_COMMIT and not prune)
        changes = build.begin(documents, source, take_over, types, max_length, prune)
        with progress_line(progress and sys.stderr.isatty()) as show:
            _run(build, changes, documents, show, batch_tokens, batch_size)
        build.finish(changes, prune, may_prune, approximate_from, queries, maintain)
        changes.close()
    report.skipped = list(getattr(documents, "skipped", []))
    report.seconds = time.perf_counter() - started
    return report


def _run(
    build: _Build, changes: Changes, documents: Iterable[SourceDocument], show: Any, batch_tokens: int, most: int | None
) -> None:
    """The stages: reading, tokenizing and writing in threads of their own, embedding in this one."""
    model, report = build.model, build.report
    window_size = min(build.commit_every or COMMIT_CHUNKS, COMMIT_CHUNKS)

    def tokenize(window: Window) -> tuple[Window, Prepared]:
        return window, prepare(model, list(window.texts.values()), changes.max_length, batch_tokens, most)

    def encode(given: tuple[Window, Prepared]) -> Window:
        window, prepared = given
        matrix = embed(model, prepared, window.names, changes.max_length)
        vector_of = window.held | dict(zip(window.texts, matrix, strict=True))
        if window.rows:
            window.vectors = np.stack([vector_of[row[TEXT_HASH]] for row in window.rows])
        report.documents += window.documents
        report.embedded += len(matrix)
        report.truncated += prepared.truncated
        show(report)
        return window

    read: Pipe[Window] = Pipe(WAITING)
    tokenized: Pipe[tuple[Window, Prepared]] = Pipe(WAITING)
    encoded: Pipe[Window] = Pipe(WAITING)
    reader = start_stage("read", changes.windows(documents, window_size), lambda window: window, read)
    start_stage("tokenize", read, tokenize, tokenized)
    writer = _Writer(build, encoded)
    writer.start()
    run_stage(tokenized, encode, encoded)
    try:
        writer.join()
    except KeyboardInterrupt:
        writer.join()  # a commit that has begun is done in a moment; the lock is held until then
        raise
    finally:
        reader.join(STOP_SECONDS)  # longer only if it waits for a source that does not answer; it writes nothing
    if writer.error is not None:
        raise writer.error


class _Writer(threading.Thread):
    """Commits what comes. `error` is its own, or the one that ended what came."""

    def __init__(self, build: _Build, encoded: Pipe[Window]) -> None:
        super().__init__(name="write", daemon=True)
        self.build, self.encoded = build, encoded
        self.error: BaseException | None = None

    def run(self) -> None:
        waiting: list[Window] = []
        last = time.monotonic()
        exact = self.build.commit_every
        try:
            try:
                for window in self.encoded:
                    waiting.append(window)
                    count = sum(len(held.rows) for held in waiting)
                    late = time.monotonic() - last >= COMMIT_SECONDS or count >= COMMIT_AT_MOST
                    if count >= (exact or COMMIT_CHUNKS) and (exact or late):
                        ready, waiting = waiting, []
                        self.build.commit(ready)
                        last = time.monotonic()
            except BaseException:
                if exact is None and waiting:  # an interruption costs nothing that is embedded already
                    self.build.commit(waiting)
                raise
            self.build.commit(waiting)
        except BaseException as error:
            self.error = error
        self.encoded.abandon()


class _Build:
    """One run of `build_index`: the index as it was when the run began, and the writing of what comes."""

    def __init__(
        self,
        path: Place,
        held: Held,
        model: Encoder,
        commit_every: int | None,
        report: IndexReport,
        at_once: bool = False,
    ) -> None:
        self.model, self.path, self.commit_every, self.report = model, path, commit_every, report
        self.held, self.began = held, time.time()
        self.at_once = at_once  # one commit changes all that will change: the index is whole before it and behind it
        self.table: Any = open_table(path)
        self.schema = table_schema(model.dimension)
        self.before: Any = None
        self.sources = Sources()
        self.scope = Scope(SourceRecord(DOCUMENTS))
        self.declared: dict[str, pa.DataType] = {}
        self.touched = self.may_be_empty = False
        self.first = self.was_complete = True
        self.brings_all = False  # of its source, so an earlier run that was interrupted does not count any more
        self.brought = False
        if self.table is None:
            if isinstance(path, Path):
                strangers = [item.name for item in path.iterdir() if item.name not in {*OURS, f"{TABLE}.lance"}]
                if strangers:
                    raise InputError(
                        f"{path} holds other things ({', '.join(sorted(strangers)[:3])}); give a new folder"
                    )
            return
        index = SearchIndex.open(path)
        index.check_model(model)
        migrate_rows(self.table)
        self.was_complete = index.complete
        self.touched = not self.was_complete
        if self.touched:  # the crash may have come between the table and its full-text index
            ensure_full_text(self.table, rebuild=False)
        if not at_once:
            report.duplicates_removed, report.differing = remove_equal_copies(self.table)
        if rename_old_ids(self.table) and not self.touched:
            mark_complete(self.table)
        ensure_lookups(self.table)
        self.first = len(index) == 0
        self.was_complete |= self.first

    def begin(
        self,
        documents: Iterable[SourceDocument],
        source: str | None,
        take_over: bool,
        types: Mapping[str, str] | None,
        max_length: int | None,
        prune: bool,
    ) -> Changes:
        """Find out what the documents are to the index, and convert the columns whose types are given."""
        self.declared = parse_types(types)
        self.sources = Sources.of(self.table)
        self.scope = self.sources.scope(documents, source, self.path, take_over)
        self.report.source = self.scope.record.name
        self.brings_all = not self.at_once and self.scope.whole and (prune or isinstance(documents, Source))
        self.schema = self.schema if self.table is None else self.table.schema
        replacing = None
        if isinstance(documents, Source):
            documents.text_columns = text_fields(self.schema, self.declared)
            self.may_be_empty = self.scope.allow_empty(documents, self.path)
            check_fields(self.schema, types or {}, documents)
            replacing = Replacing(lambda: self.scope.documents(documents), self.scope.own, take_over)
        if self.table is not None:
            self.touched |= give_types(self.table, self.declared, replacing)
            self.schema = self.table.schema
        if self.table is not None and not self.first:
            self.before = open_table(self.path)  # a second handle, held at the version the run starts from
            self.before.checkout(self.table.version)
        limit = token_limit(self.model, max_length)
        return Changes(self.before, ColumnTypes(self.schema, self.declared), max_length, self.scope, limit)

    def commit(self, windows: list[Window]) -> None:
        """Write the windows' changes in one commit."""
        rows = [row for window in windows for row in window.rows]
        given = {row["id"] for row in rows}
        stale = [identifier for window in windows for identifier in window.stale if identifier not in given]
        try:
            if rows:
                self._touch()
                for window in windows:
                    self.add_columns(window.columns, window.widened)
                vectors = np.concatenate([window.vectors for window in windows if window.vectors is not None])
                together = stale if len(stale) <= IDS_A_COMMIT else []
                self._merge(rows, vectors, together, fresh=all(window.fresh for window in windows))
                stale = [] if together else stale
            self._delete(stale)
        except (OSError, RuntimeError) as error:
            if "No space left" not in str(error) and "Disk quota" not in str(error):
                raise
            raise DiskError(
                f"the disk of {self.path} is full ({brief(error)}); what was committed is kept: free some space and "
                "run the same command again"
            ) from error
        for window in windows:
            self.report.unchanged += window.unchanged
            self.report.updated += window.updated
            self.report.added += len(window.rows) - window.updated
            self.report.removed += len(window.stale)

    def add_columns(self, new: Mapping[str, pa.DataType], widened: Iterable[str]) -> None:
        """Make room for metadata: columns that the table lacks, and numbers in columns of integers."""
        for name in sorted(widened):
            widen(self.table, name)
        if new:
            self.table.add_columns(new_columns(new, self.declared))

    def finish(
        self,
        changes: Changes,
        prune: bool,
        may_prune: Callable[[Removal], bool] | None,
        approximate_from: int | None,
        queries: Sequence[str],
        maintain: bool = True,
    ) -> None:
        """Remove what is gone, do the maintenance that is due, mark the index complete, and see it on the disk."""
        if not changes.seen and not self.may_be_empty:
            raise InputError("no documents were given; the index is unchanged")
        self.report.conflicts = changes.conflicts
        self._prune(changes, prune, may_prune)
        if self.report.differing:  # what of them was written again is equal now
            self.held.check()
            removed, self.report.differing = remove_equal_copies(self.table)
            self.report.duplicates_removed += removed
        if maintain or not self.at_once or self.first:
            self._maintain(approximate_from, queries)
        else:
            self._complete(ensure_complete)
        flush(self.path, self.began)

    def _maintain(self, approximate_from: int | None, queries: Sequence[str]) -> None:
        if self.table is not None and full_text_state(self.table) != "current":
            self._touch()  # it is rebuilt, though no document changed
        self.held.check()
        tidied = tidy(self.table, self.path, everything=self.first) if self.touched else Tidied()
        self.report.full_text_rebuilt = tidied.full_text_rebuilt
        self.held.check()
        encode = encoder_of(self.model, queries)
        found = keep_approximate(self.table, approximate_from, encode, self.held.check)
        self.held.check()
        self.report.approximate = found.to_dict() if found else None
        if not self.touched or (self.at_once and not tidied.changed and not forget_is_due(self.table)):
            self._complete(ensure_complete)
            return
        self._complete(mark_complete)
        if self.first and not self.at_once:  # nobody searched it before
            forget_versions(self.path, timedelta(0))
        else:
            forget_versions(self.path)

    def _complete(self, mark: Callable[[Any], None]) -> None:
        """Say that the index is whole; not if a run of another source was interrupted, and not after a few documents
        that were added to an index of which something is missing."""
        unfinished = any(record.unfinished for record in read_sources(self.table.schema).values())
        if not unfinished and (self.was_complete or not self.at_once):
            mark(self.table)

    def _prune(self, changes: Changes, prune: bool, may_prune: Callable[[Removal], bool] | None) -> None:
        if prune and may_prune is not None and (removal := changes.removal()).chunks and not may_prune(removal):
            self.report.kept, prune = removal, False
        gone: list[str] = []
        for ids in changes.gone(lost=prune):
            gone += ids
            self.report.removed += len(ids)
            if len(gone) >= IDS_A_COMMIT:
                self._delete(gone)
                gone = []
        self._delete(gone)
        if self.table is not None:
            left = [held.name for held in self.scope.absorbed if self.table.count_rows(source_condition([held.name]))]
            self.brought = True
            self.held.check()
            keep_sources(self.table, self._records(left))
        if prune and self.before is not None:
            self.report.unknown = count_unknown(self.table)

    def _records(self, left: list[str] | None = None) -> list[SourceRecord]:
        """The index's sources with this run's; without those that it absorbed, but for `left`, where that is known."""
        gone = {held.name for held in self.scope.absorbed}.difference(left) if left is not None else set()
        records = {name: record for name, record in self.sources.records.items() if name not in gone}
        own = replace(self.scope.record, unfinished=not self.brought) if self.brings_all else self.scope.record
        return list((records | {own.name: own}).values())

    def _delete(self, ids: list[str]) -> None:
        for start in range(0, len(ids), IDS_A_COMMIT):
            self._touch()
            some = ids[start : start + IDS_A_COMMIT]
            self.table.delete(f"id IN ({quoted(some)})")

    def _touch(self) -> None:
        """Before the first change: the table exists, and does not say that it is complete while it is not."""
        self.held.check()
        if self.table is None:
            self.table = create_table(self.path, IndexInfo.of(self.model), self._records())
        if not self.at_once and COMPLETE in self.table.tags.list():
            self.table.tags.delete(COMPLETE)
        keep_sources(self.table, self._records())
        self.touched = True

    def _merge(self, rows: list[dict[str, Any]], vectors: np.ndarray, stale: list[str], fresh: bool) -> None:
        batch = as_arrow(rows, vectors, self.table.schema)
        if fresh and not stale:
            self.table.add(batch)  # no look at what is there: a first build's commits all cost the same
            return
        merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        if stale:
            merge = merge.when_not_matched_by_source_delete(f"id IN ({quoted(stale)})")
        merge.execute(batch)

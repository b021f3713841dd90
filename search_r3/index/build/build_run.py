"""One run of a build over a LanceDB index: the state it starts from, its commits, and the maintenance that ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.backends.lance.approximate import encoder_of, keep_approximate
from search_r3.index.backends.lance.compaction import CompactionResult, cleanup_is_due, cleanup_old_versions, compact
from search_r3.index.backends.lance.conversion import Replacing, check_fields, give_types, widen
from search_r3.index.backends.lance.duplicates import remove_equal_copies
from search_r3.index.backends.lance.durable import DiskError, flush
from search_r3.index.backends.lance.full_text import ensure_full_text, full_text_state
from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.backends.lance.lance_table import (
    TABLE,
    ensure_complete,
    ensure_lookups,
    mark_complete,
    mark_incomplete,
    migrate_rows,
    rename_old_ids,
)
from search_r3.index.backends.lance.table_columns import (
    IDS_AT_ONCE,
    ColumnTypes,
    in_parts,
    new_columns,
    parse_types,
    table_schema,
    text_fields,
)
from search_r3.index.backends.lance.table_sources import count_unknown, read_sources, write_sources
from search_r3.index.build.build_report import IndexReport, Removal
from search_r3.index.build.embedding import token_limit
from search_r3.index.build.index_diff import ChangeBatch, IndexDiff
from search_r3.index.build.relevance_floor import keep_floor
from search_r3.index.chunking.chunking_cache import ChunkingCache
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.index_info import IndexInfo
from search_r3.index.index_sources import DOCUMENTS, Scope, SourceRecord, Sources
from search_r3.index.readers.path_source import PathSource
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import Location, brief
from search_r3.index.storage.locking import OURS, WriteLock


class BuildRun:
    """One run of a build: the index as it was when the run began, and the commits it makes.

    Args:
        path: the index, protected from other writers by `lock`.
        commit_every: chunks per commit, or None.
        report: filled in as the run proceeds.
        at_once: a single commit makes all changes, so the index is complete before and after it (documents that some
            paths no longer have are removed in a second one).
    """

    def __init__(
        self,
        path: Location,
        lock: WriteLock,
        model: Encoder,
        commit_every: int | None,
        report: IndexReport,
        at_once: bool = False,
    ) -> None:
        self.model, self.path, self.commit_every, self.report = model, path, commit_every, report
        self.lock, self.began = lock, time.time()
        self.at_once = at_once
        self.index: LanceBackend | None = LanceBackend.open(path)
        self.schema = table_schema(model.dimension)
        self.before: LanceBackend | None = None
        self.sources = Sources()
        self.scope = Scope(SourceRecord(DOCUMENTS))
        self.declared: dict[str, pa.DataType] = {}
        self.touched = self.may_be_empty = False
        self.first = self.was_complete = True
        self.reads_whole_source = False  # then an earlier, interrupted run of the source no longer counts
        self.finished_reading = False
        if self.index is None:
            if isinstance(path, Path):
                others = [item.name for item in path.iterdir() if item.name not in {*OURS, f"{TABLE}.lance"}]
                if others:
                    raise InputError(
                        f"{path} contains other files ({', '.join(sorted(others)[:3])}); give a new folder"
                    )
            return
        self.index.info.check_model(model, path)
        migrate_rows(self.table)
        self.was_complete = self.index.complete
        self.touched = not self.was_complete
        if self.touched:  # a crash may have left the table without its full-text index
            ensure_full_text(self.table, rebuild=False)
        if not at_once:
            report.duplicates_removed, report.differing = remove_equal_copies(self.table)
        if rename_old_ids(self.table) and not self.touched:
            mark_complete(self.table)
        ensure_lookups(self.table)
        self.first = self.index.count() == 0
        self.was_complete |= self.first

    @property
    def table(self) -> Any:
        """The LanceDB table, once there is one."""
        assert self.index is not None
        return self.index.table

    def begin(
        self,
        documents: Iterable[SourceDocument],
        source: str | None,
        take_over: bool,
        types: Mapping[str, str] | None,
        max_length: int | None,
        prune: bool,
    ) -> IndexDiff:
        """Determine the documents' source and scope, and convert the columns whose types are given."""
        self.declared = parse_types(types)
        self.sources = Sources.of(self.index)
        self.scope = self.sources.scope(documents, source, self.path, take_over)
        self.report.source = self.scope.record.name
        self.reads_whole_source = not self.at_once and self.scope.whole and (prune or isinstance(documents, PathSource))
        self.schema = self.schema if self.index is None else self.table.schema
        replacing = None
        if isinstance(documents, PathSource):
            documents.text_columns = text_fields(self.schema, self.declared)
            self.may_be_empty = self.scope.allow_empty(documents, self.path)
            check_fields(self.schema, types or {}, documents)
            replacing = Replacing(lambda: self.scope.documents(documents), self.scope.own, take_over)
        if self.index is not None:
            self.touched |= give_types(self.table, self.declared, replacing)
            self.schema = self.table.schema
        if self.index is not None and not self.first:
            self.before = self.index.pinned()
        limit = token_limit(self.model, max_length)
        cuts = ChunkingCache.of(self.model.contract_hash, max_length)
        types_so_far = ColumnTypes(self.schema, self.declared)
        return IndexDiff(self.before, types_so_far, max_length, self.scope, limit, cuts)

    def commit(self, batches: list[ChangeBatch]) -> None:
        """Write the changes of these batches in one commit."""
        rows = [row for batch in batches for row in batch.rows]
        given = {row["id"] for row in rows}
        stale = [identifier for batch in batches for identifier in batch.stale if identifier not in given]
        try:
            if rows:
                index = self.touch()
                for batch in batches:
                    self.add_columns(batch.columns, batch.widened)
                vectors = np.concatenate([batch.vectors for batch in batches if batch.vectors is not None])
                together = stale if len(stale) <= IDS_AT_ONCE else []
                index.merge(rows, vectors, together, fresh=all(batch.fresh for batch in batches))
                stale = [] if together else stale
            self._delete(stale)
        except (OSError, RuntimeError) as error:
            if "No space left" not in str(error) and "Disk quota" not in str(error):
                raise
            raise DiskError(
                f"the disk of {self.path} is full ({brief(error)}); what was committed is kept: free some space and "
                "run the same command again"
            ) from error
        for batch in batches:
            self.report.unchanged += batch.unchanged
            self.report.updated += batch.updated
            self.report.added += len(batch.rows) - batch.updated
            self.report.removed += len(batch.stale)

    def add_columns(self, new: Mapping[str, pa.DataType], widened: Iterable[str]) -> None:
        """Add the metadata columns that the table lacks, and widen integer columns to numbers."""
        for name in sorted(widened):
            widen(self.table, name)
        if new:
            self.table.add_columns(new_columns(new, self.declared))

    def finish(
        self,
        diff: IndexDiff,
        prune: bool,
        may_prune: Callable[[Removal], bool] | None,
        approximate_from: int | None,
        queries: Sequence[str],
        maintain: bool = True,
    ) -> None:
        """Remove what is gone, do the maintenance that is due, mark the index complete, and flush it to disk."""
        if not diff.seen and not self.may_be_empty:
            raise InputError("no documents were given; the index is unchanged")
        self.report.conflicts = diff.conflicts
        self._prune(diff, prune, may_prune)
        if self.report.differing:  # rows that this run rewrote are equal now
            self.lock.check()
            removed, self.report.differing = remove_equal_copies(self.table)
            self.report.duplicates_removed += removed
        if maintain or not self.at_once or self.first:
            self._maintain(approximate_from, queries)
        else:
            self._complete(ensure_complete)
        flush(self.path, self.began)

    def _maintain(self, approximate_from: int | None, queries: Sequence[str]) -> None:
        if self.index is not None and full_text_state(self.table) != "current":
            self.touch()  # it will be rebuilt even though no document changed
        self.lock.check()
        compaction = compact(self.table, self.path, everything=self.first) if self.touched else CompactionResult()
        self.report.full_text_rebuilt = compaction.full_text_rebuilt
        self.lock.check()
        encode = encoder_of(self.model, queries)
        approximate = keep_approximate(self.table, approximate_from, encode, self.lock.check)
        self.lock.check()
        self.report.approximate = approximate.to_dict() if approximate else None
        if self.touched and not self.at_once and self.index is not None:
            keep_floor(self.index, self.model)
        if not self.touched or (self.at_once and not compaction.changed and not cleanup_is_due(self.table)):
            self._complete(ensure_complete)
            return
        self._complete(mark_complete)
        if self.first and not self.at_once:  # nobody can be searching it yet
            cleanup_old_versions(self.path, timedelta(0))
        else:
            cleanup_old_versions(self.path)

    def _complete(self, mark: Callable[[Any], None]) -> None:
        """Mark the index complete, unless a run of another source was interrupted, or a few documents were added to an
        index that was incomplete."""
        unfinished = any(record.unfinished for record in read_sources(self.table.schema).values())
        if not unfinished and (self.was_complete or not self.at_once):
            mark(self.table)

    def _prune(self, diff: IndexDiff, prune: bool, may_prune: Callable[[Removal], bool] | None) -> None:
        if prune and may_prune is not None and (removal := diff.removal()).chunks and not may_prune(removal):
            self.report.kept, prune = removal, False
        gone: list[str] = []
        for ids in diff.gone(lost=prune):
            gone += ids
            self.report.removed += len(ids)
            if len(gone) >= IDS_AT_ONCE:
                self._delete(gone)
                gone = []
        self._delete(gone)
        if self.index is not None:
            left = [source.name for source in self.scope.absorbed if self.index.count_of_sources([source.name])]
            self.finished_reading = True
            self.lock.check()
            write_sources(self.table, self._records(left))
        if prune and self.before is not None and not self.at_once:
            self.report.unknown = count_unknown(self.table)

    def _records(self, left: list[str] | None = None) -> list[SourceRecord]:
        """The index's sources including this run's, without those it absorbed.

        Args:
            left: absorbed sources that still have rows and stay; None if that is not known yet: all stay.
        """
        gone = {source.name for source in self.scope.absorbed}.difference(left) if left is not None else set()
        records = {name: record for name, record in self.sources.records.items() if name not in gone}
        own = (
            replace(self.scope.record, unfinished=not self.finished_reading)
            if self.reads_whole_source
            else self.scope.record
        )
        return list((records | {own.name: own}).values())

    def _delete(self, ids: list[str]) -> None:
        for some in in_parts(ids):
            self.touch().delete(some)

    def touch(self) -> LanceBackend:
        """Prepare for a change: the index exists, and is not marked complete while it is not. Returns the index."""
        self.lock.check()
        if self.index is None:
            self.index = LanceBackend.create(self.path, IndexInfo.of(self.model), self._records())
        if not self.at_once:
            mark_incomplete(self.table)
        write_sources(self.table, self._records())
        self.touched = True
        return self.index

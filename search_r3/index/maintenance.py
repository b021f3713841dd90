"""Changing an index without its corpus: delete or replace documents by id, delete a source, compact files.

Each deletion is all or nothing: an unknown id refuses the whole deletion.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.hybrid_fusion import HybridFusion
from search_r3.index.backends.backend_registry import choose_backend, open_backend, open_lance
from search_r3.index.backends.index_backend import IndexBackend
from search_r3.index.backends.lance.approximate import keep_approximate
from search_r3.index.backends.lance.compaction import (
    KEEP_VERSIONS,
    bytes_on_disk,
    cleanup_is_due,
    cleanup_old_versions,
    compact,
    count_files,
    live_bytes,
)
from search_r3.index.backends.lance.duplicates import Differing, remove_equal_copies
from search_r3.index.backends.lance.durable import flush
from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.backends.lance.lance_table import ensure_complete, mark_complete, migrate_rows
from search_r3.index.backends.lance.table_columns import in_parts
from search_r3.index.backends.lance.table_sources import write_sources
from search_r3.index.build.build_index import IndexReport, build_index
from search_r3.index.build.portable_build import delete_rows
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.index_info import IndexInfo
from search_r3.index.index_sources import API
from search_r3.index.readers.path_source import PathSource
from search_r3.index.row_keys import SOURCE
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import Location, for_writing, location_of, storage_errors
from search_r3.index.storage.locking import WriteLock, writing


class UnknownDocument(InputError):
    """The index has no document with that id; a server answers 404."""


@dataclass(frozen=True)
class Compacted:
    """What a compaction did.

    Attributes:
        files_before, files_after: number of files of rows.
        bytes_before, bytes_after: bytes on disk; 0 on object storage.
        bytes_old: the part of `bytes_after` that belongs to versions which readers may still use. The first write or
            compaction after those versions are old enough removes them.
        approximate: the approximate index as `ApproximateIndex` describes it, if there is one.
        full_text_rebuilt: the full-text index of an earlier version, which left out words, was rebuilt.
        duplicates_removed: rows removed because an equal row has the same id and source.
        differing: ids whose rows differ; all of those rows were kept.
    """

    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    bytes_old: int
    approximate: dict[str, Any] | None
    full_text_rebuilt: bool = False
    duplicates_removed: int = 0
    differing: Differing | None = None


@dataclass(frozen=True)
class Deleted:
    """What a deletion did.

    Attributes:
        chunks: number of chunks removed.
        full_text_rebuilt: the full-text index of an earlier version, which left out words, was rebuilt.
        source: name of the removed source, if one was removed.
    """

    chunks: int
    full_text_rebuilt: bool = False
    source: str | None = None


def delete_documents(path: str | Path, ids: Sequence[str], *, wait: float = 0.0, maintain: bool = True) -> Deleted:
    """Remove documents, with all of their chunks, from the index in the folder `path`.

    Args:
        wait: seconds to wait for another writer to finish.
        maintain: do the maintenance that is due; with False, call `maintain_index` from time to time.

    Raises:
        UnknownDocument: the index lacks one of `ids`; nothing is deleted.
        IndexBusy: another process is writing.
        StorageError: object storage failed or did not answer.
        InputError: there are no ids, or there is no index.
    """
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        raise InputError("no ids were given; give the ids of the documents to delete")
    removed, rebuilt = _delete(path, wanted, wait, maintain, None, every=True)
    return Deleted(sum(removed.values()), rebuilt)


def delete_each(
    path: str | Path,
    ids: Sequence[str],
    *,
    wait: float = 0.0,
    maintain: bool = True,
    expected_info: IndexInfo | None = None,
) -> dict[str, int]:
    """`delete_documents` that ignores unknown ids; returns the number of removed chunks of each document.

    Args:
        expected_info: info of the expected index; an index of another model at this path is left untouched.

    Raises:
        ModelMismatch: the index was not made with the model of `expected_info`.
        InputError: as for `delete_documents`.
    """
    return _delete(path, list(dict.fromkeys(ids)), wait, maintain, expected_info, every=False)[0]


def _delete(
    path: str | Path, wanted: list[str], wait: float, maintain: bool, expected_info: IndexInfo | None, every: bool
) -> tuple[dict[str, int], bool]:
    """Delete documents; returns the number of removed chunks of each, and whether the full-text index was rebuilt."""
    location = for_writing(location_of(path))
    if "streaming" not in choose_backend(location).capabilities:
        return _delete_portable(location, path, wanted, wait, expected_info, every), False
    began = time.time()
    with storage_errors(location), writing(location, wait=wait) as lease:
        index = _open(location, expected_info)
        complete = index.complete
        chunks = Counter(document for (document,) in index.rows_where("document", wanted, ["document"]))
        if every:
            _refuse_unknown(path, wanted, chunks)
        for some in in_parts(sorted(chunks)):
            lease.check()
            index.delete_where("document", some)
        rebuilt = complete and maintain and _maintain(index.table, location, lease)
        flush(location, began)
        return dict(chunks), rebuilt


def _delete_portable(
    location: Location, path: str | Path, wanted: list[str], wait: float, expected_info: IndexInfo | None, every: bool
) -> dict[str, int]:
    """`_delete` for backends that need no maintenance."""
    backend = open_backend(location)
    if expected_info is not None:
        backend.info.check_expected(expected_info, location)
    if every:
        _refuse_unknown(path, wanted, {document for document, _, _ in backend.listed()})
    ids = set(wanted)
    gone = delete_rows(location, type(backend), lambda row: row["document"] in ids, wait)
    return dict(Counter(row["document"] for row in gone))


def _refuse_unknown(path: str | Path, wanted: list[str], known: Container[str]) -> None:
    if unknown := [identifier for identifier in wanted if identifier not in known]:
        more = f" and {len(unknown) - 1:,} others" if len(unknown) > 1 else ""
        raise UnknownDocument(f'{path} has no document "{unknown[0][:200]}"{more}; nothing was deleted')


def maintain_index(
    path: str | Path,
    *,
    start: int | None = None,
    wait: float = 0.0,
    always: bool = False,
    expected_info: IndexInfo | None = None,
) -> bool:
    """Do the maintenance that is due in a complete index, after writes that postponed it.

    Returns:
        Whether that rebuilt an outdated full-text index.

    Args:
        start: number of rows from which an approximate index is built; None never builds one.
        wait: seconds to wait for another writer to finish.
        always: remove old versions even if there were few writes since the last time.
        expected_info: info of the expected index; an index of another model at this path is left untouched.

    Raises:
        IndexBusy: another process is writing.
        StorageError: object storage failed or did not answer.
        ModelMismatch: the index was not made with the model of `expected_info`.
        InputError: there is no index.
    """
    location = for_writing(location_of(path))
    if "maintenance" not in choose_backend(location).capabilities:
        return False
    began = time.time()
    with storage_errors(location), writing(location, wait=wait) as lease:
        index = _open(location, expected_info)
        if not index.complete:
            return False
        rebuilt = _maintain(index.table, location, lease, start, always)
        flush(location, began)
        return rebuilt


def keep_fusion(path: str | Path, fusion: HybridFusion | None) -> None:
    """Store with the index how its hybrid searches are fused; None goes back to the default.

    Raises:
        IndexBusy: another process is writing.
        StorageError: object storage failed or did not answer.
        InputError: there is no index, or its backend cannot store it.
    """
    location = for_writing(location_of(path))
    kind = choose_backend(location)
    kind.require("records", "a tuned fusion")
    began = time.time()
    with storage_errors(location), kind.writing(location):
        open_backend(location).write_fusion(fusion)
        flush(location, began)


def _open(location: Location, expected_info: IndexInfo | None = None) -> LanceBackend:
    index = open_lance(location)
    if expected_info is not None:
        index.info.check_expected(expected_info, location)
    return index


def _maintain(table: Any, location: Location, lease: WriteLock, start: int | None = None, always: bool = False) -> bool:
    lease.check()
    compaction = compact(table, location)
    if compaction.changed or always or cleanup_is_due(table):
        lease.check()
        keep_approximate(table, start, check=lease.check)
        lease.check()
        mark_complete(table)
        cleanup_old_versions(location)
    return compaction.full_text_rebuilt


def update_documents(
    path: str | Path,
    documents: Iterable[SourceDocument],
    model: Encoder,
    *,
    source: str | None = None,
    take_over: bool = True,
    prune: bool = False,
    progress: bool | Callable[[str], None] = True,
    max_length: int | None = None,
    commit_every: int | None = None,
    wait: float = 0.0,
    maintain: bool = True,
    types: Mapping[str, str] | None = None,
) -> IndexReport:
    """Add documents, or replace those whose ids the index has: `build_index` without removing other documents.

    The documents then belong to the source "api", unless they are read from a folder or a file, or `source` is given.
    Indexing their former source again does not replace them.

    Args:
        path, documents, model: as for `build_index`, like the options. The index must exist.

    Raises:
        InputError: there is no index, or as for `build_index`.
    """
    SearchIndex.open(path)
    return build_index(
        path,
        documents,
        model,
        source=source or (None if isinstance(documents, PathSource) else API),
        take_over=take_over,
        prune=prune,
        progress=progress,
        max_length=max_length,
        commit_every=commit_every,
        wait=wait,
        maintain=maintain,
        types=types,
    )


def delete_source(path: str | Path, name: str) -> Deleted:
    """Remove a source with all of its documents.

    Args:
        name: the source's name, as in `SearchIndex.sources`, or the path of its folder or file. "unknown" are documents
            of an index of format 1 that no run has read since.

    Raises:
        IndexBusy: another process is writing.
        InputError: there is no index, or it has no such source (the message lists its sources).
    """
    location = for_writing(location_of(path))
    if "streaming" not in (kind := choose_backend(location)).capabilities:
        name = _source_named(open_backend(location), name)
        return Deleted(len(delete_rows(location, kind, lambda row: row[SOURCE] == name)), source=name)
    began = time.time()
    with storage_errors(location), writing(location) as lease:
        index = _open(location)
        complete, before = index.complete, index.count()
        name = _source_named(index, name)
        lease.check()
        migrate_rows(index.table)
        index.delete_source(name)
        others = index.read_sources()
        unfinished = (was := others.pop(name, None)) is not None and was.unfinished
        write_sources(index.table, others.values())
        deleted = before - index.count()
        if unfinished and not any(other.unfinished for other in others.values()):
            ensure_complete(index.table)  # nothing is missing now
            complete = True
        rebuilt = complete and _maintain(index.table, location, lease)
        flush(location, began)
        return Deleted(deleted, rebuilt, name)


def _source_named(index: IndexBackend, name: str) -> str:
    """The name of the source that has this name, or that was read from this path."""
    names = {source.name: source.root for source in index.sources()}
    if name in names:
        return name
    for path in (os.path.realpath(os.path.expanduser(name)), os.path.abspath(os.path.expanduser(name))):
        for known, root in names.items():
            if path in (root, known):
                return known
    listed = ", ".join(f'"{known}"' for known in names) or "none"
    raise InputError(f'{index.path} has no source "{name}"; its sources are: {listed}')


def compact_index(path: str | Path, *, keep: timedelta = KEEP_VERSIONS) -> Compacted:
    """Merge small files, drop deleted rows, index new rows, and remove old versions.

    The approximate index is built, retrained or measured again if that is due (`keep_approximate`).

    Args:
        keep: versions replaced within this time stay, for processes that are reading them. With `timedelta(0)` all
            space is freed at once; a search that is running then may fail once, which `SearchIndex.search` repeats
            automatically.

    Raises:
        IndexBusy: another process is writing.
        StorageError: object storage failed or did not answer.
        InputError: there is no index, or its backend has nothing to compact.
    """
    location = for_writing(location_of(path))
    choose_backend(location).require("maintenance", "compaction")
    began = time.time()
    with storage_errors(location), writing(location) as lease:
        index = _open(location)
        complete = index.complete
        files, size = count_files(index.table), bytes_on_disk(location)
        removed, differing = remove_equal_copies(index.table)
        lease.check()
        compaction = compact(index.table, location, everything=True)
        lease.check()
        renewed = keep_approximate(index.table, check=lease.check)
        lease.check()
        if complete:
            mark_complete(index.table)
        cleanup_old_versions(location, keep)
        flush(location, began)
        after = bytes_on_disk(location)
        old = max(0, after - live_bytes(location)) if after else 0
        approximate = renewed.to_dict() if renewed else None
        rebuilt = compaction.full_text_rebuilt
        return Compacted(files, count_files(index.table), size, after, old, approximate, rebuilt, removed, differing)

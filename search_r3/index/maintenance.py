"""Changing an index without its corpus: documents deleted or replaced by their ids, files put together.

Each is one LanceDB commit or none: an id that is not there refuses the whole deletion.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.index.backends.backend_registry import choose_backend, open_backend, open_lance
from search_r3.index.backends.index_backend import IndexBackend
from search_r3.index.backends.lance.approximate import keep_approximate
from search_r3.index.backends.lance.compaction import (
    KEEP_VERSIONS,
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
from search_r3.index.storage.location import Place, for_writing, place_of, storage_errors
from search_r3.index.storage.locking import WriteLock, writing


class UnknownDocument(InputError):
    """The index has no document of that id; a server makes it a 404."""


@dataclass(frozen=True)
class Compacted:
    """What a compaction did: files of rows and bytes on disk, before and after; bytes are 0 at a URI.

    `bytes_old` of `bytes_after` belong to versions that a reader may still use; they go with the next write or
    compaction that comes when those versions are old enough. `duplicates_removed` counts rows that were removed as
    another of the same id and source is equal; `differing` are ids whose rows differ, all of which were kept.
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
        chunks: how many were removed.
        full_text_rebuilt: an earlier version had left words out of the full-text index, so it was built again.
        source: the name of the source that was removed, if one was.
    """

    chunks: int
    full_text_rebuilt: bool = False
    source: str | None = None


def delete_documents(path: str | Path, ids: Sequence[str], *, wait: float = 0.0, maintain: bool = True) -> Deleted:
    """Remove documents, with all of their chunks, from the index in the folder `path`.

    Args:
        wait: seconds to wait for another writer to end.
        maintain: do the maintenance that is due; with False, `maintain_index` must be called now and then.

    Raises:
        UnknownDocument: one of `ids` is not there; nothing is deleted.
        IndexBusy: another process is writing.
        StorageError: object storage failed or did not answer.
        InputError: no ids, or no index.
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
    """`delete_documents`, but ids that are not there are passed over; returns the chunks of those that were.

    Args:
        expected_info: info of the expected index; an index of another model at this path is left untouched.

    Raises:
        ModelMismatch: it was not made with the model of `expected_info`.
        InputError: as `delete_documents`.
    """
    return _delete(path, list(dict.fromkeys(ids)), wait, maintain, expected_info, every=False)[0]


def _delete(
    path: str | Path, wanted: list[str], wait: float, maintain: bool, expected_info: IndexInfo | None, every: bool
) -> tuple[dict[str, int], bool]:
    """The chunks removed of each document, and whether the full-text index was rebuilt."""
    place = for_writing(place_of(path))
    if "streaming" not in choose_backend(place).capabilities:
        return _delete_portable(place, path, wanted, wait, expected_info, every), False
    began = time.time()
    with storage_errors(place), writing(place, wait=wait) as lease:
        index = _open(place, expected_info)
        complete = index.complete
        held = Counter(document for (document,) in index.rows_where("document", wanted, ["document"]))
        if every:
            _refuse_unknown(path, wanted, held)
        for some in in_parts(sorted(held)):
            lease.check()
            index.delete_where("document", some)
        rebuilt = complete and maintain and _maintain(index.table, place, lease)
        flush(place, began)
        return dict(held), rebuilt


def _delete_portable(
    place: Place, path: str | Path, wanted: list[str], wait: float, expected_info: IndexInfo | None, every: bool
) -> dict[str, int]:
    """`_delete` from an index of a backend that has nothing to maintain."""
    backend = open_backend(place)
    if expected_info is not None:
        backend.info.check_expected(expected_info, place)
    if every:
        _refuse_unknown(path, wanted, {document for document, _, _ in backend.listed()})
    ids = set(wanted)
    assert isinstance(place, Path)  # such backends are not on object storage
    gone = delete_rows(place, type(backend), lambda row: row["document"] in ids, wait)
    return dict(Counter(row["document"] for row in gone))


def _refuse_unknown(path: str | Path, wanted: list[str], held: Container[str]) -> None:
    if unknown := [identifier for identifier in wanted if identifier not in held]:
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
    """Do the maintenance that is due in an index that is whole: after writes that left it undone.

    Returns whether that rebuilt a full-text index that an earlier version had made.

    Args:
        start: rows from which on the index gets an approximate one; None begins none.
        wait: seconds to wait for another writer to end.
        always: look for old versions though few writes were made since they were last removed.
        expected_info: info of the expected index; an index of another model at this path is left untouched.

    Raises:
        IndexBusy: another process is writing.
        StorageError: object storage failed or did not answer.
        ModelMismatch: the index was not made with the model of `expected_info`.
        InputError: there is no index.
    """
    place = for_writing(place_of(path))
    if "maintenance" not in choose_backend(place).capabilities:
        return False
    began = time.time()
    with storage_errors(place), writing(place, wait=wait) as lease:
        index = _open(place, expected_info)
        if not index.complete:
            return False
        rebuilt = _maintain(index.table, place, lease, start, always)
        flush(place, began)
        return rebuilt


def _open(place: Place, expected_info: IndexInfo | None = None) -> LanceBackend:
    index = open_lance(place)
    if expected_info is not None:
        index.info.check_expected(expected_info, place)
    return index


def _maintain(table: Any, place: Place, lease: WriteLock, start: int | None = None, always: bool = False) -> bool:
    lease.check()
    compaction = compact(table, place)
    if compaction.changed or always or cleanup_is_due(table):
        lease.check()
        keep_approximate(table, start, check=lease.check)
        lease.check()
        mark_complete(table)
        cleanup_old_versions(place)
    return compaction.full_text_rebuilt


def update_documents(
    path: str | Path,
    documents: Iterable[SourceDocument],
    model: Encoder,
    *,
    source: str | None = None,
    take_over: bool = True,
    prune: bool = False,
    progress: bool = True,
    max_length: int | None = None,
    commit_every: int | None = None,
    wait: float = 0.0,
    maintain: bool = True,
    types: Mapping[str, str] | None = None,
) -> IndexReport:
    """Add documents, or replace those whose id the index has: `build_index` that removes no other document.

    They belong to the source "api" from then on, unless they are read from a folder or a file, or `source` is given:
    what was indexed from elsewhere before does not replace them again.

    Args:
        path, documents, model: as in `build_index`, and so are the options. The index must exist.

    Raises:
        InputError: there is no index, or as `build_index`.
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
        name: as `SearchIndex.sources` has it, or the path of its folder or file. "unknown" are the documents of an
            index of format 1 that no run has brought again.

    Raises:
        InputError: the index has no such source (its own are named), no index, or another process is writing.
    """
    place = for_writing(place_of(path))
    if "streaming" not in (kind := choose_backend(place)).capabilities:
        name = _source_named(open_backend(place), name)
        assert isinstance(place, Path)  # such backends are not on object storage
        return Deleted(len(delete_rows(place, kind, lambda row: row[SOURCE] == name)), source=name)
    began = time.time()
    with storage_errors(place), writing(place) as lease:
        index = _open(place)
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
            ensure_complete(index.table)  # nothing is missing any more
            complete = True
        rebuilt = complete and _maintain(index.table, place, lease)
        flush(place, began)
        return Deleted(deleted, rebuilt, name)


def _source_named(index: IndexBackend, name: str) -> str:
    """The name of the source that has this name, or that was read from this path."""
    names = {source.name: source.root for source in index.sources()}
    if name in names:
        return name
    for path in (os.path.realpath(os.path.expanduser(name)), os.path.abspath(os.path.expanduser(name))):
        for held, root in names.items():
            if path in (root, held):
                return held
    listed = ", ".join(f'"{known}"' for known in names) or "none"
    raise InputError(f'{index.path} has no source "{name}"; its sources are: {listed}')


def compact_index(path: str | Path, *, keep: timedelta = KEEP_VERSIONS) -> Compacted:
    """Put small files together, drop deleted rows, fold new rows into the indices, and remove old versions.

    The approximate index is built, trained again or measured again where that is due (`keep_approximate`).

    Args:
        keep: versions replaced within this time stay, for processes that read them now. With `timedelta(0)` all the
            space is given back at once; a search that is running then may fail once and has to be repeated, which
            `SearchIndex.search` does by itself.

    Raises:
        IndexBusy: another process is writing.
        StorageError: object storage failed or did not answer.
        InputError: there is no index, or its backend has nothing to compact.
    """
    place = for_writing(place_of(path))
    choose_backend(place).require("maintenance", "compaction")
    began = time.time()
    with storage_errors(place), writing(place) as lease:
        index = _open(place)
        complete = index.complete
        files, size = count_files(index.table), _bytes(place)
        removed, differing = remove_equal_copies(index.table)
        lease.check()
        compaction = compact(index.table, place, everything=True)
        lease.check()
        found = keep_approximate(index.table, check=lease.check)
        lease.check()
        if complete:
            mark_complete(index.table)
        cleanup_old_versions(place, keep)
        flush(place, began)
        after = _bytes(place)
        old = max(0, after - live_bytes(place)) if after else 0
        approximate = found.to_dict() if found else None
        rebuilt = compaction.full_text_rebuilt
        return Compacted(files, count_files(index.table), size, after, old, approximate, rebuilt, removed, differing)


def _bytes(path: Path | str) -> int:
    return 0 if isinstance(path, str) else sum(item.stat().st_size for item in path.rglob("*") if item.is_file())

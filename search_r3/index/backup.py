"""`backup_index` and `restore_index`: a copy of an index as it was at one commit, made while it is written to.

A backup is an index itself, so it can be searched and served where it is. Each copy is opened and read before
it counts.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.index.backends.backend_registry import is_index, open_backend
from search_r3.index.backends.index_backend import IndexBackend
from search_r3.index.backends.lance.compaction import bytes_on_disk, live_bytes
from search_r3.index.backends.lance.copying import copy_table
from search_r3.index.backends.lance.durable import flush
from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.index_handle import damage_explained
from search_r3.index.storage.location import CollectionUri, Location, for_writing, location_of, storage_errors
from search_r3.index.storage.locking import OURS, writing

LOCK_SECONDS = 60.0  # that a copy of another backend's index waits for its writer


@dataclass(frozen=True)
class IndexCopy:
    """What was copied: the number of chunks, the bytes of its files, and whether its last build had ended."""

    source: str
    target: str
    chunks: int
    bytes: int
    complete: bool


def backup_index(index: str | Path, target: str | Path) -> IndexCopy:
    """Copy an index, as its last commit left it, to a new folder or to object storage; it may be written to meanwhile.

    Raises:
        InputError: there is no index, `target` is not empty, the storage fails, or the copy cannot be read.
    """
    return _copy(location_of(index), location_of(target), replace=False)


def restore_index(backup: str | Path, target: str | Path, *, replace: bool = False) -> IndexCopy:
    """Copy a backup to where the index is to be.

    Args:
        replace: exchange the index that is in the folder `target`, in one step, so that servers go on.

    Raises:
        InputError: as for `backup_index`; or `target` has an index and `replace` is False, or it is on object storage,
            where an index cannot be exchanged.
        IndexBusy: another process is writing to `target`.
    """
    return _copy(location_of(backup), location_of(target), replace=replace)


def _copy(source: Location, target: Location, *, replace: bool) -> IndexCopy:
    for place in (source, target):
        if isinstance(place, CollectionUri):
            raise InputError(f"{place} is in Milvus, which has backups of its own; give folders or object storage")
    if isinstance(source, Path):
        source = source.resolve()  # a symbolic link may be replaced meanwhile
    opened = open_backend(source, snapshot=True)
    if isinstance(target, Path):
        target = target.resolve()  # the folder is exchanged, not a link to it
    else:
        opened.require("object_storage", "object storage")
    with writing(target, make=True):
        _check_free(target, replace)
        if not isinstance(target, Path):
            return _copied(opened, source, for_writing(target), target)
        with atomic_path(target) as scratch:
            scratch.mkdir()
            return _copied(opened, source, scratch, target)


def _check_free(target: Location, replace: bool) -> None:
    there = is_index(target)
    if isinstance(target, Path):
        others = [item.name for item in target.iterdir() if item.name not in OURS]
        if others and not there:
            raise InputError(f"{target} has other files ({others[0]}); give a new folder")
        if there and not replace:
            raise InputError(f"{target} has an index; give a new folder, or exchange it by restore with --replace")
    elif there:
        raise InputError(f"{target} has an index, and on object storage none can be exchanged; give another name")


def _copied(opened: IndexBackend, source: Location, written: Location, target: Location) -> IndexCopy:
    """Copy `opened`, the index at `source`, to `written`, which will be at `target`, and read the copy."""
    started = time.time()
    if isinstance(opened, LanceBackend):
        with damage_explained(source), storage_errors(source), storage_errors(target):
            table = copy_table(source, written)
        chunks, complete = table.rows, table.complete
    else:
        assert isinstance(source, Path)
        assert isinstance(written, Path)
        with writing(source, wait=LOCK_SECONDS):
            chunks, complete = open_backend(source).count(), opened.complete
            shutil.copytree(source, written, dirs_exist_ok=True, ignore=lambda *_: OURS)
    flush(written, started)
    copy = open_backend(written, follow=False)
    if copy.count() != chunks or copy.info.identity != opened.info.identity:
        raise InputError(f"{target}: the copy has {copy.count():,} chunks of {chunks:,}; check the disk and try again")
    with damage_explained(source), storage_errors(target):
        copy.probe()
        size = live_bytes(written) if isinstance(opened, LanceBackend) else bytes_on_disk(written)
    return IndexCopy(str(source), str(target), chunks, size, complete)

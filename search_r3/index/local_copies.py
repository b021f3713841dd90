"""Local copies of indexes on object storage, in a cache folder with a bound: searched as fast as any folder.

A search on object storage makes several requests one after the other. The newest version's name is one request; if
its copy is there, nothing else is fetched. A new version is copied whole, many files at a time, and the copies that
were used least recently make room for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from search_r3.errors import InputError
from search_r3.files import atomic_path, expand_user
from search_r3.index.backends.lance.compaction import bytes_on_disk
from search_r3.index.backends.lance.fetching import fetch, needed_files, version_of
from search_r3.index.backends.lance.lance_table import TABLE
from search_r3.index.search_index import SearchIndex
from search_r3.index.storage.deadline import in_thread, within_deadline
from search_r3.index.storage.location import Remote, storage_errors
from search_r3.index.storage.object_store import open_objects

GB = 1e9
LOCK, LOCK_SECONDS = ".copies.lock", 600.0
"""One process copies at a time; another one waits for it, as it may need the same copy."""
COPY = re.compile(r".+-[0-9a-f]{12}-\d+-[0-9a-f]{8}")
"""What the folder of a copy is called: index, hash of its URI, version, hash of the version's manifest."""
OPENING = "reading which files the index has"
ATTEMPTS = 3
"""To copy a version that is removed meanwhile, as it is not the newest any more."""


@dataclass(frozen=True)
class LocalCopies:
    """A folder of copies.

    Attributes:
        folder: made if it does not exist. Other files in it are left alone.
        limit: maximum size of all copies together, in bytes.
    """

    folder: Path
    limit: float

    def open(self, location: Remote) -> SearchIndex:
        """The newest version of the index at `location`, opened in its copy, which is made if need be.

        While the storage is asked which version is the newest, the copy that is there is opened already.

        Raises:
            StorageError, InputError: as for `newest`, and as for `SearchIndex.open_snapshot`.
        """
        wait = in_thread(lambda: self.newest(location), inside=False)
        likely, opened = self._last_copy(location), None
        if likely is not None:
            with suppress(InputError, OSError, ValueError):  # it may be removed at this moment
                opened = SearchIndex.open_snapshot(likely)
                opened.backend.check_text()
        copy = wait(None)
        if opened is None or copy != likely:
            opened = SearchIndex.open_snapshot(copy)
        return opened.with_display_path(location)

    def newest(self, location: Remote) -> Path:
        """The folder of a copy of the newest version of the index at `location`, which is made if need be.

        Raises:
            StorageError: object storage cannot be reached, refuses, or does not answer in time.
            InputError: there is no index, it is larger than the limit, or the folder cannot be written.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._newest(location)
            except FileNotFoundError as error:
                if attempt == ATTEMPTS:
                    raise InputError(f"{location} changes all the time ({error}); try again") from error
        raise AssertionError("the last attempt returns or raises")

    def _newest(self, location: Remote) -> Path:
        version, tag = within_deadline(location, "asking for the index's version", lambda: newest_version(location))
        copy = expand_user(self.folder) / f"{_prefix(location)}{version}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}"
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(copy.parent / LOCK, timeout=LOCK_SECONDS):
                if not copy.is_dir():
                    self._copy(location, version, copy)
                os.utime(copy)
        except Timeout as error:
            raise InputError(f"another process has been copying into {copy.parent} for {LOCK_SECONDS:g} s") from error
        except PermissionError as error:
            raise InputError(f"cannot write to {copy.parent}: {error.strerror}; give another --cache-dir") from error
        return copy

    def _last_copy(self, location: Remote) -> Path | None:
        """The copy of this index that was searched last."""
        try:
            copies = [one for one in self._copies(expand_user(self.folder)) if one.name.startswith(_prefix(location))]
            return max(copies, key=used, default=None)
        except OSError:  # there is no folder yet
            return None

    def _copy(self, location: Remote, version: int, copy: Path) -> None:
        """Raises FileNotFoundError if the version was removed meanwhile."""
        removed: FileNotFoundError | None = None
        with storage_errors(location):
            try:
                files = within_deadline(location, OPENING, lambda: needed_files(location, TABLE, version))
                self._make_room(copy, sum(files.values()), location)
                with atomic_path(copy) as scratch:
                    fetch(location, TABLE, files, scratch)
            except FileNotFoundError as error:
                removed = error
        if removed is not None:
            raise removed
        self._make_room(copy, bytes_on_disk(copy), location)  # with what the file system adds

    def _make_room(self, copy: Path, size: int, location: Remote) -> None:
        """Remove older versions of this index, then the copies used least recently, until `size` bytes fit."""
        if size > self.limit:
            shutil.rmtree(copy, ignore_errors=True)
            raise InputError(
                f"{location} has {size / GB:,.2f} GB, more than the cache may have ({self.limit / GB:g} GB): raise "
                "--cache-size, or leave out --cache-dir"
            )
        index = copy.name.rsplit("-", 2)[0]
        found = (one for one in self._copies(copy.parent) if one != copy)
        others = sorted(found, key=lambda one: (not one.name.startswith(f"{index}-"), used(one)))
        sizes = {one: bytes_on_disk(one) for one in others}
        for one in others:
            if one.name.startswith(f"{index}-") or sum(sizes.values()) + size > self.limit:
                shutil.rmtree(one)
                del sizes[one]

    @staticmethod
    def _copies(folder: Path) -> Iterator[Path]:
        return (one for one in folder.iterdir() if COPY.fullmatch(one.name) and one.is_dir())


def _prefix(location: Remote) -> str:
    """What the names of an index's copies begin with."""
    name = re.sub(r"[^\w.-]+", "-", location.rpartition("/")[2]) or "index"
    return f"{name}-{hashlib.sha256(location.encode()).hexdigest()[:12]}-"


def used(copy: Path) -> float:
    """When a copy was last searched."""
    return copy.stat().st_mtime


def newest_version(location: Remote) -> tuple[int, str]:
    """The number of the newest version of the index at `location` and its manifest's e-tag, by listing the manifests.

    Raises:
        StorageError: see `location.storage_errors`.
        InputError: there is no index.
    """
    with storage_errors(location):
        store = open_objects(location)
        objects = [one for batch in store.list(f"{TABLE}.lance/_versions") for one in batch]
    names = ((f"_versions/{one['path'].rpartition('/')[2]}", one.get("e_tag") or "") for one in objects)
    versions = [(version, tag) for name, tag in names if (version := version_of(name)) is not None]
    if not versions:
        raise InputError(f"{location} is not a search-r3 index; give the location that `search-r3 index` wrote")
    return max(versions)

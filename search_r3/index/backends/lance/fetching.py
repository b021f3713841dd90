"""Whole files of a table on object storage, many at a time: how a small table is read, and how a local copy is made.

Lance asks for a part of a file, and learns from the answer which part it needs next, so that a search waits for about
twenty requests one after the other. Here the names of all files are one request, and the files are read together.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from search_r3.index.storage.location import Remote, StorageError, options_of, storage_errors
from search_r3.index.storage.object_store import open_objects

SMALL_BYTES, SMALL_FILES = 16_000_000, 1000
"""A table of at most so much, old versions included, is read whole: no more than one list of names, and what a search
would mostly read anyway, as it compares all vectors."""
TOGETHER, PIECE = 32, 8 * 2**20
"""Requests at the same time, and the bytes of each."""
MANIFEST = re.compile(r"_versions/(\d+)\.manifest")
NEWEST_FIRST = 2**64 - 1
"""Manifests of Lance's present format are called by this number minus their version, in 20 digits."""
NOT_READ = ("_versions/", "_transactions/")
"""Folders of which a reader needs nothing, except for one manifest."""


def version_of(name: str) -> int | None:
    """The version whose manifest a file of a table is, given its path in the table's folder; None for other files."""
    if (found := MANIFEST.fullmatch(name)) is None:
        return None
    number = int(found[1])
    return NEWEST_FIRST - number if len(found[1]) == len(str(NEWEST_FIRST)) else number


def fetch_small(location: Remote, table: str) -> tempfile.TemporaryDirectory[str] | None:
    """A temporary folder with the newest version of `table` at `location`, if it is small.

    Returns:
        The folder, which is removed with the object; None if the table is large, changes at this moment or cannot be
        read so: then Lance reads it, or says why not.

    Raises:
        StorageError: the storage failed, refused or did not answer.
    """
    try:
        with storage_errors(location):
            return _fetch_small(location, table)
    except StorageError:
        raise
    except Exception:  # obstore is not installed, credentials that only Lance can use, no temporary folder, ...
        return None


def needed_files(location: Remote, table: str, version: int) -> dict[str, int]:
    """The files of a version of `table`, by path in its folder, with their sizes in bytes.

    Raises:
        FileNotFoundError: the version has been removed.
        OSError, ValueError, obstore's errors: see `location.storage_errors`.
    """
    import lance

    dataset = lance.dataset(f"{location}/{table}.lance", version, storage_options=options_of(location))
    return _needed(dataset, dict(_list(open_objects(location), table)))


def fetch(location: Remote, table: str, sizes: Mapping[str, int], folder: Path) -> None:
    """Copy files of `table` at `location`, with their sizes, to `folder`/TABLE.lance.

    Raises:
        OSError: a file cannot be written.
        obstore's errors: see `location.storage_errors`.
    """
    store = open_objects(location, seconds=location.options["timeout"])

    def piece(name: str, start: int, end: int) -> None:
        data = store.get_range(f"{table}.lance/{name}", start=start, end=end)
        with open(folder / f"{table}.lance" / name, "r+b") as file:
            file.seek(start)
            file.write(data)

    for name, size in sizes.items():
        target = folder / f"{table}.lance" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as file:
            os.truncate(file.fileno(), size)
    pieces = ((name, at, min(at + PIECE, size)) for name, size in sizes.items() for at in range(0, size, PIECE))
    with ThreadPoolExecutor(TOGETHER) as pool:
        try:
            for done in [pool.submit(piece, *one) for one in pieces]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_small(location: Remote, table: str) -> tempfile.TemporaryDirectory[str] | None:
    import lance

    sizes = dict(islice(_list(open_objects(location), table), SMALL_FILES + 1))
    newest = max(filter(None, map(version_of, sizes)), default=None)
    if newest is None or len(sizes) > SMALL_FILES:
        return None
    read = {name: size for name, size in sizes.items() if _is_read(name, newest)}
    if sum(read.values()) > SMALL_BYTES:
        return None
    folder = tempfile.TemporaryDirectory(prefix="search-r3-", ignore_cleanup_errors=True)
    try:
        fetch(location, table, read, Path(folder.name))
        dataset = lance.dataset(f"{folder.name}/{table}.lance")
        found = _needed(dataset, read)  # the names were listed while others may have written
        if _indices(dataset) - {name.split("/")[1] for name in found if name.startswith("_indices/")}:
            raise FileNotFoundError("an index is not there")
    except BaseException:
        folder.cleanup()
        raise
    return folder


def _list(store: Any, table: str) -> Iterator[tuple[str, int]]:
    """The files of a table: path in its folder, and size in bytes."""
    start = f"{table}.lance/"
    for batch in store.list(start, chunk_size=1000):
        yield from ((one["path"].partition(start)[2], int(one["size"])) for one in batch)


def _is_read(name: str, version: int) -> bool:
    return version_of(name) == version or not name.startswith(NOT_READ)


def _needed(dataset: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of the files that are read at the dataset's version. Raises FileNotFoundError if one is missing."""
    version, numbers = int(dataset.version), set[str]()
    data = set[str]()
    for fragment in dataset.get_fragments():
        numbers.add(str(fragment.fragment_id))
        data |= {f"data/{file.path}" for file in fragment.metadata.files}
    indices = _indices(dataset)

    def belongs(name: str) -> bool:
        top, _, rest = name.partition("/")
        if top == "data":
            return name in data
        if top == "_deletions":
            return rest.partition("-")[0] in numbers
        if top == "_indices":
            return rest.partition("/")[0] in indices
        return _is_read(name, version)

    found = {name: size for name, size in sizes.items() if belongs(name)}
    if missing := data - found.keys():
        raise FileNotFoundError(f"{len(missing)} files of version {version} are not there")
    return found


def _indices(dataset: Any) -> set[str]:
    """The folders of the indices."""
    return {str(segment.uuid) for index in dataset.describe_indices() for segment in index.segments}

"""Copying one version of the table while others write: Lance copies the files of that version, its manifest last.

A table's files never change, so the copy is consistent without a lock. Only the removal of old versions could
take files away meanwhile: the version is kept by a tag until the copy is done.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from search_r3.index.backends.lance.compaction import open_dataset
from search_r3.index.backends.lance.lance_table import COMPLETE, TABLE
from search_r3.index.storage.location import Location, files_lost, options_of

PIN = "being-copied-"
"""The tag of a version that is being copied begins with this, and the time (seconds since 1970)."""
ABANDONED = timedelta(days=7)  # a copy that was killed leaves its tag, and with it the version's files
ATTEMPTS = 5


@dataclass(frozen=True)
class CopiedTable:
    """The version that was copied, its number of rows, and whether the build that wrote it had ended."""

    version: int
    rows: int
    complete: bool


def copy_table(source: Location, target: Location) -> CopiedTable:
    """Copy the newest version of the table at `source`, with its indexes, to `target`, where there is none.

    A copy that is interrupted leaves files without a manifest, which are no table.

    Raises:
        OSError: a file cannot be read or written; see `location.storage_errors`.
    """
    for attempt in range(1, ATTEMPTS + 1):
        dataset = open_dataset(source)
        completed = _completed(dataset)
        with _kept(dataset):
            # Equal before and after the version was chosen: no build had begun, and none has ended in between.
            complete = completed is not None and completed == _completed(dataset)
            try:
                copy = dataset.deep_clone(f"{target}/{TABLE}.lance", int(dataset.version), options_of(target) or {})
            except OSError as error:  # removed before it was tagged, or it could not be tagged
                if attempt == ATTEMPTS or not files_lost(error):
                    raise
                if isinstance(target, Path):
                    shutil.rmtree(target / f"{TABLE}.lance", ignore_errors=True)
                continue
        if complete:
            copy.tags.create(COMPLETE, copy.version)
        return CopiedTable(int(copy.version), int(copy.count_rows()), complete)
    raise AssertionError("the last attempt returns or raises")


def _completed(dataset: Any) -> int | None:
    mark = dataset.tags.list().get(COMPLETE)
    return None if mark is None else int(mark["version"])


@contextmanager
def _kept(dataset: Any) -> Iterator[None]:
    """Keep the version from being removed, unless the index may only be read: then it is copied as long as it stays."""
    name = f"{PIN}{int(time.time())}-{uuid.uuid4().hex[:8]}"
    with suppress(OSError, ValueError):
        _drop_abandoned(dataset)
        dataset.tags.create(name, int(dataset.version))
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            dataset.tags.delete(name)


def _drop_abandoned(dataset: Any) -> None:
    oldest = time.time() - ABANDONED.total_seconds()
    for name in dataset.tags.list():
        made = name.removeprefix(PIN).partition("-")[0]
        if name.startswith(PIN) and made.isdigit() and int(made) < oldest:
            dataset.tags.delete(name)

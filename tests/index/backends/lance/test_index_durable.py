"""A flush that failed is owed: what is written afterwards is on the disk only with what was written before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from search_r3.index.backends.lance import durable
from search_r3.index.backends.lance.durable import DiskError
from search_r3.index.build.build_index import ONE_COMMIT, build_index
from search_r3.index.maintenance import update_documents
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import StorageError


@pytest.fixture
def path(tmp_path: Path, model: Any) -> Path:
    build_index(tmp_path / "index", [SourceDocument("a", "", "a text")], model, progress=False)
    return tmp_path / "index"


def test_a_write_that_is_repeated_flushes_what_was_not_on_the_disk(
    path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = durable._sync

    def broken(name: str, place: Path) -> None:
        raise DiskError("the disk does not take what was written")

    def write() -> Any:
        new = [SourceDocument("new", "", "new text")]
        return update_documents(path, new, model, progress=False, commit_every=ONE_COMMIT, maintain=False)

    before = {item for item in path.rglob("*") if item.is_file()}
    monkeypatch.setattr(durable, "_sync", broken)
    with pytest.raises(StorageError):
        write()
    new = {item for item in path.rglob("*") if item.is_file()} - before
    assert new
    for item in new:  # an hour ago
        os.utime(item, (item.stat().st_atime, item.stat().st_mtime - 3600))
    durable._since[os.path.realpath(path)] -= 3600
    monkeypatch.setattr(durable, "_sync", lambda name, place: (synced.append(name), sync(name, place)))
    assert write().unchanged == 1
    assert {str(item) for item in new} <= set(synced)
    synced.clear()
    assert write().unchanged == 1
    assert not {str(item) for item in new} & set(synced)

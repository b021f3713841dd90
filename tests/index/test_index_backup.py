"""Backups: a copy is the index at one commit, whatever is written to it meanwhile, and it can be put back."""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import (
    SearchIndex,
    SourceDocument,
    backup_index,
    build_index,
    compact_index,
    restore_index,
    update_documents,
)
from search_r3.index.backends.backend_registry import open_lance
from search_r3.index.backends.lance import copying
from search_r3.index.backends.lance.compaction import open_dataset
from search_r3.index.backends.lance.lance_table import mark_incomplete
from search_r3.index.index_handle import IndexHandle
from search_r3.index.storage.location import IndexBusy
from search_r3.index.storage.locking import writing

DOCUMENTS = [SourceDocument(f"d{i}", f"t{i}", f"text number{i} here", {"year": 2000 + i}) for i in range(20)]


def rows_of(path: Path | str) -> dict[str, str]:
    return {row["id"]: row["r3_content"] for row in SearchIndex.open(path).backend.rows()}


def test_a_backup_is_an_index_and_can_be_restored(model, path: Path, tmp_path: Path) -> None:
    build_index(path, DOCUMENTS, model)
    done = backup_index(path, tmp_path / "copies" / "one")
    assert (done.chunks, done.complete) == (20, True)
    assert done.bytes > 1000
    update_documents(path, [SourceDocument("d3", "", "changed later"), SourceDocument("new", "", "added later")], model)
    copy = SearchIndex.open(tmp_path / "copies" / "one")
    assert copy.complete
    assert copy.info == SearchIndex.open(path).info
    for mode in ("vector", "text", "hybrid"):
        assert copy.search("number3", model, mode=mode, where="year < 2010").hits[0].document == "d3"
    with pytest.raises(InputError, match=r"has an index; give a new folder, or exchange it by restore with --replace"):
        restore_index(tmp_path / "copies" / "one", path)
    assert "new" in rows_of(path)
    restore_index(tmp_path / "copies" / "one", path, replace=True)
    assert rows_of(path) == {document.id: f"{document.title} {document.text}" for document in DOCUMENTS}
    assert build_index(path, DOCUMENTS, model).unchanged == 20
    assert sorted(item.name for item in tmp_path.iterdir()) == ["copies", "x.index"]


def test_every_backup_made_while_writing_is_one_commit(model, path: Path, tmp_path: Path) -> None:
    """A writer replaces all documents, each time in one commit, and removes old versions at once."""
    texts = lambda number: [SourceDocument(f"d{i}", "", f"round{number} of {i}") for i in range(20)]  # noqa: E731
    build_index(path, texts(0), model)
    ended, rounds = threading.Event(), [0]

    def write() -> None:
        while not ended.is_set():
            rounds.append(rounds[-1] + 1)
            update_documents(path, texts(rounds[-1]), model)
            compact_index(path, keep=timedelta(0))

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        for number in range(6):
            backup_index(path, tmp_path / str(number))
            found = rows_of(tmp_path / str(number))
            assert len(found) == 20
            assert len({text.split()[0] for text in found.values()}) == 1
    finally:
        ended.set()
        writer.join(60)
    assert len(rounds) > 2, "the writer had its turns"
    assert not pins(path)


def pins(path: Path) -> list[str]:
    return [name for name in open_dataset(path).tags.list() if name.startswith(copying.PIN)]


def replace_all(path: Path, model) -> None:
    """What takes away the files of every version but the newest."""
    update_documents(path, [SourceDocument(f"d{i}", "", "all new") for i in range(20)], model)
    compact_index(path, keep=timedelta(0))


def test_files_of_the_version_stay_until_the_copy_is_done(model, path: Path, tmp_path: Path, monkeypatch) -> None:
    build_index(path, DOCUMENTS, model)
    real = copying.open_dataset

    def opened(location):
        dataset = real(location)
        clone = dataset.deep_clone

        def after_a_write(*arguments):
            replace_all(path, model)
            return clone(*arguments)

        dataset.deep_clone = after_a_write
        return dataset

    monkeypatch.setattr(copying, "open_dataset", opened)
    backup_index(path, tmp_path / "copy")
    assert "all new" not in rows_of(tmp_path / "copy").values()
    assert set(rows_of(path).values()) == {"all new"}
    assert not pins(path)


def test_a_version_that_is_removed_before_it_is_kept_is_left_for_the_newest(
    model, path: Path, tmp_path: Path, monkeypatch
) -> None:
    build_index(path, DOCUMENTS, model)
    kept, calls = copying._kept, []

    def too_late(dataset):
        if not calls:
            replace_all(path, model)
        calls.append(dataset.version)
        return kept(dataset)

    monkeypatch.setattr(copying, "_kept", too_late)
    assert backup_index(path, tmp_path / "copy").chunks == 20
    assert set(rows_of(tmp_path / "copy").values()) == {"all new"}
    assert len(calls) == 2


def test_the_tag_of_a_copy_that_was_killed_is_removed_after_a_week(model, path: Path, tmp_path: Path) -> None:
    build_index(path, DOCUMENTS, model)
    dataset, now = open_dataset(path), int(time.time())
    for age in (1, 8):
        dataset.tags.create(f"{copying.PIN}{now - age * 86_400}-x", dataset.version)
    backup_index(path, tmp_path / "copy")
    assert pins(path) == [f"{copying.PIN}{now - 86_400}-x"]


def test_an_interrupted_build_is_copied_as_such(model, path: Path, tmp_path: Path, capsys) -> None:
    build_index(path, DOCUMENTS[:5], model)
    mark_incomplete(open_lance(path).table)
    assert main(["backup", str(path), str(tmp_path / "copy"), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["complete"] is False
    assert "warning: a build was running or was interrupted" in output.err
    assert not SearchIndex.open(tmp_path / "copy").complete
    assert build_index(tmp_path / "copy", DOCUMENTS, model).added == 15


def test_a_server_goes_on_when_its_index_is_restored(model, path: Path, tmp_path: Path) -> None:
    build_index(path, DOCUMENTS, model)
    backup_index(path, tmp_path / "copy")
    update_documents(path, [SourceDocument("d7", "", "spoiled")], model)
    handle = IndexHandle(path, every=0.0)
    assert handle.search("number7", model, mode="text").hits == []
    restore_index(tmp_path / "copy", path, replace=True)
    handle.check()
    assert handle.search("number7", model, mode="text").hits[0].document == "d7"
    assert handle.problem is None


def test_another_backend_is_copied_too(model, path: Path, tmp_path: Path) -> None:
    build_index(path, DOCUMENTS, model, backend="numpy")
    assert backup_index(path, tmp_path / "copy").chunks == 20
    assert SearchIndex.open(tmp_path / "copy").backend.name == "numpy"
    with pytest.raises(InputError, match="backend 'numpy' does not support object storage"):
        backup_index(path, "s3://bucket/copy")


def test_a_link_stays_and_the_folder_that_it_names_is_exchanged(model, path: Path, tmp_path: Path) -> None:
    build_index(path, DOCUMENTS, model)
    backup_index(path, tmp_path / "copy")
    (tmp_path / "link").symlink_to(path)
    update_documents(path, [SourceDocument("d7", "", "spoiled")], model)
    restore_index(tmp_path / "copy", tmp_path / "link", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert "spoiled" not in rows_of(path).values()


def test_what_is_wrong_is_one_line_and_changes_nothing(model, path: Path, tmp_path: Path, capsys) -> None:
    build_index(path, DOCUMENTS, model)
    backup_index(path, tmp_path / "copy")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("precious")
    for file in (tmp_path / "copy").glob("chunks.lance/data/*"):
        os.truncate(file, 100)
    for arguments, words in [
        (["backup", str(tmp_path / "none"), str(tmp_path / "new")], "does not exist"),
        (["backup", str(tmp_path / "full"), str(tmp_path / "new")], "is not a search-r3 index"),
        (["backup", str(path), str(tmp_path / "full")], "has other files (letter.txt); give a new folder"),
        (["backup", str(path), str(path)], "has an index; give a new folder"),
        (["restore", str(tmp_path / "copy"), str(tmp_path / "new")], "missing or damaged"),
        (["restore", str(tmp_path / "copy"), str(path), "--replace"], "missing or damaged"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1, error
        assert words in error[0]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["copy", "full", "x.index"]
    assert len(rows_of(path)) == 20
    with writing(path), pytest.raises(IndexBusy, match="another build is writing"):
        restore_index(tmp_path / "copy", path, replace=True)


@pytest.mark.slow
def test_to_object_storage_and_back(s3, model, path: Path, tmp_path: Path, capsys) -> None:
    build_index(path, DOCUMENTS, model)
    assert main(["backup", str(path), "s3://bucket/backups/one"]) == 0
    assert "-> s3://bucket/backups/one: 20 chunks" in capsys.readouterr().out
    assert SearchIndex.open("s3://bucket/backups/one").search("number7", model).hits[0].document == "d7"
    assert main(["backup", str(path), "s3://bucket/backups/one"]) == 2
    assert "none can be exchanged; give another name" in capsys.readouterr().err
    backup_index("s3://bucket/backups/one", "s3://bucket/backups/two")
    restore_index("s3://bucket/backups/two", tmp_path / "restored")
    assert rows_of(tmp_path / "restored") == rows_of(path)
    assert SearchIndex.open(tmp_path / "restored").complete

"""What a run keeps though it does not bring it: what cannot be read now, and what has an id that is taken."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from search_r3.index import SearchIndex, SourceDocument, build_index, open_source, update_documents
from search_r3.index.row_keys import SOURCE


def held(path):
    """{document: source}."""
    rows = SearchIndex.open(path).table.search().select(["document", SOURCE]).to_arrow().to_pylist()
    return {row["document"]: row[SOURCE] for row in rows}


def sources(path):
    return {source.name for source in SearchIndex.open(path).sources}


def unreadable(monkeypatch, *places):
    """Reading a file of `places`, or listing a folder of them, fails as on a disk or a network that is away."""
    scan, read = os.scandir, Path.read_bytes

    def failing(place):
        if Path(place) in places:
            raise OSError(errno.EIO, "Input/output error", str(place))

    monkeypatch.setattr(os, "scandir", lambda place: (failing(place), scan(place))[1])
    monkeypatch.setattr(Path, "read_bytes", lambda self: (failing(self), read(self))[1])


@pytest.mark.parametrize("part", [".", "sub"])
@pytest.mark.parametrize("prune", [True, False])
def test_what_cannot_be_read_for_a_moment_is_kept(path, make, model, monkeypatch, part, prune):
    other, folder = make("other", "sub/deep/d.md"), make(
        "notes", "a.md", "subway.md", "sub/b.md", "sub/gone.md", "sub/deep/c.md", "sub/deep/er/d.md"
    )  # fmt: skip
    build_index(path, open_source(other), model)
    build_index(path, open_source(folder), model)
    before = held(path)
    (folder / "sub/gone.md").unlink()
    with monkeypatch.context() as away:
        unreadable(away, folder / "a.md", folder / "sub/b.md", folder / "sub/deep")
        make("notes", "sub/new.md")
        report = build_index(path, open_source(folder / part), model, prune=prune)
    left = {skipped.path: skipped.reason for skipped in report.skipped if skipped.unread}
    start = "sub/" if part == "." else ""
    assert left.keys() == ({"a.md"} if part == "." else set()) | {f"{start}b.md", f"{start}deep"}
    assert set(left.values()) == {"cannot be read (Input/output error); what was indexed of it before is kept"}
    assert report.removed == int(prune)
    expected = before | {"notes/sub/new.md": str(folder)}
    if prune:
        del expected["notes/sub/gone.md"]
    assert held(path) == expected
    shutil.rmtree(folder / "sub/deep")
    report = build_index(path, open_source(folder / part), model)
    assert report.removed == 2 + (not prune)
    assert "notes/sub/deep/c.md" not in held(path)


def test_what_cannot_be_read_of_a_folder_inside_is_kept_under_its_old_name(path, make, model, monkeypatch):
    folder = make("notes", "a/x.md", "a/y.md", "a/gone.md", "z.md")
    build_index(path, open_source(folder / "a"), model)
    (folder / "a/gone.md").unlink()
    with monkeypatch.context() as away:
        unreadable(away, folder / "a/x.md")
        build_index(path, open_source(folder), model)
    assert held(path) == {"x.md": f"{folder}/a"} | dict.fromkeys(["a/y.md", "z.md"], str(folder))
    build_index(path, open_source(folder), model)
    assert held(path) == dict.fromkeys(["a/x.md", "a/y.md", "z.md"], str(folder))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_what_may_not_be_read_is_kept(path, make, model):
    folder = make("notes", "a.md", "sub/b.md", "z.md")
    build_index(path, open_source(folder), model)
    before = held(path)
    for place in (folder / "a.md", folder / "sub"):
        mode = place.stat().st_mode
        place.chmod(0)
        report = build_index(path, open_source(folder), model)
        place.chmod(mode)
        assert "cannot be read (Permission denied)" in report.skipped[0].reason
        assert held(path) == before


def test_a_file_that_is_removed_while_its_folder_is_read_is_gone(path, make, model, monkeypatch):
    folder = make("notes", "a.md", "b.md")
    build_index(path, open_source(folder), model)
    read = Path.read_bytes

    def removed(self):
        (folder / "b.md").unlink(missing_ok=True)
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", removed)
    assert build_index(path, open_source(folder), model).removed == 1
    assert set(held(path)) == {"a.md"}


def test_what_is_too_large_or_binary_now_is_removed(path, make, model):
    folder = make("notes", "a.md", "b.md", "c.md")
    build_index(path, open_source(folder), model)
    (folder / "a.md").write_bytes(b"\0")
    (folder / "b.md").write_text("x" * 2000)
    assert build_index(path, open_source(folder, max_file_bytes=1000), model).removed == 2
    assert set(held(path)) == {"c.md"}


@pytest.mark.parametrize("prune", [True, False])
def test_a_document_whose_new_id_another_source_has_is_kept_under_its_old_id(path, make, model, prune):
    folder = make("notes", "a/x.md", "a/y.md")
    build_index(path, open_source(folder / "a"), model)
    update_documents(path, [SourceDocument("a/x.md", "", "said by a client")], model)
    report = build_index(path, open_source(folder), model, prune=prune)
    assert [skipped.path for skipped in report.conflicts] == ["a/x.md"]
    assert held(path) == {"x.md": f"{folder}/a", "a/x.md": "api", "a/y.md": str(folder)}
    assert sources(path) == {f"{folder}/a", str(folder), "api"}
    build_index(path, open_source(folder), model, prune=prune, take_over=True)
    assert held(path) == dict.fromkeys(["a/x.md", "a/y.md"], str(folder))
    assert sources(path) == {str(folder), "api"}

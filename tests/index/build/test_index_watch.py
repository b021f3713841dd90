"""Watching: what changes on disk changes in the index, as watchfiles really reports it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search_r3.errors import InputError
from search_r3.index import SearchIndex, build_index, open_source
from search_r3.index.build.build_index import ONE_COMMIT
from search_r3.index.build.watch import EVERYTHING, MANY, changed_paths, keep_up_to_date, watch_source
from search_r3.index.row_keys import CONTENT

SECONDS = 60.0
"""How long a test waits for a change to be reported: the machine may be busy."""


# ------------------------------------------------------------------------------------------------- what is reported


class Watching:
    """A watch on a source, with all paths that it has reported."""

    def __init__(self, path: Path) -> None:
        self.source = open_source(path)
        self.stop = threading.Event()
        self.changes = watch_source(self.source, self.stop)
        assert next(self.changes) == frozenset()
        self.sets: list[frozenset[str]] = []

    def until(self, *wanted: str) -> None:
        """Wait until all of these paths are reported."""
        deadline = time.monotonic() + SECONDS
        for paths in self.changes:
            self.sets += [paths] if paths else []
            if set(wanted) <= set().union(*self.sets):
                return
            assert time.monotonic() < deadline, self.sets

    def read(self) -> list[str]:
        """The documents at the paths that were reported, and forget these."""
        self.source.only, self.source.may_be_empty = frozenset().union(*self.sets), True
        self.sets.clear()
        return sorted(document.id for document in self.source)


@pytest.fixture
def watching() -> Iterator[Callable[[Path], Watching]]:
    pytest.importorskip("watchfiles")
    made: list[Watching] = []

    def watch(path: Path) -> Watching:
        made.append(Watching(path))
        return made[-1]

    yield watch
    for one in made:
        one.stop.set()
        one.changes.close()


def written(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


def test_a_file_that_is_replaced_by_a_rename_is_noticed_every_time(tmp_path: Path, watching: Callable) -> None:
    """A watch on the file itself ends with the first one."""
    file = written(tmp_path, "notes.md") / "notes.md"
    watch = watching(file)
    for number in range(3):
        (tmp_path / "new").write_text(f"number {number}")
        os.replace(tmp_path / "new", file)
        watch.until(".")
        watch.sets.clear()
    file.unlink()
    file.write_text("made again")
    watch.until(".")


def test_other_files_beside_a_watched_one_are_no_changes(tmp_path: Path, watching: Callable) -> None:
    watch = watching(written(tmp_path, "notes.md") / "notes.md")
    written(tmp_path, "other.md")
    assert [next(watch.changes) for _ in range(3)] == [frozenset()] * 3


def test_a_watched_link_is_followed(tmp_path: Path, watching: Callable) -> None:
    written(tmp_path, "data/real.md", "links/x")
    (tmp_path / "links" / "notes.md").symlink_to(tmp_path / "data" / "real.md")
    watch = watching(tmp_path / "links" / "notes.md")
    (tmp_path / "data" / "real.md").write_text("changed")
    watch.until(".")


def test_a_folder_moved_in_is_walked_and_one_moved_out_is_lost(tmp_path: Path, watching: Callable) -> None:
    """Both are reported by the folder's own name alone."""
    root = written(tmp_path / "root", "a.md", "old/b.md", "old/deep/c.md")
    outside = written(tmp_path / "outside", "deep/d.md", "e.md", "node_modules/x.md")
    watch = watching(root)
    outside.rename(root / "new")
    (root / "old").rename(tmp_path / "gone")
    watch.until("new", "old")
    assert watch.read() == ["new/deep/d.md", "new/e.md"]
    written(root, "new/deep/f.md")  # the folder that was moved in is watched, too
    watch.until("new/deep/f.md")
    assert watch.read() == ["new/deep/f.md"]


def test_what_is_there_counts_not_the_order_of_what_happened(tmp_path: Path, watching: Callable) -> None:
    root = written(tmp_path / "root", "lost and made.md")
    watch = watching(root)
    written(root, "made and lost.md")
    (root / "made and lost.md").unlink()
    (root / "lost and made.md").unlink()
    written(root, "lost and made.md")
    watch.until("lost and made.md", "made and lost.md")
    assert watch.read() == ["lost and made.md"]


def test_a_burst_is_joined_and_what_happens_meanwhile_is_kept(tmp_path: Path, watching: Callable) -> None:
    watch = watching(written(tmp_path / "root", "a.md"))
    names = [f"folder/{number}.md" for number in range(300)]
    written(tmp_path / "root", *names)  # nobody asks the watch while these are written
    deadline = time.monotonic() + SECONDS
    count, found = 0, set()
    while found != set(names):
        assert time.monotonic() < deadline
        if paths := next(watch.changes):
            count += 1
            watch.sets = [paths]
            found |= set(watch.read())
    assert count <= 5


def test_the_watch_ends_when_it_is_told_to_and_when_the_folder_is_gone(tmp_path: Path, watching: Callable) -> None:
    root = written(tmp_path / "root", "a.md")
    watch = watching(root)
    watch.stop.set()
    assert not any(watch.changes)
    other = watching(root)
    root.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="was moved or removed; what was indexed of it is kept"):
        list(other.changes)
    other.source.only = frozenset(["a.md"])
    with pytest.raises(InputError, match="is not there any more; what was indexed of it is kept"):
        list(other.source)


# ------------------------------------------------------------------------------------------------- what it concerns


@pytest.mark.parametrize(
    ("changed", "paths"),
    [
        (["a.md", "sub/b.md"], {"a.md", "sub/b.md"}),
        (["sub", "sub/b.md", "sub/deep/c.md", "subs.md"], {"sub", "subs.md"}),
        ([".git/index", ".hidden", ".x/a.md", "node_modules/a.md", "x.index/documents.lance/data/1", "venv"], set()),
        (["sub/.gitignore", "sub/b.md", "a.md"], {"sub", "a.md"}),
        ([".gitignore", "a.md"], {"."}),
        ([".git/info/exclude"], {"."}),
        ([""], set()),
        ([f"{number}.md" for number in range(MANY + 1)], {"."}),
    ],
)
def test_paths_that_may_be_read_differently(tmp_path: Path, changed: list[str], paths: set[str]) -> None:
    assert changed_paths(tmp_path, [str(tmp_path / name) for name in changed]) == paths


def test_only_some_paths_are_read_by_the_rules_of_all(tmp_path: Path) -> None:
    root = written(tmp_path, "a.md", "b.md", "sub/c.md", "sub/d.py", "sub/old/e.md", "venv/f.md", ".h/g.md", "i.xyz")
    (root / ".gitignore").write_text("b.md\n/sub/old/\n")
    (root / "link.md").symlink_to(root / "a.md")
    source = open_source(root, exclude=["*.py"])
    source.may_be_empty = True
    everything = [document.id for document in source]
    assert everything == ["a.md", "sub/c.md"]
    for only, found in [
        (["."], everything),
        (["sub"], ["sub/c.md"]),
        (["sub", "sub/c.md", "a.md"], everything),
        (["b.md", "sub/d.py", "sub/old", "sub/old/e.md", "venv/f.md", ".h", "link.md", "i.xyz", "gone.md"], []),
    ]:
        source.only = frozenset(only)
        assert sorted(document.id for document in source) == found, only


# ------------------------------------------------------------------------------------------------------- the index


def contents(path: Path) -> dict[str, str]:
    index = SearchIndex.open(path)
    return {row["document"]: row[CONTENT] for row in index.backend.rows()}


def update(path: Path, source: Any, model: Any, *paths: str, **options: Any) -> Any:
    source.only, source.may_be_empty = frozenset(paths), True
    return build_index(path, source, model, progress=False, commit_every=ONE_COMMIT, maintain=False, **options)


@pytest.mark.parametrize("second", [False, True])
def test_an_update_of_some_paths_gives_the_index_that_a_whole_run_would(
    tmp_path: Path, path: Path, model: Any, make_model: Callable, second: bool
) -> None:
    if second:  # its ids have a prefix
        build_index(path, open_source(written(tmp_path / "first", "other.md", "sub/a.md")), model, progress=False)
    root = written(tmp_path / "root", "a.md", "b.md", "sub/c.md", "sub/d.md", "subs.md", "old/e.md", "keep.md")
    source = open_source(root)
    build_index(path, source, model, progress=False)
    model.encoded.clear()
    (root / "a.md").write_text("changed")
    (root / "b.md").unlink()
    (root / "sub").rename(root / "renamed")
    shutil.rmtree(root / "old")
    written(root, "new/f.md")
    report = update(path, source, model, "a.md", "b.md", "sub", "renamed", "old", "new")
    assert (report.added, report.updated, report.removed) == (3, 1, 4)
    assert len(model.encoded) == 4
    assert SearchIndex.open(path).complete
    after = contents(path)
    source.only = None
    report = build_index(path, source, model, progress=False)
    assert (report.added, report.updated, report.removed) == (0, 0, 0)
    assert contents(path) == after
    found = {name.removeprefix("root/") for name in after if not second or name.startswith("root/")}
    assert found == {"a.md", "new/f.md", "renamed/c.md", "renamed/d.md", "subs.md", "keep.md"}


def test_everything_may_be_gone_and_come_back(tmp_path: Path, path: Path, model: Any) -> None:
    root = written(tmp_path / "root", "a.md", "b.md")
    source = open_source(root)
    build_index(path, source, model, progress=False)
    for name in ("a.md", "b.md"):
        (root / name).unlink()
    assert update(path, source, model, "a.md", "b.md").removed == 2
    assert contents(path) == {}
    written(root, "a.md")
    assert update(path, source, model, "a.md").added == 1
    assert set(contents(path)) == {"a.md"}
    assert SearchIndex.open(path).complete


def test_what_is_to_be_kept_is_kept(tmp_path: Path, path: Path, model: Any) -> None:
    root = written(tmp_path / "root", "a.md", "b.md")
    source = open_source(root)
    build_index(path, source, model, progress=False)
    (root / "a.md").unlink()
    assert update(path, source, model, "a.md", prune=False).removed == 0
    assert set(contents(path)) == {"a.md", "b.md"}


def test_a_file_that_cannot_be_read_now_keeps_what_was_indexed(
    tmp_path: Path, path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = written(tmp_path / "root", "a.md", "b.md")
    source = open_source(root)
    build_index(path, source, model, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", unreadable)
        report = update(path, source, model, "a.md")
    assert report.removed == 0
    assert [(one.path, one.unread) for one in report.skipped] == [("a.md", True)]
    (root / "a.md").write_text("can be read again")
    assert update(path, source, model, "a.md").updated == 1


def unreadable(_: Path) -> bytes:
    raise PermissionError(13, "Permission denied")


def test_single_paths_need_an_index_that_can_be_updated(tmp_path: Path, path: Path, model: Any) -> None:
    source = open_source(written(tmp_path / "root", "a.md"))
    build_index(path, source, model, progress=False, backend="numpy")
    with pytest.raises(InputError, match="'numpy' does not support updates of single paths"):
        update(path, source, model, "a.md")


# -------------------------------------------------------------------------------------------------------- the loop


def test_an_update_that_fails_is_tried_again_with_what_came_since() -> None:
    now, asked, said, done = 0.0, [], [], []

    def changes() -> Iterator[frozenset[str]]:
        nonlocal now
        for seconds, paths in [(0, {"a"}), (1, set()), (2, set()), (1, {"b"}), (10, set()), (1, set()), (1, {"c"})]:
            now += seconds
            yield frozenset(paths)

    def fails_thrice(paths: frozenset[str]) -> Any:
        asked.append(sorted(paths))
        if len(asked) <= 3:
            raise InputError("busy")
        return SimpleNamespace()

    keep_up_to_date(
        changes(), fails_thrice, lambda paths, _: done.append(sorted(paths)), lambda e: said.append(str(e)), lambda: now
    )
    assert asked == [["a"], ["a"], ["a", "b"], ["a", "b"], ["c"]]
    assert done == [["a", "b"], ["c"]]
    assert said == ["busy"], "the same message once"


def test_a_change_of_everything_swallows_the_others() -> None:
    asked: list[frozenset[str]] = []

    def update(paths: frozenset[str]) -> Any:
        asked.append(paths)
        if len(asked) == 1:
            raise InputError("busy")

    keep_up_to_date(iter([frozenset(["a"]), EVERYTHING]), update, lambda *_: None, lambda _: None)
    assert asked[-1] == EVERYTHING

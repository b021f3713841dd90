"""An index describes itself in brief: its size, its folders and kinds of files, and headings to ask about."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index import overview as overview_module
from search_r3.index.overview import Counted, choose_headings, overview_of


def made(folder: Path, model, *paths: str) -> SearchIndex:
    documents = [SourceDocument(path, "", f"text {number}", path=path) for number, path in enumerate(paths)]
    build_index(folder / "notes.index", documents, model, progress=False)
    return SearchIndex.open(folder / "notes.index")


def test_folders_are_those_below_what_all_documents_share(tmp_path: Path, model) -> None:
    paths = ["all/docs/a.md", "all/docs/deep/b.md", "all/src/c.py", "all/readme.md"]
    found = overview_of(made(tmp_path, model, *paths))
    assert (found.name, found.documents, found.chunks) == ("notes.index", 4, 4)
    assert found.folders == (Counted("all/docs/", 2), Counted("all/src/", 1))
    assert found.types == (Counted(".md", 3), Counted(".py", 1))


def test_what_all_documents_have_in_common_is_no_choice(tmp_path: Path, model) -> None:
    found = overview_of(made(tmp_path, model, "docs/a.md", "docs/b.md"))
    assert found.folders == found.types == ()


def test_a_very_large_index_has_only_its_size(tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview_module, "MOST_LISTED", 1)
    found = overview_of(made(tmp_path, model, "docs/a.md", "src/b.md"))
    assert (found.chunks, found.documents, found.folders) == (2, None, ())


def test_headings_are_of_different_documents_and_questions_come_first() -> None:
    titles = [
        ("a", "Guide > Backing up a disk"),
        ("a", "Guide > Restoring a disk"),
        ("b", "b.md"),
        ("c", "src/some long path.md"),
        ("d", "One"),
        ("e", "`Where` are the logs kept"),
        ("f", "Guide > Numbers of the beast"),
        ("g", "2024 was a year"),
    ]
    chosen = choose_headings(titles)
    assert chosen[0] == "Where are the logs kept"
    assert len({"Backing up a disk", "Restoring a disk"}.intersection(chosen)) == 1
    assert "Numbers of the beast" in chosen
    assert len(chosen) == 3
    assert choose_headings(reversed(titles)) == chosen

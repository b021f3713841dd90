"""The cache of what documents were cut into: an unchanged document is recognized, and every change is still found."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from search_r3.index.build import index_diff
from search_r3.index.build.build_index import build_index
from search_r3.index.build.build_report import IndexReport
from search_r3.index.chunking import chunking_cache
from search_r3.index.chunking.chunking_cache import ChunkingCache, Cut, document_digest, rows_digest
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import Heading, Page, SourceDocument

LONG = "\n\n".join(f"Paragraph {number} is about trains, boats and bread. " * 8 for number in range(12))
DOCUMENTS = [
    SourceDocument("long", "Long", LONG, path="long.txt", kind="text"),
    SourceDocument("other", "Other", LONG.replace("trains", "planes"), path="other.txt", kind="text"),
    SourceDocument("short", "Short", "One paragraph.", path="short.txt", kind="text"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "chunking"


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the documents that are cut, in order."""
    ids: list[str] = []
    real = index_diff.chunk_document

    def counted(document: SourceDocument, **options):
        ids.append(document.id)
        return real(document, **options)

    monkeypatch.setattr(index_diff, "chunk_document", counted)
    return ids


def build(path: Path, documents: Iterable[SourceDocument], model, **options) -> IndexReport:
    return build_index(path, documents, model, progress=False, **options)


def rows(path: Path) -> list[tuple]:
    table = SearchIndex.open(path).backend.table.to_arrow()
    return sorted(zip(*(table[name].to_pylist() for name in ("id", "title", "r3_content", "r3_row_hash")), strict=True))


def test_a_document_with_several_chunks_is_not_cut_again(tmp_path: Path, model, cut: list[str]) -> None:
    first = build(tmp_path / "i", DOCUMENTS, model)
    assert cut == ["long", "other", "short"]
    assert first.added > 4
    before = rows(tmp_path / "i")
    cut.clear()
    second = build(tmp_path / "i", DOCUMENTS, model)
    assert cut == ["short"]
    assert (second.unchanged, second.documents) == (first.added, 3)
    assert (second.added, second.updated, second.removed, second.embedded) == (0, 0, 0, 0)
    assert rows(tmp_path / "i") == before


@pytest.mark.parametrize(
    "change",
    [{"text": LONG + "\n\nOne more."}, {"title": "Longer"}, {"metadata": {"year": 1999}}, {"path": "moved.txt"},
     {"kind": "markdown"}, {"line": 3}, {"headings": (Heading(0, 1, "Top"),)}, {"pages": (Page(0, 7),)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_change_is_found(tmp_path: Path, model, make_model, cut: list[str], change: dict) -> None:
    build(tmp_path / "i", DOCUMENTS, model)
    before = rows(tmp_path / "i")
    changed = [replace(DOCUMENTS[0], **change), *DOCUMENTS[1:]]
    cut.clear()
    build(tmp_path / "i", changed, model)
    assert cut == ["long", "short"]
    build(tmp_path / "new", changed, make_model())
    assert rows(tmp_path / "i") == rows(tmp_path / "new")
    build(tmp_path / "i", DOCUMENTS, model)  # known from the first run, but not what the index has now
    assert rows(tmp_path / "i") == before


def test_rows_that_are_missing_or_were_changed_are_written_again(tmp_path: Path, model, cut: list[str]) -> None:
    build(tmp_path / "i", DOCUMENTS, model)
    before = rows(tmp_path / "i")
    table = SearchIndex.open(tmp_path / "i").backend.table
    table.delete("id = 'long#2'")
    table.update(where="id = 'other#1'", values={"r3_row_hash": "x"})
    cut.clear()
    report = build(tmp_path / "i", DOCUMENTS, model)
    assert sorted(cut) == ["long", "other", "short"]
    assert (report.added, report.updated) == (1, 1)
    assert rows(tmp_path / "i") == before


def test_a_document_of_another_source_is_still_a_conflict(tmp_path: Path, model) -> None:
    build(tmp_path / "i", DOCUMENTS, model, source="one")
    changed = [replace(DOCUMENTS[0], text=LONG + "\n\nMore.")]
    assert len(build(tmp_path / "i", changed, model, source="two").conflicts) == 1
    report = build(tmp_path / "i", DOCUMENTS[:2], model, source="two", take_over=True)
    assert report.updated > 4
    assert build(tmp_path / "i", DOCUMENTS[:2], model, source="two").updated == 0


def test_another_limit_of_tokens_is_another_cache(tmp_path: Path, model, cut: list[str], cache: Path) -> None:
    build(tmp_path / "i", DOCUMENTS, model)
    cut.clear()
    build(tmp_path / "i", DOCUMENTS, model, max_length=64)
    assert cut == ["long", "other", "short"]
    assert len(list(cache.glob("*.sqlite"))) == 2


@pytest.mark.parametrize("content", [b"no database" * 999, b""])
def test_a_damaged_file_is_made_anew(tmp_path: Path, model, cut: list[str], cache: Path, content: bytes) -> None:
    build(tmp_path / "i", DOCUMENTS, model)
    (file,) = cache.glob("*.sqlite")
    file.write_bytes(content)
    for expected in (["long", "other", "short"], ["short"]):
        cut.clear()
        assert build(tmp_path / "i", DOCUMENTS, model).embedded == 0
        assert cut == expected


def test_without_a_cache_folder_everything_is_cut(tmp_path: Path, model, cut: list[str], monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        cut.clear()
        build(tmp_path / "i", DOCUMENTS, model)
        assert cut == ["long", "other", "short"]


def test_a_locked_file_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking_cache, "WAIT", 0.01)
    file = tmp_path / "c.sqlite"
    cuts = ChunkingCache(file)
    cuts.put([(b"a", Cut(b"b", 2))])
    assert cuts.get(b"a") == (b"b", 2)
    with sqlite3.connect(file) as other:
        other.execute("BEGIN EXCLUSIVE")
        cuts.put([(b"c", Cut(b"d", 2))])
    assert cuts.get(b"a") is None
    again = ChunkingCache(file)
    assert (again.get(b"a"), again.get(b"c")) == ((b"b", 2), None)
    again.close()


def test_the_older_half_is_dropped_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking_cache, "MOST_DOCUMENTS", 8)
    cuts = ChunkingCache(tmp_path / "c.sqlite")
    cuts.put((bytes([number]), Cut(b"x", 2)) for number in range(10))
    cuts.close()
    cuts = ChunkingCache(tmp_path / "c.sqlite")
    assert [number for number in range(10) if cuts.get(bytes([number]))] == [5, 6, 7, 8, 9]
    cuts.close()


def test_digests_depend_on_the_content_alone() -> None:
    one = SourceDocument("a", "t", "x", {"b": 1, "a": 2.5})
    assert document_digest(one) == document_digest(replace(one, metadata={"a": 2.5, "b": 1}, record=9))
    assert document_digest(one) != document_digest(replace(one, title="tx", text=""))
    assert document_digest(replace(one, text="\ud800"))
    assert rows_digest([("b", "2"), ("a", "1")]) == rows_digest([("a", "1"), ("b", "2")]) != rows_digest([("a", "12")])

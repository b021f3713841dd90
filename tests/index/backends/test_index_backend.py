"""Index backends: what each promises, and one from another package that is built, searched and changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from plugin_package import code_of_docstring, code_of_page, install_plugin, without_docstrings

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import (
    IndexBackend,
    SearchIndex,
    SourceDocument,
    build_index,
    compact_index,
    delete_documents,
    delete_source,
    open_source,
    update_documents,
)
from search_r3.index.backends import backend_registry, index_backend
from search_r3.index.backends.backend_registry import create_backend, open_backend
from search_r3.index.backends.index_backend import Row
from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.backends.lance.table_rows import make_row
from search_r3.index.backends.numpy_backend import NumpyBackend
from search_r3.index.index_handle import IndexHandle
from search_r3.index.index_info import IndexInfo, ModelMismatch
from search_r3.index.storage.location import Location, location_of

ENTRIES = "[search_r3.index_backends]\njson = MODULE:JsonBackend\n"
INFO = IndexInfo(3, "fake", "a" * 64, 3, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def json_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The backend of docs/write-your-own/index-backend.md, installed as another package."""
    install_plugin(tmp_path / "site", monkeypatch, "json-index", ENTRIES, code_of_page("index-backend"))
    backend_registry.plugin_backends.cache_clear()
    yield backend_registry.backend_named("json")
    backend_registry.plugin_backends.cache_clear()


@pytest.fixture(params=["lance", "numpy", "milvus", "json"])
def kind(request: pytest.FixtureRequest) -> type[IndexBackend]:
    if request.param == "json":
        return request.getfixturevalue("json_backend")
    return backend_registry.backend_named(request.param)


@pytest.fixture
def place(kind: type[IndexBackend], tmp_path: Path, request: pytest.FixtureRequest) -> Location:
    """Where an index of that backend is to be made."""
    return location_of(request.getfixturevalue("milvus")) if kind.name == "milvus" else tmp_path / "x"


def rows_of(*texts: str, year: int = 2020) -> list[Row]:
    from search_r3.index import chunk_document

    documents = [SourceDocument(f"d{i}", "", text, {"year": year}, f"d{i}.txt") for i, text in enumerate(texts)]
    rows = [make_row(chunk, None, "here", "place") for document in documents for chunk in chunk_document(document)]
    return [{name: value for name, value in row.items() if name not in ("r3_columns", "r3_place")} for row in rows]


def made(kind: type[IndexBackend], place: Location) -> IndexBackend:
    if isinstance(place, Path):
        place.mkdir()
    return kind.create(place, INFO) if kind is LanceBackend else create_backend(kind, place, INFO)


def test_the_docstring_shows_the_backend_of_the_page():
    assert without_docstrings(code_of_docstring(index_backend)) == without_docstrings(code_of_page("index-backend"))


def test_a_backend_adds_replaces_searches_and_deletes(kind: type[IndexBackend], place: Location):
    backend = made(kind, place)
    vectors = np.array([[1, 0, 0], [0, 1, 0], [0, 0.6, 0.8]], dtype=np.float32)
    backend.add(rows_of("one", "two", "three"), vectors)
    backend.add(rows_of("ONE"), np.array([[0.8, 0.6, 0]], dtype=np.float32))
    again = open_backend(place)
    assert (again.info, again.count(), again.complete) == (INFO, 3, kind is not LanceBackend)
    assert {row["id"]: row["r3_content"] for row in again.rows()} == {"d0": "ONE", "d1": "two", "d2": "three"}
    found = again.search(np.array([0, 1, 0], dtype=np.float32), 2)
    assert [(row["id"], round(score, 4)) for row, score in found] == [("d1", 1.0), ("d0", 0.6)]
    assert json.loads(found[0][0]["r3_metadata"]) == {"year": 2020}
    assert again.vectors(["d2", "d0"]).tolist() == np.array([[0, 0.6, 0.8], [0.8, 0.6, 0]], dtype=np.float32).tolist()
    backend = open_backend(place)
    backend.delete(["d1", "unknown"])
    assert sorted(row["id"] for row in open_backend(place).rows()) == ["d0", "d2"]
    assert [(s.name, s.documents, s.chunks) for s in open_backend(place).sources()] == [("here", 2, 2)]


def test_a_corpus_is_built_searched_updated_and_deleted(kind: type[IndexBackend], make_model, place: Location):
    path = place
    model = make_model(dimension=2048)
    documents = [SourceDocument(f"d{i}", f"t{i}", f"text number{i} here") for i in range(20)]
    assert build_index(path, documents, model, backend=kind.name).added == 20
    index = SearchIndex.open(path)
    assert index.backend.name == kind.name
    assert index.describe()["documents"] == len(index) == 20
    assert index.search("number7", model, mode="vector", k=3).hits[0].document == "d7"
    assert index.vectors(["d7"]).shape == (1, model.dimension)
    names, vector_ND, texts = index.matrix(texts=True)
    assert sorted(names) == sorted(document.id for document in documents)
    assert np.array_equal(vector_ND[names.index("d7")], index.vectors(["d7"])[0])
    assert texts is not None
    assert texts[names.index("d7")] == "t7 text number7 here"
    assert index.matrix().texts is None
    page = index.list_documents(3, after="d18")
    assert ([d.id for d in page.documents], page.total, page.has_more) == (["d19", "d2", "d3"], 20, True)
    count = len(model.encoded)
    again = build_index(path, documents[:19], model)
    assert (again.unchanged, again.embedded, again.removed, len(model.encoded)) == (19, 0, 1, count)
    update_documents(path, [SourceDocument("d3", "", "other words")], model)
    delete_documents(path, ["d5"])
    found = SearchIndex.open(path).search("other words", model, mode="vector", k=100)
    assert found.hits[0].document == "d3"
    assert len(found.hits) == 18
    with pytest.raises(InputError, match='has no document "d5"'):
        delete_documents(path, ["d5"])
    with pytest.raises(ModelMismatch):
        build_index(path, documents, make_model(contract_hash="b" * 64))
    assert delete_source(path, "documents").chunks == 17
    assert [source.name for source in SearchIndex.open(path).sources] == ["api"]


@pytest.mark.parametrize("name", ["numpy", "json"])
def test_what_a_backend_cannot_do_is_one_line(json_backend, name: str, model, path: Path):
    build_index(path, [SourceDocument("a", "", "text")], model, backend=name)
    index = SearchIndex.open(path)
    with pytest.raises(InputError, match=f'has no text search \\(backend "{name}"\\); search with mode "vector"'):
        index.search("text", model)
    with pytest.raises(InputError, match=f"backend '{name}' does not support filters"):
        index.search("text", model, mode="vector", where="year > 1")
    with pytest.raises(InputError, match="does not support compaction"):
        compact_index(path)
    with pytest.raises(InputError, match="does not support types of columns"):
        build_index(path, [SourceDocument("a", "", "text")], model, types={"year": "text"})
    with pytest.raises(InputError, match=f"holds an index of the backend '{name}', not 'lance'"):
        build_index(path, [SourceDocument("a", "", "text")], model, backend="lance")
    with pytest.raises(InputError, match=r"no index backend 'other'; choose one of: lance, numpy, milvus, json"):
        build_index(path / "new", [SourceDocument("a", "", "text")], model, backend="other")
    with pytest.raises(InputError, match="does not support object storage"):
        build_index("s3://bucket/x", [SourceDocument("a", "", "text")], model, backend=name)
    assert (index.full_text, index.columns, index.approximate) == ("none", {}, None)


def test_a_backend_of_ones_own_may_search_words_and_filter(json_backend, monkeypatch, model, path: Path):
    class Words(json_backend):
        name = "words"
        capabilities = frozenset({"text", "filter"})
        columns = {"kind": "text"}  # noqa: RUF012

        def check_filter(self, where):
            if not re.fullmatch(r"kind = '\w+'", where):
                raise InputError(f"the filter {where!r} cannot be used; write kind = 'NAME'")
            return where

        def rows(self):
            return [row for row, _ in self._rows.values()]

        def _fits(self, row, where):
            return where is None or json.loads(row["r3_metadata"])["kind"] == where.split("'")[1]

        def search(self, vector, k, where=None, exact=False):
            return [pair for pair in super().search(vector, 10**6, None, exact) if self._fits(pair[0], where)][:k]

        def search_text(self, query, k, where=None):
            words = set(query.lower().split())
            counts = [(row, float(len(words & set(row["r3_content"].lower().split())))) for row in self.rows()]
            found = [(row, count) for row, count in counts if count and self._fits(row, where)]
            return sorted(found, key=lambda pair: (-pair[1], pair[0]["id"]))[:k]

    monkeypatch.setattr(backend_registry, "_registered", {})
    backend_registry.register_backend(Words)
    animals = {"a": ("whales in the sea", "sea"), "b": ("zebras and whales", "land"), "c": ("moss", "land")}
    documents = [SourceDocument(name, "", text, {"kind": kind}) for name, (text, kind) in animals.items()]
    build_index(path, documents, model, backend="words")
    index = SearchIndex.open(path)
    assert (index.full_text, index.columns) == ("current", {"kind": "text"})

    def found(mode: str, where: str | None = None) -> list[str]:
        return [hit.document for hit in index.search("whales", model, mode=mode, where=where).hits]

    assert found("text") == ["a", "b"]
    assert found("text", "kind = 'land'") == ["b"]
    assert sorted(found("vector", "kind = 'land'")) == ["b", "c"]
    assert set(found("hybrid")) == {"a", "b", "c"}
    with pytest.raises(InputError, match="write kind = 'NAME'"):
        found("text", "year > 1")


def test_runs_keep_to_their_sources(make, model, path: Path):
    one, two = make("one", "a.md", "b.md"), make("two", "a.md", "c.md")
    build_index(path, open_source(one), model, backend="numpy")
    report = build_index(path, open_source(two), model)
    assert [conflict.path for conflict in report.conflicts] == ["a.md"]
    assert sorted(d.id for d in SearchIndex.open(path).list_documents().documents) == ["a.md", "b.md", "c.md"]
    (one / "b.md").unlink()
    assert build_index(path, open_source(one), model, may_prune=lambda removal: False).kept.documents == 1
    assert build_index(path, open_source(one), model).removed == 1
    assert build_index(path, open_source(two), model, take_over=True).updated == 1
    assert not build_index(path, open_source(two), model).conflicts


def test_a_server_follows_it(json_backend, model, path: Path):
    build_index(path, [SourceDocument("a", "", "whales")], model, backend="json")
    handle = IndexHandle(path, every=0.0)
    update_documents(handle.writable(), [SourceDocument("b", "", "zebras")], model)
    handle.check()
    assert handle.search("zebras", model, mode="vector").hits[0].document == "b"
    assert handle.list_documents().total == 2
    assert handle.problem is None


def test_a_damaged_file_is_one_line(model, path: Path):
    build_index(path, [SourceDocument("a", "", "text")], model, backend="numpy")
    (path / "index.npz").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match=r"is damaged .*; delete the folder and index again"):
        SearchIndex.open(path)
    (path / "index.npz").unlink()
    with pytest.raises(InputError, match="is not a search-r3 index"):
        SearchIndex.open(path)


def test_the_command_line(tmp_path: Path, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/a.md").write_text("The train to Vienna leaves at nine.")
    model = ["--model", str(tiny_model)]
    assert main(["index", "notes", "--into", "x", "--backend", "numpy", *model]) == 0
    assert main(["search", "x", "train", "--mode", "vector", "--no-reasoning", *model]) == 0
    assert "a.md" in capsys.readouterr().out
    assert main(["index", "--info", "x"]) == 0
    out = capsys.readouterr().out
    assert "1 documents in 1 chunks" in out
    assert "backend:  numpy" in out
    assert main(["delete", "x", "a.md"]) == 0
    assert len(SearchIndex.open("x")) == 0
    assert main(["search", "x", "train", *model]) == 2
    assert 'search with mode "vector"' in capsys.readouterr().err


def test_what_is_wrong_with_a_backend_is_one_line(tmp_path: Path):
    class Nameless(NumpyBackend):
        name = ""

    class Remote(NumpyBackend):
        name = "remote"
        capabilities = frozenset({"object_storage"})

    for backend, line in (
        (Nameless, "give it a unique name"),
        (Remote, "capability 'object_storage'"),
        (3, "is 3;"),
    ):
        with pytest.raises(InputError, match=line):
            backend_registry.register_backend(backend)
    (tmp_path / "backend.txt").write_text("gone\n")
    with pytest.raises(InputError, match=r"cannot be opened: there is no index backend 'gone'.*install its package"):
        SearchIndex.open(tmp_path)

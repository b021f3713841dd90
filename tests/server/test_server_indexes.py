"""Several indexes in one server: a request names the one it means, and each is found, changed and lost by itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving_tools import Running, eventually, running

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.index.build.build_index import build_index
from search_r3.index.index_info import ModelMismatch
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.server.named_indexes import name_paths
from search_r3.server.service import Loaded

pytestmark = pytest.mark.timeout(180)

TEXTS = {"notes": "The train leaves at nine.", "docs": "Bread needs flour.", "mail": "The sea is cold."}


@pytest.fixture
def make(tiny: SearchR3, tmp_path: Path) -> Callable[[str], SearchIndex]:
    def make(name: str) -> SearchIndex:
        document = SourceDocument(f"{name}-1", f"About {name}", TEXTS[name], {f"only_{name}": 1, "year": 2020})
        build_index(tmp_path / name, [document], tiny, progress=False)
        return SearchIndex.open(tmp_path / name)

    return make


@pytest.fixture
def server(tiny: SearchR3, make: Callable[[str], SearchIndex]) -> Iterator[Running]:
    indexes = {name: make(name) for name in ("notes", "docs")}
    with running(lambda: Loaded.of(tiny, indexes), writable=True) as found:
        yield found


def found(server: Running, **body: str) -> list[str]:
    answer = server.post("/v1/search", {"query": "what", "mode": "vector", "reasoning": False, **body})
    assert answer.status == 200, answer.json
    assert answer.json["index"] == body.get("index", "notes")
    return [hit["document"] for hit in answer.json["hits"]]


def test_a_search_finds_in_the_index_that_it_names_or_in_the_first(server: Running) -> None:
    assert found(server) == found(server, index="notes") == ["notes-1"]
    assert found(server, index="docs") == ["docs-1"]
    assert found(server, index="docs", where="only_docs = 1") == ["docs-1"]
    wrong = server.post("/v1/search", {"query": "what", "index": "docs", "where": "only_notes = 1"})
    assert (wrong.status, wrong.error["param"]) == (400, "where")


def test_what_is_served_is_listed_with_its_sizes(server: Running) -> None:
    assert server.ask("GET", "/v1/indexes").json == {
        "object": "list",
        "data": [
            {"object": "index", "name": name, "available": True, "chunks": 1} for name in ("notes", "docs")
        ],
    }  # fmt: skip
    assert server.ask("GET", "/v1/index").json["name"] == "notes"
    assert server.ask("GET", "/v1/index?index=docs").json["name"] == "docs"
    described = server.ask("GET", "/openapi.json").json["components"]["schemas"]
    assert described["IndexName"]["enum"] == ["notes", "docs"]
    assert "year" in described["Filter"]["pattern"]
    assert "only_" not in described["Filter"]["pattern"]  # a filter that is described fits every index


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("POST", "/v1/search", {"query": "what", "index": "other"}), ("GET", "/v1/index?index=other", None),
     ("GET", "/v1/documents?index=other", None), ("DELETE", "/v1/documents/notes-1?index=other", None),
     ("POST", "/v1/documents", {"documents": [{"id": "x", "text": "x"}], "index": "other"})],
)  # fmt: skip
def test_an_unknown_index_is_404_with_those_that_there_are(server: Running, method: str, path: str, body: dict) -> None:
    answer = server.ask(method, path, body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "index_not_found", "index")
    assert answer.error["message"] == "the index 'other' is not served here; this server has 'notes', 'docs'"


def test_documents_are_added_to_and_deleted_from_the_index_that_is_named(server: Running) -> None:
    def ids(index: str) -> list[str]:
        listed = server.ask("GET", f"/v1/documents?index={index}").json
        return [one["id"] for one in listed["data"]]

    new = {"documents": [{"id": "new", "text": "Yeast is alive."}], "index": "docs"}
    assert server.post("/v1/documents", new).status == 201
    assert (ids("notes"), ids("docs")) == (["notes-1"], ["docs-1", "new"])
    assert server.ask("DELETE", "/v1/documents/new").status == 404  # from the first index
    assert server.ask("DELETE", "/v1/documents/new?index=docs").status == 200
    assert (ids("notes"), ids("docs")) == (["notes-1"], ["docs-1"])


def test_one_index_that_is_gone_stops_only_its_own_searches(server: Running, tmp_path: Path) -> None:
    shutil.move(tmp_path / "docs", tmp_path / "away")
    eventually(lambda: server.ask("GET", "/health").json["reason"])
    health = server.ask("GET", "/health")
    assert (health.status, health.json["status"]) == (200, "ready")
    assert "docs is missing" in health.json["reason"]
    assert b"search_r3_index_available 0.0" in server.ask("GET", "/metrics").body
    assert server.post("/v1/search", {"query": "what", "index": "docs"}).error["code"] == "index_unavailable"
    assert found(server) == ["notes-1"]
    listed = server.ask("GET", "/v1/indexes").json["data"]
    assert [(one["name"], one["available"], one["chunks"]) for one in listed] == [
        ("notes", True, 1),
        ("docs", False, None),
    ]
    shutil.move(tmp_path / "notes", tmp_path / "away-too")
    eventually(lambda: server.ask("GET", "/health").status == 503)
    assert "; " in server.ask("GET", "/health").json["reason"]


def test_an_index_of_another_model_is_refused_with_both_names(
    tiny: SearchR3, other_tiny_model: Path, make: Callable[[str], SearchIndex], tmp_path: Path
) -> None:
    other = SearchR3.from_pretrained(other_tiny_model, device="cpu")
    build_index(tmp_path / "foreign", [SourceDocument("a", "", "text")], other, progress=False)
    with pytest.raises(ModelMismatch, match=f"foreign was made with {other.name} .* but this model is {tiny.name}"):
        Loaded.of(tiny, {"notes": make("notes"), "foreign": SearchIndex.open(tmp_path / "foreign")})


def test_an_index_is_named_after_its_folder_or_as_it_is_asked() -> None:
    found = name_paths(["~/a/notes", "s3://bucket/docs/"], ["mail=~/x=y", "other notes=z"])
    assert found == {"notes": "~/a/notes", "docs": "s3://bucket/docs/", "mail": "~/x=y", "other notes": "z"}
    assert list(name_paths(["."])) == [Path.cwd().name]


@pytest.mark.parametrize(
    ("paths", "named", "words"),
    [(["a/notes", "b/notes"], [], "a/notes and b/notes would both be served as 'notes'"),
     (["a"], ["a=b"], "--index NAME=b"), ([], ["notes"], "--index notes: expected a name and a folder"),
     ([], ["=notes"], "expected a name"), ([], ["notes="], "expected a name"), ([], ["a\nb=c"], "expected a name")],
)  # fmt: skip
def test_names_that_cannot_be_used_are_refused(paths: list[str], named: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        name_paths(paths, named)

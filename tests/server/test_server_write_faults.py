"""Writes while something goes wrong: storage that fails, another model's index, timeouts, additions held up."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from nightly import nightly
from serving_tools import Answer, Held, Running, eventually, running
from storage_faults import storage

from search_r3 import SearchR3
from search_r3.index.backends.lance import durable
from search_r3.index.backends.lance.durable import DiskError
from search_r3.index.build.build_index import build_index
from search_r3.index.index_handle import IndexHandle
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.locking import writing as locked
from search_r3.server import index_writer
from search_r3.server.service import Loaded

pytestmark = pytest.mark.timeout(180)
NEW = {"documents": [{"id": "new", "text": "a new text"}]}


@pytest.fixture(scope="session")
def other(other_tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(other_tiny_model, device="cpu")


@pytest.fixture
def asking() -> Any:
    """A request that is sent in a thread: its answer comes by `.result(60)`."""
    with ThreadPoolExecutor(8) as threads:
        yield threads.submit


def make(path: Path, model: Any, *names: str) -> Path:
    build_index(path, [SourceDocument(name, "", f"text of {name}", {}) for name in names], model, progress=False)
    return path


def documents(path: Path) -> set[str]:
    return set(SearchIndex.open(path).table.search().select(["document"]).to_arrow()["document"].to_pylist())


def status_and_code(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.error["code"]


def body_of(connection: Any) -> bytes:
    received = b""
    while more := connection.recv(65536):
        received += more
        if b"}" in more:
            break
    return received


def test_additions_that_are_being_embedded_keep_nobody_waiting(
    held: Held, make_index: Callable[[], SearchIndex]
) -> None:
    index = make_index()
    with running(lambda: Loaded.of(held, index), writable=True) as server:
        held.armed = True
        posts = [
            server.open_post("/v1/documents", {"documents": [{"id": f"d{i}", "text": f"text {i}"}]}) for i in range(80)
        ]
        eventually(lambda: server.service.in_flight == 80)
        eventually(lambda: held.passes == [("document", 1)] or held.passes)
        found = server.post("/v1/search", {"query": "bread", "mode": "text"})
        assert [hit["document"] for hit in found.json["hits"]] == ["bread"]
        assert server.ask("DELETE", "/v1/documents/bread").status == 200
        assert server.ask("GET", "/v1/documents").json["total"] == 2
        for connection in posts[40:]:  # they are dropped, whether they are being embedded or wait for a thread
            connection.close()
        eventually(lambda: server.service.in_flight == 40)
        held.gate.set()
        for connection in posts[:40]:
            assert body_of(connection).startswith(b"HTTP/1.1 201")
            connection.close()
        assert documents(index.path) == {"zug", "train"} | {f"d{i}" for i in range(40)}


def test_an_index_that_the_server_refuses_is_not_written(
    tiny: SearchR3, other: SearchR3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, foreign = make(tmp_path / "1", tiny, "a", "b"), make(tmp_path / "2", other, "a", "b")
    live = tmp_path / "live"

    def point(target: Path) -> None:
        (tmp_path / "link").symlink_to(target)
        os.replace(tmp_path / "link", live)

    def refused(server: Running) -> None:
        for answer in (server.post("/v1/documents", NEW), server.ask("DELETE", "/v1/documents/a")):
            assert status_and_code(answer) == (503, "index_unavailable")
            assert "made with other-llama" in answer.error["message"]
            assert int(answer.headers["retry-after"]) >= 1

    point(ours)
    versions = [SearchIndex.open(path).table.version for path in (ours, foreign)]
    handle = IndexHandle(live, every=600)
    with running(lambda: Loaded.of(tiny, handle), writable=True) as server:
        point(foreign)
        refused(server)  # and these two are the first to notice
        assert handle.refusal is not None
        refused(server)
        index_writer._maintain(handle, True)
        with monkeypatch.context() as patched:  # it is exchanged when the server has just looked
            patched.setattr(handle, "check", lambda: None)
            patched.setattr(handle, "_refused", None)
            refused(server)
            index_writer._maintain(handle, True)
        assert [SearchIndex.open(path).table.version for path in (ours, foreign)] == versions
        assert server.post("/v1/search", {"query": "text", "reasoning": False}).status == 200
        point(ours)
        assert server.post("/v1/documents", NEW).status == 503  # so it was at the last look
        handle.check()
        assert server.post("/v1/documents", NEW).status == 201
        assert server.ask("DELETE", "/v1/documents/a").status == 200
    assert documents(ours) == {"b", "new"}
    assert documents(foreign) == {"a", "b"}


def test_a_write_ends_in_the_index_in_which_it_began(
    tiny: SearchR3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make(tmp_path / "1", tiny, "a", "b"), make(tmp_path / "2", tiny, "c")
    live, version, update = (
        tmp_path / "live",
        SearchIndex.open(tmp_path / "2").table.version,
        index_writer.update_documents,
    )
    live.symlink_to(old)

    def exchanged(*given: Any, **options: Any) -> Any:
        (tmp_path / "link").symlink_to(new)
        os.replace(tmp_path / "link", live)
        return update(*given, **options)

    monkeypatch.setattr(index_writer, "update_documents", exchanged)
    with running(lambda: Loaded.of(tiny, SearchIndex.open(live)), writable=True) as server:
        assert server.post("/v1/documents", NEW).status == 201
        eventually(lambda: server.ask("GET", "/v1/documents").json["total"] == 1)
    assert documents(old) == {"a", "b", "new"}
    assert SearchIndex.open(new).table.version == version


def test_no_index_is_made_where_the_servers_is_gone(tiny: SearchR3, tmp_path: Path) -> None:
    live = make(tmp_path / "live", tiny, "a")
    handle = IndexHandle(live, every=600, patience=0.5)
    with running(lambda: Loaded.of(tiny, handle), writable=True) as server:
        live.rename(tmp_path / "away")
        assert status_and_code(server.ask("DELETE", "/v1/documents/a")) == (503, "index_unavailable")
        assert status_and_code(server.post("/v1/documents", NEW)) == (503, "index_unavailable")
        assert not live.exists()
        (tmp_path / "away").rename(live)
        handle.check()
        assert server.post("/v1/documents", NEW).status == 201


@pytest.mark.parametrize("fault", ["500", *nightly("gone", "half")])
@pytest.mark.parametrize("method", ["POST", *nightly("GET", "DELETE")])
def test_whoever_notices_first_that_storage_fails_is_told_so(
    tiny: SearchR3, s3_server: str, s3: pytest.MonkeyPatch, fault: Any, method: str
) -> None:
    place = f"s3://bucket/first/{uuid.uuid4().hex}"
    with storage(s3_server) as bad:
        s3.setenv("AWS_ENDPOINT_URL", bad.url)
        s3.setenv("SEARCH_R3_STORAGE_TIMEOUT", "0.3")
        build_index(place, [SourceDocument("first", "", "the first text")], tiny, progress=False)
        handle = IndexHandle(place, every=600, patience=0.5)
        with running(lambda: Loaded.of(tiny, handle), writable=True) as server:
            bad.fault = fault
            path = "/v1/documents" + ("/first" if method == "DELETE" else "")
            answer = server.ask(method, path, NEW if method == "POST" else None)
            assert answer.status == 503
            assert answer.error["code"] in ("storage_unavailable", "index_unavailable")
            assert place in answer.error["message"]
            assert int(answer.headers["retry-after"]) >= 1
            bad.fault = "none"
            handle.check()
            assert server.post("/v1/documents", NEW).status == 201


def test_a_disk_that_fails_is_503(tiny: SearchR3, make_index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make_index()

    def broken(name: str, place: Path) -> None:
        raise DiskError(f"{place}: the disk does not take what was written")

    with running(lambda: Loaded.of(tiny, index), writable=True) as server:
        with monkeypatch.context() as patched:
            patched.setattr(durable, "_sync", broken)
            for answer in (server.post("/v1/documents", NEW), server.ask("DELETE", "/v1/documents/bread")):
                assert status_and_code(answer) == (503, "storage_unavailable")
                assert "the disk does not take" in answer.error["message"]
        assert server.post("/v1/documents", NEW).status == 201


def test_a_change_waits_for_the_servers_own_maintenance(
    tiny: SearchR3, make_index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, tidying, maintain = make_index(), threading.Event(), index_writer.maintain_index

    def slow(path: Path, *, always: bool, **options: Any) -> None:
        if always:
            with locked(path):
                tidying.set()
                time.sleep(1.0)
        maintain(path, always=always, **options)

    monkeypatch.setattr(index_writer, "KEEP_VERSIONS", timedelta(seconds=-0.9))
    monkeypatch.setattr(index_writer, "maintain_index", slow)
    with running(lambda: Loaded.of(tiny, index), writable=True) as server:
        server.service.writer()._wait = 0.1
        assert server.post("/v1/documents", NEW).status == 201
        assert tidying.wait(60)
        assert server.post("/v1/documents", NEW).status == 201
        assert server.ask("DELETE", "/v1/documents/new").status == 200


def test_a_search_or_an_addition_that_was_begun_is_504_and_others_503(held: Held, make_index: Any, asking: Any) -> None:
    index = make_index()
    with running(lambda: Loaded.of(held, index), writable=True, timeout=1.5) as server:
        for begun in ({"query": "one", "mode": "vector", "reasoning": False}, NEW):
            path = "/v1/documents" if begun is NEW else "/v1/search"
            held.armed, passes = True, len(held.passes)
            first = asking(server.post, path, begun)
            eventually(lambda passes=passes: len(held.passes) > passes)
            second = asking(server.post, "/v1/search", {"query": "two", "reasoning": False})
            third = asking(server.post, "/v1/documents", {"documents": [{"id": "third", "text": "third text"}]})
            assert status_and_code(first.result(60)) == (504, "timeout")
            assert status_and_code(second.result(60)) == (503, "busy")
            assert status_and_code(third.result(60)) == (503, "busy")
            held.armed = False
            held.gate.set()
            eventually(lambda: server.service.batcher.waiting() == (0, 0))
            eventually(lambda: server.embed("x").status == 200)
            held.gate.clear()
        assert documents(index.path) == {"bread", "zug", "train"}


def test_a_deletion_that_nobody_waits_for_is_not_begun(
    tiny: SearchR3, make_index: Any, asking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, gate, begun, delete = make_index(), threading.Event(), threading.Event(), index_writer.delete_each

    def slow(*given: Any, **options: Any) -> Any:
        begun.set()
        assert gate.wait(60)
        return delete(*given, **options)

    monkeypatch.setattr(index_writer, "delete_each", slow)
    with running(lambda: Loaded.of(tiny, index), writable=True, timeout=1.5) as server:
        first = asking(server.ask, "DELETE", "/v1/documents/bread")
        assert begun.wait(60)
        second = asking(server.ask, "DELETE", "/v1/documents/zug")
        assert status_and_code(first.result(60)) == (504, "timeout")
        assert status_and_code(second.result(60)) == (503, "busy")
        gate.set()
        assert server.ask("DELETE", "/v1/documents/train").status == 200
        assert documents(index.path) == {"zug"}

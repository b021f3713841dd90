"""A server whose index is on object storage: two that write to one index, and storage that fails."""

from __future__ import annotations

import threading
import time
import uuid

import pytest
from nightly import nightly
from processes import eventually
from serving_tools import running
from storage_faults import storage

from search_r3.index.build.build_index import build_index
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage import lease
from search_r3.index.storage.location import Remote
from search_r3.server.service import Loaded

pytestmark = pytest.mark.slow
FAULTS = ["500", *nightly("silent", "gone")]

UNAVAILABLE = ("storage_unavailable", "index_unavailable")  # whoever notices first: the request, or the index's handle


@pytest.fixture
def place(s3):
    return f"s3://bucket/served/{uuid.uuid4().hex}"


@pytest.mark.nightly
def test_two_servers_store_each_document_once_or_refuse_it(tiny, place):
    build_index(place, [SourceDocument("first", "", "the first text")], tiny, progress=False)
    answers: dict[str, int] = {}

    def post(server, name: str) -> None:
        for number in range(6):
            identifier = f"{name}{number}" if number % 2 else f"both{number}"
            answer = server.post("/v1/documents", {"documents": [{"id": identifier, "text": f"text of {name}"}]})
            if answer.status == 201:
                answers[identifier] = 201
            else:
                assert (answer.status, answer.error["code"]) == (409, "index_busy")
                assert int(answer.headers["retry-after"]) >= 1

    load = lambda: Loaded.of(tiny, SearchIndex.open(place))  # noqa: E731
    with running(load, writable=True) as one, running(load, writable=True) as other:
        work = [(one, "a"), (other, "b"), (one, "c"), (other, "d")]
        threads = [threading.Thread(target=post, args=args, daemon=True) for args in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        index = SearchIndex.open(place)
        rows = index.table.search().select(["id"]).to_arrow()["id"].to_pylist()
        assert sorted(rows) == sorted({"first", *answers})
        assert answers


def test_a_server_waits_for_another_writer_and_then_says_when_to_come_back(tiny, place, monkeypatch):
    build_index(place, [SourceDocument("first", "", "the first text")], tiny, progress=False)
    with running(lambda: Loaded.of(tiny, SearchIndex.open(place)), writable=True) as server:
        monkeypatch.setattr(server.server.service.writer(), "_wait", 0.5)
        writer = lease.Lease(Remote(place))
        writer.acquire()
        for answer in (
            server.post("/v1/documents", {"documents": [{"id": "x", "text": "y"}]}),
            server.ask("DELETE", "/v1/documents/first"),
        ):
            assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (409, "index_busy", "5")
            assert "another writer is using" in answer.error["message"]
        monkeypatch.setattr(server.server.service.writer(), "_wait", 20.0)
        threading.Timer(0.5, writer.release).start()
        assert server.post("/v1/documents", {"documents": [{"id": "x", "text": "y"}]}).status == 201
        assert server.ask("GET", "/v1/documents").json["total"] == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_readiness_sees_storage_that_fails_though_nobody_searches(tiny, place, s3_server, s3, fault):
    with storage(s3_server) as bad:
        s3.setenv("AWS_ENDPOINT_URL", bad.url)
        s3.setenv("SEARCH_R3_STORAGE_TIMEOUT", "0.3")
        build_index(place, [SourceDocument("first", "", "the first text")], tiny, progress=False)
        with running(lambda: Loaded.of(tiny, SearchIndex.open(place))) as server:
            assert server.ask("GET", "/readyz").status == 200
            bad.fault = fault
            eventually(lambda: server.ask("GET", "/readyz").status == 503)
            answer = server.ask("GET", "/readyz")
            assert answer.json["status"] == "index_unavailable"
            assert place in answer.json["reason"]
            assert server.ask("GET", "/livez").status == 200
            bad.fault = "none"
            eventually(lambda: server.ask("GET", "/readyz").status == 200)


@pytest.mark.parametrize("fault", FAULTS)
def test_storage_that_fails_is_503_and_what_follows_works(tiny, place, s3_server, s3, fault):
    s3.setattr(lease, "SECONDS", 2.0)
    with storage(s3_server) as bad:
        s3.setenv("AWS_ENDPOINT_URL", bad.url)
        s3.setenv("SEARCH_R3_STORAGE_TIMEOUT", "0.3")
        build_index(place, [SourceDocument("first", "", "the first text")], tiny, progress=False)
        with running(lambda: Loaded.of(tiny, SearchIndex.open(place)), writable=True) as server:
            assert server.post("/v1/search", {"query": "text"}).status == 200
            bad.fault = fault
            asked = [
                ("POST", "/v1/search", {"query": "text", "reasoning": False}),
                ("POST", "/v1/search", {"query": "text", "reasoning": False, "where": "title = 'x'"}),
                ("GET", "/v1/documents", None),
                ("POST", "/v1/documents", {"documents": [{"id": "x", "text": "y"}]}),
                ("DELETE", "/v1/documents/first", None),
            ]
            time.sleep(2.1)  # the table looks for news
            for method, path, body in asked:
                started = time.monotonic()
                answer = server.ask(method, path, body)
                assert (method, path, answer.status) == (method, path, 503)
                assert answer.error["code"] in UNAVAILABLE
                assert int(answer.headers["retry-after"]) >= 1
                assert place in answer.error["message"]
                assert time.monotonic() - started < 60  # LanceDB's own retries and pauses; about 20 s when quiet
            streamed = server.post("/v1/search", {"query": "text", "stream": True})
            assert (streamed.status, streamed.error["code"] in UNAVAILABLE) == (503, True)  # known before it begins
            bad.fault = "none"
            eventually(lambda: server.post("/v1/search", {"query": "text"}).status == 200)
            assert server.post("/v1/documents", {"documents": [{"id": "x", "text": "y"}]}).status == 201

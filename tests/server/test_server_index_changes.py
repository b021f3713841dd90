"""A server whose index is moved, exchanged or lost: probes tell it, and a search is right or 503 with the reason."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_tools import Running, eventually, running

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.index.build.build_index import build_index
from search_r3.index.index_handle import IndexHandle
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.integrations.index_searcher import IndexSearcher
from search_r3.server.logs import LOGGER, JsonFormatter
from search_r3.server.service import Loaded

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="session")
def other(other_tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(other_tiny_model, device="cpu")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, text: str, model: Any) -> Path:
        path = tmp_path / name
        build_index(
            path, [SourceDocument(f"{text}-{i}", "", f"{text} bread {i}", {}) for i in range(3)], model, progress=False
        )
        return path

    return make


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(level)


def serve(path: Path, model: SearchR3, **settings: Any) -> Any:
    handle = IndexHandle(path, every=0.1, patience=1.0)
    return running(lambda: Loaded.of(model, handle), **settings)


def search(server: Running, **more: Any) -> Any:
    return server.post("/v1/search", {"query": "bread", "mode": "vector", "reasoning": 2, **more})


def found(server: Running, **more: Any) -> str:
    answer = search(server, **more)
    assert answer.status == 200, answer.body
    return answer.json["hits"][0]["id"].split("-")[0]


def metric(server: Running, name: str) -> float:
    lines = server.ask("GET", "/metrics").body.decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


def test_a_folder_that_is_moved_away_and_back(tiny: SearchR3, make: Any, log: Any, tmp_path: Path) -> None:
    live = make("live", "old", tiny)
    with serve(live, tiny, writable=True) as server:
        assert found(server) == "old"
        assert metric(server, "search_r3_index_available") == metric(server, "search_r3_ready") == 1
        live.rename(tmp_path / "away")
        answer = search(server)  # it waits for a second whether the folder comes back
        assert (answer.status, answer.error["code"]) == (503, "index_unavailable")
        assert f"{live} is missing" in answer.error["message"]
        assert int(answer.headers["retry-after"]) >= 1
        for path in ("/health", "/readyz"):
            answer = server.ask("GET", path)
            assert answer.status == 503
            assert answer.json["status"] == "index_unavailable"
            assert "is missing" in answer.json["reason"]
            assert server.ask("HEAD", path).status == 503
        assert server.ask("GET", "/livez").status == 200
        assert metric(server, "search_r3_index_available") == metric(server, "search_r3_ready") == 0
        for mode in ("vector", "text", "hybrid"):
            assert search(server, mode=mode).status == 503
        assert server.ask("GET", "/v1/documents").status == 503
        assert server.post("/v1/documents", {"documents": [{"id": "a", "text": "x"}]}).status == 503
        assert not live.exists()  # nothing was made in its place
        assert server.embed("text").status == 200
        (tmp_path / "away").rename(live)
        eventually(lambda: server.ask("GET", "/health").status == 200)
        assert found(server) == "old"
        assert server.ask("GET", "/v1/documents").json["total"] == 3
    events = [line["event"] for line in log() if line["event"].startswith("index")]
    assert events == ["index unavailable", "index available"]
    assert not [line for line in log() if line.get("status") == 500]


def test_a_folder_that_goes_away_while_nobody_searches(tiny: SearchR3, make: Any, tmp_path: Path) -> None:
    live = make("live", "old", tiny)
    with serve(live, tiny) as server:
        live.rename(tmp_path / "away")
        eventually(lambda: server.ask("GET", "/readyz").status == 503)
        assert search(server).status == 503


def rename(live: Path, new: Path) -> None:
    live.rename(live.with_name("before"))
    new.rename(live)


def delete_and_copy(live: Path, new: Path) -> None:
    shutil.rmtree(live)
    shutil.copytree(new, live)


@pytest.mark.parametrize("exchange", [rename, delete_and_copy])
def test_an_index_of_the_same_model_costs_no_request(
    tiny: SearchR3, make: Any, exchange: Callable[[Path, Path], None]
) -> None:
    live, new = make("live", "old", tiny), make("new", "fresh", tiny)
    with serve(live, tiny) as server:
        answers: list[str] = []
        stop = threading.Event()

        def client(mode: str, stream: bool) -> None:
            while not stop.is_set():
                answer = search(server, mode=mode, stream=stream)
                if answer.status != 200:
                    answers.append(f"{answer.status} {answer.body!r}")
                    continue
                result = answer.json if not stream else dict(answer.events)["result"] if answer.events else {}
                if stream:
                    pieces = "".join(data["text"] for name, data in answer.events if name == "reasoning")
                    assert pieces == result["reasoning"]["text"]  # nothing is sent twice
                answers.append(result["hits"][0]["id"].split("-")[0])

        threads = [
            threading.Thread(target=client, args=given, daemon=True)
            for given in (("vector", False), ("hybrid", False), ("vector", True))
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: answers.count("old") > 5)
        exchange(live, new)
        eventually(lambda: answers.count("fresh") > 5)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert set(answers) == {"old", "fresh"}
        assert server.ask("GET", "/health").json["reason"] is None
        exchanged = 'search_r3_index_events_total{event="exchanged"} 1.0'  # counted just after the first answers
        eventually(lambda: exchanged in server.ask("GET", "/metrics").body.decode())


def test_an_index_of_another_model_is_refused(tiny: SearchR3, other: SearchR3, make: Any, log: Any) -> None:
    live, foreign = make("live", "old", tiny), make("foreign", "wrong", other)
    with serve(live, tiny) as server:
        assert found(server) == "old"
        rename(live, foreign)
        eventually(lambda: server.ask("GET", "/health").status == 503)
        for mode in ("vector", "text", "hybrid"):
            answer = search(server, mode=mode)
            assert (answer.status, answer.error["code"]) == (503, "index_unavailable")
            assert "made with other-llama" in answer.error["message"]
        assert "made with other-llama" in server.ask("GET", "/health").json["reason"]
        rename_back = live.with_name("before")
        shutil.rmtree(live)
        rename_back.rename(live)
        eventually(lambda: server.ask("GET", "/health").status == 200)
        assert found(server) == "old"
    assert [line["event"] for line in log()].count("index refused") == 1


def test_why_it_is_not_ready_is_told_only_to_those_who_have_a_key(tiny: SearchR3, make: Any, tmp_path: Path) -> None:
    live = make("live", "old", tiny)
    with serve(live, tiny, api_keys=("right",)) as server:
        live.rename(tmp_path / "away")
        eventually(lambda: server.ask("GET", "/readyz").status == 503)
        for path in ("/health", "/readyz"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
                answer = server.ask("GET", path, headers=headers)
                assert (answer.status, answer.json["status"]) == (503, "index_unavailable")
                assert answer.json["reason"] is None
                assert str(tmp_path).encode() not in answer.body
            answer = server.ask("GET", path, headers={"Authorization": "Bearer right"})
            assert (answer.status, str(live) in answer.json["reason"]) == (503, True)
        (tmp_path / "away").rename(live)
        eventually(lambda: server.ask("GET", "/readyz").status == 200)


def test_behind_a_link_the_index_before_goes_on_answering(
    tiny: SearchR3, other: SearchR3, make: Any, tmp_path: Path
) -> None:
    old, foreign, new = make("1", "old", tiny), make("2", "wrong", other), make("3", "fresh", tiny)
    live = tmp_path / "live"

    def point(target: Path) -> None:
        (tmp_path / "link").symlink_to(target)
        os.replace(tmp_path / "link", live)

    point(old)
    with serve(live, tiny) as server:
        point(foreign)
        eventually(lambda: server.ask("GET", "/health").json["reason"] is not None)
        assert server.ask("GET", "/health").status == 200
        assert found(server) == "old"
        assert metric(server, "search_r3_index_available") == 1
        point(new)
        eventually(lambda: found(server) == "fresh")
        assert server.ask("GET", "/health").json["reason"] is None


def test_what_is_written_is_found_at_once(tiny: SearchR3, make: Any) -> None:
    with serve(make("live", "old", tiny), tiny, writable=True) as server:
        for i in range(3):
            body = {"documents": [{"id": f"zebra-{i}", "text": f"a zebra, number {i}"}]}
            assert server.post("/v1/documents", body).status == 201
            ids = {hit["id"] for hit in search(server, query="zebra", mode="text").json["hits"]}
            assert f"zebra-{i}" in ids
        assert server.ask("DELETE", "/v1/documents/zebra-1").status == 200
        assert "zebra-1" not in {hit["id"] for hit in search(server, query="zebra", mode="text").json["hits"]}


def test_agents_and_chains_follow_an_index_too(tiny: SearchR3, other: SearchR3, make: Any) -> None:
    live, new, foreign = make("live", "old", tiny), make("new", "fresh", tiny), make("foreign", "wrong", other)
    searcher = IndexSearcher(live, tiny)
    searcher.index.every, searcher.index.patience = 0.05, 0.3
    assert searcher.search("bread", reasoning=False).hits[0].id.startswith("old")
    rename(live, new)
    assert searcher.search("bread", reasoning=False).hits[0].id.startswith("fresh")
    shutil.rmtree(live)
    foreign.rename(live)
    for mode in ("vector", "text"):
        with pytest.raises(InputError, match="made with other-llama"):
            searcher.search("bread", reasoning=False, mode=mode)


def test_head_is_answered_wherever_get_is(served: Running) -> None:
    page = ["/", "/style.css", "/page.js", "/icon.svg"]
    for path in [
        "/health",
        "/readyz",
        "/livez",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v1/models",
        "/v1/documents",
        *page,
    ]:
        get, head = served.ask("GET", path), served.ask("HEAD", path)
        assert (head.status, head.body) == (get.status, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
    assert served.ask("HEAD", "/nowhere").status == 404
    refused = served.ask("PUT", "/health", b"{}")
    assert refused.status == 405
    assert refused.headers["allow"] == "GET, HEAD"
    assert served.ask("GET", "/livez").json == {"status": "alive"}


METADATA = "metadata must be an object of text, numbers, true or false"


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("documents", {"documents": [{"id": "a", "text": "x", "metadata": None}]}, "documents.0.metadata", METADATA),
        ("documents", {"documents": [{"id": "a", "text": "x", "metadata": ["a"]}]}, "documents.0.metadata", METADATA),
        ("documents", {"documents": [{"id": "a", "text": "x", "metadata": {"n": None}}]}, "documents.0.metadata.n",
         "expected text, a number, true or false"),
        ("documents", {"documents": [{"id": "a", "text": "x", "metadata": {"n": [1]}}]}, "documents.0.metadata.n",
         "expected text, a number, true or false"),
        ("documents", {"documents": [{"id": "a", "text": "x", "metadata": {"n": 1e16}}]}, "documents.0.metadata.n",
         "from -1e15 to 1e15"),
        ("documents", {"documents": {}}, "documents", "expected a list"),
        ("documents", {"documents": ["a"]}, "documents.0", "expected an object"),
        ("search", {"query": "q", "reasoning": "yes"}, "reasoning", 'expected true, false, "auto", "latent"'),
        ("search", {"query": "q", "reasoning": []}, "reasoning", 'expected true, false, "auto", "latent"'),
        ("search", {"query": "q", "where": 5}, "where", "expected text"),
        ("search", {"query": "q", "k": "3"}, "k", "expected a whole number"),
        ("search", {"query": "q", "stream": 1}, "stream", "expected true or false"),
        ("embeddings", {"model": "m", "input": [1, "a"]}, "input.1", "expected a whole number"),
        ("embeddings", {"model": "m", "input": [[1], "a"]}, "input.1", "expected a list"),
        ("embeddings", {"model": "m", "input": "x", "input_type": "query", "reasoning": -1}, "reasoning",
         "a number of tokens from 0"),
    ],
)  # fmt: skip
def test_a_message_names_the_field_and_what_it_may_be(
    tiny: SearchR3, make_index: Callable[[], SearchIndex], path: str, body: Any, param: str, words: str
) -> None:
    from search_r3.server.parsing import ApiError, parse
    from search_r3.server.schemas import DOCUMENTS, EMBEDDINGS, SEARCH

    shapes: dict[str, Any] = {"documents": DOCUMENTS, "search": SEARCH, "embeddings": EMBEDDINGS}
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body).encode(), shapes[path])
    assert (caught.value.status, caught.value.param) == (400, param)
    assert words in caught.value.message
    assert caught.value.message.startswith(f"{param}: ")

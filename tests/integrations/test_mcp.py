"""An agent's program starts `search-r3 mcp`, speaks the Model Context Protocol with it, and searches.

The tests import `mcp` themselves: it takes two seconds, which each of `make test`'s processes would spend.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from processes import run

from search_r3 import InputError, SearchR3
from search_r3.cli import main
from search_r3.integrations.index_searcher import IndexSearcher, LazyIndexSearcher


def test_a_client_over_stdio_finds_the_tool_and_searches(tiny_index: Path):
    """The real command as a process: nothing but the protocol may come out of its standard output."""
    command = ["-m", "search_r3", "mcp", str(tiny_index), "--budget", "3", "--device", "cpu"]
    cache = os.environ.get("SEARCH_R3_CACHE")
    environment = {"HF_HUB_OFFLINE": "1"} | ({"SEARCH_R3_CACHE": cache} if cache else {})

    async def talk() -> None:
        from mcp import Client, StdioServerParameters, stdio_client

        server = StdioServerParameters(command=sys.executable, args=command, env=environment)
        async with Client(stdio_client(server)) as client:
            tool, *others = (await client.list_tools()).tools
            assert (tool.name, [other.name for other in others]) == ("search", ["get", "status"])
            assert set(tool.input_schema["properties"]) == {"query", "k", "mode", "where", "reasoning_text"}
            assert tool.input_schema["required"] == ["query"]
            assert "5 passages" in tool.description
            assert tool.annotations.read_only_hint

            done = await client.call_tool("search", {"query": "train to Vienna", "k": 2})
            assert not done.is_error
            assert len(done.structured_content["passages"]) == 2
            assert done.structured_content["reasoning"] is not None

            done = await client.call_tool("search", {"query": "nine", "mode": "text", "where": "lang = 'de'"})
            assert done.structured_content["passages"] == []
            done = await client.call_tool("search", {"query": "train to Vienna", "mode": "text"})
            best = done.structured_content["passages"][0]
            assert (best["rank"], best["id"], best["text"]) == (1, "train", "The train to Vienna leaves at nine.")
            assert best["metadata"] == {"lang": "en"}
            assert done.structured_content["reasoning"] is None

            wrong = await client.call_tool("search", {"query": "train", "where": "colour = 'red'"})
            assert wrong.is_error
            assert "columns:" in wrong.content[0].text, "the agent must read what it can fix"
            assert (await client.call_tool("search", {"query": " "})).is_error
            assert (await client.call_tool("search", {"query": "train", "k": 0})).is_error

    asyncio.run(asyncio.wait_for(talk(), timeout=100))


def test_the_tool_finds_what_the_index_finds(tiny_index: Path, tiny: SearchR3):
    from search_r3.integrations.mcp_server import build_server

    searcher = IndexSearcher(tiny_index, tiny)
    server = build_server(searcher, reasoning=False)

    async def ask() -> list[str]:
        from mcp import Client

        async with Client(server) as client:
            done = await client.call_tool("search", {"query": "a file, line by line", "k": 3})
            assert done.structured_content["reasoning"] is None
            return [passage["id"] for passage in done.structured_content["passages"]]

    expected = searcher.search("a file, line by line", k=3, reasoning=False)
    assert asyncio.run(ask()) == [hit.id for hit in expected.hits]


def test_an_agents_own_reasoning_takes_the_place_of_the_models(tiny_index: Path, tiny: SearchR3):
    from search_r3.integrations.mcp_server import build_server

    searcher = IndexSearcher(tiny_index, tiny)
    server = build_server(searcher, reasoning=False)

    async def ask() -> tuple[str, list[float]]:
        from mcp import Client

        async with Client(server) as client:
            words = {"query": "a file, line by line", "reasoning_text": "iterate over open()"}
            found = (await client.call_tool("search", words)).structured_content
            refused = await client.call_tool("search", words | {"mode": "text"})
            assert refused.is_error
            return found["reasoning"], [passage["score"] for passage in found["passages"]]

    expected = searcher.search("a file, line by line", reasoning_text="iterate over open()")
    assert asyncio.run(ask()) == ("iterate over open()", [hit.score for hit in expected.hits])


def test_a_corrected_query_is_told(tiny_index: Path, tiny: SearchR3, monkeypatch: pytest.MonkeyPatch):
    from search_r3.integrations.mcp_server import build_server

    monkeypatch.setattr(tiny, "normalize_query", lambda text: text.replace("flie", "file"))
    server = build_server(IndexSearcher(tiny_index, tiny), reasoning=False)

    async def ask(query: str) -> str | None:
        from mcp import Client

        async with Client(server) as client:
            return (await client.call_tool("search", {"query": query})).structured_content["corrected_query"]

    assert asyncio.run(ask("a flie, line by line")) == "a file, line by line"
    assert asyncio.run(ask("a file, line by line")) is None


def test_the_server_reads_as_it_was_started_to_and_says_what(tiny_index: Path, reader: SearchR3, tiny: SearchR3):
    from search_r3.integrations.mcp_server import build_server

    searcher = IndexSearcher(tiny_index, reader)
    server = build_server(searcher, reasoning=False, read=2, hops=2)

    async def ask() -> tuple[list[str], list[str]]:
        from mcp import Client

        async with Client(server) as client:
            found = (await client.call_tool("search", {"query": "a file, line by line"})).structured_content
            by_words = await client.call_tool("search", {"query": "a file", "mode": "text"})
            assert by_words.structured_content["read"] == []
            return found["read"], [passage["id"] for passage in found["passages"]]

    expected = searcher.search("a file, line by line", reasoning=False, read=2, hops=2)
    assert asyncio.run(ask()) == ([passage.id for passage in expected.read], [hit.id for hit in expected.hits])
    with pytest.raises(InputError, match="has no reading mode"):
        IndexSearcher(tiny_index, tiny).load(False, read=2)


def test_a_terminal_and_a_missing_index_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert main(["mcp", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["mcp", str(tmp_path / "none")]) == 2
    assert "must start this" in capsys.readouterr().err


def test_connecting_opens_no_index_and_listing_tools_needs_no_model(tiny_index: Path):
    """What is imported decides how soon a client is answered; a stopwatch would only measure the machine."""
    code = f"""
import asyncio, sys
from mcp import Client
from search_r3.integrations.mcp_server import build_server
from search_r3.integrations.index_searcher import LazyIndexSearcher
heavy = lambda: sorted(set(sys.modules) & {{"lancedb", "lance", "torch", "transformers", "pyarrow"}})
async def talk():
    async with Client(build_server(LazyIndexSearcher({str(tiny_index)!r}))) as client:
        assert heavy() == [], heavy()
        assert len((await client.list_tools()).tools) == 3
        done = await client.call_tool("search", {{"query": "train", "mode": "text"}})
        assert done.structured_content["passages"], done
        assert not {{"torch", "transformers"}} & set(heavy()), heavy()
asyncio.run(asyncio.wait_for(talk(), timeout=90))
"""
    run([sys.executable, "-c", code])


def test_a_text_search_does_not_wait_for_the_model(tiny_index: Path, tiny: SearchR3, monkeypatch: pytest.MonkeyPatch):
    begun, go = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> SearchR3:
        begun.set()
        assert go.wait(60)
        return tiny

    monkeypatch.setattr(SearchR3, "from_pretrained", slow)
    searcher = IndexSearcher(tiny_index, "a model")
    loading = threading.Thread(target=searcher.load, daemon=True)
    loading.start()
    try:
        assert begun.wait(60)
        assert searcher.search("train", mode="text").hits
        assert loading.is_alive()
    finally:
        go.set()
        loading.join(60)
    assert searcher.search("train", mode="vector", reasoning=False).hits


def test_a_damaged_index_is_reported_to_the_agent(tmp_path: Path):
    from search_r3.integrations.mcp_server import build_server

    (tmp_path / "empty").mkdir()
    server = build_server(LazyIndexSearcher(tmp_path / "empty"))

    async def ask() -> str:
        from mcp import Client

        async with Client(server) as client:
            done = await client.call_tool("search", {"query": "a file"})
            assert done.is_error
            return done.content[0].text

    assert "is not a search-r3 index" in asyncio.run(asyncio.wait_for(ask(), timeout=60))


def test_reasoning_auto_waits_for_no_model_and_is_refused_where_the_model_keeps_no_rule(
    tiny_index: Path, tiny: SearchR3, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    go = threading.Event()

    def slow(*_: object, **__: object) -> SearchR3:
        assert go.wait(60)
        return tiny

    async def talk(server: Any) -> None:
        from mcp import Client

        async with Client(server) as client:
            assert len((await client.list_tools()).tools) == 3
            done = await client.call_tool("search", {"query": "train", "mode": "text"})
            assert done.structured_content["passages"]
            go.set()
            for _ in range(2):
                done = await client.call_tool("search", {"query": "train"})
                assert done.is_error
                assert "has none; choose on or off" in done.content[0].text

    def serve(searcher: IndexSearcher, **settings: Any) -> None:
        from search_r3.integrations.mcp_server import IndexServer

        asyncio.run(asyncio.wait_for(talk(IndexServer(searcher, load=True, **settings)), timeout=60))

    monkeypatch.setattr(SearchR3, "from_pretrained", slow)
    monkeypatch.setattr("search_r3.integrations.mcp_server.serve_stdio", serve)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    try:
        assert main(["mcp", str(tiny_index), "--model", "a model", "--reasoning", "auto"]) == 0
    finally:
        go.set()
    for thread in threading.enumerate():
        if thread.name == "load model":
            thread.join(60)
    assert "error: reasoning auto needs a model with a rule" in capsys.readouterr().err

"""Agents over HTTP: the real client searches and reads documents; foreign hosts, pages and keys are refused."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import eventually, start

from search_r3 import InputError, SearchR3
from search_r3.integrations.index_searcher import IndexSearcher

CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}


@contextmanager
def serving(index: Path, model: Any, keys: tuple[str, ...] = (), hosts: tuple[str, ...] = ()) -> Iterator[int]:
    """A server on a free port, in a thread."""
    import uvicorn

    from search_r3.integrations.mcp_http import make_app, security
    from search_r3.integrations.mcp_server import IndexServer

    tools = IndexServer(IndexSearcher(index, model), reasoning=False)
    app = make_app(tools, security("127.0.0.1", hosts, ("https://agents.example.org",)), keys)
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()


def post(port: int, body: Any = CALL, method: str = "POST", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, "/mcp", body if isinstance(body, bytes) else json.dumps(body), given)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def port(tiny_index: Path, tiny: SearchR3) -> Iterator[int]:
    with serving(tiny_index, tiny, hosts=("search.example.org",)) as port:
        yield port


def test_the_real_client_searches_reads_and_asks_for_the_status(port: int) -> None:
    async def talk() -> None:
        from mcp import Client

        async with Client(f"http://127.0.0.1:{port}/mcp") as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            assert names == ["search", "get", "status"]
            done = await client.call_tool("search", {"query": "train to Vienna", "mode": "text", "k": 1})
            (passage,) = done.structured_content["passages"]
            assert passage["id"] == "train"
            done = await client.call_tool(
                "search", {"query": "train", "reasoning_text": "It leaves from the old station."}
            )
            assert done.structured_content["reasoning"] == "It leaves from the old station."
            document = (await client.call_tool("get", {"id": "train"})).structured_content
            assert (document["text"], document["metadata"]) == ("The train to Vienna leaves at nine.", {"lang": "en"})
            assert not document["truncated"]
            missing = await client.call_tool("get", {"id": "nothing"})
            assert missing.is_error
            assert "take an id from a search" in missing.content[0].text
            status = (await client.call_tool("status", {})).structured_content
            assert (status["passages"], status["documents"], status["complete"]) == (5, 5, True)
            assert status["fields"]["lang"] == "text"

    asyncio.run(asyncio.wait_for(talk(), timeout=100))


def test_foreign_hosts_and_pages_are_refused(port: int) -> None:
    assert post(port)[0] == 200
    for host in (f"localhost:{port}", "127.0.0.1", "search.example.org"):
        assert post(port, Host=host)[0] == 200
    for host in ("evil.example.com", f"evil.example.com:{port}", "127.0.0.1.evil.example.com:80", ""):
        assert post(port, Host=host)[0] == 421, host
    for origin in ("http://localhost:3000", "https://agents.example.org"):
        assert post(port, Origin=origin)[0] == 200
    for origin in ("https://evil.example.com", "null", "http://localhost.evil.example.com", "https://127.0.0.1"):
        assert post(port, Origin=origin)[0] == 403, origin
    for version in ("2025-06-18", "2099-01-01"):  # two code paths of the library
        assert post(port, Origin="https://evil.example.com", MCP_Protocol_Version=version)[0] == 403
        assert post(port, Host="evil.example.com", MCP_Protocol_Version=version)[0] == 421


def test_bodies_are_limited_and_only_json(port: int) -> None:
    assert post(port, b"x" * 1_100_000)[0] == 413
    assert post(port, Content_Type="text/plain")[0] == 400


def test_keys_are_asked_for_before_anything_is_read(tiny_index: Path, tiny: SearchR3) -> None:
    with serving(tiny_index, tiny, keys=("secret",)) as port:
        status, body = post(port)
        assert (status, json.loads(body)["error"]["code"]) == (401, "missing_api_key")
        assert post(port, Authorization="Bearer other")[0] == 401
        assert post(port, Authorization="Bearer secret")[0] == 200
        assert post(port, b"x" * 1_100_000)[0] == 401
        assert post(port, Authorization="Bearer secret", Host="evil.example.com")[0] == 421


def test_a_network_address_needs_the_names_that_lead_to_it() -> None:
    from search_r3.integrations.mcp_http import security

    with pytest.raises(InputError, match="--allow-host search"):
        security("0.0.0.0")
    assert security("0.0.0.0", ["search.example.org:443"]).allowed_hosts == ["search.example.org:443"]
    for hosts, origins in ((["http://x"], ()), (["a b"], ()), ((), ["example.org"]), ((), ["*"])):
        with pytest.raises(InputError, match="is not allowed here"):
            security("127.0.0.1", hosts, origins)


def test_the_command_serves_until_it_is_told_to_stop(tiny_index: Path) -> None:
    asked = CALL | {"method": "tools/call", "params": {"name": "status", "arguments": {}}}
    command = [sys.executable, "-m", "search_r3", "mcp", str(tiny_index), "--http", "--port", "0", "--device", "cpu"]
    with start(command, env={**os.environ, "SEARCH_R3_API_KEY": "k"}) as process:
        line = process.line(r"MCP: http://127\.0\.0\.1:\d+/mcp", "stderr")
        port = int(line.split("/mcp")[0].rpartition(":")[2])

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(listens, 60)
        status, body = post(port, asked, Authorization="Bearer k")
        assert status == 200
        assert json.loads(body)["result"]["structuredContent"]["passages"] == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_options_of_http_need_http(tiny_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from search_r3.cli import main

    assert main(["mcp", str(tiny_index), "--port", "80"]) == 2
    assert capsys.readouterr().err == "error: --port is for --http; give that too\n"

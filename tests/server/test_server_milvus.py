"""Servers on one index in Milvus: they keep nothing of it themselves, so that any of them may answer any request."""

from __future__ import annotations

import json
import socket
import sys
import threading
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from processes import eventually, run, start
from serving_tools import running

from search_r3 import SearchR3
from search_r3.index.build.build_index import build_index
from search_r3.index.index_handle import IndexHandle
from search_r3.index.source_document import SourceDocument
from search_r3.server.service import Loaded

SEARCHES = 400
LITE = "from milvus_lite.cmdline import main; main()"


def documents(build: int) -> list[SourceDocument]:
    return [SourceDocument(f"d{i}", "", f"water of build{build} number{i}") for i in range(8)]


@pytest.mark.slow
def test_two_servers_answer_while_a_build_is_exchanged(tiny: SearchR3, tmp_path: Path) -> None:
    """None of 400 searches fails, and none is answered from two builds."""
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'search-r3[milvus]'")
    pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed: pip install 'search-r3[milvus]'")
    address = f"milvus://{tmp_path}/lite.db/notes"
    build_index(address, documents(0), tiny, progress=False)
    answers: list[tuple[int, set[str]]] = []
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running(lambda: Loaded.of(tiny, IndexHandle(address, every=0.1)))) for _ in range(2)
        ]

        def client(number: int) -> None:
            while len(answers) < SEARCHES:
                body = {"query": "water", "k": 8, "reasoning": False, "mode": ("hybrid", "text")[len(answers) % 2]}
                answer = servers[number % 2].post("/v1/search", body)
                hits = answer.json["hits"] if answer.status == 200 else []
                answers.append((answer.status, {hit["text"].split()[2] for hit in hits}))

        threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for build in (1, 2):
            build_index(address, documents(build), tiny, exchange=True, progress=False)
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive()
        for server in servers:
            server.service.index().check()
            hits = server.post("/v1/search", {"query": "water", "reasoning": False}).json["hits"]
            assert {hit["text"].split()[2] for hit in hits} == {"build2"}
    assert {status for status, _ in answers} == {200}
    assert all(len(builds) == 1 for _, builds in answers)
    assert len({build for _, builds in answers for build in builds}) > 1, "the searches saw the exchange"


def post(url: str, body: Any) -> tuple[int, Any]:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=100) as answer:
        return answer.status, json.load(answer)


@pytest.mark.nightly
@pytest.mark.timeout(500, func_only=True)
def test_two_server_processes_answer_while_a_third_process_exchanges_the_build(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As above, with every part in a process of its own, from the command line, and Milvus Lite behind its port."""
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'search-r3[milvus]'")
    pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed: pip install 'search-r3[milvus]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address, ours = f"milvus://127.0.0.1:{port}/notes", [sys.executable, "-m", "search_r3"]
    answers, built = list[tuple[int, set[str]]](), threading.Event()

    def build(number: int, *options: str) -> None:
        corpus = tmp_path / f"build{number}.jsonl"
        corpus.write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents(number)))
        run([*ours, "index", corpus, "--into", address, "--model", tiny_model, *options])

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def client(url: str) -> None:
        while len(answers) < SEARCHES or not built.is_set():
            body = {"query": "water", "k": 8, "reasoning": False, "mode": ("hybrid", "text")[len(answers) % 2]}
            status, found = post(f"{url}/v1/search", body)
            answers.append((status, {hit["text"].split()[2] for hit in found["hits"]}))

    with ExitStack() as stack:
        lite = [sys.executable, "-c", LITE, "server", "--data-dir", tmp_path / "lite.db", "--port", str(port)]
        stack.enter_context(start(lite))
        eventually(listens, 60)
        build(0)
        urls = []
        for _ in range(2):
            command = [*ours, "serve", address, "--model", tiny_model, "--port", "0", "--device", "cpu"]
            server = stack.enter_context(start(command, cwd=tmp_path))
            urls.append(json.loads(server.line('"event": ?"listening"', "stderr"))["url"])
            server.line('"ready"', "stderr")
        threads = [threading.Thread(target=client, args=(urls[n % 2],), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        for number in (1, 2):
            build(number, "--exchange")
        built.set()
        for thread in threads:
            thread.join(200)
            assert not thread.is_alive()
        for url in urls:
            eventually(lambda url=url: "build2" in json.dumps(post(f"{url}/v1/search", {"query": "water"})), 10)
    assert len(answers) >= SEARCHES
    assert {status for status, _ in answers} == {200}
    assert all(len(builds) == 1 for _, builds in answers)
    assert len({name for _, builds in answers for name in builds}) > 1, "the searches saw the exchange"

"""Servers on one index in Milvus: they keep nothing of it themselves, so that any of them may answer any request."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from serving_tools import running

from search_r3 import SearchR3
from search_r3.index.build.build_index import build_index
from search_r3.index.index_handle import IndexHandle
from search_r3.index.source_document import SourceDocument
from search_r3.server.service import Loaded

SEARCHES = 1000


def documents(build: int) -> list[SourceDocument]:
    return [SourceDocument(f"d{i}", "", f"water of build{build} number{i}") for i in range(8)]


@pytest.mark.slow
def test_two_servers_answer_while_a_build_is_exchanged(tiny: SearchR3, tmp_path: Path) -> None:
    """None of a thousand searches fails, and none is answered from two builds."""
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
            thread.join(100)
            assert not thread.is_alive()
        for server in servers:
            server.service.index().check()
            hits = server.post("/v1/search", {"query": "water", "reasoning": False}).json["hits"]
            assert {hit["text"].split()[2] for hit in hits} == {"build2"}
    assert {status for status, _ in answers} == {200}
    assert all(len(builds) == 1 for _, builds in answers)
    assert len({build for _, builds in answers for build in builds}) > 1, "the searches saw the exchange"

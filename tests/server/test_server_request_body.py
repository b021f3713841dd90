"""What requests hold up, and what they leave behind: the event loop's turn, and memory."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nightly import now
from processes import run
from serving_tools import Running, eventually, running

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.index.backends.lance import durable
from search_r3.index.backends.lance.durable import DiskError
from search_r3.server import parsing, request_body
from search_r3.server.routes import documents, embeddings
from search_r3.server.service import Loaded

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def embeddings_of(server: Running, **more: Any) -> bytes:
    return json.dumps({"model": server.service.loaded.model.name, **more}, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("more", "status"),
    [({"input": [7] * 99_000}, 200), ({"input": [[]] * 66_000}, 400), ({"input": "x", "k": [{}] * 66_000}, 400)],
)
def test_a_body_of_many_values_keeps_the_event_loop_free(
    served: Running, monkeypatch: pytest.MonkeyPatch, more: Any, status: int
) -> None:
    """Up to 200 kB in a thread and by the C parser, as that takes milliseconds; Python's takes half a second."""
    threads: list[str] = []

    def parse(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return parsing.parse(*given)

    monkeypatch.setattr(request_body, "parse", parse)
    monkeypatch.setattr(parsing, "_Counting", None)
    body = embeddings_of(served, **more)
    assert 190_000 < len(body) <= request_body.LARGE
    assert served.post("/v1/embeddings", body).status == status
    assert served.embed("a small text").status == 200
    assert threads[0].startswith("tokenize")
    assert threads[1] == served.thread.name


REJECTED = {
    "not JSON": b'{"model": "m", "input": "' + b"word " * 100_000,
    "another shape": json.dumps({"model": "m", "input": ["word " * 100_000, 5]}).encode(),
    "an unknown field": json.dumps({"model": "m", "input": "word " * 100_000, "field": 1}).encode(),
    "many values": json.dumps({"model": "m", "input": [7] * 600_000 + ["x"]}).encode(),
    "another model": json.dumps({"model": "m", "input": "word " * 100_000}).encode(),
    "too many tokens": {"input": ["word " * 1400] * 1000},
    "too many texts": {"input": ["word"] * 60_000},
    "an unknown token": {"input": [7] * 150_000 + [10**9]},
}


@pytest.mark.parametrize("kind", now(REJECTED, "another shape"))
def test_a_rejected_request_is_freed_at_once(
    served: Running, monkeypatch: pytest.MonkeyPatch, no_garbage_collection: None, kind: str
) -> None:
    """By counting references alone: what waits for the garbage collector may wait for long."""
    seen: list[weakref.ref[Any]] = []
    read_bytes, read = request_body._read_bytes, request_body.read

    class Body(bytearray):
        """One that can be watched."""

    async def watched_bytes(*given: Any) -> Body:
        body = Body(await read_bytes(*given))
        seen.append(weakref.ref(body))
        return body

    async def watched(*given: Any) -> Any:
        body = await read(*given)
        seen.append(weakref.ref(body))
        return body

    monkeypatch.setattr(request_body, "_read_bytes", watched_bytes)
    monkeypatch.setattr(embeddings, "read", watched)
    body: Any = REJECTED[kind]
    body = body if isinstance(body, bytes) else embeddings_of(served, **body)
    assert served.post("/v1/embeddings", body).status in (400, 404, 413)
    assert seen
    eventually(lambda: all(one() is None for one in seen))


def test_rejected_documents_are_freed(
    tiny: SearchR3, make_index: Any, monkeypatch: pytest.MonkeyPatch, no_garbage_collection: None
) -> None:
    seen: list[weakref.ref[Any]] = []
    index, read, change = make_index(), documents.read, documents.Change

    async def watched(*given: Any) -> Any:
        body = await read(*given)
        seen.append(weakref.ref(body))
        return body

    def watched_change(*given: Any) -> Any:
        found = change(*given)
        seen.append(weakref.ref(found))
        return found

    def broken(name: str, place: Path) -> None:
        raise DiskError("the disk does not take what was written")

    monkeypatch.setattr(documents, "read", watched)
    monkeypatch.setattr(documents, "Change", watched_change)
    with running(lambda: Loaded.of(tiny, index), writable=True) as server:
        wrong = {"id": "a", "text": "word " * 1000, "metadata": {"year": "text"}}
        assert server.post("/v1/documents", {"documents": [wrong]}).status == 409
        monkeypatch.setattr(durable, "_sync", broken)
        assert server.post("/v1/documents", {"documents": [wrong | {"metadata": {}}]}).status == 503
        assert len(seen) == 4

        def freed() -> bool:
            if sys.version_info >= (3, 12):  # LanceDB's queries keep their callers' frames: lancedb-frames-kept.sh
                gc.collect()
            return all(one() is None for one in seen)

        eventually(freed)


def test_the_error_of_a_thread_holds_nothing(no_garbage_collection: None) -> None:
    class Text:
        """One that can be watched."""

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def call(threads: ThreadPoolExecutor) -> weakref.ref[Text]:
        text = Text()
        found = weakref.ref(text)

        def job(_: Any) -> None:
            assert text
            raise InputError("wrong")

        service: Any = SimpleNamespace(config=SimpleNamespace(timeout=60))
        request: Any = SimpleNamespace(receive=receive)
        with suppress(InputError):
            await request_body.in_thread(request, service, threads, job)
        return found

    with ThreadPoolExecutor(1) as threads:
        found = asyncio.run(call(threads))
        eventually(lambda: found() is None)


PROGRAM = """
import gc
usual = gc.get_threshold()
from search_r3.cli.process import collect_garbage_as_usual, collect_garbage_rarely
collect_garbage_rarely()
assert gc.get_threshold() != usual
collect_garbage_as_usual()
assert gc.get_threshold() == usual
assert gc.get_freeze_count() > 1000
"""


def test_a_server_that_has_started_collects_garbage_as_usual() -> None:
    run([sys.executable, "-c", PROGRAM])

"""A real server on a free port with a tiny random model and a small index, and a client that shows every byte."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
from search_r3 import SearchR3
from search_r3.index.build import build_index
from search_r3.index.readers import SourceDocument
from search_r3.index.table import SearchIndex
from search_r3.server.config import ServerConfig
from search_r3.server.run import Server, listen, make_server
from search_r3.server.service import Loaded, Service

DOCUMENTS = [
    SourceDocument("bread", "Baking", "Bread needs flour, water and yeast.", {"lang": "en", "year": 2020}),
    SourceDocument("zug", "", "Der Zug nach Wien fährt um neun.", {"lang": "de", "year": 2021}),
    SourceDocument("train", "", "The train to Vienna leaves at nine.", {"lang": "en", "old": True}),
]


@dataclass
class Answer:
    """A response, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, after checking that it has OpenAI's form."""
        found = self.json
        assert list(found) == ["error"]
        assert list(found["error"]) == ["message", "type", "param", "code"]
        assert "\n" not in found["error"]["message"]
        return found["error"]

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Server-sent events: (name, data)."""
        assert self.headers["content-type"].startswith("text/event-stream")
        blocks = [block for block in self.body.decode().split("\n\n") if block and not block.startswith(":")]
        lines = [block.split("\n") for block in blocks]
        return [(a.removeprefix("event: "), json.loads(b.removeprefix("data: "))) for a, b in lines]


@dataclass
class Running:
    """A server that runs in a thread."""

    server: Server
    thread: threading.Thread
    port: int

    @property
    def service(self) -> Service:
        return self.server.service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own; anything but bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, given)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, headers)

    def embed(self, texts: Any, **more: Any) -> Answer:
        return self.post("/v1/embeddings", {"model": self.service.loaded.model.name, "input": texts, **more})

    def open(self, raw: bytes) -> socket.socket:
        """A connection on which `raw` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(raw)
        return connection

    def stop(self) -> None:
        """Ask it to stop, as SIGTERM does, and wait."""
        self.server.handle_exit(15, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `true()`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


@contextmanager
def running(load: Callable[[], Loaded], wait: bool = True, **settings: Any) -> Iterator[Running]:
    """A server with these settings, on a free port."""
    server = make_server(ServerConfig(**{"grace": 10.0, **settings}), load)
    bound = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    found = Running(server, thread, bound.getsockname()[1])
    try:
        if wait:
            eventually(lambda: found.service.status == "ready")
        yield found
    finally:
        found.stop()
        bound.close()


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def make_index(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], SearchIndex]:
    def make() -> SearchIndex:
        folder = tmp_path_factory.mktemp("served") / "small.index"
        build_index(folder, DOCUMENTS, tiny, progress=False)
        return SearchIndex.open(folder)

    return make


@pytest.fixture(scope="session")
def served(tiny: SearchR3, make_index: Callable[[], SearchIndex]) -> Iterator[Running]:
    """One server with an index for all tests that leave it as it is."""
    index = make_index()
    with running(lambda: Loaded.of(tiny, index)) as found:
        yield found


class Held:
    """A model that waits before each pass until it is let on; `passes` are (kind, number of texts)."""

    def __init__(self, model: SearchR3) -> None:
        self._model = model
        self.gate = threading.Event()
        self.passes: list[tuple[str, int]] = []
        self.armed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _hold(self, kind: str, texts: Any) -> None:
        if self.armed:
            self.passes.append((kind, len(texts)))
            assert self.gate.wait(30)

    def encode_document(self, texts: Any, **options: Any) -> Any:
        self._hold("document", texts)
        return self._model.encode_document(texts, **options)

    def encode_query(self, texts: Any, **options: Any) -> Any:
        self._hold("query", texts)
        return self._model.encode_query(texts, **options)

    def reason(self, texts: Any, **options: Any) -> Any:
        self._hold("reasoned", texts)
        return self._model.reason(texts, **options)


@pytest.fixture
def held(tiny: SearchR3) -> Iterator[Held]:
    model = Held(tiny)
    yield model
    model.gate.set()

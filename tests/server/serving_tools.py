"""A real server on a free port, a client that shows every byte, and a model that can be made to wait."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from processes import eventually

from search_r3 import SearchR3
from search_r3.server.listening import listen
from search_r3.server.run_server import Server, make_server
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded, Service


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

    def open_post(self, path: str, body: Any) -> socket.socket:
        """A connection on which `body` was posted as JSON; nothing was read."""
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(sent)}\r\n\r\n"
        return self.open(head.encode() + sent)

    def open_embed(self, texts: Any, **more: Any) -> socket.socket:
        return self.open_post("/v1/embeddings", {"model": self.service.loaded.model.name, "input": texts, **more})

    def stop(self) -> None:
        """Ask it to stop, as SIGTERM does, and wait."""
        self.server.handle_exit(15, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def running(load: Callable[[], Loaded], wait: bool = True, **settings: Any) -> Iterator[Running]:
    """A server with these settings, on a free port."""
    server = make_server(ServerConfig(**{"grace": 10.0, **settings}), load)
    bound = listen("127.0.0.1", 0).socket
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


class Held:
    """A model that waits before each pass until it is let on; `passes` are (kind, number of texts)."""

    def __init__(self, model: SearchR3) -> None:
        self._model = model
        self.gate = threading.Event()
        self.passes: list[tuple[str, int]] = []
        self.armed = False
        self.engine: Any = model.engine

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


def pausing(model: SearchR3, after: Callable[[int], None]) -> Held:
    """`model`, calling `after(token)` behind each token of reasoning, when the batcher has been told of it."""
    held = Held(model)

    def reason(texts: Any, on_token: Any = None, **options: Any) -> Any:
        def on(row: int, token: int) -> None:
            on_token(row, token)
            after(token)

        return model.reason(texts, on_token=on if on_token else None, **options)

    held.reason = reason  # type: ignore[method-assign]
    held.engine = _PausingEngine(model.engine, after)
    return held


class _PausingEngine:
    """For `pausing`, where the batcher writes in slots: `after` is called before the next step."""

    def __init__(self, engine: Any, after: Callable[[int], None]) -> None:
        self._engine, self._after = engine, after
        self._told: list[int] = []

    def continuous_batch(self, prefix: Any) -> Any:
        found = self._engine.continuous_batch(prefix)
        step = found.step

        def after_the_last() -> Any:
            for token in self._told:
                self._after(token)
            steps = step()
            self._told = [one.token for one in steps if one.token is not None]
            return steps

        found.step = after_the_last
        return found

"""A stand-in for a model behind /v1/embeddings: rows by hashing words, and the failures that real endpoints have."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-7Rk2Qz"
DIMENSION = 64
Answer = tuple[int, dict[str, str], str]


def embed(text: str, dimension: int = DIMENSION) -> list[float]:
    """A bag of words, not of unit length: whoever asks must normalise."""
    row = [1e-3] * dimension
    for word in text.lower().replace(".", "").replace("?", "").split():
        row[hashlib.sha256(word.encode()).digest()[0] % dimension] += 2.0
    return row


def good(request: dict[str, Any], dimension: int = DIMENSION) -> Answer:
    """The right answer, its embeddings in another order than the texts, as the format allows."""
    data = [
        {"object": "embedding", "index": i, "embedding": embed(t, dimension)} for i, t in enumerate(request["input"])
    ]
    tokens = sum(len(text.split()) for text in request["input"])
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return 200, {}, json.dumps({"object": "list", "data": data[::-1], "model": request["model"], "usage": usage})


def error(status: int, message: str = "it went wrong", **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"message": message, "type": "error", "code": None}})


@dataclass
class Sent:
    """What the server was sent: bodies and Authorization headers, in the order of their arrival."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [text for request in self.requests for text in request["input"]]


class EmbeddingServer:
    """`with EmbeddingServer(answer) as sent:`; `answer(request, number from 0)` gives status, headers and body."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer] = lambda request, number: good(request)) -> None:
        lock, sent = threading.Lock(), Sent()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(sent.requests)
                    sent.requests.append(request)
                    sent.keys.append(self.headers.get("Authorization", ""))
                if self.path == "/v1/embeddings":
                    status, headers, body = answer(request, number)
                else:
                    status, headers, body = error(404, f"no route {self.path}")
                data = body.encode()
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Type": "application/json"} | headers).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client did not wait
                    pass

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.sent = sent
        sent.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Sent:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self.sent

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

"""A stand-in for an OpenAI-compatible endpoint: embeddings and chat completions by rule, and the failures of real ones.

Embeddings are bags of hashed words. Completions are what the synthesis of pairs asks for, out of the document's own
words.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-7Rk2Qz"
DIMENSION = 64
ROUTES = ("/v1/embeddings", "/v1/chat/completions")
Answer = tuple[int, dict[str, str], str]
"""Status, headers, body."""


def embed(text: str, dimension: int = DIMENSION) -> list[float]:
    """A bag of words, not of unit length: whoever asks must normalise."""
    row = [1e-3] * dimension
    for word in text.lower().replace(".", "").replace("?", "").split():
        row[hashlib.sha256(word.encode()).digest()[0] % dimension] += 2.0
    return row


def embeddings(request: dict[str, Any], dimension: int = DIMENSION) -> Answer:
    """The right answer, its embeddings in another order than the texts, as the format allows."""
    data = [
        {"object": "embedding", "index": i, "embedding": embed(t, dimension)} for i, t in enumerate(request["input"])
    ]
    tokens = sum(len(text.split()) for text in request["input"])
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return 200, {}, json.dumps({"object": "list", "data": data[::-1], "model": request["model"], "usage": usage})


def completion(text: str, **more: Any) -> Answer:
    """A good answer of 100 tokens read and 20 written."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return 200, {}, json.dumps(body)


def by_rule(request: dict[str, Any]) -> str:
    """A reply in the form asked for, made of the document's own rarer words, so that a search with it finds it."""
    system, user = (message["content"] for message in request["messages"])
    document = user.split("<document>\n")[1].split("\n</document>")[0]
    words = list(dict.fromkeys(word for word in re.findall(r"[a-z]+", document.lower()) if len(word) > 4))
    if "Passage:" in system:
        return "Passage: " + " ".join(f"{word} otherwise" for word in words[::4])
    if "Concepts:" in system:
        return f"Concepts: {words[0]}\nTerms: {words[1]}, a thing\nSynonyms: {words[2]}"
    most = 8 if "keyword" in system else 14
    return "Query: " + " ".join(words[::-1][:most])


def good(request: dict[str, Any], number: int = 0) -> Answer:
    """The right answer to either kind of request."""
    return embeddings(request) if "input" in request else completion(by_rule(request))


def error(status: int, message: str = "it went wrong", **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"message": message, "type": "error", "code": None}})


@dataclass
class Sent:
    """What the running server was sent, in the order of arrival: bodies and Authorization headers."""

    answer: Callable[[dict[str, Any], int], Answer]
    """May be changed while the server runs."""
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_at_once: int = 0
    """Requests that were being answered at the same time."""

    @property
    def texts(self) -> list[str]:
        """The texts that were to be embedded."""
        return [text for request in self.requests for text in request["input"]]


class EndpointServer:
    """`with EndpointServer(answer) as sent:`; `answer(request, number from 0)` gives status, headers and body."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer] = good) -> None:
        lock, now, sent = threading.Lock(), [0], Sent(answer)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(sent.requests)
                    sent.requests.append(request)
                    sent.keys.append(self.headers.get("Authorization", ""))
                    now[0] += 1
                    sent.most_at_once = max(sent.most_at_once, now[0])
                if self.path in ROUTES:
                    status, headers, body = sent.answer(request, number)
                else:
                    status, headers, body = error(404, f"no route {self.path}")
                with lock:
                    now[0] -= 1
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

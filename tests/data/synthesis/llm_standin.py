"""A stand-in for an LLM behind /v1/chat/completions: answers by rule, and fails in the ways that real endpoints do."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-7Rk2Qz"
Answer = Callable[[dict[str, Any], int], "tuple[int, dict[str, str], str]"]


def completion(text: str, **more: Any) -> tuple[int, dict[str, str], str]:
    """A good answer of 100 tokens read and 20 written."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return 200, {}, json.dumps(body)


def error(status: int, message: str = "it went wrong", **headers: str) -> tuple[int, dict[str, str], str]:
    return status, headers, json.dumps({"error": {"message": message, "type": "error", "code": None}})


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


@dataclass
class StandIn:
    """The running server; `requests` are the bodies that it was sent, `keys` the Authorization headers."""

    url: str
    answer: Answer
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_at_once: int = 0


class Server:
    """`with Server(answer) as stand_in:`; `answer(request, number from 0)` gives status, headers and body."""

    def __init__(self, answer: Answer | None = None) -> None:
        def good(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
            return completion(by_rule(request))

        lock, now = threading.Lock(), [0]
        stand_in = StandIn("", answer or good)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stand_in.requests)
                    stand_in.requests.append(request)
                    stand_in.keys.append(self.headers.get("Authorization", ""))
                    now[0] += 1
                    stand_in.most_at_once = max(stand_in.most_at_once, now[0])
                if self.path == "/v1/chat/completions":
                    status, headers, body = stand_in.answer(request, number)
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
        self.stand_in = stand_in
        stand_in.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self.stand_in

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

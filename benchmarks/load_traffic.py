"""What the clients of the load test send: good requests whose answers are known, and rubbish with what it may get.

The known answers are those of the model alone, one text at a time. A client draws what it does from its own seed.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serve_client import Answer, Connection, ServerProcess, embedding_body, vectors_of

TOLERANCE = 1e-4
"""How far an element of a vector, or a hit's score, may be from the one computed alone."""
HITS = 5
BODY_LIMIT = 1_000_000
"""The server's --max-body."""
BODY_SECONDS = 30.0
"""The server's time for a body to arrive."""
PATIENCE = 120.0
"""Seconds that a client waits for an answer before it counts as hanging."""
BUSY = (429, 503)
STOPPING = ("shutting_down", "not_ready_stopping")
REFUSED = "refused"
CUT = "cut off"


@dataclass(frozen=True)
class Spec:
    """The model alone, in a worker: as `serve_systems.Spec`; `folder` gets truth.npz, truth.json and the index."""

    model: str
    engine: str
    dtype: str
    device: str
    threads: int | None
    budget: int
    texts: int
    folder: str


def load(spec: Spec) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """A worker's side: make the known answers when asked."""
    import torch
    from transformers.utils import logging

    from search_r3 import SearchR3

    logging.disable_progress_bar()
    if spec.threads:
        torch.set_num_threads(spec.threads)
    model = SearchR3.from_pretrained(spec.model, device=spec.device, engine=spec.engine, dtype=spec.dtype)
    return {"model": model.name, "dtype": model.dtype}, lambda _: make_truth(model, spec)


def make_truth(model: Any, spec: Spec) -> dict[str, Any]:
    """Each text alone: as a document, as a query, reasoned about, and searched in an index of all of them."""
    from search_r3.data.sources.docstrings import docstring_pairs
    from search_r3.index.build.build_index import build_index
    from search_r3.index.search_index import SearchIndex
    from search_r3.index.source_document import SourceDocument

    folder = Path(spec.folder)
    pairs = docstring_pairs(["json", "logging", "email", "http", "unittest"])[0][: spec.texts]
    documents, queries = [pair.positive for pair in pairs], [pair.query for pair in pairs]
    build_index(
        folder / "index",
        [SourceDocument(f"d{i}", "", text, {}) for i, text in enumerate(documents)],
        model,
        progress=False,
    )
    index = SearchIndex.open(folder / "index")
    quiet: dict[str, Any] = {"batch_size": 1, "show_progress_bar": False}
    found = [
        index.search(query, model, k=HITS, mode="vector", max_reasoning_tokens=spec.budget).to_dict()["hits"]
        for query in queries
    ]
    np.savez(
        folder / "truth.npz",
        documents=np.concatenate([model.encode_document([text], **quiet) for text in documents]),
        queries=np.concatenate([model.encode_query([text], reasoning=False, **quiet) for text in queries]),
        reasoned=np.stack([model.reason([q], max_reasoning_tokens=spec.budget, **quiet)[0].embedding for q in queries]),
        scores=np.array([[hit["score"] for hit in hits] for hits in found]),
    )
    record = {"documents": documents, "queries": queries, "budget": spec.budget}
    (folder / "truth.json").write_text(json.dumps(record), encoding="utf-8")
    return {"texts": len(documents)}


class Truth:
    """The known answers; every method says what is wrong with an answer, or None."""

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
        self.documents, self.queries, self.budget = record["documents"], record["queries"], record["budget"]
        with np.load(folder / "truth.npz") as held:
            self._rows = {name: held[name] for name in held.files}

    def embeddings(self, kind: str, chosen: list[int], answer: dict[str, Any]) -> str | None:
        """Whether the vectors are those of these texts."""
        if isinstance(answer["data"][0]["embedding"], str):
            vectors = vectors_of(answer)
        else:
            vectors = np.array([one["embedding"] for one in answer["data"]], dtype=np.float32)
        return self._near(f"{kind} {chosen}", vectors, self._rows[kind][chosen])

    def hits(self, query: int, answer: dict[str, Any]) -> str | None:
        """Whether the hits score as those of a search by the model alone; equal scores may change places."""
        scores = np.array([hit["score"] for hit in answer["hits"]])
        return self._near(f"search {query}", scores, self._rows["scores"][query])

    def _near(self, what: str, found: np.ndarray, known: np.ndarray) -> str | None:
        if found.shape != known.shape:
            return f"{what}: shape {found.shape} for {known.shape}"
        far = float(np.abs(found - known).max())
        return None if far <= TOLERANCE else f"{what}: {far:.2g} from the one computed alone"


@dataclass
class Tally:
    """What happened, from all clients; safe between threads for what it is used for here."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    without_retry_after: int = 0
    latencies: list[float] = field(default_factory=list)

    def note(self, kind: str, answer: Answer | None, allowed: tuple[int, ...], otherwise: str = CUT) -> bool:
        """Count an answer, or that there was none; True if it is a 200 that should be looked at."""
        if answer is None:
            self.outcomes[kind, otherwise] += 1
            return False
        self.outcomes[kind, str(answer.status)] += 1
        if answer.status in BUSY:
            if not answer.headers.get("retry-after", "").isdecimal():
                self.without_retry_after += 1
        elif answer.status not in allowed:
            self.unexpected.append(f"{kind}: {answer.status} {answer.body[:200]!r}")
        return answer.status == 200 and 200 in allowed

    def count(self, *, status: str | None = None, kinds: tuple[str, ...] | None = None) -> int:
        """How many outcomes are of this status, and of these kinds."""
        return sum(n for (k, s), n in self.outcomes.items() if status in (None, s) and (kinds is None or k in kinds))


class Client:
    """One client: `good` or `bad`, until `end` (monotonic seconds) or until `stopped` is set."""

    def __init__(self, server: ServerProcess, truth: Truth, tally: Tally, number: int) -> None:
        self.server, self.truth, self.tally = server, truth, tally
        self.rng = random.Random(number)

    def run(self, good: bool, end: float, stopped: threading.Event) -> None:
        """Send one request after another."""
        while time.monotonic() < end and not stopped.is_set():
            if good:
                self.good(self.rng.choices(list(GOOD), list(GOOD.values()))[0])
            else:
                getattr(self, f"_{self.rng.choice(BAD)}")(end)

    # -------------------------------------------------------------------------------------------------------- good

    def good(self, kind: str) -> None:
        """One good request, and a look at its answer; after a 429 or a 503 it waits a while."""
        body, check = self._search(stream=kind == "stream") if kind in ("search", "stream") else self._texts(kind)
        path = "/v1/search" if kind in ("search", "stream") else "/v1/embeddings"
        try:
            with Connection(self.server, PATIENCE) as connection:
                answer = connection.ask("POST", path, body)
        except ConnectionRefusedError:
            self.tally.note(kind, None, (), REFUSED)
            return
        except TimeoutError:
            self.tally.unexpected.append(f"{kind}: no answer within {PATIENCE:.0f} s")
            return
        except (OSError, http.client.HTTPException):
            self.tally.note(kind, None, ())
            return
        if self.tally.note(kind, answer, (200,)):
            self.tally.latencies.append(answer.seconds)
            try:
                found = _result(answer.body) if kind == "stream" else answer.json
                fault = check(found) if found else self.tally.note(kind, None, (), "503 in the stream")
            except (ValueError, KeyError, IndexError, TypeError) as error:
                fault = f"{kind}: {error!r}"
            if fault:
                self.tally.wrong.append(fault)
        elif answer.status in BUSY:
            time.sleep(self.rng.uniform(0.3, 1.0))  # a real client would wait for Retry-After

    def _texts(self, kind: str) -> tuple[bytes, Callable[[Any], str | None]]:
        texts = self.truth.documents if kind == "documents" else self.truth.queries
        chosen = self.rng.sample(range(len(texts)), self.rng.randint(1, 2 if kind == "reasoned" else 4))
        more: dict[str, Any] = {"encoding_format": self.rng.choice(["float", "base64"])}
        if kind == "queries":
            more |= {"input_type": "query"}
        if kind == "reasoned":
            more |= {"input_type": "query", "reasoning": self.truth.budget}
        body = embedding_body(self.server.model, [texts[i] for i in chosen], **more)
        return body, lambda answer: self.truth.embeddings(kind, chosen, answer)

    def _search(self, stream: bool) -> tuple[bytes, Callable[[Any], str | None]]:
        query = self.rng.randrange(len(self.truth.queries))
        body = {"query": self.truth.queries[query], "k": HITS, "mode": "vector", "reasoning": self.truth.budget}
        return json.dumps(body | {"stream": stream}).encode(), lambda answer: self.truth.hits(query, answer)

    # --------------------------------------------------------------------------------------------------------- bad

    def _not_json(self, _: float) -> None:
        self._ask("not JSON", "POST", "/v1/embeddings", self.rng.randbytes(self.rng.randint(1, 400)), (400,))

    def _deep_json(self, _: float) -> None:
        self._ask("deep JSON", "POST", "/v1/search", b"[" * self.rng.randint(10, 200_000), (400,))

    def _wrong_types(self, _: float) -> None:
        good = {"model": self.server.model, "input": "text"}
        wrong = self.rng.choice(
            [
                *({"input": value} for value in (None, 5, {}, [], [1, "a"], [[1, -5]], [10**30], "", " \n", ["a", 1])),
                *({"reasoning": value, "input_type": "query"} for value in ("yes", -1, 10**9, 1.5, [])),
                *({"dimensions": 7}, {"encoding_format": "hex"}, {"unknown": 1}, {"input_type": "passage"}),
            ]
        )
        self._ask("wrong types", "POST", "/v1/embeddings", json.dumps(good | wrong).encode(), (400,))

    def _wrong_search(self, _: float) -> None:
        wrong = self.rng.choice(
            [{"k": "3"}, {"k": 0}, {"query": ""}, {"query": "x" * 200_000}, {"where": "1; DROP TABLE x"}, {"mode": "x"}]
        )
        self._ask("wrong search", "POST", "/v1/search", json.dumps({"query": "text"} | wrong).encode(), (400,))

    def _wrong_model(self, _: float) -> None:
        self._ask("wrong model", "POST", "/v1/embeddings", embedding_body("gpt-9", "text"), (404,))

    def _wrong_place(self, _: float) -> None:
        method, path = self.rng.choice([("GET", "/nowhere"), ("PUT", "/v1/embeddings"), ("GET", "/v1/models/x")])
        self._ask("wrong place", method, path, None, (404, 405))

    def _wrong_media(self, _: float) -> None:
        kind = self.rng.choice([{"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}])
        body = embedding_body(self.server.model, "text")
        self._ask("wrong media type", "POST", "/v1/embeddings", body, (415,), kind)

    def _too_many(self, _: float) -> None:
        body = embedding_body(self.server.model, ["a"] * 3000)
        self._ask("too many texts", "POST", "/v1/embeddings", body, (400,))

    def _giant_sent(self, _: float) -> None:
        self._ask("giant body", "POST", "/v1/embeddings", b'"' + b"x" * (BODY_LIMIT + 100_000), (413,))

    def _giant_declared(self, _: float) -> None:
        self._raw("giant body, declared", self._head(10**9) + b'{"model"', (413,))

    def _no_http(self, _: float) -> None:
        self._raw("no HTTP", self.rng.randbytes(self.rng.randint(1, 300)) + b"\r\n\r\n", (400,))

    def _slow(self, end: float) -> None:
        """A good body in pieces: slow, but in time, so it must be answered right."""
        body, check = self._texts("documents")
        size = -(-len(body) // self.rng.randint(2, 8))
        pieces = [self._head(len(body)), *(body[i : i + size] for i in range(0, len(body), size))]
        answer = self._send("slow body", pieces, min(0.3, max(0.0, (end - time.monotonic()) / 20)))
        if self.tally.note("slow body", answer, (200,)):
            assert answer is not None
            if fault := check(answer.json):
                self.tally.wrong.append(fault)

    def _stalled(self, end: float) -> None:
        """Half a body, and no more. Some wait for the 408, where there is time for it."""
        patient = end - time.monotonic() > BODY_SECONDS + 5 and self.rng.random() < 0.2
        body = embedding_body(self.server.model, "text")
        pieces = [self._head(len(body)) + body[: len(body) // 2]]
        if patient:
            self.tally.note("stalled body", self._send("stalled body", pieces), (408,))
        else:
            self._leave("stalled, then hung up", pieces[0], self.rng.uniform(0, 2))

    def _hang_up(self, _: float) -> None:
        """A whole good request, and away before its answer."""
        body = self._texts(self.rng.choice(["documents", "reasoned"]))[0]
        self._leave("hung up", self._head(len(body)) + body, self.rng.choice([0, 0, self.rng.uniform(0, 0.5)]))

    def _hang_up_midway(self, _: float) -> None:
        """A stream of which only the beginning is read."""
        body = self._search(stream=True)[0]
        self._leave("hung up in a stream", self._head(len(body), "/v1/search") + body, 0, read=200)

    def _head(self, length: int, path: str = "/v1/embeddings") -> bytes:
        return (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n"
        ).encode()

    def _ask(
        self,
        kind: str,
        method: str,
        path: str,
        body: bytes | None,
        allowed: tuple[int, ...],
        headers: dict[str, str] | None = None,
    ) -> None:
        try:
            with Connection(self.server, PATIENCE) as connection:
                answer: Answer | None = connection.ask(method, path, body, headers)
        except (OSError, http.client.HTTPException):  # it may stop listening to what it refuses
            answer = None
        self.tally.note(kind, answer, allowed)

    def _raw(self, kind: str, raw: bytes, allowed: tuple[int, ...]) -> None:
        self.tally.note(kind, self._send(kind, [raw]), allowed)

    def _send(self, kind: str, pieces: list[bytes], pause: float = 0.0) -> Answer | None:
        try:
            with self._connect() as connection:
                for i, piece in enumerate(pieces):
                    if i and pause:
                        time.sleep(pause)
                    connection.sendall(piece)
                response = http.client.HTTPResponse(connection)
                response.begin()
                headers = {name.lower(): value for name, value in response.getheaders()}
                return Answer(response.status, headers, response.read(), 0.0)
        except TimeoutError:
            self.tally.unexpected.append(f"{kind}: no answer within {PATIENCE:.0f} s")
        except (OSError, http.client.HTTPException):
            pass
        return None

    def _leave(self, kind: str, raw: bytes, seconds: float, read: int = 0) -> None:
        try:
            with self._connect() as connection:
                connection.sendall(raw)
                if read:
                    connection.recv(read)
                time.sleep(seconds)
        except OSError:
            pass
        self.tally.note(kind, None, (), "left")

    def _connect(self) -> socket.socket:
        return socket.create_connection((self.server.host, self.server.port), timeout=PATIENCE)


GOOD = {"documents": 4, "queries": 2, "reasoned": 4, "search": 2, "stream": 2}
"""Kinds of good requests, and how often each is sent."""
BAD = (
    *("not_json", "deep_json", "wrong_types", "wrong_search", "wrong_model", "wrong_place", "wrong_media", "too_many"),
    *("giant_sent", "giant_declared", "no_http", "slow", "stalled", "hang_up", "hang_up_midway"),
)


def _result(body: bytes) -> dict[str, Any] | None:
    """The result that a whole event stream ended with, None if the server was stopping. Raises ValueError otherwise."""
    blocks = [block.split("\n") for block in body.decode().split("\n\n") if block.startswith("event: ")]
    name, data = blocks[-1][0].removeprefix("event: "), json.loads(blocks[-1][1].removeprefix("data: "))
    if name == "error" and data["error"]["code"] in STOPPING:
        return None
    if name != "result":
        raise ValueError(f"the stream ended with {name} {data}")
    pieces = "".join(json.loads(b[1].removeprefix("data: "))["text"] for b in blocks if b[0] == "event: reasoning")
    if pieces.strip() != (data["reasoning"] or {}).get("text", "").strip():
        raise ValueError("the streamed pieces are not the reasoning of the result")
    return data

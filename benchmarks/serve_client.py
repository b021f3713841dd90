"""A real `search-r3 serve` process and those who use it: requests over kept connections, closed loops, event streams.

A closed loop is a number of clients of whom each sends its next request when it has the answer to the last one, so the
load follows what the server can do. Only the standard library is used, to leave the cores to the server.
"""

from __future__ import annotations

import base64
import http.client
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from search_r3.cli.serve import serve as serve_command

Item, Found = TypeVar("Item"), TypeVar("Found")
START_SECONDS = 600.0
"""The longest that a server may take to load its model; an int8 export may have to be made first."""
ANSWER_SECONDS = 600.0
"""The longest wait for an answer."""


@dataclass(frozen=True)
class Engine:
    """What is compared: an engine in a precision, written ENGINE or ENGINE:DTYPE ("int8", "torch:float32")."""

    name: str
    dtype: str = "auto"

    @classmethod
    def of(cls, written: str) -> Engine:
        """Read ENGINE or ENGINE:DTYPE."""
        name, _, dtype = written.partition(":")
        return cls(name, dtype or "auto")

    def __str__(self) -> str:
        return self.name if self.dtype == "auto" else f"{self.name}:{self.dtype}"


def serve_options(**wanted: Any) -> list[str]:
    """Options of `search-r3 serve`: `max_body=5` is --max-body 5; what is None is left out.

    Raises:
        SystemExit: this checkout's `search-r3 serve` has no such option. "torch" as the engine is what there was before
            there was a choice, so it may be missing.
    """
    known = inspect.signature(serve_command).parameters
    found: list[str] = []
    for name, value in wanted.items():
        if value is None or (name == "engine" and value == "torch" and name not in known):
            continue
        if name not in known:
            raise SystemExit(f"search-r3 serve has no option --{name.replace('_', '-')} here (wanted: {value})")
        found += [f"--{name.replace('_', '-')}", str(value)]
    return found


class ServerProcess:
    """`search-r3 serve` in a process of its own, on a free port; `ready` waits until it answers."""

    def __init__(self, index: Path | None = None, *, threads: int | None = None, **options: Any) -> None:
        """Start it with these options (see `serve_options`); it loads while the caller goes on."""
        place = [] if index is None else [str(index)]
        command = [sys.executable, "-m", "search_r3", "serve", *place, "--port", "0", *serve_options(**options)]
        environment = dict(os.environ)
        environment.pop("SEARCH_R3_API_KEY", None)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115  # open as long as the process: `stop` closes it
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment
        )
        self.host, self.port, self.model = "127.0.0.1", 0, ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> ServerProcess:
        """Wait until requests are taken. Raises SystemExit with the end of its log if it died or took too long."""
        end = time.monotonic() + START_SECONDS
        while not self.port:
            self._alive(end)
            for line in self.log().splitlines():
                if line.startswith("{") and (found := json.loads(line)).get("event") == "listening":
                    self.port = urllib.parse.urlsplit(found["url"]).port or 0
            time.sleep(0.05)
        while self.health().get("status") != "ready":
            self._alive(end)
            time.sleep(0.5)
        self.model = self.health()["model"]
        return self

    def health(self) -> dict[str, Any]:
        """What /health says; nothing where it does not answer."""
        try:
            with Connection(self) as connection:
                return json.loads(connection.ask("GET", "/health").body)
        except OSError:
            return {}

    def metrics(self) -> dict[str, float]:
        """Prometheus' samples, by name and labels as they are written there."""
        with Connection(self) as connection:
            page = connection.ask("GET", "/metrics").body.decode()
        lines = (line.rpartition(" ") for line in page.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def cache_hits(self) -> int:
        """Reasoned queries whose answers came from the cache."""
        return int(self.metrics().get('search_r3_reasoned_cache_total{found="yes"}', 0))

    def resident_bytes(self) -> int:
        """The process's resident set now: Linux's VmRSS."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))

    def handles(self) -> dict[str, int]:
        """Open files (sockets among them) and threads."""
        place = Path(f"/proc/{self.pid}")
        return {"files": len(list((place / "fd").iterdir())), "threads": len(list((place / "task").iterdir()))}

    def log(self) -> str:
        """What it has written so far."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def terminate(self) -> None:
        """SIGTERM: finish what was accepted and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None if it is still there after `seconds`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End it, in order if it will."""
        self.terminate()
        if self.wait(60) is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _alive(self, end: float) -> None:
        code = self._process.poll()
        if code is not None or time.monotonic() > end:
            what = f"ended with code {code}" if code is not None else f"was not ready in {START_SECONDS:.0f} s"
            tail = "\n".join(line for line in self.log().splitlines() if '"/health"' not in line)[-3000:]
            self.stop()
            raise SystemExit(f"search-r3 serve {what}:\n{tail}")

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass
class Answer:
    """A response, read to its end. `seconds` are from before the request was sent."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One client's connection, kept open between its requests."""

    def __init__(self, server: ServerProcess, timeout: float = ANSWER_SECONDS) -> None:
        self._http = http.client.HTTPConnection(server.host, server.port, timeout=timeout)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """Send a request and read the answer. `body` is JSON unless `headers` says otherwise."""
        given = {"Content-Type": "application/json"} if body is not None else {}
        started = time.perf_counter()
        self._http.request(method, path, body, given | (headers or {}))
        response = self._http.getresponse()
        content = response.read()
        seconds = time.perf_counter() - started
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, content, seconds)

    def events(self, path: str, body: bytes) -> Iterator[tuple[str, Any, float]]:
        """Server-sent events as they come: name, data, seconds since the request was sent."""
        started = time.perf_counter()
        self._http.request("POST", path, body, {"Content-Type": "application/json"})
        response = self._http.getresponse()
        if response.status != 200:
            raise SystemExit(f"{path} answered {response.status}: {response.read()[:300]!r}")
        event = ""
        while line := response.readline():
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                event = value
            elif field == "data":
                yield event, json.loads(value), time.perf_counter() - started

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def embedding_body(model: str, texts: str | Sequence[str], **more: Any) -> bytes:
    """A request for embeddings as base64, which costs a client least; a `budget` makes texts reasoned queries."""
    budget = more.pop("budget", None)
    query = {} if budget is None else {"input_type": "query", "reasoning": budget}
    return json.dumps({"model": model, "input": texts, "encoding_format": "base64", **query, **more}).encode()


def vectors_of(answer: dict[str, Any]) -> np.ndarray:
    """The rows of an embeddings answer in base64: float32 (n, dim)."""
    return np.stack([np.frombuffer(base64.b64decode(e["embedding"]), dtype="<f4") for e in answer["data"]])


@dataclass
class Loop:
    """What a closed loop took: seconds from the first request to the last answer; each request's own, and answer."""

    seconds: float
    latencies: list[float]
    answers: list[dict[str, Any]]


def in_closed_loop(
    server: Any, items: Iterable[Item], clients: int, ask: Callable[[Connection, Item], Found]
) -> tuple[float, list[Found]]:
    """Have `clients` ask about `items`, each client about its next one as soon as it has its answer.

    Args:
        server: a `ServerProcess`, or another with its attributes `host` and `port` and its method `log`.
        ask: asks about one item by a client's own connection.

    Returns:
        Seconds from the first request to the last answer, and the answers in the order in which they came.

    Raises:
        SystemExit: `ask` failed.
    """
    left = iter(items)
    lock = threading.Lock()
    answers: list[Found] = []
    faults: list[BaseException] = []
    gate = threading.Barrier(clients + 1)

    def client() -> None:
        with Connection(server) as connection:
            gate.wait()
            while not faults:
                with lock:
                    item = next(left, None)
                if item is None:
                    return
                try:
                    answers.append(ask(connection, item))
                except BaseException as error:
                    faults.append(error)
                    return

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if faults:
        raise SystemExit(f"a client failed: {faults[0]!r}; the server's log ends:\n{server.log()[-2000:]}")
    return seconds, answers


def closed_loop(server: ServerProcess, bodies: Sequence[bytes], clients: int) -> Loop:
    """Have `clients` post `bodies` to /v1/embeddings, each client its next one as soon as it has its answer.

    Raises:
        SystemExit: an answer other than 200, or one whose vectors are no unit vectors.
    """
    seconds, answers = in_closed_loop(
        server, bodies, clients, lambda connection, body: connection.ask("POST", "/v1/embeddings", body)
    )
    for answer in answers:
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}: {answer.body[:300]!r}")
    found = [answer.json for answer in answers]
    norms = np.linalg.norm(np.concatenate([vectors_of(one) for one in found]), axis=1)
    if not np.allclose(norms, 1, atol=1e-3):
        raise SystemExit(f"an answer is no unit vector: its norm is {norms[np.abs(norms - 1).argmax()]}")
    return Loop(seconds, [answer.seconds for answer in answers], found)

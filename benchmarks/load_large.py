"""Whether texts of many megabytes hold other requests up: the part of load.py about one client that posts them.

A server of its own, with its own limits. A few clients send small good requests all the time, and with them, in turns:

- `alone`: nobody else;
- `beginnings`: a client posts, once a second, as many characters as are read of a long text at most: the model has the
  same work as with the long one;
- `large`: a client posts the whole text, once a second. Every third time it hangs up when it has sent it.

The texts are of several kinds: words, one word, digits, white space, and none twice, so that nothing is remembered.

**Memory.** The first two turns are made once unmeasured, so that pools, arenas and caches are there, but no large text
was. Then nothing is sent for a while, and the process's VmRSS is read: before. After the measured turns the same pause:
after.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import rounded, say
from load_traffic import GOOD, Client, Tally, Truth
from serve_client import ANSWER_SECONDS, Connection, ServerProcess, embedding_body

CLIENTS = 6
EVERY = 1.0
"""Seconds between two posts."""
READ = 20_000
"""Characters, of which any of these texts has more than 512 tokens."""
WAIT_WITHIN = 2.0
"""Seconds that a request may take longer because of large texts."""
MEMORY_WITHIN = 0.1
ROUNDS = 3
KINDS: dict[str, Callable[[int], str]] = {
    "words": lambda i: f"text {i} " + "word ",
    "digits": lambda i: f"number {i} " + "3141592653",
    "one word": lambda i: f"letters {i} " + "abcdefghij",
    "white space": lambda i: f"columns {i}" + 9 * " " + "\n",
}


def large(options: argparse.Namespace, model: str, truth: Truth, scratch: Path) -> dict[str, Any]:
    """The figures of this part."""
    server = ServerProcess(
        scratch / "index",
        threads=options.threads,
        model=model,
        engine=options.engine.name,
        dtype=options.engine.dtype,
        device=options.device,
        batching=options.batching,
    )
    try:
        server.ready()
        poster = Poster(server, int(options.large * 1e6))
        found: dict[str, list[Tally]] = {"alone": [], "beginnings": [], "large": []}
        say("warming up for the large texts")
        turn(server, truth, options.large_seconds, None, 1)
        turn(server, truth, options.large_seconds, poster.beginning, 2)
        before = at_rest(server, options.quiet)
        for number in range(ROUNDS):
            for name, post in (("alone", None), ("beginnings", poster.beginning), ("large", poster.whole)):
                say(f"large texts, round {number + 1} of {ROUNDS}: {name}")
                found[name].append(turn(server, truth, options.large_seconds, post, 10 + number))
        during = server.resident_bytes()  # the last large text has just been answered
        after = at_rest(server, options.quiet)
        return figures(options, found, poster, before, during, after)
    finally:
        server.stop()


class Poster:
    """Posts texts, each in a thread of its own, whatever has become of the last."""

    def __init__(self, server: ServerProcess, size: int) -> None:
        self.server, self.size = server, size
        self.posted, self.seconds = 0, dict[str, list[float]](beginning=[], whole=[])
        self.statuses: dict[str, int] = {}
        self._lock = threading.Lock()

    def beginning(self) -> None:
        """Post what is read of the next text."""
        self._post("beginning", READ)

    def whole(self) -> None:
        """Post the next text; every third time leave without waiting for the answer."""
        self._post("whole", self.size)

    def _post(self, which: str, size: int) -> None:
        with self._lock:
            self.posted += 1
            number = self.posted
        begin = list(KINDS.values())[number % len(KINDS)](number)
        repeated = begin[begin.index(str(number)) + len(str(number)) :]
        text = begin + repeated * (size // len(json.dumps(repeated).strip('"')))  # so many bytes as JSON
        body = embedding_body(self.server.model, text)
        started, status = time.perf_counter(), "left"
        if which == "whole" and number % 3 == 0:
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            with socket.create_connection((self.server.host, self.server.port), timeout=60) as connection:
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        else:
            try:
                with Connection(self.server, ANSWER_SECONDS) as connection:
                    answer = connection.ask("POST", "/v1/embeddings", body)
                cut = answer.status != 200 or answer.json["usage"]["truncated_texts"] == 1
                status = f"{answer.status}{'' if cut else ', but not cut'}"
            except (OSError, http.client.HTTPException) as error:
                status = f"no answer ({type(error).__name__})"
        with self._lock:
            self.seconds[which].append(time.perf_counter() - started)
            name = f"{which}: {status}"
            self.statuses[name] = self.statuses.get(name, 0) + 1


def turn(server: ServerProcess, truth: Truth, seconds: float, post: Callable[[], None] | None, seed: int) -> Tally:
    """Let the clients send for so many seconds, and `post` beside them; wait until all is answered."""
    tally, stopped = Tally(), threading.Event()
    end = time.monotonic() + seconds

    def good(number: int) -> None:
        client = Client(server, truth, tally, 1000 * seed + number)
        while time.monotonic() < end:
            client.good(client.rng.choices(list(GOOD), list(GOOD.values()))[0])

    threads = [threading.Thread(target=good, args=(i,), daemon=True) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    posts = []
    while post is not None and time.monotonic() < end:
        began = time.monotonic()
        posts.append(threading.Thread(target=post, daemon=True))
        posts[-1].start()
        stopped.wait(max(0.0, EVERY - (time.monotonic() - began)))
    for thread in [*threads, *posts]:
        thread.join(ANSWER_SECONDS)
    return tally


def at_rest(server: ServerProcess, quiet: float) -> int:
    """Resident bytes after a pause in which nothing is in flight."""
    end = time.monotonic() + ANSWER_SECONDS
    while server.health().get("in_flight") and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(quiet)
    return server.resident_bytes()


def figures(
    options: argparse.Namespace, found: dict[str, list[Tally]], poster: Poster, before: int, during: int, after: int
) -> dict[str, Any]:
    """What is written, with the goals."""
    seconds = {name: [s for tally in tallies for s in tally.latencies] for name, tallies in found.items()}
    shown = {name: quantiles(values) for name, values in seconds.items()}
    wrong = [fault for tallies in found.values() for tally in tallies for fault in (*tally.wrong, *tally.unexpected)]
    more = shown["large"]["slowest"] - shown["alone"]["slowest"]
    growth = after / before - 1
    refused = {name: count for name, count in poster.statuses.items() if not name.endswith((": 200", ": left"))}
    goals: list[tuple[str, Any, bool]] = [
        ("large texts: seconds that the slowest small request takes longer", rounded(more), more <= WAIT_WITHIN),
        ("large texts: resident memory, growth", rounded(growth), growth <= MEMORY_WITHIN),
        ("large texts: wrong or unexpected answers", len(wrong), not wrong),
        ("large texts: neither answered nor left by the client", sum(refused.values()), not refused),
    ]
    return {
        "megabytes": options.large,
        "every_seconds": EVERY,
        "clients": CLIENTS,
        "seconds_a_turn": options.large_seconds,
        "rounds": ROUNDS,
        "small_requests": shown,
        "posted": {which: quantiles(values) for which, values in poster.seconds.items()},
        "statuses": poster.statuses,
        "resident_mib": {
            name: round(count / 2**20, 1) for name, count in (("before", before), ("during", during), ("after", after))
        },
        "examples": wrong[:5],
        "goals": [{"name": name, "found": found, "met": bool(met)} for name, found, met in goals],
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """How many, p50, p95, p99 and the slowest, in seconds."""
    if not values:
        return {"requests": 0, "slowest": 0.0}
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "slowest": 1.0}
    return {"requests": len(values)} | {name: rounded(float(np.quantile(values, q))) for name, q in shares.items()}


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """For the table: what was posted beside the small requests, and how long these took."""
    return [(name, json.dumps(found)) for name, found in figures["small_requests"].items()]

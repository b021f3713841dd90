"""Whether the server stands a crowd: 200 clients for a minute, a quarter of them sending rubbish or hanging up midway.

    python benchmarks/load.py                       # the default model
    python benchmarks/load.py --tiny                # the server alone: random weights, which take no time
    python benchmarks/load.py --tiny --clients 10 --seconds 3

A real `search-r3 serve` process on loopback, its queue shorter than the crowd, so that 429s come, and its cache smaller
than the texts, so that answers come out of it and not. The good requests are embeddings of documents and queries, with
and without reasoning, and searches, plain and streamed; each answer is held against the model's own, computed alone.
The bad ones are listed in load_traffic.py.

**Memory.** The same traffic warms the server up for `--warm-up` seconds, so that pools, caches and threads are there.
Then nothing is sent for `--quiet` seconds, and the process's VmRSS is read: before. After the load the same pause, and
it is read again: after.

**Large texts.** Whether texts of 15 MB hold others up, and what stays of their memory: load_large.py.

**Shutdown.** A few clients send good requests without a pause, one body is left half sent and one connection idle; then
SIGTERM. Everyone must be answered (200, or 503 with Retry-After) or not have been accepted: the server's log must hold
no answer that did not arrive. The process must end within its grace.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Table, Worker, finish, rounded, say, serve
from load_large import large, rows
from load_traffic import BODY_LIMIT, CUT, GOOD, PATIENCE, REFUSED, Client, Spec, Tally, Truth, load
from serve_bench import tiny_model
from serve_client import Engine, ServerProcess, embedding_body

from search_r3.model.resolve import default_model
from search_r3.server.server_config import ServerConfig

SEED = 0
MEMORY_WITHIN = 0.05
CACHE = 16
"""Reasoned queries that the server remembers: fewer than there are texts."""
TEXTS = 48
LEAVERS = 8
"""Clients that send while the server is asked to stop."""
EXTRA_SECONDS = 5.0
"""How much longer than its grace a server may take to end: it gives up work, joins threads and leaves Python."""
POOL = ServerConfig.search_threads
"""A pool may still fill after the warm-up; a leak would be one thread for each of hundreds of requests."""
SHUTDOWN_KINDS = ("documents", "reasoned", "search", "stream")


def main() -> None:
    """Warm up, load, stop; print what happened and what is missed, write the JSON."""
    options = parse()
    if options.worker:
        spec = Spec(**json.loads(options.worker))
        serve(lambda: load(spec))
        return
    with tempfile.TemporaryDirectory() as scratch:
        figures = run(options, Path(scratch))
    report(figures)
    finish("load", figures, options, SEED)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="bundled name, adapter, folder or hub id (default: the default adapter)")
    parser.add_argument("--engine", type=Engine.of, default=Engine("torch"), metavar="ENGINE[:DTYPE]")
    parser.add_argument("--batching", help="of the server (default: its own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--clients", type=int, default=200, help="a quarter of them are bad")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load that is measured")
    parser.add_argument("--warm-up", type=float, help="seconds of the same traffic before (default: as long)")
    parser.add_argument("--quiet", type=float, default=5.0, help="seconds of silence before memory is read")
    parser.add_argument("--queue", type=int, default=64, help="requests in flight that the server accepts")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that the server may take to stop")
    parser.add_argument("--budget", type=int, default=8, help="tokens of reasoning")
    parser.add_argument("--large", type=float, default=15.0, metavar="MB", help="size of the large texts; 0: none")
    parser.add_argument("--large-seconds", type=float, default=10.0, help="of each turn with or without large texts")
    parser.add_argument("--tiny", action="store_true", help="random weights, two layers: the server alone")
    parser.add_argument(
        "--json", "--output", dest="output", type=Path, help=f"where it goes (default: {RESULTS.name}/load.json)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.warm_up = options.seconds if options.warm_up is None else options.warm_up
    if options.clients < 4 or options.seconds <= 0 or options.warm_up < 0 or options.queue < 1 or options.budget < 1:
        parser.error("--clients must be 4 or more, --seconds over 0, --queue and --budget 1 or more")
    return options


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All phases; the figures."""
    model = options.model or default_model()
    shown = "tiny random" if options.tiny else Path(model).name
    if options.tiny:
        model = str(tiny_model(model, scratch / "tiny"))
    spec = Spec(
        model=model,
        engine=options.engine.name,
        dtype=options.engine.dtype,
        device=options.device,
        threads=options.threads,
        budget=options.budget,
        texts=TEXTS,
        folder=str(scratch),
    )
    say("computing every answer alone")
    with Worker(__file__, asdict(spec)) as worker:
        worker.ready()
        worker.ask("truth")
    truth = Truth(scratch)
    with ExitStack() as stack:
        server = ServerProcess(
            scratch / "index",
            threads=options.threads,
            model=model,
            engine=options.engine.name,
            dtype=options.engine.dtype,
            device=options.device,
            batching=options.batching,
            queue=options.queue,
            cache=CACHE,
            max_body=BODY_LIMIT,
            grace=options.grace,
        )
        stack.callback(server.stop)
        server.ready()
        say(f"warming up for {options.warm_up:g} s")
        crowd(server, truth, options.clients, options.warm_up, seed=1)
        before = at_rest(server, options.quiet)
        say(f"{options.clients} clients for {options.seconds:g} s")
        tally, memory = crowd(server, truth, options.clients, options.seconds, seed=2)
        after = at_rest(server, options.quiet)
        metrics = server.metrics()
        say("asking it to stop")
        stopped = shutdown(server, truth, options.grace)
        faults = faults_logged(server)
    with_large = large(options, model, truth, scratch) if options.large else None
    return {
        "model": shown,
        "engine": asdict(options.engine),
        "batching": options.batching,
        "clients": options.clients,
        "bad_clients": options.clients // 4,
        "seconds": options.seconds,
        "warm_up_seconds": options.warm_up,
        "quiet_seconds": options.quiet,
        "queue": options.queue,
        "budget": options.budget,
        "requests": sum(tally.outcomes.values()),
        "outcomes": outcomes(tally),
        "accepted_and_answered": len(tally.latencies),
        "latency_seconds": quantiles(tally.latencies),
        "wrong_answers": len(tally.wrong),
        "unexpected": len(tally.unexpected),
        "examples": [*tally.wrong[:5], *tally.unexpected[:5], *stopped["examples"], *faults[:5]],
        "busy_without_retry_after": tally.without_retry_after,
        "server_errors_logged": len(faults),
        "resident_mib": {"before": mib(before["bytes"]), "after": mib(after["bytes"]), "during": memory},
        "at_rest_before": before["handles"],
        "at_rest_after": after["handles"],
        "waiting_after": metrics["search_r3_queue_texts"] + metrics["search_r3_requests_in_flight"],
        "shutdown": stopped,
        "large": with_large,
        "goals": [
            *goals(options, tally, before, after, metrics, stopped, faults),
            *(with_large["goals"] if with_large else []),
        ],
    }


def crowd(server: ServerProcess, truth: Truth, clients: int, seconds: float, seed: int) -> tuple[Tally, list[float]]:
    """Let every fourth client misbehave; what happened, and the server's resident MiB twelve times meanwhile."""
    tally, stopped = Tally(), threading.Event()
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(
            target=Client(server, truth, tally, 1000 * seed + i).run, args=(i % 4 != 0, end, stopped), daemon=True
        )
        for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    memory = []
    while (left := end - time.monotonic()) > 0:
        memory.append(mib(server.resident_bytes()))
        time.sleep(min(left, max(0.05, seconds / 12)))
    late = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, late - time.monotonic()))
    if hanging := sum(thread.is_alive() for thread in threads):
        tally.unexpected.append(f"{hanging} clients hang")
    return tally, memory


def at_rest(server: ServerProcess, quiet: float) -> dict[str, Any]:
    """Memory, open files and threads after a pause in which nothing is in flight."""
    end = time.monotonic() + PATIENCE
    while server.health().get("in_flight") and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(quiet)
    in_flight = server.health().get("in_flight")
    return {"bytes": server.resident_bytes(), "handles": server.handles(), "in_flight": in_flight}


def shutdown(server: ServerProcess, truth: Truth, grace: float) -> dict[str, Any]:
    """Stop it while it is working, and account for every answer."""
    logged = requests_logged(server)
    tally, stopped = Tally(), threading.Event()
    end = time.monotonic() + PATIENCE
    place = (server.host, server.port)

    def leave(number: int) -> None:
        client = Client(server, truth, tally, 9000 + number)
        while time.monotonic() < end and not tally.count(status=REFUSED) and not stopped.is_set():
            client.good(random.Random(f"{number} {time.monotonic()}").choice(SHUTDOWN_KINDS))

    threads = [threading.Thread(target=leave, args=(i,), daemon=True) for i in range(LEAVERS)]
    body = embedding_body(server.model, "text")
    with socket.create_connection(place) as half, socket.create_connection(place) as idle:
        half.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        half.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:9])
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        idle.recv(1000)
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        answered = tally.count(status="200")
        started = time.monotonic()
        server.terminate()
        code = server.wait(grace + 60)
        seconds = time.monotonic() - started
    stopped.set()
    for thread in threads:
        thread.join(10)
    found = {status: n - logged.get(status, 0) for status, n in requests_logged(server).items()}
    arrived = tally.count(status="200")
    try:
        socket.create_connection(place, timeout=1).close()
        closed = False
    except OSError:
        closed = True
    return {
        "exit_code": code,
        "seconds": round(seconds, 2),
        "grace": grace,
        "answered_before_the_signal": answered,
        "answered_after_the_signal": arrived - answered,
        "told_to_come_back": tally.count(status="503") + tally.count(status="503 in the stream"),
        "not_accepted": tally.count(status=REFUSED) + tally.count(status=CUT),
        "answers_logged": found.get(200, 0),
        "answers_arrived": arrived,
        "wrong_answers": len(tally.wrong),
        "busy_without_retry_after": tally.without_retry_after,
        "hanging_clients": sum(thread.is_alive() for thread in threads),
        "port_closed": closed,
        "examples": [*tally.wrong[:3], *tally.unexpected[:3]],
    }


def requests_logged(server: ServerProcess) -> dict[int, int]:
    """Requests at /v1 in the server's log, by status."""
    found: dict[int, int] = {}
    for line in server.log().splitlines():
        if line.startswith("{") and line.endswith("}"):
            record = json.loads(line)
            if record["event"] == "request" and record["route"].startswith("/v1/"):
                found[record["status"]] = found.get(record["status"], 0) + 1
    return found


def faults_logged(server: ServerProcess) -> list[str]:
    """What the server's log holds of 5xx but 503, of errors and of tracebacks.

    uvicorn calls it an error that it cuts off what has not arrived when its grace is over, which is what we provoke.
    """
    found = []
    for line in server.log().splitlines():
        record: dict[str, Any] = {"event": line, "level": "error" if line.startswith("Traceback") else "info"}
        if line.startswith("{") and line.endswith("}"):
            record = json.loads(line)
        status = record.get("status", 0)
        wrong = (status >= 500 and status != 503) or record["level"] == "error"
        if wrong and not record["event"].startswith("Cancel "):
            found.append(f"log: {json.dumps(record)}")
    return found


def goals(
    options: argparse.Namespace,
    tally: Tally,
    before: dict[str, Any],
    after: dict[str, Any],
    metrics: dict[str, float],
    stopped: dict[str, Any],
    faults: list[str],
) -> list[dict[str, Any]]:
    """What must hold, what was found, and whether it does."""
    growth = after["bytes"] / before["bytes"] - 1
    busy = tally.count(status="429")
    in_flight = metrics["search_r3_queue_texts"] + metrics["search_r3_requests_in_flight"]
    cut = tally.count(status=CUT, kinds=tuple(GOOD))
    every: list[tuple[str, Any, bool]] = [
        ("good requests answered", len(tally.latencies), len(tally.latencies) > options.clients / 4),
        ("wrong answers", len(tally.wrong), not tally.wrong),
        ("unexpected answers", len(tally.unexpected), not tally.unexpected),
        ("good requests cut off", cut, not cut),
        ("5xx but 503, and errors in the log", len(faults), not faults),
        ("429s seen, as the crowd is larger than the queue", busy, bool(busy) or options.clients <= 2 * options.queue),
        ("429s and 503s without Retry-After", tally.without_retry_after, not tally.without_retry_after),
        ("resident memory, growth", rounded(growth), abs(growth) <= MEMORY_WITHIN),
        ("still in flight or waiting afterwards", in_flight, not in_flight and not after["in_flight"]),
        ("open files, growth", *_growth(before, after, "files", 2)),
        ("threads, growth", *_growth(before, after, "threads", POOL)),
        ("exit code", stopped["exit_code"], stopped["exit_code"] in (0, -15)),  # uvicorn raises the signal again
        ("seconds to stop", stopped["seconds"], stopped["seconds"] <= options.grace + EXTRA_SECONDS),
        (
            "port closed, clients gone",
            stopped["port_closed"],
            stopped["port_closed"] and not stopped["hanging_clients"],
        ),
        (
            "answers of the shutdown, logged and arrived",
            [stopped["answers_logged"], stopped["answers_arrived"]],
            stopped["answers_logged"] == stopped["answers_arrived"] > 0,
        ),
        ("wrong answers in the shutdown", stopped["wrong_answers"], not stopped["wrong_answers"]),
        (
            "503s without Retry-After there",
            stopped["busy_without_retry_after"],
            not stopped["busy_without_retry_after"],
        ),
    ]
    return [{"name": name, "found": found, "met": bool(met)} for name, found, met in every]


def _growth(before: dict[str, Any], after: dict[str, Any], name: str, within: int) -> tuple[int, bool]:
    found = after["handles"][name] - before["handles"][name]
    return found, found <= within


def outcomes(tally: Tally) -> dict[str, dict[str, int]]:
    """How often each kind of request ended how."""
    found: dict[str, dict[str, int]] = {}
    for (kind, status), count in sorted(tally.outcomes.items()):
        found.setdefault(kind, {})[status] = count
    return found


def quantiles(latencies: list[float]) -> dict[str, float]:
    """p50 and p99 of the answered good requests."""
    if not latencies:
        return {}
    return {name: rounded(float(np.quantile(latencies, share))) for name, share in (("p50", 0.5), ("p99", 0.99))}


def mib(count: int) -> float:
    """Bytes as MiB."""
    return round(count / 2**20, 1)


def report(figures: dict[str, Any]) -> None:
    """The tables."""
    table = Table("outcomes", "kind" + 20 * " ", "how often each")
    for kind, found in figures["outcomes"].items():
        table.row(kind, ", ".join(f"{status}: {count}" for status, count in found.items()))
    if figures.get("large"):
        table = Table("beside large texts", "small requests" + 6 * " ", "seconds")
        for name, found in rows(figures["large"]):
            table.row(name, found)
    table = Table("what must hold", "what" + 46 * " ", "found    ", "")
    for goal in figures["goals"]:
        table.row(goal["name"], str(goal["found"]), "met" if goal["met"] else "missed")
    for line in figures["examples"]:
        print(f"  {line[:300]}")


if __name__ == "__main__":
    main()

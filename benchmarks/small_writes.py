"""Many small writes to a large index, over HTTP: what they cost, what they leave on disk, and what kills lose.

    python benchmarks/small_writes.py                     # 20,000 rows of 576; results/benchmarks/small_writes.json
    python benchmarks/small_writes.py --rows 300 --writes 10 --kills 2 --json FILE    # a rehearsal

A writable server (random weights, two layers of 576 dimensions) holds the rows, whose vectors are random too: nothing
here depends on what a vector means. One client adds, replaces and deletes one document a request, in a random order,
each as soon as the last was answered; another one searches (hybrid, exact), ten times a second, before it and during
it. The bytes are set against an index that was built anew from what is there at the end.

Then the same writes once more, on a fresh copy, with the server killed (SIGKILL) at random moments while a write is
under way, and started again. After each kill the index is read: all that was answered must be there as it was sent, and
nothing that was deleted; the write that was not answered may be there or not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import Table, finish, rounded, say

SEED = 0
DIMENSION = 576
WORDS, WORDS_A_TEXT = 5000, 20
EVERY = 0.1
"""Seconds between two searches."""
BEFORE = 150
"""Searches before the writes begin."""
PATIENCE = 120.0


def text_of(rng: random.Random) -> str:
    return " ".join(f"word{rng.randrange(WORDS)}" for _ in range(WORDS_A_TEXT))


def make_model(folder: Path) -> Path:
    """Random weights of two layers, as wide as an embedding of the 135M model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from conftest import save_tiny_model

    save_tiny_model(folder)
    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": DIMENSION, "head_dim": DIMENSION // 4, "intermediate_size": 2 * DIMENSION})
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


class Random:
    """The model's name and contract, with random vectors: 20,000 texts are embedded at once."""

    def __init__(self, model: Any) -> None:
        self.name, self.source, self.dimension = model.name, model.source, model.dimension
        self.contract_hash = model.contract_hash
        self._rng = np.random.default_rng(SEED)

    def encode_document(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        rows = self._rng.standard_normal((len(texts), self.dimension), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass
class Write:
    """One request: `kind` is "add", "replace" or "delete"."""

    kind: str
    name: str
    text: str = ""


def plan(rows: int, writes: int) -> list[Write]:
    """So many writes of each kind, in random order; what is replaced or deleted was there at the beginning."""
    rng = random.Random(SEED + 1)
    old = rng.sample(range(rows), 2 * writes)
    made = [Write("add", f"new{i}", text_of(rng)) for i in range(writes)]
    made += [Write("replace", f"d{i}", text_of(rng)) for i in old[:writes]]
    made += [Write("delete", f"d{i}") for i in old[writes:]]
    rng.shuffle(made)
    return made


@dataclass
class Server:
    """`search-r3 serve INDEX --writable` in a process of its own."""

    index: Path
    model: Path
    process: subprocess.Popen[bytes] = field(init=False)
    port: int = field(init=False)

    def __post_init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        with http_free_port() as self.port:
            pass
        command = [sys.executable, "-m", "search_r3", "serve", self.index, "--writable", "--model", self.model]
        command += ["--device", "cpu", "--port", self.port]
        self.process = subprocess.Popen([str(part) for part in command], stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError, http.client.HTTPException):
                if Client(self.port).ask("GET", "/health")[0] == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end(signal.SIGKILL)
                self._log.seek(0)
                raise SystemExit(f"the server does not start:\n{self._log.read().decode()[-3000:]}")
            time.sleep(0.05)

    def end(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def http_free_port() -> Iterator[int]:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


class Client:
    """One connection, kept open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        content = None if body is None else json.dumps(body)
        self._connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")

    def write(self, write: Write) -> int:
        if write.kind == "delete":
            return self.ask("DELETE", f"/v1/documents/{write.name}")[0]
        return self.ask("POST", "/v1/documents", {"documents": [{"id": write.name, "text": write.text}]})[0]


class Searches(threading.Thread):
    """Searches ten times a second until `stop`; seconds of each in `seconds`."""

    def __init__(self, port: int, seed: int, count: int | None = None) -> None:
        super().__init__(daemon=True)
        self.client, self.rng, self.count = Client(port), random.Random(seed), count
        self.seconds: list[float] = []
        self.bad = 0
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(EVERY) and (self.count is None or len(self.seconds) < self.count):
            query = f"word{self.rng.randrange(WORDS)} word{self.rng.randrange(WORDS)}"
            begun = time.perf_counter()
            status, found = self.client.ask("POST", "/v1/search", {"query": query, "reasoning": False})
            self.seconds.append(time.perf_counter() - begun)
            self.bad += status != 200 or not found["hits"]

    def stop(self) -> None:
        self._stop_now.set()
        self.join(PATIENCE)


def size_of(path: Path) -> tuple[int, int]:
    """Bytes and files."""
    sizes = []
    for item in path.rglob("*"):
        with suppress(FileNotFoundError):
            if item.is_file():
                sizes.append(item.stat().st_size)
    return sum(sizes), len(sizes)


def held_in(path: Path) -> dict[str, str]:
    """Each document's text, read from the files."""
    from search_r3.index import SearchIndex
    from search_r3.index.row_keys import CONTENT

    rows = SearchIndex.open(path).table.search().select(["document", CONTENT]).to_arrow()
    names = rows["document"].to_pylist()
    if len(set(names)) < len(names):
        raise SystemExit(f"{len(names) - len(set(names))} documents are there twice")
    return dict(zip(names, rows[CONTENT].to_pylist(), strict=True))


def undisturbed(path: Path, model: Path, writes: list[Write], fresh: Path) -> dict[str, Any]:
    """Times, bytes and searches of all writes."""
    server = Server(path, model)
    try:
        warm = Searches(server.port, SEED, 20)
        warm.run()
        before = Searches(server.port, SEED + 1, BEFORE)
        before.run()
        start_bytes, _ = size_of(path)
        during = Searches(server.port, SEED + 2)
        during.start()
        client, seconds, most = Client(server.port), {"add": [], "replace": [], "delete": []}, 0
        for number, write in enumerate(writes):
            begun = time.perf_counter()
            status = client.write(write)
            seconds[write.kind].append(time.perf_counter() - begun)
            if status not in (200, 201):
                raise SystemExit(f"{write.kind} {write.name}: {status}")
            if number % 50 == 49:
                most = max(most, size_of(path)[0])
        during.stop()
        end_bytes, end_files = size_of(path)
    finally:
        server.end(signal.SIGTERM)
    live = rebuilt(path, fresh)
    every = sorted(second for kind in seconds.values() for second in kind)
    p95s = [float(np.percentile(run.seconds, 95)) for run in (before, during)]
    return {
        "median_write_seconds": rounded(float(np.median(every))),
        "p95_write_seconds": rounded(float(np.percentile(every, 95))),
        "slowest_write_seconds": rounded(every[-1]),
        "median_seconds_by_kind": {kind: rounded(float(np.median(some))) for kind, some in seconds.items()},
        "bytes_before": start_bytes,
        "bytes_at_the_end": end_bytes,
        "most_bytes": max(most, end_bytes),
        "files_at_the_end": end_files,
        "live_bytes": live,
        "bytes_ratio": rounded(end_bytes / live),
        "searches_before": len(before.seconds),
        "searches_during": len(during.seconds),
        "searches_that_failed": before.bad + during.bad,
        "search_p50_seconds": [rounded(float(np.median(run.seconds))) for run in (before, during)],
        "search_p95_seconds": [rounded(p95) for p95 in p95s],
        "search_p95_ratio": rounded(p95s[1] / p95s[0]),
    }


def rebuilt(path: Path, fresh: Path) -> int:
    """Bytes of an index that is built anew from what `path` holds."""
    from search_r3.index import SearchIndex, SourceDocument, build_index

    info = SearchIndex.open(path).info
    encoder = Random(argparse.Namespace(name=info.model_name, source="", dimension=info.dimension,
                                        contract_hash=info.contract_hash))  # fmt: skip
    documents = (SourceDocument(name, "", text) for name, text in held_in(path).items())
    build_index(fresh, documents, encoder, progress=False)
    return size_of(fresh)[0]


def with_kills(path: Path, model: Path, writes: list[Write], kills: int, typical: float) -> dict[str, Any]:
    """What the server lost that it had answered, killed `kills` times among the writes."""
    rng = random.Random(SEED + 3)
    at = set(rng.sample(range(len(writes)), kills))
    there = held_in(path)
    lost: list[str] = []
    kept = 0
    server = Server(path, model)
    client = Client(server.port)
    try:
        for number, write in enumerate(writes):
            before = there.get(write.name)
            killer = None
            if number in at:
                killer = threading.Timer(2 * typical * rng.random(), server.process.kill)
                killer.start()
            try:
                answered = client.write(write) in (200, 201)
            except (OSError, http.client.HTTPException):
                answered = False
            if answered:
                there.pop(write.name, None)
                there |= {write.name: write.text} if write.kind != "delete" else {}
            if killer is None:
                continue
            killer.join()
            server.end(signal.SIGKILL)
            found = held_in(path)
            lost += differences(there, found, None if answered else write.name)
            kept += not answered and found.get(write.name) != before
            there = found
            server = Server(path, model)
            client = Client(server.port)
            if not answered and found.get(write.name) == before:
                client.write(write)
                there.pop(write.name, None)
                there |= {write.name: write.text} if write.kind != "delete" else {}
            say(f"kill after {number + 1} writes, {'answered' if answered else 'not answered'}: {len(lost)} lost")
    finally:
        server.end(signal.SIGTERM)
    lost += differences(there, held_in(path), None)
    size, files = size_of(path)
    return {"kills": kills, "lost": len(lost), "which": lost[:10], "kept_without_an_answer": kept,
            "bytes_at_the_end": size, "files_at_the_end": files}  # fmt: skip


def differences(expected: dict[str, str], found: dict[str, str], unsure: str | None) -> list[str]:
    """Names of documents that are not as they were answered, but for the one in flight."""
    return [name for name in {*expected, *found} if expected.get(name) != found.get(name) and name != unsure]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--writes", type=int, default=500, help="of each of the three kinds")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", choices=("writes", "kills"))
    parser.add_argument("--json", dest="output", type=Path, help="instead of results/benchmarks/small_writes.json")
    options = parser.parse_args()
    if options.rows < 2 * options.writes or options.kills > 3 * options.writes:
        parser.error("two rows for each write, and a write for each kill, are the least")
    options.tiny, options.device = options.rows < 20_000, "cpu"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

    from search_r3.index import SourceDocument, build_index
    from search_r3.model.searchr3 import SearchR3

    figures: dict[str, Any] = {"rows": options.rows, "dimension": DIMENSION, "writes_of_each_kind": options.writes}
    with tempfile.TemporaryDirectory(prefix="small-writes-") as folder:
        work = Path(folder)
        os.environ["SEARCH_R3_CACHE"] = str(work / "cache")
        model = make_model(work / "model")
        rng = random.Random(SEED)
        documents = (SourceDocument(f"d{i}", "", text_of(rng)) for i in range(options.rows))
        encoder = Random(SearchR3.from_pretrained(model, device="cpu"))
        build_index(work / "base.index", documents, encoder, progress=False)
        writes = plan(options.rows, options.writes)
        typical = 0.05
        if options.only != "kills":
            shutil.copytree(work / "base.index", work / "one.index")
            figures |= undisturbed(work / "one.index", model, writes, work / "fresh.index")
            typical = figures["median_write_seconds"]
            shutil.rmtree(work / "one.index")
        if options.only != "writes":
            shutil.copytree(work / "base.index", work / "two.index")
            figures["kills"] = with_kills(work / "two.index", model, writes, options.kills, typical)
    show(figures)
    finish("small_writes", figures, options, SEED)


def show(figures: dict[str, Any]) -> None:
    """The table: what was found, and the goals."""
    writes, rows = 3 * figures["writes_of_each_kind"], figures["rows"]
    title = f"{writes:,} writes of one document, {rows:,} rows of {DIMENSION}"
    table = Table(title, "what                      ", "found     ", "goal")
    if "live_bytes" in figures:
        ms = [f"{1e3 * figures[f'{name}_write_seconds']:.0f} ms" for name in ("median", "p95", "slowest")]
        table.row("median write", ms[0], "at most 100 ms")
        table.row("p95, slowest", ", ".join(ms[1:]), "")
        for name in ("bytes_before", "bytes_at_the_end", "most_bytes", "live_bytes"):
            table.row(name.replace("_", " "), f"{figures[name] / 1e6:.1f} MB", "")
        table.row("bytes, of the live ones", f"{figures['bytes_ratio']:.2f}", "at most 2")
        table.row("files at the end", f"{figures['files_at_the_end']:,}", "")
        before, during = (f"{1e3 * second:.0f} ms" for second in figures["search_p95_seconds"])
        table.row("p95 of a search", f"{before} before, {during} during", "")
        table.row("ratio", f"{figures['search_p95_ratio']:.2f}", "at most 1.5")
        table.row("searches that failed", str(figures["searches_that_failed"]), "0")
    if kills := figures.get("kills"):
        table.row(f"lost by {kills['kills']} kills", str(kills["lost"]), "0")


if __name__ == "__main__":
    main()

"""llama.cpp's own server beside ours, over HTTP on both sides: start-up, memory, documents, reasoned queries.

    python benchmarks/serve.py --only llama            # the first of --engines against it, on the same model as GGUF

The peer is the server inside xllamacpp in a process of its own, on the file of `search-r3 export --format gguf`. It
gets the texts that the export's README says; a reasoned query is two requests there, the generation and the embedding
of all that was written. `--engines int8 llama.cpp torch:float32` compares the engine llama.cpp inside our own server,
in all other parts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import serve_llama_process
from common import Table, compare, ratio_cell, ratio_figures, rounded
from serve_bench import Bench, Lazy, Record, seconds_of
from serve_client import Connection, Loop, ServerProcess, closed_loop, embedding_body, in_closed_loop, vectors_of

PEER = "llama.cpp's server"
CHARACTERS = 400
"""Where documents are cut, on both sides alike."""
TOGETHER, DOCUMENT_CLIENTS = 32, 2
"""Documents of a request, and who send them."""


class LlamaServerProcess:
    """llama.cpp's server on a GGUF file, in a process of its own that loads nothing of ours."""

    def __init__(self, file: Path, threads: int | None) -> None:
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115  # open as long as the process: `stop` closes it
        self._process = subprocess.Popen(
            [sys.executable, serve_llama_process.__file__, str(file), str(threads or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.host, self.port = "127.0.0.1", 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> LlamaServerProcess:
        """Wait until it listens. Raises SystemExit with the end of its log if it died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's server ended with code {self._process.wait()}:\n{self.log()[-3000:]}")
        self.port = urllib.parse.urlsplit(line.strip()).port or 0
        return self

    resident_bytes = ServerProcess.resident_bytes

    def log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """Let it end: it stops at the end of its input."""
        self._process.communicate()
        self._log.close()


# ------------------------------------------------------------------------------------------------------------ part


def llama(bench: Bench) -> Record:
    """The first engine in our server against llama.cpp's own, both over HTTP."""
    file, around = exported(bench)
    figures: Record = {"engine": str(bench.engines[0]), "file": file.name, "sequences": serve_llama_process.SEQUENCES}
    figures["start"] = _start(bench, file)
    with ExitStack() as stack:
        ours = bench.server(bench.engines[0], stack, max(bench.options.clients))
        peer = Lazy(lambda: LlamaServerProcess(file, bench.options.threads).ready(), LlamaServerProcess.stop)
        stack.callback(peer.close)
        figures["documents"] = _documents(bench, ours, peer, around["document"])
        figures["queries"] = _queries(bench, ours, peer, around["reasoning"])
    return figures


def exported(bench: Bench) -> tuple[Path, dict[str, tuple[str, str]]]:
    """The model as GGUF, made only once, and the texts around a text on each side."""
    from gguf import GGUFReader

    folder = bench.work / "gguf"
    if not folder.exists():
        command = [sys.executable, "-m", "search_r3", "export", bench.model, str(folder), "--format", "gguf"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (file,) = folder.glob("*.gguf")
    fields = GGUFReader(file).fields

    def around(side: str) -> tuple[str, str]:
        prefix, suffix = (fields[f"search_r3.{side}.{part}"].contents() for part in ("prefix", "suffix"))
        return prefix, suffix

    return file, {side: around(side) for side in ("document", "reasoning")}


def _start(bench: Bench, file: Path) -> Record:
    """Seconds from the process's start to its first answer, and its resident memory then."""
    engine, options = bench.engines[0], bench.options
    more = {"model": bench.model, "engine": engine.name, "dtype": engine.dtype, "device": options.device, "cache": 0}
    starts: dict[str, Callable[[], Any]] = {
        str(engine): lambda: ServerProcess(threads=options.threads, **more).ready(),
        PEER: lambda: LlamaServerProcess(file, options.threads).ready(),
    }

    def measure(name: str, turn: int) -> Record:
        started = time.perf_counter()
        server = starts[name]()
        try:
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "bytes": server.resident_bytes()}
        finally:
            server.stop()

    records = bench.in_turns("llama/start", list(starts), options.rounds, measure)
    table = Table("start-up", "system              ", "seconds", "MB resident")
    figures: Record = {}
    for name, found in records.items():
        seconds, size = float(np.median(seconds_of(found))), float(np.median([one["bytes"] for one in found]))
        figures[name] = {"seconds": rounded(seconds), "resident_bytes": size}
        table.row(name, f"{seconds:.3g}", f"{size / 1e6:.0f}")
    return figures


def _documents(
    bench: Bench, ours: Lazy[ServerProcess], peer: Lazy[LlamaServerProcess], around: tuple[str, str]
) -> Record:
    """Documents per second, in requests of `TOGETHER`."""
    texts = [text[:CHARACTERS] for text in bench.texts["documents"]]
    parts = [texts[start : start + TOGETHER] for start in range(0, len(texts), TOGETHER)]
    name = str(bench.engines[0])

    def measure(system: str, turn: int) -> Record:
        if system == PEER:
            bodies = [_llama_body([around[0] + text + around[1] for text in part]) for part in parts]
            return {"seconds": closed_loop(peer(), bodies, DOCUMENT_CLIENTS).seconds}  # type: ignore[arg-type]
        bodies = [embedding_body(ours().model, part) for part in parts]
        return {"seconds": closed_loop(ours(), bodies, DOCUMENT_CLIENTS).seconds}

    records = bench.in_turns("llama/documents", [name, PEER], bench.options.rounds + 1, measure)
    times = {system: seconds_of(found)[1:] for system, found in records.items()}  # the first round warms both up
    measured = compare(times[name], times[PEER])
    rates = {system: len(texts) / float(np.median(seconds)) for system, seconds in times.items()}
    table = Table(f"documents over HTTP, cut at {CHARACTERS} characters", "system              ", "a second", "times")
    table.row(name, f"{rates[name]:.3g}", ratio_cell(measured))
    table.row(PEER, f"{rates[PEER]:.3g}", "")
    found = {system: {"documents_per_second": rounded(rate)} for system, rate in rates.items()}
    return {"documents": len(texts), **found, **ratio_figures("times", measured)}


def _queries(
    bench: Bench, ours: Lazy[ServerProcess], peer: Lazy[LlamaServerProcess], around: tuple[str, str]
) -> Record:
    """Reasoned queries per second at several numbers of clients, and how soon the peer's first token comes."""
    options, name = bench.options, str(bench.engines[0])
    header = ("clients", "system              ", "a second", "p50 s", "p99 s", "first token p50 s", "times")
    table = Table(f"reasoned queries over HTTP, at most {options.budget} tokens each", *header)
    figures: Record = {"budget": options.budget}
    first = 0
    for clients in options.clients:
        count = max(options.least, options.requests * clients)

        def measure(system: str, turn: int, clients: int = clients, count: int = count, first: int = first) -> Record:
            begin = first + turn * count
            if system == PEER:
                loop, soon = reasoned_loop(peer(), bench.queries(begin, count), around, options.budget, clients)
            else:
                loop, soon = closed_loop(ours(), bench.bodies(ours(), begin, count, options.budget), clients), []
            return {"seconds": loop.seconds, "latencies": loop.latencies, "first_token": soon}

        records = bench.in_turns(f"llama/queries/{clients} clients", [name, PEER], options.rounds, measure)
        first += options.rounds * count
        measured = compare(seconds_of(records[name]), seconds_of(records[PEER]))
        cell = figures[f"{clients} clients"] = {**ratio_figures("times", measured)}
        for system, found in records.items():
            p50, p99 = np.quantile([one for record in found for one in record["latencies"]], (0.5, 0.99))
            soon = [one for record in found for one in record["first_token"]]
            rate = count / float(np.median(seconds_of(found)))
            cell[system] = {
                "queries_per_second": rounded(rate),
                "p50_seconds": rounded(float(p50)),
                "p99_seconds": rounded(float(p99)),
                "first_token_p50_seconds": rounded(float(np.median(soon))) if soon else None,
            }
            shown = f"{np.median(soon):.3g}" if soon else "see answer"
            times = ratio_cell(measured) if system == name else ""
            table.row(str(clients), system, f"{rate:.3g}", f"{p50:.3g}", f"{p99:.3g}", shown, times)
    figures["resident_bytes"] = {name: ours().resident_bytes(), PEER: peer().resident_bytes()}
    return figures


def reasoned_loop(
    server: LlamaServerProcess, queries: Sequence[str], around: tuple[str, str], budget: int, clients: int
) -> tuple[Loop, list[float]]:
    """`closed_loop` with two requests for each query; also the seconds until each first token.

    Raises:
        SystemExit: a client failed, or an answer is no unit vector.
    """
    seconds, timed = in_closed_loop(
        server,
        queries,
        clients,
        lambda connection, query: _reasoned(server, connection, around[0] + query + around[1], budget),
    )
    return Loop(seconds, [whole for whole, _ in timed], []), [first for _, first in timed]


def _reasoned(server: LlamaServerProcess, connection: Connection, prompt: str, budget: int) -> tuple[float, float]:
    """Seconds of the generation and the embedding behind it, and until the first token."""
    embed_token = "<|embed_token|>"
    started = time.perf_counter()
    body = {"prompt": prompt, "temperature": 0, "n_predict": budget, "stream": True}
    written, first = "", 0.0
    with Connection(server) as streaming:  # type: ignore[arg-type]  # llama.cpp closes it at the end of a stream
        for _, event, since in streaming.events("/completion", json.dumps(body).encode()):
            first = first or since
            written += event["content"]
    answer = connection.ask("POST", "/v1/embeddings", _llama_body(prompt + written + embed_token))
    if answer.status != 200 or abs(float(np.linalg.norm(vectors_of(answer.json))) - 1) > 1e-3:
        raise RuntimeError(f"llama.cpp answered {answer.status}: {answer.body[:300]!r}")
    return time.perf_counter() - started, first


def _llama_body(texts: str | Sequence[str]) -> bytes:
    return json.dumps({"input": texts, "encoding_format": "base64"}).encode()

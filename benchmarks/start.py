"""How long until something is there: CPU and wall seconds of a fresh process to its first result, on a warm cache.

    git worktree add build/before f444c4d
    python benchmarks/start.py --against build/before     # side by side with another checkout, in turns
    python benchmarks/start.py --tiny --rounds 1          # random weights: the program's own start alone

Each round starts, in turns, in each checkout:

- `search INDEX QUERY --mode text` and `--mode vector --reasoning off`, to their end;
- `mcp INDEX`, to the answers to `initialize`, `tools/list` and a text search (the process's CPU seconds so far);
- `serve INDEX`, to the first `GET /health` that answers 200.

CPU seconds are user plus system time of the process and, for `search`, what the operating system accounts to it at its
end. The **parts** are `python -X importtime` of one run of each search: self times, summed by top-level package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import Table, finish, in_turns, rounded, say
from serve_bench import tiny_model

from search_r3.model.resolve import default_model

SEED = 0
DOCUMENTS = 200
QUERY = "how do I remove a folder and everything in it"
PATIENCE = 180.0
PARTS = 8
ROOT = Path(__file__).resolve().parents[1]
SENT = (
    {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "start", "version": "1"}}},
    {"jsonrpc": "2.0", "id": 2, "method": "tools/list"},
    {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {
        "name": "search", "arguments": {"query": "remove", "mode": "text"}}},
)  # fmt: skip
STEPS = ("mcp initialize", "mcp tools/list", "mcp text search")


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--model", help="bundled name, adapter or folder (default: the default adapter)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a random two-layer model")
    parser.add_argument(
        "--json", dest="output", type=Path, help="where to write (default: results/benchmarks/start.json)"
    )
    options = parser.parse_args()
    checkouts = {"ours": ROOT} | ({"before": options.against.resolve()} if options.against else {})
    with tempfile.TemporaryDirectory() as scratch:
        model = str(options.model or default_model())
        model = str(tiny_model(model, Path(scratch) / "tiny")) if options.tiny else model
        systems = {name: Checkout(name, folder, model, Path(scratch)) for name, folder in checkouts.items()}
        measured = measure(systems, options.rounds)
        parts = {name: system.parts() for name, system in systems.items()}
    figures = summary(measured, options.rounds) | {"parts": parts, "documents": DOCUMENTS, "model": Path(model).name}
    finish("start", figures, options, SEED)


class Checkout:
    """One checkout with an index of its own, whose commands run in fresh processes of this Python."""

    def __init__(self, name: str, folder: Path, model: str, scratch: Path) -> None:
        self.name, self.folder = name, folder
        known = folder / "models" / model
        self.model = str(known) if known.is_dir() else model
        self.environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
        self.index, self.scratch = scratch / f"{name}.index", scratch
        source = scratch / "documents.jsonl"
        topics = ("remove a folder", "read a file by lines", "sort a dictionary by value", "start a child process")
        rows = ({"id": str(i), "text": f"Note {i}: how to {topics[i % 4]}, part {i // 4}."} for i in range(DOCUMENTS))
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.run("index", str(source), "--into", str(self.index), "--model", self.model)
        for mode in ("text", "vector"):  # files into the page cache, .pyc files written
            self.search(mode)

    def command(self, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command line of a subcommand."""
        return [sys.executable, *options, "-m", "search_r3", *arguments]

    def run(self, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run a subcommand to its end."""
        return subprocess.run(
            self.command(*arguments, options=options), env=self.environment, cwd=self.scratch, check=True,
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip

    def search_arguments(self, mode: str) -> tuple[str, ...]:
        """One search, without reasoning: that would be measured by how much the model writes."""
        return ("search", str(self.index), QUERY, "--mode", mode, "--reasoning", "off", "--model", self.model)

    def search(self, mode: str) -> dict[str, float]:
        """One search to its end."""
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        self.run(*self.search_arguments(mode))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {f"search {mode}, cpu": cpu, f"search {mode}, wall": time.perf_counter() - begun}

    def mcp(self) -> dict[str, float]:
        """Three requests to a fresh server of the Model Context Protocol, as an agent's program sends them."""
        found: dict[str, float] = {}
        begun = time.perf_counter()
        with subprocess.Popen(
            self.command("mcp", str(self.index), "--model", self.model), env=self.environment, cwd=self.scratch,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                for step, message in zip(STEPS, SENT, strict=True):
                    process.stdin.write(json.dumps(message) + "\n")
                    process.stdin.flush()
                    assert "result" in json.loads(process.stdout.readline())
                    found |= {f"{step}, cpu": cpu_of(process.pid), f"{step}, wall": time.perf_counter() - begun}
            finally:
                process.kill()
        return found

    def serve(self) -> dict[str, float]:
        """A server, to its readiness."""
        begun = time.perf_counter()
        with subprocess.Popen(
            self.command("serve", str(self.index), "--port", "0", "--model", self.model), env=self.environment,
            cwd=self.scratch, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stderr is not None
            try:
                url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\w.:\[\]]+\d", line)))
                while time.perf_counter() - begun < PATIENCE:
                    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                        if answer.status == 200:
                            break
                    time.sleep(0.02)
                else:
                    raise SystemExit(f"the server of {self.name} was not ready within {PATIENCE:g} s")
                return {"serve ready, cpu": cpu_of(process.pid), "serve ready, wall": time.perf_counter() - begun}
            finally:
                process.kill()

    def parts(self) -> dict[str, dict[str, float]]:
        """Seconds of importing by top-level package, of a search by words and of one by meaning: the largest."""
        found = {}
        for mode in ("text", "vector"):
            seconds: Counter[str] = Counter()
            for line in self.run(*self.search_arguments(mode), options=("-X", "importtime")).stderr.splitlines():
                if match := re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", line):
                    seconds[match[2].split(".")[0]] += int(match[1])
            found[mode] = {package: rounded(micro / 1e6) for package, micro in seconds.most_common(PARTS)}
        return found


def cpu_of(pid: int) -> float:
    """User and system seconds of a running process so far (proc(5): fields 14 and 15 of stat, counted from 1)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(systems: dict[str, Checkout], rounds: int) -> dict[str, dict[str, list[float]]]:
    """System -> what -> a figure a round."""
    kept: dict[str, dict[str, list[float]]] = {name: {} for name in systems}

    def one(name: str) -> Callable[[int], float]:
        def run(turn: int) -> float:
            say(f"round {turn + 1} of {rounds}: {name}")
            system = systems[name]
            for part in (system.search("text"), system.search("vector"), system.mcp(), system.serve()):
                for what, seconds in part.items():
                    kept[name].setdefault(what, []).append(seconds)
            return 0.0

        return run

    in_turns({name: one(name) for name in systems}, rounds)
    return kept


def summary(measured: dict[str, dict[str, list[float]]], rounds: int) -> dict[str, Any]:
    """Medians, printed as a table and returned for the JSON."""
    ours, before = measured["ours"], measured.get("before")
    table = Table(f"Seconds to the first result, medians of {rounds}", "what", "ours", "before", "ours / before")
    figures: dict[str, Any] = {}
    for what, seconds in ours.items():
        now = statistics.median(seconds)
        figures[what] = {"ours": rounded(now)}
        then = None if before is None else statistics.median(before[what])
        if then is not None and before is not None:
            ratios = [a / b for a, b in zip(seconds, before[what], strict=True)]
            figures[what] |= {"before": rounded(then), "ratio": rounded(statistics.median(ratios)),
                              "ratio_min": rounded(min(ratios)), "ratio_max": rounded(max(ratios))}  # fmt: skip
        cells = ("", "") if then is None else (f"{then:.2f}", f"{figures[what]['ratio']:.2f}")
        table.row(what, f"{now:.2f}", *cells)
    return {"rounds": rounds, "seconds": figures}


if __name__ == "__main__":
    main()

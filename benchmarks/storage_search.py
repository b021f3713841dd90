"""What a search costs on object storage that takes 50 ms to begin an answer: sequential requests and seconds.

    python benchmarks/storage_search.py                      # results/benchmarks/storage_search.json
    python benchmarks/storage_search.py --against CHECKOUT   # an older one side by side, in turns
    python benchmarks/storage_search.py --rows 300 --rounds 1 --json FILE   # a rehearsal

A local server speaks S3 (moto's), behind an address that holds every request for 50 ms. Each checkout builds an index
there and searches it (hybrid, random vectors, no model): as the command does, which opens the index anew; as a server
does, with an index that is open; with a local copy that has to be made, and with one that is there (`--cache-dir`); and
the same in a folder. Requests are sequential if none of them began before the one before it could be answered.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Table, rounded, say, write_report

SEED = 0
HERE = Path(__file__).resolve().parent
WARM = 3
"""Searches of an open index before those that are measured: they fill its caches."""


class Searcher:
    """A process that searches with the code of a checkout."""

    def __init__(self, checkout: Path, spec: dict[str, Any]) -> None:
        command = [sys.executable, "-W", "ignore", str(HERE / "storage_search_worker.py"), json.dumps(spec)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def ask(self, task: str, place: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(task, place, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"a searching process ended with code {self._process.wait()}")
        return json.loads(line)


class Times(list[str]):
    """What came to the storage, with the time of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []

    def append(self, line: str) -> None:
        super().append(line)
        self.at.append(time.time())


@contextmanager
def slow_storage() -> Iterator[Any]:
    """moto's server with a bucket, behind an address that can be slow; the environment leads there."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from storage_faults import s3_bucket, s3_variables, storage

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_bucket() as url, storage(url) as found:
        found.requests = Times()
        os.environ |= s3_variables(found.url)
        yield found


def sequential(times: list[float], delay: float) -> int:
    """The largest number of requests none of which began within `delay` seconds of the one before it."""
    count, free = 0, 0.0
    for began in sorted(times):
        if began >= free:
            count, free = count + 1, began + delay
    return count


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    checkouts = {"ours": HERE.parent} | ({"before": options.against.resolve()} if options.against else {})
    found: dict[str, dict[str, list[tuple[float, int, int]]]] = {}
    with slow_storage() as storage:
        searchers = {}
        for name, checkout in checkouts.items():
            spec = {"dimension": options.dimension, "rows": options.rows, "cache": str(scratch / name)}
            searchers[name] = searcher = Searcher(checkout, spec)
            for place in (f"s3://bucket/{name}", str(scratch / f"{name}.index")):
                searcher.ask("make", place)
            for _ in range(WARM):
                searcher.ask("server", f"s3://bucket/{name}")
            say(f"{name}: built")
        storage.delay = options.delay
        for turn in range(options.rounds):
            for name in sorted(searchers, reverse=bool(turn % 2)):
                remote, local = f"s3://bucket/{name}", str(scratch / f"{name}.index")
                tasks = [("command", "command", remote), ("server", "server", remote), ("folder", "command", local)]
                if name == "ours":
                    tasks += [("copy made", "copy", remote), ("copy there", "copy", remote)]
                for what, task, place in tasks:
                    if what == "copy made":
                        subprocess.run(["rm", "-rf", str(scratch / name)], check=True)
                    done = searchers[name].ask(task, place)
                    times = [at for at in storage.requests.at if done["began"] <= at <= done["ended"]]
                    entry = (done["seconds"], len(times), sequential(times, options.delay))
                    found.setdefault(name, {}).setdefault(what, []).append(entry)
        for searcher in searchers.values():
            searcher.close()
    return {name: {what: _medians(runs) for what, runs in kinds.items()} for name, kinds in found.items()}


def _medians(runs: list[tuple[float, int, int]]) -> dict[str, float]:
    seconds, requests, chain = (statistics.median(column) for column in zip(*runs, strict=True))
    return {"seconds": rounded(seconds), "requests": requests, "sequential_requests": chain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that each request waits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", dest="output", type=Path, help="where to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        figures = measure(options, Path(folder))
    table = Table("a search", "code", "where", "seconds", "requests", "sequential")
    for name, kinds in figures.items():
        for what, run in kinds.items():
            numbers = (run["seconds"], run["requests"], run["sequential_requests"])
            table.row(name, what, *(f"{number:g}" for number in numbers))
    settings = {"rows": options.rows, "dimension": options.dimension, "delay": options.delay, "rounds": options.rounds}
    against = options.against.name if options.against else None
    figures = {**settings, "against": against, **figures}
    print(write_report("storage_search", figures, device="cpu", seed=SEED, output=options.output).name)


if __name__ == "__main__":
    main()

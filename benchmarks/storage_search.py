"""What a search costs on object storage that takes 50 ms to begin an answer: sequential requests and seconds.

    python benchmarks/storage_search.py                      # results/benchmarks/storage_search.json
    python benchmarks/storage_search.py --against CHECKOUT   # an older one side by side, in turns
    python benchmarks/storage_search.py --rows 300 --rounds 1 --json FILE   # a rehearsal

A local server speaks S3 (moto's), behind an address that holds every request for 50 ms. Each checkout builds an index
there and searches it (hybrid, random vectors, no model): as the command does, which opens the index anew; as a server
does, with an index that is open; with a local copy that has to be made, and with one that is there (`--cache-dir`); and
the same in a folder. These are the times of opening and searching in a process that has imported what it needs. With
--commands the whole command `search-r3 search` is timed too, in a process of its own, with a random two-layer model:
starting Python, importing torch and loading a model are in it, which no storage can make faster.

Requests are sequential if none of them began before the one before it had been answered. `waiting` are the seconds in
which at least one request was under way; what is left is the process's own.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Table, rounded, say, shrunk, write_report

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


@contextmanager
def slow_storage() -> Iterator[Any]:
    """moto's server with a bucket, behind an address that can be slow; the environment leads there."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from storage_faults import s3_bucket, s3_variables, storage

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_bucket() as url, storage(url) as found:
        os.environ |= s3_variables(found.url)
        yield found


def sequential(spans: Sequence[Sequence[float]]) -> int:
    """The largest number of requests none of which began before the one before it was answered, of [came, answered]."""
    count, free = 0, 0.0
    for came, answered in sorted(spans, key=lambda span: max(span)):
        if came >= free:
            count, free = count + 1, max(came, answered)
    return count


def under_way(spans: Sequence[Sequence[float]]) -> float:
    """Seconds in which at least one request was."""
    total, free = 0.0, 0.0
    for came, answered in sorted(spans):
        total, free = total + max(0.0, answered - max(came, free)), max(free, answered)
    return total


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    checkouts = {"ours": HERE.parent} | ({"before": options.against.resolve()} if options.against else {})
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {}
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
        commands = Commands(checkouts, scratch) if options.commands else None
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
                    kept = found.setdefault(name, {}).setdefault(what, [])
                    kept.append(counted(storage, lambda: searchers[name].ask(task, place)))  # noqa: B023  # called here
                for what, run in commands.of(name).items() if commands else ():
                    found[name].setdefault(what, []).append(counted(storage, run))
        for searcher in searchers.values():
            searcher.close()
    figures: dict[str, Any] = {name: {kind: _medians(runs) for kind, runs in of.items()} for name, of in found.items()}
    return figures | {"ratios": ratios(found)}


def counted(storage: Any, work: Callable[[], dict[str, Any]]) -> tuple[float, ...]:
    """Seconds of a search, its requests, how many follow each other, and seconds in which any was under way."""
    before = len(storage.spans)
    done = work()
    spans = [span for span in storage.spans[before:] if done["began"] <= span[0] <= done["ended"]]
    return done["seconds"], len(spans), sequential(spans), under_way(spans)


class Commands:
    """`search-r3 search` of each checkout as a whole, on an index that its `search-r3 index` made."""

    def __init__(self, checkouts: dict[str, Path], scratch: Path) -> None:
        self.checkouts, self.cache = checkouts, scratch / "commands"
        self.model = shrunk("smollm2-135m", scratch / "tiny")
        corpus = scratch / "corpus.jsonl"
        texts = ({"_id": f"d{i}", "text": f"word{i % 500} word{i % 77} and more"} for i in range(300))
        corpus.write_text("".join(json.dumps(one) + "\n" for one in texts), encoding="utf-8")
        self.corpus = corpus
        for name in checkouts:
            for place in (f"s3://bucket/{name}-command", str(scratch / f"{name}-command.index")):
                self._run(name, "index", str(corpus), "--into", place, "--model", str(self.model))
            say(f"{name}: indexed by the command")
        self.of("ours")["whole command, copy there"]()  # which makes it

    def of(self, name: str) -> dict[str, Callable[[], dict[str, Any]]]:
        """What is timed of one checkout."""
        remote, local = f"s3://bucket/{name}-command", str(self.corpus.parent / f"{name}-command.index")

        def search(place: str, *options: str) -> Callable[[], dict[str, Any]]:
            query = ["search", place, "word12 word33", "--no-reasoning", "--model", str(self.model)]
            return lambda: self._run(name, *query, *options)

        found = {"whole command": search(remote), "whole command, folder": search(local)}
        if name == "ours":
            found["whole command, copy there"] = search(remote, "--cache-dir", str(self.cache))
        return found

    def _run(self, name: str, *arguments: str) -> dict[str, Any]:
        environment = os.environ | {"PYTHONPATH": str(self.checkouts[name])}
        began, started = time.time(), time.perf_counter()
        done = subprocess.run(  # not in a checkout, whose package Python would find first
            [sys.executable, "-W", "ignore", "-m", "search_r3", *arguments],
            env=environment,
            cwd=self.corpus.parent,
            capture_output=True,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{name}: {' '.join(arguments)}: {done.stderr.decode(errors='replace')[-2000:]}")
        return {"began": began, "seconds": seconds, "ended": time.time()}


def ratios(found: dict[str, dict[str, list[tuple[float, ...]]]]) -> dict[str, float]:
    """Medians over the rounds of what the goals are about: to the older checkout, and of a copy to a folder."""
    pairs = {"copy there to folder": ("ours", "copy there", "ours", "folder")}
    if "before" in found:
        pairs["command to before"] = ("ours", "command", "before", "command")
        pairs["server to before"] = ("ours", "server", "before", "server")
    if "whole command" in found["ours"]:
        whole = "whole command"
        pairs["whole command, copy there to folder"] = ("ours", f"{whole}, copy there", "ours", f"{whole}, folder")
        if "before" in found:
            pairs["whole command to before"] = ("ours", whole, "before", whole)
    out = {}
    for name, (one, what, other, against) in pairs.items():
        rounds = zip(found[one][what], found[other][against], strict=True)
        out[name] = rounded(statistics.median(ours[0] / theirs[0] for ours, theirs in rounds))
    return out


def _medians(runs: list[tuple[float, ...]]) -> dict[str, float]:
    seconds, requests, chain, waiting = (statistics.median(column) for column in zip(*runs, strict=True))
    times = {"seconds": rounded(seconds), "waiting": rounded(waiting)}
    return times | {"requests": requests, "sequential_requests": chain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that each request waits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commands", action="store_true", help="time the whole command too")
    parser.add_argument("--json", dest="output", type=Path, help="where to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        figures = measure(options, Path(folder))
    table = Table("a search", "code", "where", "seconds", "waiting", "requests", "sequential")
    for name, kinds in figures.items():
        for what, run in kinds.items() if name != "ratios" else ():
            numbers = (run["seconds"], run["waiting"], run["requests"], run["sequential_requests"])
            table.row(name, what, *(f"{number:g}" for number in numbers))
    for name, ratio in figures["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    settings = {"rows": options.rows, "dimension": options.dimension, "delay": options.delay, "rounds": options.rounds}
    against = options.against.name if options.against else None
    figures = {**settings, "against": against, **figures}
    print(write_report("storage_search", figures, device="cpu", seed=SEED, output=options.output).name)


if __name__ == "__main__":
    main()

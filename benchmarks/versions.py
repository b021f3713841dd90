"""Whether a change made anything slower: this checkout beside another one, in turns within one run.

    git worktree add build/before f444c4d
    python benchmarks/versions.py --against build/before --data DATA
    python benchmarks/versions.py --against build/before --only sft grpo --rounds 5
    python benchmarks/versions.py --against . --tiny --rounds 1         # random weights; writes no result

A worker in each checkout runs what that checkout's own `encode.py`, `sft.py`, `grpo.py` and `serve.py` time as ours, in
turns; the figures are the other's seconds by ours, 1 being equal. A worker of `serve` starts that checkout's
`search-r3 serve`. The other checkout needs these files and the same options, from f444c4d on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Table, Worker, compare, finish, in_turns, ratio_cell, ratio_figures, rounded, say, serve

SEED = 0
GOAL = 0.97
"""The smallest ratio that is no loss: the same code run twice differs by this much."""
BENCHMARKS = ("encode", "sft", "grpo", "serve")
ROOT = Path(__file__).resolve().parents[1]
Step = Callable[[int], Any]


def main() -> None:
    """Measure what `--only` asks for, print the table, write the JSON."""
    options = parse()
    if options.worker:
        job = json.loads(options.worker)
        serve(lambda: load(job["benchmark"], argparse.Namespace(**job["arguments"]), Path(job["scratch"])))
        return
    figures: dict[str, Any] = {"against": options.against.name, "rounds": options.rounds, "goal": GOAL, "ratios": {}}
    table = Table(
        "seconds of the other checkout by ours", "what                ", "ours (s)", "other (s)", "ratio (min-max) "
    )
    for benchmark in options.only:
        for what, measured in side_by_side(benchmark, options).items():
            table.row(what, f"{measured.ours_seconds:.3g}", f"{measured.peer_seconds:.3g}", ratio_cell(measured))
            figures["ratios"][what] = ratio_figures("ratio", measured) | {"seconds": rounded(measured.ours_seconds)}
    least = min(found["ratio"] for found in figures["ratios"].values())
    print(f"\nthe smallest ratio is {least:.3f}; goal {GOAL}: {'met' if least >= GOAL else 'missed'}")
    finish("versions", figures, options, SEED)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=4, help="turns of each checkout")
    parser.add_argument("--model", default="search-r3-smollm2-135m-sft", help="adapter that both have")
    parser.add_argument("--data", help="BEIR data root (default: SEARCH_R3_DATA, then the cache folder)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="int8", help="of `serve`")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of `sft` and `grpo`")
    parser.add_argument("--tiny", action="store_true", help="random weights, two layers, few texts: tries the script")
    parser.add_argument(
        "--json", dest="output", type=Path, help="where it goes (default: results/benchmarks/versions.json)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is None and options.against is None:
        parser.error("--against CHECKOUT is needed")
    return options


def side_by_side(benchmark: str, options: argparse.Namespace) -> dict[str, Any]:
    """What was timed -> ours and the other's seconds, compared turn by turn."""
    arguments = {name: getattr(options, name) for name in ("model", "data", "device", "engine", "dtype", "tiny")}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name, folder in {"ours": ROOT, "other": options.against.resolve()}.items():
                (Path(scratch) / name).mkdir()
                job = {"benchmark": benchmark, "arguments": arguments, "scratch": str(Path(scratch) / name)}
                workers[name] = InCheckout(folder, job)
                parts = workers[name].ready()["parts"]
                say(f"{benchmark}: {name} is loaded")
            return {f"{benchmark}: {part}": timed(workers, part, options.rounds) for part in parts}
        finally:
            for worker in workers.values():
                worker.close()


def timed(workers: dict[str, Worker], part: str, rounds: int) -> Any:
    """One part in turns; the first turn of each, which warms up, is not counted."""

    def run(name: str) -> Callable[[int], float]:
        def once(turn: int) -> float:
            found = workers[name].ask(json.dumps({"part": part, "turn": turn}))["seconds"]
            say(f"{part}, turn {turn}: {name} {found:.3g} s")
            return found

        return once

    seconds = in_turns({name: run(name) for name in workers}, rounds + 1)
    return compare(seconds["ours"][1:], seconds["other"][1:])


class InCheckout(Worker):
    """A worker that runs this script with the package and the benchmarks of another checkout."""

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        super().__init__(str(self._script(Path(job["scratch"]))), job, folder)

    @staticmethod
    def _script(scratch: Path) -> Path:
        """This script where no other module lies, so that all modules come from the checkout."""
        copy = scratch / "versions_worker.py"
        copy.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
        return copy


# What a worker does. Only names that both checkouts have may be used here.


def load(benchmark: str, options: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """The names of the parts, and what answers `{"part", "turn"}` with the seconds that it took."""
    parts: dict[str, Step] = {"encode": encode, "sft": sft, "grpo": grpo, "serve": serving}[benchmark](options, scratch)

    def answer(line: str) -> dict[str, float]:
        asked = json.loads(line)
        started = time.perf_counter()
        found = parts[asked["part"]](asked["turn"])
        return {"seconds": found if isinstance(found, float) else time.perf_counter() - started}

    return {"parts": list(parts)}, answer


def texts(options: argparse.Namespace, name: str, count: int) -> tuple[list[str], list[str]]:
    """The first documents and queries of a data set."""
    from search_r3.data.beir import load_beir

    root = Path(options.data or os.environ["SEARCH_R3_DATA"])
    found = load_beir(root / name, "test")
    documents = [document.full_text for document in found.corpus.values() if document.full_text]
    return documents[:count], list(found.queries.values())[:count]


def encode(options: argparse.Namespace, scratch: Path) -> dict[str, Step]:
    """Documents of two lengths, and reasoned queries one by one and together."""
    from common import shrunk

    from search_r3 import SearchR3

    base = str(shrunk("smollm2-135m", scratch / "tiny")) if options.tiny else options.model
    model = SearchR3.from_pretrained(base, device=options.device)
    few = 4 if options.tiny else 128
    short, queries = texts(options, "cosqa", few)
    long, _ = texts(options, "scifact", few // 4)
    return {
        "documents, short": lambda _: model.encode_document(short, batch_size=32),
        "documents, long": lambda _: model.encode_document(long, batch_size=32),
        "queries, alone": lambda turn: [model.encode_query([queries[turn * 2 + i]]) for i in range(2)],
        "queries, 32 at once": lambda _: model.encode_query(queries[:32], batch_size=32),
    }


def sft(options: argparse.Namespace, scratch: Path) -> dict[str, Step]:
    """A step of stage 1, as sft.py runs ours; its first batch is the same each time."""
    import sft as script
    import sft_systems

    few = ["--only", "speed", "--device", options.device, "--dtype", options.dtype]
    sys.argv = ["sft.py", *few, *(["--tiny"] if options.tiny else [])]
    spec, _ = script.prepare(script.parse(), scratch)
    _, answer = sft_systems.load(spec)
    answer("first 0")
    return {"step": lambda turn: float(answer(f"step {turn + 1}")["seconds"])}


def grpo(options: argparse.Namespace, scratch: Path) -> dict[str, Step]:
    """A step of stage 2, as grpo.py runs ours."""
    import grpo as script

    if not hasattr(script, "load"):  # older checkouts have it in a module of its own
        import grpo_systems

        script.load = grpo_systems.load
    few = ["--steps", "8", "--adapter", options.model, "--device", options.device, "--dtype", options.dtype]
    sys.argv = ["grpo.py", *few, *(["--tiny"] if options.tiny else [])]
    spec, _ = script.prepare(script.parse(), scratch)
    _, answer = script.load(replace(spec, system="ours"))
    return {"step": lambda turn: float(answer(f"step {turn}")["seconds"])}


def serving(options: argparse.Namespace, scratch: Path) -> dict[str, Step]:
    """Requests to `search-r3 serve`: documents, reasoned queries of 1 and of 16 clients, short texts of 4."""
    import atexit

    from common import shrunk
    from serve_client import ServerProcess, closed_loop, embedding_body

    engine = "torch" if options.tiny else options.engine
    base = str(shrunk("smollm2-135m", scratch / "tiny")) if options.tiny else options.model
    server = ServerProcess(model=base, device=options.device, engine=engine).ready()
    atexit.register(server.stop)
    few = 8 if options.tiny else 128
    documents, queries = texts(options, "cosqa", few)
    used = iter(f"{query} {number}" for number in range(99) for query in queries)  # never one that the cache knows

    def ask(bodies: list[bytes], clients: int) -> None:
        closed_loop(server, bodies, clients)

    def reasoned(count: int, clients: int) -> None:
        bodies = [embedding_body(server.model, next(used), budget=16) for _ in range(count)]
        ask(bodies, clients)

    return {
        "documents": lambda _: ask([embedding_body(server.model, documents[i : i + 32]) for i in range(0, few, 32)], 1),
        "queries, 1 client": lambda _: reasoned(few // 8, 1),
        "queries, 16 clients": lambda _: reasoned(few, 16),
        "short texts, 4 clients": lambda turn: ask(
            [embedding_body(server.model, f"{turn} {i}") for i in range(few)], 4
        ),
    }


if __name__ == "__main__":
    main()

"""How fast documents are embedded, how much memory that takes and how long until the first: engines and checkouts.

    python benchmarks/documents.py int8 bfloat16=torch:bfloat16 float32=torch:float32
    python benchmarks/documents.py int8 before=int8@build/before          # after: git worktree add build/before f444c4d
    python benchmarks/documents.py int8 torch:float32 --tiny              # random weights: tries the script

A system is [NAME=]ENGINE[:DTYPE][@CHECKOUT]; every other one is compared with the first. Each loads the same model in a
process of its own, embeds the same documents of exactly `--tokens` tokens, in turns with the others, and says how long
loading took, how much memory it holds then, and its peak. On a processor with VNNI and without AMX, int8 of f444c4d
multiplies in oneDNN's reference code (findings/onednn-signed-inputs.sh): compare it on one with AMX.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Table, Worker, compare, finish, give_memory_back, in_turns, peak_memory, ratio_cell, rounded, say
from common import serve as serve_worker

SEED = 0
MB = 1_000_000
SYSTEM = re.compile(r"(?:(?P<name>[\w. -]+)=)?(?P<engine>[\w.]+)(?::(?P<dtype>\w+))?(?:@(?P<checkout>.+))?")


@dataclass(frozen=True)
class Spec:
    """One system: what its process is told.

    Attributes:
        checkout: where the package comes from; None: this one.
    """

    name: str
    engine: str
    dtype: str
    model: str
    threads: int | None = None
    checkout: str | None = None


def main() -> None:
    """Measure, print, write the JSON."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        model = options.model
        if options.tiny:
            from serve_bench import tiny_model

            model = str(tiny_model(model, Path(scratch) / "tiny"))
        specs = [spec_of(text, model, options.threads) for text in options.systems]
        if len({spec.name for spec in specs}) < len(specs):
            raise SystemExit("two systems have one name; name them: NAME=ENGINE[:DTYPE][@CHECKOUT]")
        workers: dict[str, Worker] = {}
        loaded = {}
        for spec in specs:  # one after the other: a start beside another one would take longer
            say(f"loading {spec.name}")
            checkout = None if spec.checkout is None else Path(spec.checkout).resolve()
            workers[spec.name] = stack.enter_context(Worker(__file__, asdict(spec), checkout))
            loaded[spec.name] = workers[spec.name].ready()
        figures = measure(workers, options) | {"loaded": loaded, "systems": [asdict(spec) for spec in specs]}
    finish("documents", figures, argparse.Namespace(**vars(options) | {"device": "cpu"}), SEED)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="+", metavar="[NAME=]ENGINE[:DTYPE][@CHECKOUT]")
    parser.add_argument(
        "--model", default="search-r3-smollm2-135m-sft", help="a name that all checkouts have, or a folder"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512], help="of a document")
    parser.add_argument("--total", type=int, default=32_768, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--tiny", action="store_true", help="a random two-layer model")
    parser.add_argument(
        "--json", dest="output", type=Path, help="where to write (default: results/benchmarks/documents.json)"
    )
    return parser.parse_args()


def spec_of(text: str, model: str, threads: int | None) -> Spec:
    """The system that a text names. Raises SystemExit if it names none."""
    found = SYSTEM.fullmatch(text)
    if found is None:
        raise SystemExit(f"{text!r} is no system: [NAME=]ENGINE[:DTYPE][@CHECKOUT]")
    name = found["name"] or ":".join(filter(None, (found["engine"], found["dtype"])))
    return Spec(name, found["engine"], found["dtype"] or "auto", model, threads, found["checkout"])


def measure(workers: dict[str, Worker], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of every system and length, the ratios to the first, and the memory."""
    first = next(iter(workers))
    figures: dict[str, Any] = {"rounds": options.rounds, "tokens_per_second": {}, "first_is_times_as_fast_as": {}}
    table = Table(
        "documents", "system", *(f"{n} tokens, tokens/s" for n in options.tokens), f"{first} to it", "peak MB"
    )
    rows: dict[str, list[str]] = {name: [] for name in workers}
    ratios: dict[str, list[str]] = {name: [] for name in workers}
    for tokens in options.tokens:
        count = max(1, options.total // tokens)

        def embedding(name: str, tokens: int = tokens, count: int = count) -> Callable[[int], float]:
            def run(turn: int) -> float:
                say(f"{tokens} tokens, round {turn + 1} of {options.rounds}: {name}")
                return float(workers[name].ask(f"{tokens} {count}")["seconds"])

            return run

        for name in workers:  # untimed: compiled kernels, caches
            workers[name].ask(f"{tokens} {max(1, count // 8)}")
        seconds = in_turns({name: embedding(name) for name in workers}, options.rounds)
        for name, times in seconds.items():
            speed = rounded(tokens * count / statistics.median(times))
            figures["tokens_per_second"].setdefault(name, {})[str(tokens)] = speed
            rows[name].append(f"{speed:,.0f}")
            if name != first:
                measured = compare(seconds[first], times)
                figures["first_is_times_as_fast_as"].setdefault(name, {})[str(tokens)] = measured.figures()
                ratios[name].append(ratio_cell(measured))
    figures["peak_bytes"] = {name: worker.ask("peak")["peak"] for name, worker in workers.items()}
    for name in workers:
        peak = figures["peak_bytes"][name] / MB
        table.row(name, *rows[name], ", ".join(ratios[name]) or "-", f"{peak:,.0f}")
    return figures


def load(spec: Spec) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """A worker's side: load the model, then embed what is asked for."""
    begun = time.perf_counter()
    import numpy as np
    import torch

    from search_r3 import SearchR3

    if spec.threads:
        torch.set_num_threads(spec.threads)
    known = None if spec.checkout is None else Path(spec.checkout) / "models" / spec.model
    name = str(known) if known is not None and known.is_dir() else spec.model
    model = SearchR3.from_pretrained(name, device="cpu", engine=spec.engine, dtype=spec.dtype)
    seconds = time.perf_counter() - begun
    model.encode_document(["the first document"])
    first = time.perf_counter() - begun
    give_memory_back("cpu")
    ready = {"load_seconds": rounded(seconds), "first_document_seconds": rounded(first), "resident": resident()}
    prefix = list(range(4, 16))  # as many tokens as a document's conversation has before it

    def answer(line: str) -> dict[str, Any]:
        if line == "peak":
            return {"peak": peak_memory("cpu")}
        tokens, count = map(int, line.split())
        top = min(40_000, len(model.tokenizer) // 2)
        rows = np.random.default_rng(tokens).integers(4, top, (count, tokens)).tolist()
        started = time.perf_counter()
        model.engine.embed(prefix, rows)
        return {"seconds": time.perf_counter() - started}

    return ready, answer


def resident() -> int:
    """The resident set in bytes (proc(5): the second number of statm, in pages)."""
    import resource

    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    if "--worker" in sys.argv:
        import json

        spec = Spec(**json.loads(sys.argv[sys.argv.index("--worker") + 1]))
        serve_worker(lambda: load(spec))
    else:
        main()

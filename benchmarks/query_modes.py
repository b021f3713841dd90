"""What each mode of a query costs: direct, in latent steps, after reading, with reasoning; one query and 32 at once.

    python benchmarks/query_modes.py --engine int8                    # 2 minutes
    python benchmarks/query_modes.py --model MODEL --modes off latent
    python benchmarks/query_modes.py --tiny                           # random weights; writes no result

Only the encoding of queries is timed. The modes take turns on the same queries; a ratio is that of a turn's seconds to
those of the direct mode in the same round. A mode that the model was not trained for is left out, and named.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import Table, finish, in_turns, rounded
from serve_bench import tiny_model

from search_r3 import SearchR3
from search_r3.data.beir import load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.model.reading import has_reading

SEED = 0
BATCHES = (1, 32)
DIRECT, MODES = "off", ("off", "latent", "read", "on", "read+on")


def main() -> None:
    options = parse()
    if options.tiny:
        queries, passages = [f"question {n}" for n in range(32)], [f"passage {n} " * 8 for n in range(4)]
        with tempfile.TemporaryDirectory() as scratch:
            model = SearchR3.from_pretrained(tiny_model(options.model, Path(scratch) / "tiny"), device="cpu")
            figures = measure(model, queries, passages, options)
    else:
        dataset = load_beir(find_dataset(options.dataset, options.data))
        queries = sorted(dataset.queries.values(), key=len)[:: max(1, len(dataset.queries) // 32)][:32]
        passages = [document.full_text for document in list(dataset.corpus.values())[:4]]
        model = SearchR3.from_pretrained(options.model, device="cpu", engine=options.engine, dtype=options.dtype)
        figures = measure(model, queries, passages, options)
    finish("query_modes", figures, argparse.Namespace(**vars(options) | {"device": "cpu"}), SEED)


def measure(model: SearchR3, queries: list[str], passages: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a call, and the median ratio to the direct mode's, by batch size and mode."""
    ways = {mode: way for mode, way in encoders(model, passages, options.budget).items() if mode in options.modes}
    left_out = [mode for mode in options.modes if mode not in ways]
    figures: dict[str, Any] = {"model": model.name, "engine": options.engine, "budget": options.budget,
                               "rounds": options.rounds, "left_out": left_out, "batches": {}}  # fmt: skip
    table = Table("a call", "queries", "mode", "p50 ms", "ratio")
    for size in BATCHES:
        batches = [queries[start : start + size] for start in range(0, len(queries) - size + 1, size)]
        seconds: dict[str, list[float]] = {mode: [] for mode in ways}
        turns = {mode: partial(run, way, batches, seconds[mode]) for mode, way in ways.items()}
        for way in ways.values():  # untimed: prefixes, caches
            way(batches[0])
        in_turns(turns, options.rounds)
        found = {}
        for mode in ways:
            ratio = statistics.median(a / b for a, b in zip(seconds[mode], seconds[DIRECT], strict=True))
            median = statistics.median(seconds[mode]) * 1e3
            found[mode] = {"p50_ms": rounded(median), "ratio": rounded(ratio)}
            table.row(str(size), mode, f"{median:.1f}", f"{ratio:.2f}")
        figures["batches"][str(size)] = found
    return figures


def run(way: Callable[[list[str]], Any], batches: list[list[str]], seconds: list[float], turn: int) -> float:
    """Encode one batch after the other, and note the seconds of each."""
    for batch in batches:
        started = time.perf_counter()
        way(batch)
        seconds.append(time.perf_counter() - started)
    return 0.0


def encoders(model: SearchR3, passages: list[str], budget: int) -> dict[str, Callable[[list[str]], Any]]:
    """Mode -> a function that embeds a batch in it."""

    def encode(batch: list[str], *, reads: bool = False, **settings: Any) -> Any:
        read = [passages] * len(batch) if reads else None
        return model.encode_query(batch, passages=read, max_reasoning_tokens=budget, **settings)

    ways: dict[str, Callable[[list[str]], Any]] = {
        DIRECT: partial(encode, reasoning=False),
        "on": partial(encode, reasoning=True),
    }
    if model.latent_steps:
        ways["latent"] = partial(encode, reasoning="latent")
    if has_reading(model):
        ways["read"] = partial(encode, reasoning=False, reads=True)
        ways["read+on"] = partial(encode, reasoning=True, reads=True)
    return {mode: ways[mode] for mode in MODES if mode in ways}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="search-r3-smollm2-135m-v2", help="bundled name, adapter or folder")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dataset", default="cosqa", help="32 of its queries, and its first four documents")
    parser.add_argument("--data", type=Path, help="folder of BEIR data sets; by default SEARCH_R3_DATA")
    parser.add_argument("--budget", type=int, default=32, help="reasoning tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a random two-layer model")
    parser.add_argument("--json", dest="output", type=Path, help="where to write (default: results/benchmarks)")
    options = parser.parse_args()
    if DIRECT not in options.modes:
        parser.error(f"--modes must have {DIRECT}, to which the others are compared")
    return options


if __name__ == "__main__":
    main()

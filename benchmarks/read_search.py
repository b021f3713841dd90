"""What it costs a search to read the first hits, and to reason after them: each way in turns, on one index.

    python benchmarks/read_search.py INDEX --engine int8     # the demo's questions, or those of --queries
    python benchmarks/read_search.py INDEX --tiny            # random weights; writes no result

INDEX is one that the model can search (that of `search-r3 demo`, in the cache folder). A model that was not trained to
read is given the usual reading conversation, as its weights do not matter to the time. Every question is searched once
in each round, by one way after the other; the ratio is that of a question's seconds to those of its direct search in
the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import Table, finish, in_turns, rounded
from serve_bench import tiny_model

from search_r3 import SearchR3
from search_r3.demo import QUESTIONS
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.prompts import with_reading

SEED = 0
DIRECT = "direct"


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        name = str(tiny_model(options.model, Path(scratch) / "tiny")) if options.tiny else options.model
        model = reader(name, options.engine, options.dtype, options.passages, options.tokens)
        place = options.index
        if options.tiny:
            place = Path(scratch) / "index"
            build_index(place, [SourceDocument(text, "", text) for text in QUESTIONS], model, progress=False)
        index = SearchIndex.open(place, follow=False)
        questions = options.queries.read_text(encoding="utf-8").split("\n") if options.queries else QUESTIONS
        questions = [question for question in questions if question.strip()]
        figures = measure(index, model, questions, options)
    finish("read_search", figures, argparse.Namespace(**vars(options) | {"device": "cpu"}), SEED)


def reader(name: str, engine: str, dtype: str, passages: int, tokens: int) -> SearchR3:
    """The model, with a conversation that reads so many passages of so many tokens."""
    model = SearchR3.from_pretrained(name, device="cpu", engine=engine, dtype=dtype)
    prompts = with_reading(model.contract.prompts, passages, tokens)
    if prompts == model.contract.prompts:
        return model
    checkpoint = replace(model.checkpoint, contract=replace(model.contract, prompts=prompts))
    return SearchR3(checkpoint, engine)


def measure(index: SearchIndex, model: SearchR3, questions: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each way, and their ratio to the direct search's."""
    ways: dict[str, dict[str, Any]] = {
        DIRECT: {"reasoning": False},
        "read": {"reasoning": False, "read": options.passages},
        "read-2": {"reasoning": False, "read": options.passages, "hops": 2},
        "on": {"max_reasoning_tokens": options.budget},
        "read+on": {"max_reasoning_tokens": options.budget, "read": options.passages},
    }
    seconds: dict[str, list[float]] = defaultdict(list)

    def search(way: str) -> Any:
        def run(turn: int) -> float:
            for question in questions:
                started = time.perf_counter()
                index.search(question, model, mode=options.mode, k=10, **ways[way])
                if turn >= 0:
                    seconds[way].append(time.perf_counter() - started)
            return 0.0

        return run

    for way in ways:  # untimed: prefixes, caches
        search(way)(-1)
    in_turns({way: search(way) for way in ways}, options.rounds)
    table = Table("a search", "", "p50 ms", "p95 ms", "ratio")
    figures: dict[str, Any] = {
        "questions": len(questions), "rounds": options.rounds, "engine": options.engine, "mode": options.mode,
        "passages": options.passages, "passage_tokens": options.tokens, "chunks": len(index), "ways": {},
    }  # fmt: skip
    for way in ways:
        ratio = statistics.median(np.array(seconds[way]) / np.array(seconds[DIRECT]))
        p50, p95 = (float(np.quantile(seconds[way], q)) * 1e3 for q in (0.5, 0.95))
        figures["ways"][way] = {"p50_ms": rounded(p50), "p95_ms": rounded(p95), "ratio": rounded(float(ratio))}
        table.row(way, f"{p50:.1f}", f"{p95:.1f}", f"{ratio:.2f}")
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", nargs="?", type=Path, help="the folder of an index; not with --tiny")
    parser.add_argument("--model", default="search-r3-smollm2-135m-grpo", help="bundled name, adapter or folder")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--mode", default="hybrid", choices=["hybrid", "vector"])
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="tokens that are read of each passage")
    parser.add_argument("--budget", type=int, default=32, help="reasoning tokens")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--queries", type=Path, help="a text file, one question a line")
    parser.add_argument("--tiny", action="store_true", help="a random two-layer model and a few documents")
    parser.add_argument("--json", dest="output", type=Path, help="where to write (default: results/benchmarks)")
    options = parser.parse_args()
    if options.index is None and not options.tiny:
        parser.error("give the folder of an index, or --tiny")
    return options


if __name__ == "__main__":
    main()

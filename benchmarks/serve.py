"""How fast we serve: one engine against another, continuous against static batching, over real HTTP servers.

    python benchmarks/serve.py                                          # CPU: int8 against torch in float32
    python benchmarks/serve.py --engines torch:bfloat16 torch:float32   # any; the last is what the others are held to
    python benchmarks/serve.py --only answer --work runs/serve          # one part; goes on where it was killed
    python benchmarks/serve.py --device cuda --engines torch            # GPU: and against generate, then encode
    python benchmarks/serve.py --engines int8 llama.cpp torch:float32 --only documents queries quality answer llama
    python benchmarks/serve.py --tiny                                   # random tiny weights; writes no result

Parts: `documents` (a second, in batches), `queries` (reasoned, over HTTP, closed loops of clients), `quality` (nDCG@10
off and on), `batching` (continuous against static), `answer` (a streamed search on the demo's index), `peer` (against
transformers' generate, then encode; by default only on a GPU), `llama` (against llama.cpp's own server; only if named,
serve_llama.py). Systems take turns, warm-ups are left out, queries are
distinct and the servers' cache is off. Each measurement is kept in `--work` as soon as it is made. The sustained load
with rubbish among it is load.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import serve_llama
import serve_parts
from common import RESULTS, Kept, Table, finish, serve
from serve_bench import SEED, Bench, tiny_model
from serve_client import Engine
from serve_systems import Spec, load

from search_r3.data.beir import choose_pool, load_beir, stable_order
from search_r3.data.io.find_dataset import find_dataset
from search_r3.files import atomic_write_text
from search_r3.model.resolve import default_model

PARTS = ("documents", "queries", "quality", "batching", "answer", "peer", "llama")
ENDINGS = ("", " in python", " example", " with a function", " step by step", " in one line", " safely", " fast")
"""What makes further distinct queries where the data set has too few."""


def main() -> None:
    """Run what `--only` asks for, print tables and goals, write the JSON."""
    options = parse()
    if options.worker:
        spec = Spec(**json.loads(options.worker))
        serve(lambda: load(spec))
        return
    with tempfile.TemporaryDirectory() as scratch:
        bench = prepare(options, options.work or Path(scratch))
        figures = about(bench)
        for part in PARTS:
            if part in options.only:
                figures[part] = getattr(serve_llama if part == "llama" else serve_parts, part)(bench)
    figures |= {"goals": bench.goals, "commits": bench.kept.commits}
    table = Table("goals", "what" + 48 * " ", "found", "wanted    ", "")
    for goal in bench.goals:
        wanted = f"<= {goal['at_most']:g}" if "at_most" in goal else f">= {goal['at_least']:g}"
        table.row(goal["name"], f"{goal['found']:.4g}", wanted, "met" if goal["met"] else "missed")
    finish("serve", figures, options, SEED)


def parse() -> argparse.Namespace:
    """The command line, with the defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="bundled name, adapter, folder or hub id (default: the default adapter)")
    parser.add_argument(
        "--engines", nargs="+", type=Engine.of, metavar="ENGINE[:DTYPE]",
        help="the first is held against the last (default: int8 torch:float32; on a GPU torch)",
    )  # fmt: skip
    parser.add_argument("--data", help="BEIR data root (default: SEARCH_R3_DATA, then the cache folder)")
    parser.add_argument("--dataset", default="cosqa", help="documents and queries of all parts, dev and test")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all but llama; peer only on a GPU")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system")
    parser.add_argument("--documents", type=int, help="documents of a round (default: 128)")
    parser.add_argument("--document-tokens", type=int, default=128, help="where documents are cut")
    parser.add_argument("--budget", type=int, default=16, help="tokens of reasoning, at most")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="of the queries part")
    parser.add_argument("--requests", type=int, help="of a round, for each client (default: 6)")
    parser.add_argument("--least", type=int, help="requests of a round, at least (default: 16)")
    parser.add_argument("--batching-clients", type=int, default=16)
    parser.add_argument("--batching-budget", type=int, default=32, help="tokens of reasoning in the batching part")
    parser.add_argument("--batching-requests", type=int, help="of a round of that part, for each client (default: 20)")
    parser.add_argument("--batching-base", default="smollm2-135m", help="a model that does not end its analyses itself")
    parser.add_argument("--batching-engine", type=Engine.of, metavar="ENGINE[:DTYPE]", help="default: the first")
    parser.add_argument("--quality-queries", type=int, help="default: 300")
    parser.add_argument("--quality-documents", type=int, help="default: 1,000")
    parser.add_argument("--answer-queries", type=int, help="default: 20")
    parser.add_argument("--peer-budget", type=int, default=32, help="tokens of reasoning in the peer part")
    parser.add_argument("--peer-sizes", type=int, nargs="+", default=[1, 8, 32], help="batches of the peer part")
    parser.add_argument("--work", type=Path, help="keep measurements here, and go on with what is there")
    parser.add_argument("--tiny", action="store_true", help="random weights, two layers, few texts: tries the script")
    parser.add_argument(
        "--json", "--output", dest="output", type=Path, help=f"where it goes (default: {RESULTS.name}/serve.json)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    usual = ["torch"] if on_gpu else ["int8", "torch:float32"]
    options.engines = options.engines or [Engine.of(one) for one in usual]
    options.only = options.only or [part for part in PARTS if part != "llama" and (part != "peer" or on_gpu)]
    options.batching_engine = options.batching_engine or options.engines[0]
    full = {"documents": 128, "requests": 6, "batching_requests": 20, "least": 16, "quality_queries": 300,
            "quality_documents": 1000, "answer_queries": 20}  # fmt: skip
    tiny = {"documents": 8, "requests": 2, "batching_requests": 2, "least": 4, "quality_queries": 8,
            "quality_documents": 24, "answer_queries": 3}  # fmt: skip
    for name, value in (tiny if options.tiny else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    counts = (*full, "rounds", "batching_clients", "document_tokens", "budget", "peer_budget")
    if min(getattr(options, name) for name in counts) < 1 or min(*options.clients, *options.peer_sizes) < 1:
        parser.error("all sizes, clients, budgets and --rounds must be 1 or more")
    if len({str(engine) for engine in options.engines}) < len(options.engines):
        parser.error("--engines names an engine twice")
    return options


def prepare(options: argparse.Namespace, work: Path) -> Bench:
    """Put the texts, and a tiny run's model, into `work`; open what was measured there."""
    model = options.model or default_model()
    settings = {"model": Path(model).name, "work": None, "worker": None, "only": None, "output": None, "rounds": None,
                "engines": None, "data": None, "batching_engine": str(options.batching_engine)}  # fmt: skip
    kept = Kept(work, vars(options) | settings)
    work.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        model = str(tiny_model(model, work / "tiny"))
    texts = texts_of(options)
    atomic_write_text(work / "texts.json", json.dumps(texts))
    return Bench(options, kept, work, model, texts, __file__)


def texts_of(options: argparse.Namespace) -> dict[str, Any]:
    """Documents to embed, distinct queries, and the pool of the quality part with its judgments; always the same."""
    folder = find_dataset(options.dataset, options.data)
    test = load_beir(folder, "test")
    texts = {test.corpus[i].full_text for i in test.corpus}
    asked = stable_order(set(test.queries.values()) | set(load_beir(folder, "dev").queries.values()), SEED)
    pool = choose_pool(test, options.quality_queries, options.quality_documents, SEED)
    return {
        "documents": stable_order(texts, SEED)[: options.documents],
        "queries": [text + ending for ending in ENDINGS for text in asked],
        "pool": {
            "document_ids": list(pool.corpus),
            "documents": [document.full_text for document in pool.corpus.values()],
            "queries": list(pool.queries.values()),
            "qrels": [pool.qrels[query] for query in pool.queries],
        },
    }


def about(bench: Bench) -> dict[str, Any]:
    """What was compared, for the JSON."""
    options = bench.options
    return {
        "model": "tiny random" if options.tiny else Path(bench.model).name,
        "engines": [asdict(engine) for engine in options.engines],
        "dataset": options.dataset,
        "document_tokens": options.document_tokens,
        "threads": options.threads,
        "distinct_queries": len(bench.texts["queries"]),
        "cache": "off",
    }


if __name__ == "__main__":
    main()

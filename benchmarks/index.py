"""A million rows: building, size on disk, memory, recall@10 and the time of one search, ours beside three libraries.

    python benchmarks/index.py --work build/index-million            # the real one: hours on two cores
    python benchmarks/index.py --work build/index-small --rows 20000 --texts 2000

Every step of every system is a process of its own; what it found is kept in --work, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Kept, Table, Worker, rounded, say, serve, write_report
from index_rows import Rows, encoded, likeness, nearest, on_disk, short_texts, unit, write_rows
from index_systems import SYSTEMS, Spec, load

from search_r3.files import atomic_path, atomic_write_text

DEPTH = 10
GOALS = {"recall_at_10": 0.98, "p95_ms": 25.0, "peak_bytes_building": 2_000_000_000}
PACKAGES = ["stdlib", "numpy", "torch", "transformers"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--texts", type=int, default=20_000, help="real texts that are encoded")
    parser.add_argument("--queries", type=int, default=500, help="of held-out texts, and of real questions: each")
    parser.add_argument("--model", default=None, help="whose vectors; by default the default adapter")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", type=Path, default=None, help="BEIR folders; by default SEARCH_R3_DATA")
    parser.add_argument("--packages", nargs="*", default=PACKAGES, help="whose docstrings' first sentences are texts")
    parser.add_argument("--longest", type=int, default=24, help="tokens: texts are shorter")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="where rows, indices and finished parts are kept")
    parser.add_argument("--cache", type=Path, default=Path("build"), help="where the encoded texts are kept")
    parser.add_argument("--tiny", action="store_true", help="for tests: a few hundred rows")
    parser.add_argument("--json", type=Path, default=None, help="by default results/benchmarks/index.json")
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.texts, options.queries = 1500, 150, 20
    return options


def main() -> None:
    """Make the rows, run every system, print the table and write the JSON."""
    if "--worker" in sys.argv:
        spec = Spec(**json.loads(sys.argv[sys.argv.index("--worker") + 1]))
        serve(lambda: load(spec))
        return
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        settings = {"rows": options.rows, "texts": options.texts, "queries": options.queries, "seed": options.seed}
        kept = Kept(work, settings | {"model": options.model, "longest": options.longest, "threads": options.threads})
        about = kept.measure("rows", lambda: prepare(options, work))
        figures = {"rows": options.rows, **about, "goals": GOALS, "threads": options.threads, "systems": {}}
        table = Table(
            f"{options.rows:,} rows of {about['dimension']}", "system", "build s", "MB on disk", "peak MB building",
            "peak MB searching", "recall@10", "p50 ms", "p95 ms",
        )  # fmt: skip
        for system in options.systems:
            found = {}
            for step in ("build", "search"):
                found[step] = kept.measure(f"{system} {step}", lambda s=system, p=step: run(options, work, s, p))
            figures["systems"][system] = summary(found)
            one = figures["systems"][system]
            table.row(
                system, f"{one['build_seconds']:.0f}", f"{one['bytes'] / 1e6:.0f}",
                f"{one['peak_bytes_building'] / 1e6:.0f}", f"{one['peak_bytes_searching'] / 1e6:.0f}",
                f"{one['recall_at_10']:.4f}", f"{one['p50_ms']:.2f}", f"{one['p95_ms']:.2f}",
            )  # fmt: skip
        figures["commits"] = kept.commits
    if options.tiny and options.json is None:
        return
    say(str(write_report("index", figures, device="cpu", seed=options.seed, output=options.json)))


def run(options: argparse.Namespace, work: Path, system: str, step: str) -> dict[str, Any]:
    """One step of one system, in its process."""
    say(f"{system}: {step}")
    start = min(100_000, options.rows)
    spec = Spec(system, step, str(work), str(work / system), DEPTH, GOALS["recall_at_10"], options.threads, start)
    with Worker(__file__, dataclasses.asdict(spec)) as worker:
        return worker.ready()


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """rows.npy, texts.json, queries.npy and truth.npy in `work`; what is to be said of them."""
    import os

    from search_r3.model.resolve import default_model
    from search_r3.model.searchr3 import SearchR3

    model = SearchR3.from_pretrained(options.model or default_model(), dtype=options.dtype)
    root = options.data or (Path(os.environ["SEARCH_R3_DATA"]) if "SEARCH_R3_DATA" in os.environ else None)
    texts = short_texts(model.tokenizer, root, options.packages, options.longest, options.seed)
    wanted = options.texts + 2 * options.queries
    if len(texts) < wanted:
        raise SystemExit(
            f"{len(texts):,} short texts where {wanted:,} are needed; give --data, more --packages, or fewer"
        )
    texts = texts[:wanted]
    folder = options.cache / f"index-vectors-{model.contract_hash[:12]}-{options.seed}-{options.longest}-{wanted}"
    known, held_out, asked = np.split(np.arange(wanted), [options.texts, options.texts + options.queries])
    vectors = unit(encoded(model, texts[: len(known) + len(held_out)], "texts", folder))
    questions = unit(encoded(model, [texts[i] for i in asked], "queries", folder))
    rows = Rows(vectors[known], options.rows, options.seed)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "rows.npy").exists():
        write_rows(rows, work / "rows.npy")
    # Held-out texts and questions take turns, so that each half holds as many of both.
    queries = np.stack([vectors[held_out], questions], axis=1).reshape(-1, vectors.shape[1])
    half = len(queries) // 4 * 2
    queries = queries[: 2 * half]
    best, _ = nearest(queries, on_disk(work / "rows.npy"), DEPTH)
    for name, matrix in (("queries.npy", queries), ("truth.npy", best)):
        with atomic_path(work / name) as scratch:
            np.save(scratch, matrix)
    atomic_write_text(work / "texts.json", json.dumps([texts[i] for i in known]))
    return {
        "dimension": int(vectors.shape[1]),
        "model": model.name,
        "texts": len(known),
        "text_tokens": f"under {options.longest}",
        "queries": {"tuning": half, "measured": half, "what": "half held-out texts, half texts encoded as queries"},
        "distances": likeness(rows, work / "rows.npy"),
    }


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A system's figures out of its two steps."""
    build, search = found["build"], found["search"]
    parts = {key: value for key, value in build.items() if key.endswith("_seconds")}
    out = {
        "about": build["about"],
        **{key: rounded(value) for key, value in parts.items()},
        "bytes": build["bytes"],
        "peak_bytes_building": build["peak_bytes"],
        "peak_bytes_searching": search["peak_bytes"],
        "open_seconds": rounded(search["open_seconds"]),
        "recall_at_10": round(search["recall"], 4),
        "p50_ms": rounded(search["p50_ms"]),
        "p95_ms": rounded(search["p95_ms"]),
        "setting": search["setting"],
        "tuning": search["tuning"],
    }
    if "approximate" in build:
        out["approximate"] = build["approximate"]
    out["goals_met"] = {
        "recall_at_10": out["recall_at_10"] >= GOALS["recall_at_10"],
        "p95_ms": out["p95_ms"] <= GOALS["p95_ms"],
        "peak_bytes_building": out["peak_bytes_building"] <= GOALS["peak_bytes_building"],
    }
    return out


if __name__ == "__main__":
    main()

"""A million rows: building, size, memory, recall@10, one search, a filtered one, eight at once; ours and others.

    python benchmarks/index_encode.py build/rows --from KIND=PATH ... --questions DATA       # real rows: hours, once
    python benchmarks/index.py --work build/index-real --vectors build/rows --against ../before
    python benchmarks/index.py --work build/index-made-up            # or copies of 20,000 real ones, moved a little
    python benchmarks/index.py --work build/index-small --rows 20000 --texts 2000

`--against` also measures ours as it is in another checkout. Every step of every system is a process of its own; what it
found is kept in --work, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Kept, Table, Worker, rounded, say, serve, write_report
from index_encode import part_file, read_lines
from index_peers import MODULES
from index_rows import Rows, encoded, likeness, nearest, on_disk, real_distances, unit, write_parts, write_rows
from index_spec import FILTER_SHARES, Spec, filter_value
from index_systems import SYSTEMS, load, truth_file
from index_texts import cut, read_texts

from search_r3.files import atomic_path, atomic_write_text

DEPTH = 10
GOALS = {"recall_at_10": 0.98, "p95_ms": 8.0, "peak_bytes_building": 2_000_000_000, "p95_ms_filter_0.01": 10.0}
PACKAGES = ["stdlib", "numpy", "torch", "transformers"]
AFTER_SEARCH = ("filter", "together")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="with --vectors, at most")
    parser.add_argument("--vectors", type=Path, default=None, help="a folder of index_encode.py: rows that are real")
    parser.add_argument("--texts", type=int, default=20_000, help="real texts that are encoded; not with --vectors")
    parser.add_argument("--queries", type=int, default=500, help="held-out texts; and, without --vectors, as queries")
    parser.add_argument("--questions", type=int, default=500, help="real questions; only with --vectors")
    parser.add_argument("--against", type=Path, default=None, help="a checkout whose index is measured too")
    parser.add_argument("--model", default=None, help="whose vectors; by default the default adapter")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", type=Path, default=None, help="BEIR folders; by default SEARCH_R3_DATA")
    parser.add_argument("--packages", nargs="*", default=PACKAGES, help="whose docstrings' sentences are texts")
    parser.add_argument("--longest", type=int, default=24, help="tokens, at which texts are cut")
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8, help="searches at once")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for one pass over the queries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="where rows, indices and finished parts are kept")
    parser.add_argument("--cache", type=Path, default=Path("build"), help="where the encoded texts are kept")
    parser.add_argument("--tiny", action="store_true", help="for tests: a few hundred rows")
    parser.add_argument("--json", type=Path, default=None, help="by default results/benchmarks/index.json")
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.texts, options.queries, options.questions = 1500, 150, 20, 20
    if options.against is not None and not (options.against / "search_r3").is_dir():
        parser.error(f"--against {options.against}: not a checkout, as it has no folder search_r3")
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
        parts = real_parts(options)
        settings = {"texts": options.texts} if parts is None else {"parts": [str(options.vectors), len(parts)]}
        settings |= {"rows": options.rows, "queries": options.queries, "seed": options.seed, "model": options.model}
        kept = Kept(work, settings | {"longest": options.longest, "threads": options.threads})
        about = kept.measure("rows", lambda: prepare(options, work, parts))
        figures = {**about, "goals": GOALS, "threads": options.threads, "systems": {}, "not_measured": {}}
        table = Table(
            f"{about['rows']:,} rows of {about['dimension']}", "system", "build s", "MB on disk", "peak MB building",
            "peak MB searching", "recall@10", "p50 ms", "p95 ms", "1% p95 ms (recall)", "10%", "50%",
            "8 at once/s", "p95 ms",
        )  # fmt: skip
        for system in systems_of(options):
            if missing := [name for name in MODULES.get(system, []) if importlib.util.find_spec(name) is None]:
                figures["not_measured"][system] = f"not installed: {', '.join(missing)}"
                say(f"{system}: {figures['not_measured'][system]}")
                continue
            found: dict[str, Any] = {}
            for step in ("build", "search", *AFTER_SEARCH):
                found[step] = kept.measure(
                    f"{system} {step}", lambda s=system, p=step, f=found: run(options, work, s, p, f, about["rows"])
                )
            figures["systems"][system] = summary(found)
            table.row(*cells(system, figures["systems"][system]))
        figures["commits"] = kept.commits
    if options.tiny and options.json is None:
        return
    say(str(write_report("index", figures, device="cpu", seed=options.seed, output=options.json)))


def systems_of(options: argparse.Namespace) -> list[str]:
    """The systems to measure, what ours was before behind ours."""
    systems = list(options.systems)
    if options.against is not None:
        systems.insert(systems.index("ours") + 1 if "ours" in systems else 0, "before")
    return systems


def run(
    options: argparse.Namespace, work: Path, system: str, step: str, found: dict[str, Any], rows: int
) -> dict[str, Any]:
    """One step of one system, in its process."""
    say(f"{system}: {step}")
    spec = Spec(
        system, step, str(work), str(work / system), DEPTH, GOALS["recall_at_10"], options.threads, min(100_000, rows),
        found.get("search", {}).get("setting"), options.clients, options.budget,
    )  # fmt: skip
    checkout = options.against.resolve() if system == "before" else None
    with Worker(__file__, dataclasses.asdict(spec), checkout) as worker:
        return worker.ready()


def real_parts(options: argparse.Namespace) -> list[Path] | None:
    """The files of encoded texts that are there, in order without a gap; None where rows are made up."""
    if options.vectors is None:
        return None
    parts: list[Path] = []
    while (path := part_file(options.vectors, len(parts))).exists():
        parts.append(path)
    if not parts:
        raise SystemExit(f"{options.vectors} has no part yet: see index_encode.py")
    return parts


def prepare(options: argparse.Namespace, work: Path, parts: Sequence[Path] | None) -> dict[str, Any]:
    """rows.npy, texts.json, queries.npy and the truths in `work`; what is to be said of them."""
    work.mkdir(parents=True, exist_ok=True)
    about, texts, queries = made_up(options, work) if parts is None else real(options, work, parts)
    half = len(queries) // 4 * 2
    queries = queries[: 2 * half]
    _save(work / "queries.npy", queries)
    for share in (None, *FILTER_SHARES):
        keeps = None if share is None else lambda numbers, s=share: filter_value(numbers) < round(s * 100)
        best, _ = nearest(queries, on_disk(work / "rows.npy"), DEPTH, keeps)
        _save(work / truth_file(share), best)
    atomic_write_text(work / "texts.json", json.dumps(texts))
    what = f"half held-out texts, half {'texts encoded as queries' if parts is None else 'real questions'}"
    return about | {"queries": {"tuning": half, "measured": half, "what": what}}


def real(
    options: argparse.Namespace, work: Path, parts: Sequence[Path]
) -> tuple[dict[str, Any], list[str], np.ndarray]:
    """Rows out of the parts: the first texts are held out as queries, the next ones are the rows."""
    about = json.loads((options.vectors / "about.json").read_text(encoding="utf-8"))
    held_out = unit(np.load(parts[0])[: options.queries])
    questions = unit(np.load(options.vectors / "questions.npy")[: options.questions])
    there = sum(len(np.load(path, mmap_mode="r")) for path in parts)
    rows = min(options.rows, there - len(held_out))
    if not (work / "rows.npy").exists():
        write_parts(parts, len(held_out), rows, work / "rows.npy")
    texts = read_lines(options.vectors / "texts.jsonl")[len(held_out) : len(held_out) + rows]
    found = {
        "rows": rows, "dimension": int(held_out.shape[1]), "model": about["model"], "engine": about["engine"],
        "text_tokens": f"at most {about['longest']}, {about['cut']:,} of {about['texts']:,} texts cut there",
        "sources": about["sources"], "all_real": True,
        "distances": real_distances(work / "rows.npy", rows, options.seed),
    }  # fmt: skip
    return found, texts, in_turns_rows(held_out, questions)


def made_up(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], list[str], np.ndarray]:
    """Rows that lie as real texts do (`index_rows.Rows`); queries are held-out texts and others encoded as queries."""
    from search_r3.model.resolve import default_model
    from search_r3.model.searchr3 import SearchR3

    model = SearchR3.from_pretrained(options.model or default_model(), dtype=options.dtype)
    data = options.data or (Path(os.environ["SEARCH_R3_DATA"]) if "SEARCH_R3_DATA" in os.environ else None)
    sources = [("data", file) for file in sorted(data.glob("*/*.jsonl"))] if data else []
    sources += [("package", Path(name)) for name in options.packages]
    wanted = options.texts + 2 * options.queries
    texts, _ = cut(model.tokenizer, read_texts(sources, options.seed)[0], options.longest, wanted)
    if len(texts) < wanted:
        raise SystemExit(
            f"{len(texts):,} short texts where {wanted:,} are needed; give --data, more --packages, or fewer"
        )
    folder = options.cache / f"index-texts-{model.contract_hash[:12]}-{options.seed}-{options.longest}-{wanted}"
    known, held_out, asked = np.split(np.arange(wanted), [options.texts, options.texts + options.queries])
    vectors = unit(encoded(model, texts[: len(known) + len(held_out)], "texts", folder))
    questions = unit(encoded(model, [texts[i] for i in asked], "queries", folder))
    rows = Rows(vectors[known], options.rows, options.seed)
    if not (work / "rows.npy").exists():
        write_rows(rows, work / "rows.npy")
    about = {
        "rows": options.rows, "dimension": int(vectors.shape[1]), "model": model.name, "texts": len(known),
        "text_tokens": f"at most {options.longest}", "all_real": False, "distances": likeness(rows, work / "rows.npy"),
    }  # fmt: skip
    return about, [texts[i] for i in known], in_turns_rows(vectors[held_out], questions)


def in_turns_rows(held_out: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Both in turns, so that each half holds as many of both."""
    each = min(len(held_out), len(questions))
    return np.stack([held_out[:each], questions[:each]], axis=1).reshape(-1, held_out.shape[1])


def _save(path: Path, matrix: np.ndarray) -> None:
    with atomic_path(path) as scratch:
        np.save(scratch, matrix)


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A system's figures out of its steps."""
    build, search = found["build"], found["search"]
    out: dict[str, Any] = {
        "about": build["about"],
        **{key: rounded(value) for key, value in build.items() if key.endswith("_seconds")},
        "bytes": build["bytes"],
        "peak_bytes_building": build["peak_bytes"],
        "peak_bytes_searching": search["peak_bytes"],
        "open_seconds": rounded(search["open_seconds"]),
        **times(search),
        "setting": search["setting"],
        "tuning": search["tuning"],
    }
    if "approximate" in build:
        out["approximate"] = build["approximate"]
    together = found["together"]
    out["together"] = times(together) | {"searches_second": rounded(together["searches_second"])}
    if why := found["filter"].get("not_measured"):
        out["filter"] = {"not_measured": why}
    else:
        filtered = {str(share): found["filter"][str(share)] for share in FILTER_SHARES}
        out["filter"] = {share: times(one) | {"setting": one["setting"]} for share, one in filtered.items()}
    first = out["filter"].get(str(FILTER_SHARES[0]))
    out["goals_met"] = {
        "recall_at_10": out["recall_at_10"] >= GOALS["recall_at_10"],
        "p95_ms": out["p95_ms"] <= GOALS["p95_ms"],
        "peak_bytes_building": out["peak_bytes_building"] <= GOALS["peak_bytes_building"],
    }
    if first is not None:
        out["goals_met"]["p95_ms_filter_0.01"] = first["p95_ms"] <= GOALS["p95_ms_filter_0.01"]
    return out


def times(found: dict[str, Any]) -> dict[str, Any]:
    """Recall, where it was measured, and quantiles of the milliseconds of so many searches."""
    out: dict[str, Any] = {"recall_at_10": round(found["recall"], 4)} if "recall" in found else {}
    return out | {"p50_ms": rounded(found["p50_ms"]), "p95_ms": rounded(found["p95_ms"]), "measured": found["measured"]}


def cells(system: str, one: dict[str, Any]) -> list[str]:
    """A system's row of the table."""
    filtered = [one["filter"].get(str(share)) for share in FILTER_SHARES]
    return [
        system, f"{one['build_seconds']:.0f}", f"{one['bytes'] / 1e6:.0f}", f"{one['peak_bytes_building'] / 1e6:.0f}",
        f"{one['peak_bytes_searching'] / 1e6:.0f}", f"{one['recall_at_10']:.4f}", f"{one['p50_ms']:.2f}",
        f"{one['p95_ms']:.2f}", *(f"{f['p95_ms']:.2f} ({f['recall_at_10']:.3f})" if f else "-" for f in filtered),
        f"{one['together']['searches_second']:.0f}", f"{one['together']['p95_ms']:.2f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()

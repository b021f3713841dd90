"""What `search-r3 adapt` gains on test queries, how long it takes and how much memory: results/benchmarks/adapt.json.

    python benchmarks/adapt.py nfcorpus scifact --data DATA --work build/adapt
    python benchmarks/adapt.py scifact --data DATA --work build/adapt-lora --json FILE -- --method lora

Each data set is indexed and adapted to by the commands, in processes of their own, with the arguments behind `--` added
to those of `adapt`. The index is searched exactly, and what is there already (an index, a query adapter) is taken: a
run that was killed goes on. The test queries (and those of dev, if the set has them) are measured at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import Table, rounded, say, write_report

from search_r3.data.judged_queries import JudgedQuery, read_judged_queries
from search_r3.errors import InputError
from search_r3.evaluation.significance import randomization_test
from search_r3.files import atomic_write_text
from search_r3.index.search_index import SearchIndex
from search_r3.model.processor import fastest_dtype
from search_r3.model.resolve import default_model
from search_r3.model.searchr3 import SearchR3
from search_r3.training.adapt import IndexedVectors, embed_queries

SEED = 0


def arguments() -> argparse.Namespace:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", help="names of BEIR folders in --data")
    parser.add_argument("--data", type=Path, default=None, help="where they are; by default SEARCH_R3_DATA")
    parser.add_argument("--work", type=Path, required=True, help="where indexes and query adapters are kept")
    parser.add_argument("--model", default=None, help="whose index it is; by default the default adapter")
    parser.add_argument("--engine", default="fastest", help="that builds the index")
    parser.add_argument("--json", dest="output", type=Path, default=None)
    options = parser.parse_args(own)
    options.more = sys.argv[len(own) + 2 :]
    options.data = options.data or Path(os.environ["SEARCH_R3_DATA"])
    options.model = options.model or default_model()
    return options


def main() -> None:
    """Index, adapt, measure, print, write the JSON."""
    options = arguments()
    figures: dict[str, Any] = {"model": options.model, "adapt": options.more, "datasets": {}}
    table = Table("nDCG@10", "data set", "split", "queries", "before", "after", "gain", "p", "seconds", "MiB")
    for name in options.datasets:
        figures["datasets"][name] = found = one_dataset(name, options)
        for split, values in found["splits"].items():
            scores = [f"{values[key]['ndcg@10']:.4f}" for key in ("before", "after")]
            gain = f"{values['gain']:+.4f}"
            spent = [f"{found['seconds']:.0f}", f"{found['peak_bytes'] / 2**20:,.0f}"]
            table.row(name, split, str(values["queries"]), *scores, gain, f"{values['p']:.3g}", *spent)
    print(write_report("adapt", figures, device="cpu", seed=SEED, output=options.output).name)


def one_dataset(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What is to be said of one data set."""
    data, index, into = options.data / name, options.work / f"{name}.index", options.work / f"{name}.adapter"
    if not index.exists():
        say(f"{name}: indexing")
        run("index", str(data), "--into", str(index), "--model", options.model, "--engine", options.engine)
    kept = options.work / f"{name}.json"
    if not into.exists() or not kept.exists():
        before, began = bytes_of(index), time.perf_counter()
        say(f"{name}: adapting")
        peak = run("adapt", str(index), str(data), "--into", str(into), *options.more)
        about = {"seconds": rounded(time.perf_counter() - began), "peak_bytes": peak}
        about["index_is_the_same"] = bytes_of(index) == before
        atomic_write_text(kept, json.dumps(about) + "\n")
    report = json.loads((into / "adapt.json").read_text(encoding="utf-8"))
    found = json.loads(kept.read_text(encoding="utf-8")) | {key: report[key] for key in ("queries", "documents")}
    found["held_out"] = {key: report[key] for key in ("before", "after")}
    return found | {"splits": measured(name, data, index, into, options)}


def run(*arguments: str) -> int:
    """One command of search-r3; its peak memory in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "search_r3", *arguments], stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"search-r3 {arguments[0]} ended with code {process.returncode}")
    return used.ru_maxrss * 1024


def bytes_of(folder: Path) -> str:
    """SHA-256 of a folder's files and their names."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def measured(name: str, data: Path, index: Path, into: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Split -> the measures of its queries without reasoning, before and after."""
    vectors = IndexedVectors(*SearchIndex.open(index).matrix())
    models = {"before": options.model, "after": str(into)}
    loaded = {
        key: SearchR3.from_pretrained(place, device="cpu", dtype=fastest_dtype("cpu")) for key, place in models.items()
    }
    splits: dict[str, Any] = {}
    for split in ("dev", "test"):
        queries = judged(data, split, vectors)
        if not queries:
            continue
        say(f"{name}: measuring {len(queries):,} queries of {split}")
        values = {key: vectors.measure(embed_queries(model, queries), queries) for key, model in loaded.items()}
        means = {key: {m: round(float(of.mean()), 4) for m, of in one.items()} for key, one in values.items()}
        rise_Q = values["after"]["ndcg@10"] - values["before"]["ndcg@10"]
        p = randomization_test(rise_Q, seed=SEED)
        splits[split] = means | {"queries": len(queries), "gain": round(float(rise_Q.mean()), 4), "p": rounded(p)}
    return splits


def judged(data: Path, split: str, vectors: IndexedVectors) -> list[JudgedQuery]:
    """The queries of a split, judged by documents that the index has; none if there is no such split."""
    try:
        found = read_judged_queries(str(data), split, None)
    except InputError:
        return []
    kept = [
        JudgedQuery(query.id, query.text, {d: grade for d, grade in query.relevant.items() if d in vectors.column_of})
        for query in found
    ]
    return [query for query in kept if query.relevant]


if __name__ == "__main__":
    main()

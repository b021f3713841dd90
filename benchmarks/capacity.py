"""What one search costs by rows, recall and share of partitions: CPU time, memory, reads from disk.

    python benchmarks/capacity.py --work build/capacity --rows 1e6 3e6 1e7 \\
        --data hotpotqa hotpotqa_more strategyqa scifact nfcorpus          # results/benchmarks/capacity.json
    python benchmarks/capacity.py --work build/capacity-tiny --rows 2000 6000 --tiny --json FILE   # a rehearsal

Made-up rows that lie as the documents of these data sets do (`index_rows`), cut to --dimension components, with texts
of words drawn by Zipf's law. Each number of rows is built as `search-r3 index` builds it, and searched in a process of
its own, one search at a time: by vectors with every share of the partitions, exactly, and by words. `scale_search` fits
its formulas to what is found. What was measured is kept in --work, so a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import Kept, Table, Worker, peak_memory, rounded, say, serve, write_report
from index_rows import Rows, unit

SEED, DEPTH, GOAL = 0, 10, 0.98
SAME = 1e-5
"""Cosine: as near as the tenth is as good as the tenth."""
FRAGMENT = 1_048_576
"""Rows of a commit: Lance's own size of a fragment, so that compaction has nothing to rewrite."""
SHARES = (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
REFINES = (4, 16)
"""Candidates that are compared exactly, for each result."""
WORDS, WORDS_A_TEXT, WORDS_A_QUERY = 200_000, 12, 4
ZIPF = 1.07
EXACT_QUERIES = 10
"""A search of all vectors is slow and always costs the same."""
WARM_UP = 10


@dataclass(frozen=True)
class Spec:
    """One step of one number of rows: "build" or "search"."""

    step: str
    rows: int
    work: str
    queries: int

    @property
    def folder(self) -> Path:
        """Where its index is."""
        return Path(self.work, f"index-{self.rows}")


# ------------------------------------------------------------------------------------------------------------ building


def zipf_words(rng: np.random.Generator, count: int) -> np.ndarray:
    """Numbers of words, (count,), the most frequent being 0."""
    weights = 1.0 / np.arange(1, WORDS + 1) ** ZIPF
    return np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(count))


def texts_of(start: int, count: int) -> list[str]:
    """The texts of rows `start` to `start + count`, the same every time."""
    words = zipf_words(np.random.default_rng([SEED, 1, start]), count * WORDS_A_TEXT).reshape(count, WORDS_A_TEXT)
    return [" ".join(f"w{word}" for word in row) for row in words.tolist()]


def rows_of(spec: Spec) -> Rows:
    return Rows(np.load(Path(spec.work, "real.npy")), spec.rows, SEED)


def build(spec: Spec) -> dict[str, Any]:
    """Write the table with its full-text and approximate index; the queries' tenth cosines go to a file beside it."""
    from search_r3.index.backends.lance.approximate import train_approximate
    from search_r3.index.backends.lance.compaction import cleanup_old_versions, compact
    from search_r3.index.backends.lance.lance_table import create_table, mark_complete
    from search_r3.index.index_info import IndexInfo

    shutil.rmtree(spec.folder, ignore_errors=True)
    spec.folder.mkdir(parents=True)
    rows, queries, clock = rows_of(spec), np.load(Path(spec.work, "queries.npy")), time.perf_counter
    table = create_table(spec.folder, IndexInfo(1, "made-up rows", "0" * 64, queries.shape[1], ""))
    best, made, writing = np.full((len(queries), DEPTH), -2.0, dtype=np.float32), 0.0, 0.0
    for start in range(0, spec.rows, FRAGMENT):
        begun = clock()
        block = rows.block(start, min(start + FRAGMENT, spec.rows))
        for part in np.array_split(block, max(1, len(block) // 16_384)):
            best = np.sort(np.concatenate([best, queries @ part.T], axis=1), axis=1)[:, -DEPTH:]
        made, begun = made + clock() - begun, clock()
        table.add(as_table(start, block, table.schema))
        writing += clock() - begun
        say(f"{spec.rows:,} rows: {min(start + FRAGMENT, spec.rows):,} written")
    np.save(spec.folder.with_suffix(".npy"), best[:, 0])
    begun = clock()
    compact(table, spec.folder, everything=True)
    cleanup_old_versions(spec.folder, timedelta(0))
    words = clock() - begun
    found = train_approximate(table, spec.rows)
    mark_complete(table)
    files = [file for file in spec.folder.rglob("*") if file.is_file()]
    return {
        "made_seconds": rounded(made),
        "write_seconds": rounded(writing),
        "full_text_seconds": rounded(words),
        "approximate_seconds": found.build_seconds,
        "partitions": found.partitions,
        "kind": found.kind,
        "bytes": sum(file.stat().st_size for file in files),
        "index_bytes": sum(file.stat().st_size for file in files if "_indices" in file.parts),
        "peak_bytes": peak_memory("cpu"),
    }


def as_table(start: int, vectors: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Rows as `search-r3 index` would store them."""
    count = len(vectors)
    names = pa.array([f"{number:09d}" for number in range(start, start + count)])
    empty, one = pa.array([""]).take(pa.array(np.zeros(count, dtype=np.int64))), pa.array(np.ones(count, dtype=int))
    given: dict[str, Any] = dict.fromkeys(("id", "document", "r3_text_hash", "r3_row_hash"), names)
    given |= dict.fromkeys(("title", "path", "r3_metadata", "r3_source"), empty)
    given |= {"start_line": one, "end_line": one, "r3_content": pa.array(texts_of(start, count))}
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    given["r3_vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.table([given[name] for name in schema.names], schema=schema.remove_metadata())


# ----------------------------------------------------------------------------------------------------------- searching


def read_so_far() -> dict[str, int]:
    """Bytes and calls that this process has read, and bytes that came from the disk (Linux; zeros elsewhere)."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return {"rchar": 0, "syscr": 0, "read_bytes": 0}
    found = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return {name: found[name] for name in ("rchar", "syscr", "read_bytes")}


def cpu_so_far() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def forget(folder: Path) -> None:
    """Let the operating system drop the files of `folder` from its cache, as far as it will."""
    for file in folder.rglob("*"):
        if file.is_file() and hasattr(os, "posix_fadvise"):
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cost(calls: Iterator[Callable[[], Any]], before_each: Callable[[], None] | None = None) -> dict[str, float]:
    """Of each of the calls, which search: milliseconds of the clock and of CPU, kilobytes and calls of reading."""
    clocks, cpu, before = [], 0.0, read_so_far()
    for call in calls:
        if before_each is not None:
            before_each()
        begun, used = time.perf_counter(), cpu_so_far()
        call()
        clocks.append(time.perf_counter() - begun)
        cpu += cpu_so_far() - used
    read = {name: (value - before[name]) / len(clocks) for name, value in read_so_far().items()}
    return {
        "p50_ms": rounded(float(np.median(clocks)) * 1e3),
        "p95_ms": rounded(float(np.quantile(clocks, 0.95)) * 1e3),
        "cpu_ms": rounded(cpu / len(clocks) * 1e3),
        "kilobytes_asked_for": rounded(read["rchar"] / 1e3),
        "reads": rounded(read["syscr"]),
        "kilobytes_from_disk": rounded(read["read_bytes"] / 1e3),
    }


def search(spec: Spec) -> dict[str, Any]:
    """Every kind of search of an index that is there."""
    from lancedb.query import MatchQuery

    from search_r3.index.backends.lance.approximate import probing
    from search_r3.index.backends.lance.lance_table import open_table
    from search_r3.index.index_info import ApproximateIndex

    queries = np.load(Path(spec.work, "queries.npy"))
    tenth = np.load(spec.folder.with_suffix(".npy"))
    forget(spec.folder)
    table: Any = open_table(spec.folder, follow=False)
    partitions = max(1, round(spec.rows**0.5))
    start = ApproximateIndex("IVF_RQ", True, 0.0, {}, {}, GOAL, partitions, 1, 4, spec.rows, spec.rows, "", 0.0, 0.0)
    recalls: list[float] = []

    def by_vector(query: np.ndarray, least: float, settings: ApproximateIndex | None) -> Callable[[], None]:
        def run() -> None:
            search = table.search(query, vector_column_name="r3_vector", query_type="vector").distance_type("cosine")
            hits = probing(search, settings).select(["id", "_distance"]).limit(DEPTH + 10).to_arrow()
            near = 1.0 - np.sort(hits["_distance"].to_numpy())[:DEPTH]
            recalls.append(float(np.sum(near >= least - SAME)) / DEPTH)

        return run

    def vectors(settings: ApproximateIndex | None, count: int, **more: Any) -> dict[str, float]:
        recalls.clear()
        pairs = list(zip(queries, tenth, strict=True))[:count]
        found = cost((by_vector(query, least, settings) for query, least in pairs), **more)
        return found | {"recall_at_10": rounded(float(np.mean(recalls)))}

    def by_words(number: int) -> Callable[[], Any]:
        words = " ".join(f"w{word}" for word in zipf_words(np.random.default_rng([SEED, 2, number]), WORDS_A_QUERY))
        search = table.search(MatchQuery(words, "r3_content"), query_type="fts").select(["id", "_score"]).limit(60)
        return search.to_arrow

    first = vectors(replace(start, nprobes=partitions), 1)
    tried = []
    for refine in REFINES:
        for nprobes in sorted({max(1, round(share * partitions)) for share in SHARES}):
            settings = replace(start, nprobes=nprobes, refine=refine)
            vectors(settings, WARM_UP)
            found = vectors(settings, spec.queries)
            tried.append({"share": rounded(settings.nprobes / partitions), "refine": refine} | found)
            say(f"{spec.rows:,} rows: {tried[-1]}")
            if found["recall_at_10"] >= 0.995:
                break
    good = [one for one in tried if one["recall_at_10"] >= GOAL]
    chosen = min(good or tried, key=lambda one: one["cpu_ms"])
    settings = replace(start, nprobes=max(1, round(chosen["share"] * partitions)), refine=chosen["refine"])
    uncached = vectors(settings, min(20, spec.queries), before_each=lambda: forget(spec.folder))
    cost(by_words(number) for number in range(WARM_UP))
    return {
        "first_search": first,
        "approximate": tried,
        "with_vectors_on_disk": uncached,
        "words": cost(by_words(number) for number in range(WARM_UP, WARM_UP + spec.queries)),
        "exact": vectors(None, EXACT_QUERIES),
        "peak_bytes": peak_memory("cpu"),
    }


# ------------------------------------------------------------------------------------------------------------- running


def real_vectors(options: argparse.Namespace) -> np.ndarray:
    """Unit rows of --dimension components: embedded documents, from the cache of `search-r3 evaluate` if there."""
    if options.tiny:
        rng = np.random.default_rng(SEED)
        centers = rng.standard_normal((30, options.dimension))
        return unit(centers[rng.integers(0, 30, 400)] + 0.4 * rng.standard_normal((400, options.dimension)))
    from search_r3.data.beir import load_beir
    from search_r3.evaluation.embedding_cache import EmbeddingCache
    from search_r3.evaluation.systems import SearchR3System
    from search_r3.model.resolve import default_model
    from search_r3.model.searchr3 import SearchR3

    model = SearchR3.from_pretrained(options.model or default_model(), device="cpu", engine=options.engine)
    system, found = SearchR3System(model, "model", "off", max_length=256), []
    for name in options.data:
        folder = Path(name) if Path(name).is_dir() else Path(os.environ.get("SEARCH_R3_DATA", "."), name)
        corpus = load_beir(folder).corpus
        texts = {one: document.full_text for one, document in corpus.items()}
        found.append(system.document_rows(texts, EmbeddingCache())[0])
    return unit(np.concatenate(found)[:, : options.dimension])


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """real.npy and queries.npy, which are held-out documents."""
    real = real_vectors(options)
    order = np.random.default_rng(SEED).permutation(len(real))
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "queries.npy", real[order[: options.queries]])
    np.save(work / "real.npy", real[order[options.queries :]])
    return {"real_rows": len(real) - options.queries, "data": options.data}


def steps(options: argparse.Namespace, kept: Kept, rows: int) -> dict[str, Any]:
    """Both steps of one number of rows, each in its process."""
    found = {}
    for step in ("build", "search"):
        spec = Spec(step, rows, str(options.work), options.queries)

        def run(spec: Spec = spec) -> dict[str, Any]:
            say(f"{spec.rows:,} rows: {spec.step}")
            with Worker(__file__, dataclasses.asdict(spec)) as worker:
                return worker.ready()

        found[step] = kept.measure(f"{rows} {step}", run)
    if not options.keep:
        shutil.rmtree(Path(options.work, f"index-{rows}"), ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=lambda text: int(float(text)), default=[1_000_000, 3_000_000])
    parser.add_argument("--dimension", type=int, default=128, help="a multiple of 8: one bit each")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--data", nargs="+", default=["scifact"], help="data sets in SEARCH_R3_DATA, or folders")
    parser.add_argument("--model", default=None, help="whose vectors; by default the default adapter")
    parser.add_argument("--engine", default="int8")
    parser.add_argument("--work", type=Path, required=True, help="for indexes and finished parts")
    parser.add_argument("--keep", action="store_true", help="the indexes; otherwise each is removed when it is done")
    parser.add_argument("--tiny", action="store_true", help="random vectors in place of embeddings")
    parser.add_argument("--json", dest="output", type=Path, help="where to write")
    options = parser.parse_args()
    settings = {"dimension": options.dimension, "queries": options.queries, "data": options.data, "tiny": options.tiny}
    kept = Kept(options.work, settings)
    about = kept.measure("rows", lambda: prepare(options, options.work))
    table = Table("a search", "rows", "share", "refine", "recall@10", "CPU ms", "p50 ms", "p95 ms")
    by_rows = {}
    for rows in sorted(options.rows):
        by_rows[str(rows)] = found = steps(options, kept, rows)
        for one in found["search"]["approximate"]:
            numbers = (one[name] for name in ("share", "refine", "recall_at_10", "cpu_ms", "p50_ms", "p95_ms"))
            table.row(f"{rows:,}", *(f"{number:g}" for number in numbers))
    figures = {**about, "dimension": options.dimension, "goal": GOAL, "cores": os.cpu_count(), "by_rows": by_rows}
    figures["commits"] = kept.commits
    if options.tiny and options.output is None:
        return
    say(str(write_report("capacity", figures, device="cpu", seed=SEED, output=options.output)))


def worker(given: str) -> None:
    """A step in this process."""
    spec = Spec(**json.loads(given))
    serve(lambda: ((build if spec.step == "build" else search)(spec), lambda line: {}))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(sys.argv[sys.argv.index("--worker") + 1])
    else:
        main()

"""Ours as a system, and the steps of every system: built in one process, searched in others.

Each may be tuned by one number (partitions or candidates); it takes the first of a doubling ladder that reaches the
goal on the tuning queries. Ours tunes itself, on the same queries and on rows of its own.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import peak_memory
from index_peers import PEERS
from index_rows import on_disk
from index_spec import FILTER_FIELD, FILTER_SHARES, Spec, filter_value

SAME = 1e-5  # cosine: as near as the tenth is as good as the tenth
WARM_UP = 20
LEAST = 20  # queries that are measured, however slow
DIMENSION_NAME = "rows"
COMMIT = 8192
OURS = ("ours", "before")
SYSTEMS = ("ours", *PEERS)


def load(spec: Spec) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """Do the step; what to say of it. There is nothing to ask afterwards."""
    before = peak_memory("cpu")
    if spec.step == "build":
        shutil.rmtree(spec.folder, ignore_errors=True)
        Path(spec.folder).mkdir(parents=True)
    system: Any = Ours(spec) if spec.system in OURS else PEERS[spec.system](spec)
    begun = time.perf_counter()
    if spec.step == "build":
        said = system.build()
        found = {"build_seconds": time.perf_counter() - begun, **said, "bytes": _bytes(Path(spec.folder))}
    else:
        system.open()
        found = {"open_seconds": time.perf_counter() - begun, **STEPS[spec.step](system, spec)}
    found |= {"bytes_before": before, "peak_bytes": peak_memory("cpu"), "about": system.about}
    return found, lambda line: {}


def _searched(system: Any, spec: Spec) -> dict[str, Any]:
    """The setting that reaches the goal on the tuning half, and what it does on the other one."""
    queries, tenth = _queries(spec), _tenth(spec)
    half = len(queries) // 2
    tried = {}
    for setting in system.ladder():
        recall, _ = _measure(system, queries[:half], tenth[:half], setting, spec)
        tried[str(setting)] = round(recall, 4)
        if recall >= spec.goal:
            break
    recall, seconds = _measure(system, queries[half:], tenth[half:], setting, spec)
    return {"recall": recall, **_quantiles(seconds), "setting": setting, "tuning": tried}


def _filtered(system: Any, spec: Spec) -> dict[str, Any]:
    """With filters that keep a share of the rows: from the same setting on, the first that reaches the goal again."""
    if why := getattr(system, "no_filter", ""):
        return {"not_measured": why}
    queries = _queries(spec)
    half = len(queries) // 2
    found = {}
    ladder = system.ladder()
    for share in FILTER_SHARES:
        tenth = _tenth(spec, share)
        for setting in ladder[ladder.index(spec.setting) :] if system.tunes_filters else [spec.setting]:
            recall, _ = _measure(system, queries[:half], tenth[:half], setting, spec, share)
            if recall >= spec.goal:
                break
        recall, seconds = _measure(system, queries[half:], tenth[half:], setting, spec, share)
        found[str(share)] = {"recall": recall, **_quantiles(seconds), "setting": setting}
    return found


def _together(system: Any, spec: Spec) -> dict[str, Any]:
    """`clients` threads, each with a search in flight all the time, until each query was searched twice."""
    queries = _queries(spec)
    waiting = list(queries[len(queries) // 2 :]) * 2
    seconds: list[float] = []
    for query in waiting[:WARM_UP]:
        system.search(query, spec.k, spec.setting)
    started = time.perf_counter()

    def client() -> None:
        while waiting and (len(seconds) < LEAST or time.perf_counter() - started < spec.budget):
            try:
                query = waiting.pop()
            except IndexError:
                return
            begun = time.perf_counter()
            system.search(query, spec.k, spec.setting)
            seconds.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=client) for _ in range(spec.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"searches_second": len(seconds) / (time.perf_counter() - started), **_quantiles(seconds)}


STEPS = {"search": _searched, "filter": _filtered, "together": _together}


def _queries(spec: Spec) -> np.ndarray:
    return np.load(Path(spec.data, "queries.npy"))


def _tenth(spec: Spec, share: float | None = None) -> np.ndarray:
    return np.load(Path(spec.data, truth_file(share)))[:, spec.k - 1]


def truth_file(share: float | None = None) -> str:
    """The file with the exact cosines of each query's nearest rows, best first, of those that a filter keeps."""
    return "truth.npy" if share is None else f"truth-{share}.npy"


def _quantiles(seconds: list[float]) -> dict[str, float]:
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return {"p50_ms": float(p50) * 1e3, "p95_ms": float(p95) * 1e3, "measured": len(seconds)}


def _measure(
    system: Any, queries: np.ndarray, tenth: np.ndarray, setting: Any, spec: Spec, share: float | None = None
) -> tuple[float, list[float]]:
    """Recall@k and the seconds of each search; of fewer queries if they take longer than the budget."""
    started = time.perf_counter()
    for query in queries[:WARM_UP]:
        system.search(query, spec.k, setting, share)
        if time.perf_counter() - started > spec.budget / 10:
            break
    found, seconds = [], []
    started = time.perf_counter()
    for query, least in zip(queries, tenth, strict=True):
        begun = time.perf_counter()
        cosines = system.search(query, spec.k, setting, share)
        seconds.append(time.perf_counter() - begun)
        found.append(float(np.sum(np.asarray(cosines) >= least - SAME)) / spec.k)
        if len(found) >= LEAST and time.perf_counter() - started > spec.budget:
            break
    return float(np.mean(found)), seconds


def _bytes(folder: Path) -> int:
    return sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())


class Ours:
    """An index as `search-r3 index` leaves it, texts and full-text index included; searched as a user does."""

    tunes_filters = False  # it decides itself

    def __init__(self, spec: Spec) -> None:
        import lancedb

        self.spec, self.about = spec, f"lancedb {lancedb.__version__}"
        self.data = Path(spec.data)

    def build(self) -> dict[str, Any]:
        """Commit the rows, fold and compact, build the approximate index: seconds of each."""
        import pyarrow as pa

        package = _package()
        texts = json.loads((self.data / "texts.json").read_text(encoding="utf-8"))
        clock = time.perf_counter
        begun, table = clock(), None
        for start, block in on_disk(self.data / "rows.npy", COMMIT):
            if table is None:
                info = package.IndexInfo(1, DIMENSION_NAME, "0" * 64, block.shape[1], "")
                table = package.create_table(Path(self.spec.folder), info)
                table.add_columns(pa.schema([(FILTER_FIELD, pa.int64())]))
            rows = []
            for number in range(start, start + len(block)):
                name, kept = f"{number:08d}", {FILTER_FIELD: filter_value(number)}
                row: dict[str, Any] = {"id": name, "document": name, "title": "", "path": "", "start_line": 1}
                row |= {"end_line": 1, package.CONTENT: texts[number % len(texts)]}
                row |= {package.METADATA: json.dumps(kept), package.COLUMNS: kept}
                rows.append(row | {package.TEXT_HASH: name, package.ROW_HASH: name})
            table.add(package.as_arrow(rows, block, table.schema))
        written = clock()
        package.compact(table, Path(self.spec.folder))
        compaction = clock()
        queries = np.load(self.data / "queries.npy")
        found = package.keep_approximate(table, self.spec.start, lambda: queries[: len(queries) // 2][-200:])
        package.mark_complete(table)
        return {
            "write_seconds": written - begun,
            "full_text_and_compaction_seconds": compaction - written,
            "approximate": found.to_dict() if found else None,
        }

    def open(self) -> None:
        self.index = _package().SearchIndex.open(self.spec.folder)
        dimension = self.index.info.dimension
        self.model = SimpleNamespace(name=DIMENSION_NAME, contract_hash="0" * 64, dimension=dimension)

    def ladder(self) -> list[Any]:
        return ["approximate", "exact"]

    def search(self, query: np.ndarray, k: int, setting: Any, share: float | None = None) -> list[float]:
        model = SimpleNamespace(**vars(self.model), encode_query=lambda texts, **_: query[None])
        where = None if share is None else f"{FILTER_FIELD} < {round(share * 100)}"
        exact = setting == "exact"
        found = self.index.search("query", model, k=k, mode="vector", reasoning=False, exact=exact, where=where)
        return [hit.score for hit in found.hits]


def _package() -> SimpleNamespace:
    """What is used of the package, which in a checkout of before its modules were moved lies elsewhere."""
    from datetime import timedelta

    try:
        from search_r3.index.backends.lance.approximate import keep_approximate
    except ImportError:
        from search_r3.index.approximate import keep_approximate
        from search_r3.index.rows import as_arrow

        from search_r3.index import columns, table

        return SimpleNamespace(
            keep_approximate=keep_approximate, as_arrow=as_arrow,
            IndexInfo=table.IndexInfo, create_table=table.create_table, mark_complete=table.mark_complete,
            compact=lambda opened, folder: table.tidy(opened, timedelta(milliseconds=1)),
            SearchIndex=table.SearchIndex,
            COLUMNS=columns.COLUMNS, CONTENT=columns.CONTENT, METADATA=columns.METADATA,
            ROW_HASH=columns.ROW_HASH, TEXT_HASH=columns.TEXT_HASH,
        )  # fmt: skip
    from search_r3.index import row_keys
    from search_r3.index.backends.lance.compaction import cleanup_old_versions, compact
    from search_r3.index.backends.lance.lance_table import create_table, mark_complete
    from search_r3.index.backends.lance.table_rows import as_arrow
    from search_r3.index.index_info import IndexInfo
    from search_r3.index.search_index import SearchIndex

    def compacted(opened: Any, folder: Path) -> None:
        compact(opened, folder, everything=True)
        cleanup_old_versions(folder, timedelta(0))

    return SimpleNamespace(
        keep_approximate=keep_approximate, as_arrow=as_arrow, IndexInfo=IndexInfo, create_table=create_table,
        mark_complete=mark_complete, compact=compacted, SearchIndex=SearchIndex,
        COLUMNS=row_keys.COLUMNS, CONTENT=row_keys.CONTENT, METADATA=row_keys.METADATA,
        ROW_HASH=row_keys.ROW_HASH, TEXT_HASH=row_keys.TEXT_HASH,
    )  # fmt: skip

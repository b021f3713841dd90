"""Systems that find the nearest rows: ours and three libraries, each built in one process and searched in another.

Every one may be tuned by one number (partitions or candidates); it takes the first of a doubling ladder that reaches
the goal on the tuning queries. Ours tunes itself, on the same queries and on rows of its own.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import peak_memory
from index_rows import on_disk

SAME = 1e-5  # cosine: as near as the tenth is as good as the tenth
WARM_UP = 20
DIMENSION_NAME = "made-up rows"
COMMIT = 8192


@dataclass(frozen=True)
class Spec:
    """One step of one system.

    Attributes:
        system: "ours", "faiss-hnsw", "faiss-ivf", "usearch" or "hnswlib".
        step: "build" or "search".
        data: the folder with rows.npy, queries.npy (tuning half, then measuring half), truth.npy and texts.json.
        folder: where the system keeps its index.
        goal: recall@k to be reached.
        start: rows from which on ours builds an approximate index.
    """

    system: str
    step: str
    data: str
    folder: str
    k: int = 10
    goal: float = 0.98
    threads: int = 2
    start: int = 100_000


def load(spec: Spec) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """Do the step; what to say of it. There is nothing to ask afterwards."""
    before = peak_memory("cpu")
    system: Any = Ours(spec) if spec.system == "ours" else PEERS[spec.system](spec)
    if spec.step == "build":
        shutil.rmtree(spec.folder, ignore_errors=True)
        Path(spec.folder).mkdir(parents=True)
        begun = time.perf_counter()
        said = system.build()
        found = {"build_seconds": time.perf_counter() - begun, **said, "bytes": _bytes(Path(spec.folder))}
    else:
        begun = time.perf_counter()
        system.open()
        found = {"open_seconds": time.perf_counter() - begun, **_searched(system, spec)}
    found |= {"bytes_before": before, "peak_bytes": peak_memory("cpu"), "about": system.about}
    return found, lambda line: {}


def _searched(system: Any, spec: Spec) -> dict[str, Any]:
    queries = np.load(Path(spec.data, "queries.npy"))
    tenth = np.load(Path(spec.data, "truth.npy"))[:, spec.k - 1]
    half = len(queries) // 2
    tried = {}
    for setting in system.ladder():
        recall, _ = _measure(system, queries[:half], tenth[:half], setting, spec)
        tried[str(setting)] = round(recall, 4)
        if recall >= spec.goal:
            break
    recall, seconds = _measure(system, queries[half:], tenth[half:], setting, spec)
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return {"recall": recall, "p50_ms": p50 * 1e3, "p95_ms": p95 * 1e3, "setting": str(setting), "tuning": tried}


def _measure(
    system: Any, queries: np.ndarray, tenth: np.ndarray, setting: Any, spec: Spec
) -> tuple[float, list[float]]:
    for query in queries[:WARM_UP]:
        system.search(query, spec.k, setting)
    found, seconds = [], []
    for query, least in zip(queries, tenth, strict=True):
        begun = time.perf_counter()
        cosines = system.search(query, spec.k, setting)
        seconds.append(time.perf_counter() - begun)
        found.append(float(np.sum(np.asarray(cosines) >= least - SAME)) / spec.k)
    return float(np.mean(found)), seconds


def _bytes(folder: Path) -> int:
    return sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())


class Ours:
    """An index as `search-r3 index` leaves it, texts and full-text index included; searched as a user does."""

    def __init__(self, spec: Spec) -> None:
        import lancedb

        self.spec, self.about = spec, f"lancedb {lancedb.__version__}"
        self.data = Path(spec.data)

    def build(self) -> dict[str, Any]:
        """Commit the rows, fold and compact, build the approximate index: seconds of each."""
        from datetime import timedelta

        from search_r3.index.backends.lance.approximate import keep_approximate
        from search_r3.index.backends.lance.compaction import cleanup_old_versions, compact
        from search_r3.index.backends.lance.lance_table import create_table, mark_complete
        from search_r3.index.backends.lance.table_rows import as_arrow
        from search_r3.index.index_info import IndexInfo
        from search_r3.index.row_keys import COLUMNS, CONTENT, METADATA, ROW_HASH, TEXT_HASH

        texts = json.loads((self.data / "texts.json").read_text(encoding="utf-8"))
        clock = time.perf_counter
        begun, table = clock(), None
        for start, block in on_disk(self.data / "rows.npy", COMMIT):
            if table is None:
                table = create_table(Path(self.spec.folder), IndexInfo(1, DIMENSION_NAME, "0" * 64, block.shape[1], ""))
            rows = []
            for number in range(start, start + len(block)):
                name = f"{number:08d}"
                row: dict[str, Any] = {"id": name, "document": name, "title": "", "path": "", "start_line": 1}
                row |= {"end_line": 1, CONTENT: texts[number % len(texts)], METADATA: "{}", COLUMNS: {}}
                rows.append(row | {TEXT_HASH: name, ROW_HASH: name})
            table.add(as_arrow(rows, block, table.schema))
        written = clock()
        compact(table, Path(self.spec.folder), everything=True)
        cleanup_old_versions(Path(self.spec.folder), timedelta(0))
        compaction = clock()
        queries = np.load(self.data / "queries.npy")
        found = keep_approximate(table, self.spec.start, lambda: queries[: len(queries) // 2][-200:])
        mark_complete(table)
        return {
            "write_seconds": written - begun,
            "full_text_and_compaction_seconds": compaction - written,
            "approximate": found.to_dict() if found else None,
        }

    def open(self) -> None:
        from search_r3.index.search_index import SearchIndex

        self.index = SearchIndex.open(self.spec.folder)
        dimension = self.index.info.dimension
        self.model = SimpleNamespace(name=DIMENSION_NAME, contract_hash="0" * 64, dimension=dimension)

    def ladder(self) -> list[Any]:
        return ["approximate", "exact"]

    def search(self, query: np.ndarray, k: int, setting: Any) -> list[float]:
        self.model.encode_query = lambda texts, **_: query[None]
        found = self.index.search("query", self.model, k=k, mode="vector", reasoning=False, exact=setting == "exact")
        return [hit.score for hit in found.hits]


class Peer:
    """A library's index in memory. `ids` become cosines through the vectors it holds, by its inner products."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.file = spec, Path(spec.folder, "index")
        self.about = ""
        with open(Path(spec.data, "rows.npy"), "rb") as handle:
            np.lib.format.read_magic(handle)
            (self.count, self.dimension), *_ = np.lib.format.read_array_header_1_0(handle)

    def ladder(self) -> list[Any]:
        return [16, 32, 64, 128, 256, 512, 1024, 2048]

    def blocks(self) -> Any:
        return on_disk(Path(self.spec.data, "rows.npy"))


class Faiss(Peer):
    """faiss by its index factory; inner product of unit rows."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        import faiss

        self.faiss, self.hnsw = faiss, spec.system == "faiss-hnsw"
        faiss.omp_set_num_threads(spec.threads)
        self.lists = max(1, round(self.count**0.5))
        self.name = "HNSW16" if self.hnsw else f"IVF{self.lists},Flat"
        self.about = f"faiss {faiss.__version__} {self.name}"

    def build(self) -> dict[str, Any]:
        index = self.faiss.index_factory(self.dimension, self.name, self.faiss.METRIC_INNER_PRODUCT)
        if self.hnsw:
            index.hnsw.efConstruction = 128
        else:
            sample, want = [], min(self.count, 64 * self.lists)
            step = max(1, self.count // want)
            for start, block in self.blocks():
                sample.append(block[(-start) % step :: step])
            index.train(np.ascontiguousarray(np.concatenate(sample)))
        for _, block in self.blocks():
            index.add(np.ascontiguousarray(block))
        self.faiss.write_index(index, str(self.file))
        return {}

    def open(self) -> None:
        self.index = self.faiss.read_index(str(self.file))

    def ladder(self) -> list[Any]:
        if self.hnsw:
            return super().ladder()
        return [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n < self.lists] + [self.lists]

    def search(self, query: np.ndarray, k: int, setting: Any) -> Any:
        if self.hnsw:
            self.index.hnsw.efSearch = setting
        else:
            self.index.nprobe = setting
        return self.index.search(query[None], k)[0][0]


class Usearch(Peer):
    """usearch's HNSW over float32."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        import usearch

        self.about = f"usearch {usearch.__version__} connectivity 16, expansion_add 128"

    def _new(self) -> Any:
        from usearch.index import Index

        return Index(ndim=self.dimension, metric="ip", dtype="f32", connectivity=16, expansion_add=128)

    def build(self) -> dict[str, Any]:
        index = self._new()
        for start, block in self.blocks():
            index.add(np.arange(start, start + len(block)), block, threads=self.spec.threads)
        index.save(str(self.file))
        return {}

    def open(self) -> None:
        self.index = self._new()
        self.index.load(str(self.file))

    def search(self, query: np.ndarray, k: int, setting: Any) -> Any:
        self.index.expansion_search = setting
        return 1 - self.index.search(query, k).distances


class Hnswlib(Peer):
    """hnswlib."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        from importlib.metadata import version

        self.about = f"hnswlib {version('hnswlib')} M 16, ef_construction 128"

    def _new(self) -> Any:
        import hnswlib

        return hnswlib.Index(space="ip", dim=self.dimension)

    def build(self) -> dict[str, Any]:
        index = self._new()
        index.init_index(max_elements=self.count, ef_construction=128, M=16)
        for start, block in self.blocks():
            index.add_items(block, np.arange(start, start + len(block)), num_threads=self.spec.threads)
        index.save_index(str(self.file))
        return {}

    def open(self) -> None:
        self.index = self._new()
        self.index.load_index(str(self.file), max_elements=self.count)
        self.index.set_num_threads(self.spec.threads)

    def search(self, query: np.ndarray, k: int, setting: Any) -> Any:
        self.index.set_ef(max(setting, k))
        return 1 - self.index.knn_query(query[None], k=k)[1][0]


PEERS: dict[str, type[Peer]] = {
    "faiss-hnsw": Faiss,
    "faiss-ivf": Faiss,
    "usearch": Usearch,
    "hnswlib": Hnswlib,
}
SYSTEMS = ("ours", *PEERS)

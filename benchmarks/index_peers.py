"""The libraries that ours is compared with: faiss, usearch, hnswlib, Qdrant's local mode and DuckDB's vss.

Each keeps float32 vectors in memory and is searched by inner product of unit rows. What a library cannot do (a filter
during the search, say) its class says, and the report repeats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from index_rows import on_disk
from index_spec import FILTER_FIELD, Spec, filter_value


class Peer:
    """A library's index.

    Attributes:
        about: its name and version, with the settings of the index.
        no_filter: why it is not measured with a filter, if it isn't.
        tunes_filters: whether more candidates help with a filter.
        exact: whether it compares all rows, so that there is nothing to tune.
    """

    about = ""
    no_filter: ClassVar[str] = ""
    tunes_filters: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __init__(self, spec: Spec) -> None:
        self.spec, self.file = spec, Path(spec.folder, "index")
        with open(Path(spec.data, "rows.npy"), "rb") as handle:
            np.lib.format.read_magic(handle)
            (self.count, self.dimension), *_ = np.lib.format.read_array_header_1_0(handle)

    def ladder(self) -> list[Any]:
        return ["exact"] if self.exact else [16, 32, 64, 128, 256, 512, 1024, 2048]

    def blocks(self) -> Any:
        return on_disk(Path(self.spec.data, "rows.npy"))

    def search(self, query: np.ndarray, k: int, setting: Any, share: float | None = None) -> Any:
        """Cosines of the `k` nearest rows, of those that a filter keeps which leaves `share` of all."""
        raise NotImplementedError


class Faiss(Peer):
    """faiss by its index factory; a filter is its selector, a bitmap of the rows."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        import faiss

        self.faiss, self.hnsw = faiss, spec.system == "faiss-hnsw"
        faiss.omp_set_num_threads(spec.threads)
        self.lists = max(1, round(self.count**0.5))
        self.name = "HNSW16" if self.hnsw else f"IVF{self.lists},Flat"
        self.about = f"faiss {faiss.__version__} {self.name}"
        self._selectors: dict[float, Any] = {}

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

    def search(self, query: np.ndarray, k: int, setting: Any, share: float | None = None) -> Any:
        options: dict[str, Any] = {"efSearch": setting} if self.hnsw else {"nprobe": setting}
        if share is not None:
            options["sel"] = self._selector(share)
        kind = self.faiss.SearchParametersHNSW if self.hnsw else self.faiss.SearchParametersIVF
        return self.index.search(query[None], k, params=kind(**options))[0][0]

    def _selector(self, share: float) -> Any:
        if share not in self._selectors:
            kept = filter_value(np.arange(self.count)) < round(share * 100)
            self._selectors[share] = self.faiss.IDSelectorBitmap(np.packbits(kept, bitorder="little"))
        return self._selectors[share]


class Usearch(Peer):
    """usearch's HNSW over float32."""

    no_filter: ClassVar[str] = "usearch's Python package has no filter"

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

    def search(self, query: np.ndarray, k: int, setting: Any, share: float | None = None) -> Any:
        self.index.expansion_search = setting
        return 1 - self.index.search(query, k).distances


class Hnswlib(Peer):
    """hnswlib; a filter is a Python function that it calls for each row that it comes to."""

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

    def search(self, query: np.ndarray, k: int, setting: Any, share: float | None = None) -> Any:
        self.index.set_ef(max(setting, k))
        if share is None:
            return 1 - self.index.knn_query(query[None], k=k)[1][0]
        least = round(share * 100)
        try:
            found = self.index.knn_query(query[None], k=k, num_threads=1, filter=lambda n: filter_value(n) < least)
        except RuntimeError:  # fewer than k rows were come to
            return np.empty(0)
        return 1 - found[1][0]


class Qdrant(Peer):
    """Qdrant's local mode: it compares all rows, in Python and NumPy."""

    exact: ClassVar[bool] = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        from importlib.metadata import version

        self.about = f"qdrant-client {version('qdrant-client')}, local mode, which is exact"

    def build(self) -> dict[str, Any]:
        from qdrant_client import QdrantClient, models

        client = QdrantClient(path=str(self.file))
        vectors = models.VectorParams(size=self.dimension, distance=models.Distance.DOT)
        client.create_collection("rows", vectors_config=vectors)
        for start, block in self.blocks():
            ids = range(start, start + len(block))
            payload = [{FILTER_FIELD: int(filter_value(number))} for number in ids]
            client.upload_collection("rows", vectors=block, payload=payload, ids=list(ids), batch_size=4096)
        client.close()
        return {}

    def open(self) -> None:
        from qdrant_client import QdrantClient

        self.client = QdrantClient(path=str(self.file), force_disable_check_same_thread=True)

    def search(self, query: np.ndarray, k: int, setting: Any, share: float | None = None) -> Any:
        from qdrant_client import models

        kept = None
        if share is not None:
            field = models.FieldCondition(key=FILTER_FIELD, range=models.Range(lt=round(share * 100)))
            kept = models.Filter(must=[field])
        found = self.client.query_points("rows", query=query, limit=k, query_filter=kept, with_payload=False)
        return [point.score for point in found.points]


class DuckDb(Peer):
    """DuckDB's extension vss, an HNSW (usearch's), from the PyPI package duckdb-extension-vss.

    It filters what the index found: with a filter that keeps few rows, few of those are left.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        import duckdb

        self.about = f"duckdb {duckdb.__version__} vss, M 16, ef_construction 128"
        self.connection = duckdb.connect(str(self.file))
        from duckdb_extensions import import_extension

        import_extension("vss", con=self.connection)
        self.connection.execute("LOAD vss; SET hnsw_enable_experimental_persistence = true")
        self.connection.execute(f"SET threads = {spec.threads}")
        self._ef = 0

    def build(self) -> dict[str, Any]:
        import pyarrow as pa

        run = self.connection.execute
        run(f"CREATE TABLE rows (id INTEGER, {FILTER_FIELD} INTEGER, v FLOAT[{self.dimension}])")
        for start, block in self.blocks():
            numbers = np.arange(start, start + len(block))
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), self.dimension)
            parts = filter_value(numbers).astype(np.int32)
            batch = pa.table({"id": numbers.astype(np.int32), FILTER_FIELD: parts, "v": vectors})
            self.connection.register("batch", batch)
            run("INSERT INTO rows SELECT * FROM batch")
        run("CREATE INDEX near ON rows USING HNSW (v) WITH (metric = 'ip', ef_construction = 128, M = 16)")
        self.connection.close()
        return {}

    def open(self) -> None:
        self.search(np.zeros(self.dimension, dtype=np.float32), 1, self.ladder()[0])

    def search(self, query: np.ndarray, k: int, setting: Any, share: float | None = None) -> Any:
        connection = self.connection.cursor()
        if setting != self._ef:
            connection.execute(f"SET GLOBAL hnsw_ef_search = {int(setting)}")
            self._ef = setting
        where = "" if share is None else f"WHERE {FILTER_FIELD} < {round(share * 100)}"
        distance = f"array_negative_inner_product(v, ?::FLOAT[{self.dimension}])"
        found = connection.execute(f"SELECT {distance} AS d FROM rows {where} ORDER BY d LIMIT {k}", [query.tolist()])
        return [-row[0] for row in found.fetchall()]


PEERS: dict[str, type[Peer]] = {
    "faiss-ivf": Faiss,
    "faiss-hnsw": Faiss,
    "hnswlib": Hnswlib,
    "usearch": Usearch,
    "qdrant-local": Qdrant,
    "duckdb-vss": DuckDb,
}
MODULES = {
    "faiss-ivf": ["faiss"],
    "faiss-hnsw": ["faiss"],
    "hnswlib": ["hnswlib"],
    "usearch": ["usearch"],
    "qdrant-local": ["qdrant_client"],
    "duckdb-vss": ["duckdb", "duckdb_extensions", "duckdb_extension_vss"],
}
"""What must be installed for each."""

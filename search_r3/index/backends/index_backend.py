"""Extension point for where an index is stored: what every backend does, and what some can do in addition.

Three backends are built in: LanceDB (`lance_backend`), a NumPy file (`numpy_backend`) and Milvus (`milvus_backend`).
`backend_registry` finds those of other packages; docs/write-your-own/index-backend.md shows how to write one.

A complete backend that stores an index in one JSON file::

    import json
    from dataclasses import asdict

    import numpy as np

    from search_r3.files import atomic_write_text
    from search_r3.index import IndexBackend, IndexInfo

    class JsonBackend(IndexBackend):
        name = "json"

        def __init__(self, path, info, rows):
            self.file, self.info, self._rows = path / "index.json", IndexInfo(**info), rows

        @classmethod
        def create(cls, path, info):
            return cls(path, asdict(info), {})

        @classmethod
        def open(cls, path):
            file = path / "index.json"
            return cls(path, **json.loads(file.read_text())) if file.exists() else None

        def add(self, rows, vectors):
            self._rows |= {row["id"]: [row, vector.tolist()] for row, vector in zip(rows, vectors)}
            atomic_write_text(self.file, json.dumps({"info": asdict(self.info), "rows": self._rows}))

        def delete(self, ids):
            self._rows = {name: entry for name, entry in self._rows.items() if name not in ids}
            self.add([], [])

        def search(self, vector, k, where=None, exact=False):
            scored = [(row, float(np.dot(vector, values))) for row, values in self._rows.values()]
            return sorted(scored, key=lambda pair: (-pair[1], pair[0]["id"]))[:k]

        def rows(self):
            return [row for row, _ in self._rows.values()]

        def vectors(self, ids):
            return np.array([self._rows[name][1] for name in ids], dtype=np.float32)

Registered by an entry point of the group `search_r3.index_backends`,
`json = "my_package.json_index:JsonBackend"`, or by `search_r3.index.register_backend`.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

from search_r3.errors import InputError
from search_r3.hybrid_fusion import HybridFusion
from search_r3.index.index_info import ApproximateIndex, FullText, IndexInfo
from search_r3.index.index_sources import SourceCount, SourceRecord
from search_r3.index.row_keys import CONTENT, ROW_HASH, SOURCE, TEXT_HASH
from search_r3.index.storage.locking import writing

Row = dict[str, Any]
"""A chunk as stored, ready for JSON: "id" is unique, "document" is the id of its document. A backend keeps all keys but
interprets only these two; `search_r3.index.backends.lance.table_rows.make_row` makes rows."""
Scored = tuple[Row, float]
"""A row and its score: the cosine for a vector search, BM25's for a text search."""
Capability = Literal[
    "text", "filter", "records", "approximate", "streaming", "maintenance", "distributed", "object_storage", "exchange"
]
"""Optional abilities of a backend. "text": search by words. "filter": SQL conditions. "records": a relevance floor and
a tuned fusion are stored with the index; LanceDB and Milvus do that. "exchange": a new index is built beside the one in
use, and takes its place in one step; only Milvus has it. Only LanceDB has the others:
"approximate": an approximate index. "streaming": builds larger than memory from a LanceDB table, with typed columns and
nested sources. "maintenance": compaction. "distributed": builds by Ray. "object_storage": indexes on object storage."""


@dataclass(frozen=True)
class RelevanceFloor:
    """The best cosines that unrelated questions usually reach in an index, and such of words that no document has."""

    questions: float
    unknown_words: float


class FloorRecord(NamedTuple):
    """A floor, the number of rows when it was measured, and the contract of the model that embedded the questions; ""
    in records of older versions."""

    floor: RelevanceFloor
    rows: int
    contract_hash: str = ""

    def holds_for(self, contract_hash: str) -> bool:
        """Whether the cosines of this model's queries may be compared with the floor: a query adapter has others."""
        return self.contract_hash in ("", contract_hash)

    def to_json(self) -> str:
        return json.dumps({"floor": asdict(self.floor), "rows": self.rows, "contract_hash": self.contract_hash})

    @classmethod
    def from_json(cls, text: str) -> Self | None:
        """What `to_json` wrote; None if another version did."""
        try:
            value = json.loads(text)
            return cls(RelevanceFloor(**value["floor"]), int(value["rows"]), str(value.get("contract_hash", "")))
        except (ValueError, TypeError, KeyError):
            return None


class Matrix(NamedTuple):
    """Every row of an index: ids of documents, vectors (float32, (rows, dimension)), and perhaps the embedded texts."""

    documents: list[str]
    vectors: np.ndarray
    texts: list[str] | None = None


class OptionalFeatures:
    """Optional backend features and their defaults. `IndexBackend` inherits them."""

    name: ClassVar[str]
    capabilities: ClassVar[frozenset[Capability]] = frozenset()
    path: Path | str = ""
    """The index's name in messages."""
    location: Path
    """The index's location."""
    version: int = 0
    """Increases with every commit, or every time the index is opened. Whoever opens the index sets location, path and
    version."""
    info: IndexInfo
    """What the index was made with; `create` and `open` must set it."""
    complete: bool = True
    """Whether the last build ran to its end."""
    remote: bool = False
    """Whether reads wait for object storage, so that two of them at the same time take as long as one."""
    table: Any
    """The LanceDB table; only a backend with the capability "streaming" has one."""
    approximate: ApproximateIndex | None = None
    """The approximate index with its measured recall, or None if vectors are searched exactly."""
    floor_record: FloorRecord | None = None
    """The relevance floor that was measured last, or None if none was (`build/relevance_floor.py`)."""
    tuned_fusion: HybridFusion | None = None
    """What `search-r3 tune` chose for hybrid searches, if anything."""

    @classmethod
    def require(cls, capability: Capability, what: str) -> None:
        """Raise InputError if the backend cannot do `what`."""
        if capability not in cls.capabilities:
            raise InputError(f"the index backend {cls.name!r} does not support {what}; omit it, or use another backend")

    @property
    def relevance_floor(self) -> RelevanceFloor | None:
        """What unrelated questions reach, or None if it was not measured."""
        record = self.floor_record
        return None if record is None else record.floor

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a filter may name, with their types."""
        return {}

    @property
    def full_text(self) -> FullText:
        """The state of the full-text index; a backend with "text" is assumed to keep it current."""
        return "current" if "text" in self.capabilities else "none"

    def count(self) -> int:
        """The number of rows."""
        return sum(1 for _ in self.rows())

    def sources(self) -> list[SourceCount]:
        """The sources of the documents, by name."""
        documents: dict[str, list[str]] = {}
        for row in self.partial_rows([SOURCE, "document"]):
            documents.setdefault(row[SOURCE], []).append(row["document"])
        counts = (SourceCount(name, documents=len(set(ids)), chunks=len(ids)) for name, ids in documents.items())
        return sorted(counts, key=lambda source: source.name)

    def read_sources(self) -> dict[str, SourceRecord]:
        """What is recorded of the sources, by name; a backend may record nothing of them."""
        return {}

    def count_duplicate_ids(self) -> int:
        """How many ids more than one row has; 0 for a backend in which ids are unique."""
        return 0

    def listed(self) -> Iterator[tuple[str, str, str]]:
        """The (document, title, path) of every row."""
        return (
            (row["document"], row["title"], row["path"]) for row in self.partial_rows(["document", "title", "path"])
        )

    def rows(self) -> Iterable[Row]:
        """All rows, in any order."""
        raise NotImplementedError

    def partial_rows(self, fields: Sequence[str]) -> Iterable[Row]:
        """All rows, in any order, with at least these fields."""
        return self.rows()

    def document_rows(self, document: str) -> list[Row]:
        """The rows of one document, in any order."""
        return [row for row in self.rows() if row["document"] == document]

    def compared_rows(self) -> Iterable[Row]:
        """Of every row what a build compares: "id", "document", the source and the two hashes."""
        return self.partial_rows(["id", "document", SOURCE, TEXT_HASH, ROW_HASH])

    def matrix(self, texts: bool = False) -> Matrix:
        """The document and the vector of every row, in any order; with `texts` also what was embedded."""
        rows = list(self.rows())
        vectors = self.vectors([row["id"] for row in rows])  # type: ignore[attr-defined]
        return Matrix([row["document"] for row in rows], vectors, [row[CONTENT] for row in rows] if texts else None)

    # -------------------------------------------------------------------------------- searching by words and by filters

    def check_filter(self, where: str) -> str:
        """The filter in the form that `search` takes. Raises InputError for a filter that cannot be used."""
        self.require("filter", "filters")
        return where

    def check_text(self) -> None:
        """Raise InputError if words cannot be searched for."""
        if "text" not in self.capabilities:
            raise InputError(f'{self.path} has no text search (backend "{self.name}"); search with mode "vector"')

    def search_text(self, query: str, k: int, where: str | None = None) -> list[Scored]:
        """The `k` rows with the best BM25 scores for any word of `query`, best first, equal scores by id."""
        raise NotImplementedError

    # ----------------------------------------------------------------- an index that is open while others write to it

    def pinned(self) -> Self:
        """The index fixed at its current version, for reads that belong together."""
        return self

    def reopened(self) -> Self | None:
        """The newest version of whatever is at this location now, as a new object; None if there is nothing."""
        opened = type(self).open(self.location)  # type: ignore[attr-defined]
        if opened is not None:
            opened.location, opened.path, opened.version = self.location, self.path, time.monotonic_ns()
        return opened

    def latest(self) -> Self | None:
        """The newest version; may be this object, moved to it."""
        return self.reopened()

    def current_info(self) -> IndexInfo:
        """The description of the index at this location now, if that can change while it is open."""
        return self.info

    def files_replaced(self, error: Exception) -> bool:
        """Whether `error` occurred because a newer version replaced the files that were being read."""
        return False

    def probe(self, thorough: bool = True) -> None:
        """Test that the index is readable by reading a little, with `thorough` from every file; raises on failure."""

    # ------------------------------------------------------------------------------------------------------- writing

    def write_floor(self, record: FloorRecord) -> None:
        """Store the relevance floor with the index; only with the capability "records"."""
        raise NotImplementedError

    def write_fusion(self, fusion: HybridFusion | None) -> None:
        """Store a tuned fusion with the index, or remove it; only with the capability "records"."""
        raise NotImplementedError

    @classmethod
    def create_beside(cls, path: Any, info: IndexInfo) -> Self:
        """Create an empty index that nobody finds until `publish`; only with the capability "exchange"."""
        raise NotImplementedError

    def publish(self) -> None:
        """Let an index of `create_beside` take the place of the one that is in use, in one step."""
        raise NotImplementedError

    @classmethod
    def writing(cls, path: Any, *, make: bool = False, wait: float = 0.0) -> AbstractContextManager[Any]:
        """Lock the index at `path` for writing; see `storage.locking.writing`."""
        return writing(path, make=make, wait=wait)

    @classmethod
    def fingerprint(cls, path: Path) -> tuple[tuple[Any, ...], int]:
        """What identifies the index in the folder, and when it was last written (ns since 1970). Cheap, as no file is
        read. Raises OSError if there is no index."""
        folder = path.stat()
        newest = max((item.stat().st_mtime_ns for item in path.iterdir() if not item.name.startswith(".")), default=0)
        return (str(path), folder.st_dev, folder.st_ino), newest


class IndexBackend(OptionalFeatures, ABC):
    """One index in a folder: rows, each with a vector. Only one process writes at a time; the caller holds a lock.

    `create` and `open` must set `info`. The module's docstring shows a complete backend.
    """

    @classmethod
    @abstractmethod
    def create(cls, path: Path, info: IndexInfo) -> Self:
        """Create an empty index described by `info` in the existing folder `path`."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Self | None:
        """Open the index in the folder `path`; None if the folder has no index of this backend."""

    @abstractmethod
    def add(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        """Add rows and their vectors, float32 (rows, dimension), replacing rows of the same ids; on disk on return."""

    @abstractmethod
    def delete(self, ids: Collection[str]) -> None:
        """Remove the rows of these ids, ignoring unknown ones; on disk on return."""

    @abstractmethod
    def search(self, vector: np.ndarray, k: int, where: str | None = None, exact: bool = False) -> list[Scored]:
        """The `k` rows with the highest cosine to `vector`, float32 (dimension,), best first, equal scores by id.

        `where` is a filter from `check_filter`; None for a backend without "filter". `exact` forbids an approximation.
        """

    @abstractmethod
    def rows(self) -> Iterable[Row]:
        """All rows, in any order."""

    @abstractmethod
    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        """The vectors of these rows in this order, float32 (ids, dimension). Raises KeyError for an unknown id."""

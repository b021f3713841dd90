"""Extension point for where an index is stored: what every backend does, and what some can do in addition.

LanceDB (`lance_backend`) is one, a NumPy file (`numpy_backend`) another. `backend_registry` finds those of other
packages; docs/write-your-own/index-backend.md shows how to write one.

A complete backend, of one JSON file::

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
            self._rows = {name: held for name, held in self._rows.items() if name not in ids}
            self.add([], [])

        def search(self, vector, k, where=None, exact=False):
            found = [(row, float(np.dot(vector, held))) for row, held in self._rows.values()]
            return sorted(found, key=lambda pair: (-pair[1], pair[0]["id"]))[:k]

        def rows(self):
            return [row for row, _ in self._rows.values()]

        def vectors(self, ids):
            return np.array([self._rows[name][1] for name in ids], dtype=np.float32)

Registered by an entry point of the group `search_r3.index_backends`,
`json = "my_package.json_index:JsonBackend"`, or by `search_r3.index.register_backend`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from search_r3.errors import InputError
from search_r3.index.index_info import ApproximateIndex, FullText, IndexInfo
from search_r3.index.index_sources import SourceCount
from search_r3.index.row_keys import SOURCE

Row = dict[str, Any]
"""A chunk as it is stored, ready for JSON. "id" is unique; "document" is the id of its document. A backend keeps all
keys and looks at no other; `search_r3.index.table.table_rows.make_row` says what they are."""
Scored = tuple[Row, float]
"""A row and its score: the cosine for a vector search, BM25's for a text search."""
Capability = Literal["text", "filter", "approximate", "streaming", "maintenance", "distributed", "object_storage"]
"""What a backend can do in addition. "text": search by words. "filter": SQL conditions. Only LanceDB has the others so
far: an approximate index; builds larger than memory, with types of columns and sources inside one another; compaction;
builds by Ray; places on object storage."""


class OptionalFeatures:
    """Optional backend features and their defaults. `IndexBackend` inherits them."""

    name: ClassVar[str]
    capabilities: ClassVar[frozenset[Capability]] = frozenset()
    path: Path | str = ""
    """What the index is called in messages."""
    place: Path
    """Where it is."""
    version: int = 0
    """Grows with every commit, or every time it is opened. Place, path and version are set from outside when it is."""
    info: IndexInfo
    """What the index was made with. `create` and `open` must set it."""
    complete: bool = True
    """Whether the last build ran to its end."""
    table: Any
    """The LanceDB table; only a backend with the capability "streaming" has one."""
    approximate: ApproximateIndex | None = None
    """The approximate index with its measured recall, or None where vectors are searched exactly."""

    @classmethod
    def require(cls, capability: Capability, what: str) -> None:
        """Raise InputError if the backend cannot do `what`."""
        if capability not in cls.capabilities:
            raise InputError(f"the index backend {cls.name!r} does not support {what}; leave that out, or use another")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a filter may name, with their types."""
        return {}

    @property
    def full_text(self) -> FullText:
        """The state of the full-text index; that of a backend with "text" is taken to be always current."""
        return "current" if "text" in self.capabilities else "none"

    def count(self) -> int:
        """The number of rows."""
        return sum(1 for _ in self.rows())

    def sources(self) -> list[SourceCount]:
        """Where the documents come from, by name."""
        documents: dict[str, list[str]] = {}
        for row in self.rows():
            documents.setdefault(row[SOURCE], []).append(row["document"])
        counts = (SourceCount(name, documents=len(set(ids)), chunks=len(ids)) for name, ids in documents.items())
        return sorted(counts, key=lambda source: source.name)

    def count_duplicate_ids(self) -> int:
        """How many ids more than one row has; 0 for a backend in which ids are unique."""
        return 0

    def listed(self) -> Iterator[tuple[str, str, str]]:
        """(document, title, path) of every row."""
        return ((row["document"], row["title"], row["path"]) for row in self.rows())

    def rows(self) -> Iterable[Row]:
        """All rows, in any order."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------- searching by words and by filters

    def check_filter(self, where: str) -> str:
        """The filter as `search` takes it. Raises InputError for one that cannot be used."""
        self.require("filter", "filters")
        return where

    def check_text(self) -> None:
        """Raise InputError where words cannot be searched for."""
        if "text" not in self.capabilities:
            raise InputError(f'{self.path} has no text search (backend "{self.name}"); search with mode "vector"')

    def search_text(self, query: str, k: int, where: str | None = None) -> list[Scored]:
        """The `k` rows with the best BM25 scores for any word of `query`, best first, equal scores by id."""
        raise NotImplementedError

    # ----------------------------------------------------------------- an index that is open while others write to it

    def pinned(self) -> Self:
        """The index at the version that it has now, for reads that go together."""
        return self

    def reopened(self) -> Self | None:
        """The newest version of what is now at this place, as an object of its own; None if there is nothing."""
        opened = type(self).open(self.place)  # type: ignore[attr-defined]
        if opened is not None:
            opened.place, opened.path, opened.version = self.place, self.path, time.monotonic_ns()
        return opened

    def latest(self) -> Self | None:
        """The newest version; perhaps this object, moved on."""
        return self.reopened()

    def current_info(self) -> IndexInfo:
        """What the index at this place is now, if that can change while it is open."""
        return self.info

    def files_replaced(self, error: Exception) -> bool:
        """Whether `error` came about because another version took the place of the files that were read."""
        return False

    def probe(self, thorough: bool = True) -> None:
        """Read a little, and with `thorough` of every file; raises what reading raises."""

    @classmethod
    def fingerprint(cls, path: Path) -> tuple[tuple[Any, ...], int]:
        """What distinguishes the index in the folder from another one, and when it was last written (ns). Cheap, as
        nothing is read. Raises OSError if there is nothing."""
        folder = path.stat()
        newest = max((item.stat().st_mtime_ns for item in path.iterdir() if not item.name.startswith(".")), default=0)
        return (str(path), folder.st_dev, folder.st_ino), newest


class IndexBackend(OptionalFeatures, ABC):
    """One index in a folder: rows, each with a vector. Only one process writes at a time; the caller holds a lock.

    `info` must be set by `create` and by `open`. The module's docstring shows a complete backend.
    """

    @classmethod
    @abstractmethod
    def create(cls, path: Path, info: IndexInfo) -> Self:
        """An empty index, made with `info`, in the folder `path`, which exists."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path) -> Self | None:
        """The index in the folder `path`, or None if the folder holds none of this backend."""

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

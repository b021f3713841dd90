"""A table at its newest version, read through Lance's own Python package for a few searches.

Importing LanceDB takes over a second of CPU time, mostly for a client of its cloud service that is not needed here.
Importing Lance, which reads the same files in the same way, takes a third of that. A search takes 3 to 6 ms less than
by LanceDB, whose Python package asks its table for the schema and the version on another thread. `LanceSnapshot` has
the part of a LanceDB table that a search uses. It does not follow other writers' commits.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from search_r3.index.backends.lance.approximate import read_approximate
from search_r3.index.backends.lance.fetching import fetch_small
from search_r3.index.storage.location import Location, Remote, options_of

BLOCK = 8 * 2**20
"""Bytes that are read together on object storage, where a request lasts as long as some megabytes, of an index whose
searches read all vectors anyway. Lance's default, 64 KiB, makes a search of a small index wait for 20 requests."""


class LanceSnapshot:
    """The Lance dataset of `table` at `location`. Raises ValueError or OSError if there is no readable one.

    Args:
        version: of the table; None for the newest.
        session: a `lance.Session`, if its caches are shared.

    Attributes:
        fetched: the temporary folder that has all of it, if it is small and on object storage; else None.
    """

    def __init__(self, location: Location, table: str, version: int | None = None, session: Any = None) -> None:
        self._location, self._table, self._session = location, table, session
        self._open(location, table, version)

    def _open(self, location: Location, table: str, version: int | None = None) -> None:
        import lance

        self.fetched = fetch_small(location, table) if isinstance(location, Remote) else None
        if self.fetched is not None:
            location = Path(self.fetched.name)
        uri, options = f"{location}/{table}.lance", options_of(location)
        block = BLOCK if isinstance(location, Remote) else None
        self._dataset = lance.dataset(uri, version, storage_options=options, block_size=block, session=self._session)
        if isinstance(location, Remote) and read_approximate(self) is not None:  # a search reads a few rows only
            self._dataset = lance.dataset(uri, int(self._dataset.version), storage_options=options)
        self.tags = self._dataset.tags

    @property
    def schema(self) -> Any:
        """The Arrow schema, with its metadata."""
        return self._dataset.schema

    @property
    def version(self) -> int:
        """The version that is being read."""
        return int(self._dataset.version)

    def checkout_latest(self) -> None:
        """Move to the newest version."""
        if self.fetched is not None:
            self._open(self._location, self._table)
        else:
            self._dataset = self._dataset.checkout_version(self._dataset.latest_version)

    def count_rows(self, where: str | None = None) -> int:
        """The number of rows, or of those that match the filter."""
        return int(self._dataset.count_rows(filter=where))

    def list_indices(self) -> list[Any]:
        """The indices, each with its `columns`."""
        return [
            SimpleNamespace(columns=list(i.field_names), index_details=i.details)
            for i in self._dataset.describe_indices()
        ]

    def match_query(self, words: str, column: str) -> Any:
        """A full-text query that matches any of `words`."""
        from lance.query import MatchQuery

        return MatchQuery(words, column)

    def search(self, query: Any = None, *, vector_column_name: str = "", query_type: str = "") -> LanceQuery:
        """Like LanceDB's `Table.search`: by a vector, by a `match_query` (`query_type="fts"`), or all rows."""
        if query is None:
            return LanceQuery(self._dataset)
        if query_type == "fts":
            return LanceQuery(self._dataset, full_text_query=query)
        return LanceQuery(self._dataset, nearest={"column": vector_column_name, "q": query})


class LanceQuery:
    """A query builder with the methods of LanceDB's that a search uses."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        self._dataset, self._options = dataset, options

    def distance_type(self, name: str) -> LanceQuery:
        return self._nearest(metric=name)

    def bypass_vector_index(self) -> LanceQuery:
        return self._nearest(use_index=False)

    def minimum_nprobes(self, count: int) -> LanceQuery:
        return self._nearest(minimum_nprobes=count)

    def maximum_nprobes(self, count: int) -> LanceQuery:
        return self._nearest(maximum_nprobes=count)

    def refine_factor(self, factor: int) -> LanceQuery:
        return self._nearest(refine_factor=factor)

    def where(self, condition: str, prefilter: bool = True) -> LanceQuery:
        self._options |= {"filter": condition, "prefilter": prefilter}
        return self

    def select(self, columns: list[str]) -> LanceQuery:
        self._options["columns"] = columns
        return self

    def limit(self, count: int) -> LanceQuery:
        self._options["limit"] = count
        return self._nearest(k=count) if "nearest" in self._options else self

    def to_arrow(self) -> Any:
        return self._dataset.scanner(**self._options).to_table()

    def to_batches(self, size: int | None = None) -> Any:
        return self._dataset.scanner(**self._options, batch_size=size).to_batches()

    def to_list(self) -> list[dict[str, Any]]:
        return self.to_arrow().to_pylist()

    def _nearest(self, **options: Any) -> LanceQuery:
        self._options["nearest"] |= options
        return self

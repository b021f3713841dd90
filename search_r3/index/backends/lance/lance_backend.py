"""The default index backend: a LanceDB table, with every capability.

Vectors are searched exactly, or through the table's approximate index if its measured recall is good enough; words by
BM25. Builds (`search_r3.index.build.build_run`) use the queries and writes at the end of the class; `add` and `delete`
are for callers that already have rows and vectors.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import numpy as np

from search_r3.errors import InputError
from search_r3.hybrid_fusion import HybridFusion
from search_r3.index.backends.index_backend import Capability, FloorRecord, IndexBackend, Matrix, Row, Scored
from search_r3.index.backends.lance.approximate import TIES as FEW_TIES
from search_r3.index.backends.lance.approximate import probing, read_approximate
from search_r3.index.backends.lance.conversion import widen
from search_r3.index.backends.lance.duplicates import count_duplicate_ids
from search_r3.index.backends.lance.floor_record import read_floor, write_floor
from search_r3.index.backends.lance.full_text import full_text_state
from search_r3.index.backends.lance.fusion_record import read_fusion, write_fusion
from search_r3.index.backends.lance.lance_table import (
    COMPLETE,
    TABLE,
    check_there,
    create_table,
    damaged,
    has_versions,
    open_table,
    read_info,
)
from search_r3.index.backends.lance.table_columns import (
    TYPE_NAMES,
    VISIBLE,
    ColumnTypes,
    in_parts,
    metadata_columns,
    new_columns,
    quoted,
)
from search_r3.index.backends.lance.table_rows import as_arrow
from search_r3.index.backends.lance.table_sources import count_sources, prefix_condition, read_sources, source_condition
from search_r3.index.index_info import ApproximateIndex, FullText, IndexInfo
from search_r3.index.index_sources import UNKNOWN, SourceCount, SourceRecord
from search_r3.index.row_keys import COLUMNS, CONTENT, METADATA, ROW_HASH, SOURCE, TEXT_HASH, VECTOR
from search_r3.index.storage.deadline import bounded, within_deadline
from search_r3.index.storage.location import Location, Remote, brief, failed_storage, files_lost, storage_errors

TIES = 50  # fetched beyond the cut, so that ids, not the order on disk, decide between equal scores
EXACT_MATCHES, EXACT_SHARE = 100, 1 / 2000
"""If a filter leaves fewer rows, or a smaller share of them, all that it leaves are compared. Each is read alone, which
takes as long as comparing the codes of thousands (LOG.md, 2026-11-30)."""
T = TypeVar("T")
OPENING, SEARCHING, READING = "opening the index", "the search", "reading from the index"
LONG = 10.0  # seconds; an attempt that failed after this long is not repeated in another way
LOOKED_UP_AT_ONCE = 1000  # values in one SQL condition
KEPT_FILTERS = 1000  # results that are kept
PROBE_CHARACTERS = 200  # of a text whose words are searched for to test that the full-text index is readable
FIELDS = ["id", "document", "title", "path", "start_line", "end_line", CONTENT, METADATA]
STORED = [*FIELDS, TEXT_HASH, ROW_HASH, SOURCE]
QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`")
LEAST = re.compile(QUOTED.pattern + rf"|(?P<least>(?<![\w.])-\s*{2**63}(?![\w.]))")
NO_INTEGER = re.compile(r"Received literal \w+\((.*)\) and could not convert to literal of type 'Int64'")


class LanceBackend(IndexBackend):
    """An index in a LanceDB table, in a folder or on object storage.

    Args:
        location: the index's location.
        table: a LanceDB table, or a `LanceSnapshot`.
        info: what the index was made with.
        follow: whether the table picks up other writers' commits automatically.
        session: LanceDB's caches, shared with reopened versions.
    """

    name: ClassVar[str] = "lance"
    capabilities: ClassVar[frozenset[Capability]] = frozenset(get_args(Capability)) - {"exchange"}

    def __init__(
        self, location: Location, table: Any, info: IndexInfo, *, follow: bool = False, session: Any = None
    ) -> None:
        self.path: Path | str = location
        self.location: Location = location  # type: ignore[assignment]  # only this backend has remote indexes
        self.table, self.info = table, info
        self.remote = isinstance(location, Remote) and getattr(table, "fetched", None) is None
        self._follow, self._session = follow, session
        self._pinned: tuple[int, LanceBackend] | None = None  # the table's version, and the index opened at it
        self._lance_session: Any = None  # Lance's caches, shared by the versions that were pinned
        self._filters: dict[tuple[str, str], tuple[Any]] | None = None  # of a fixed version: what is known of filters
        self._has_full_text = False

    # ------------------------------------------------------------------------------------------------------- opening

    @classmethod
    def create(cls, path: Location, info: IndexInfo, sources: Iterable[SourceRecord] = ()) -> LanceBackend:
        return cls(path, create_table(path, info, sources), info)

    @classmethod
    def open(cls, path: Location, *, follow: bool = True, session: Any = None) -> LanceBackend | None:
        check_there(path, path)
        import lancedb

        session = session or lancedb.Session()

        def opened() -> LanceBackend | None:
            table = open_table(path, follow, session)
            return None if table is None else cls(path, table, read_info(path, table), follow=follow, session=session)

        return within_deadline(path, OPENING, opened)

    @classmethod
    def open_snapshot(cls, path: Location) -> LanceBackend | None:
        """Open the newest version for a few searches, faster than `open`: without importing LanceDB."""
        import lance  # noqa: F401  # its import takes seconds on a busy machine, which are not the storage's

        return within_deadline(path, OPENING, lambda: cls._open_snapshot(path))

    @classmethod
    def _open_snapshot(cls, path: Location) -> LanceBackend | None:
        from search_r3.index.backends.lance.snapshot import LanceSnapshot

        check_there(path, path)
        started = time.monotonic()
        with storage_errors(path):
            try:
                table = LanceSnapshot(path, TABLE)
            except (ValueError, OSError) as error:
                if time.monotonic() - started > LONG:
                    raise  # LanceDB would wait just as long again
                if not isinstance(path, Path) or not has_versions(path):
                    return cls.open(path)  # which raises the clearest error
                raise damaged(path, error) from error
        return cls(path, table, read_info(path, table))

    def reopened(self) -> LanceBackend | None:
        if self._session is None:
            return LanceBackend.open_snapshot(self.location)
        return LanceBackend.open(self.location, follow=False, session=self._session)

    def pinned(self) -> LanceBackend:
        if not self._follow:
            return self
        version, pinned = self.table.version, self._pinned
        if pinned is None or pinned[0] != version:
            opened = self._remote_at(version) if isinstance(self.location, Remote) else self._local_at(version)
            opened.path = self.path
            self._pinned = pinned = version, opened
        return pinned[1]

    def _local_at(self, version: int) -> LanceBackend:
        """This index at a version, for searches: read by Lance, which takes less time for one than LanceDB."""
        import lance

        from search_r3.index.backends.lance.snapshot import LanceSnapshot

        if self._lance_session is None:
            self._lance_session = lance.Session()

        def opened() -> LanceBackend:
            for wanted in (version, None):  # if that version is gone, the newest is as good
                with suppress(OSError, RuntimeError, ValueError):
                    table = LanceSnapshot(self.location, TABLE, wanted, self._lance_session)
                    pinned = LanceBackend(self.location, table, read_info(self.path, table))
                    pinned._filters = {}
                    return pinned
            raise InputError(f"{self.path} is no longer a search-r3 index; put the folder back")

        return within_deadline(self.location, OPENING, opened)

    def _remote_at(self, version: int) -> LanceBackend:
        opened = self.reopened()
        if opened is None:
            raise InputError(f"{self.path} is no longer a search-r3 index; put the folder back")
        with suppress(OSError, RuntimeError, ValueError):  # if that version is gone, the newest is as good
            if opened.table.version != version:
                opened.table.checkout(version)
        return opened

    def latest(self) -> LanceBackend:
        self.table.checkout_latest()
        return self

    @property
    def version(self) -> int:  # type: ignore[override]
        return int(self.table.version)

    def current_info(self) -> IndexInfo:  # LanceDB follows the path, which may hold another index by now
        return read_info(self.path, self.table)

    def files_replaced(self, error: Exception) -> bool:
        return f"{TABLE}.lance/" in str(error) and "Not found" in str(error)

    @bounded(READING)
    def probe(self, thorough: bool = True) -> None:
        """Search all vectors and the full-text index, or read just one vector; raises what LanceDB raises."""
        if thorough:
            query = np.ones(self.info.dimension, dtype=np.float32)
            search = self.table.search(query, vector_column_name=VECTOR).select(["id", "_distance"])
        else:
            search = self.table.search().select([VECTOR])
        search.limit(1).to_arrow()
        if thorough and self.full_text != "missing":  # only words that occur make it read all files
            words = " ".join(self.table.search().select([CONTENT]).limit(1).to_arrow()[CONTENT].to_pylist())
            query = self._match_query(words[:PROBE_CHARACTERS])
            self.table.search(query, query_type="fts").select(["id", "_score"]).limit(1).to_arrow()

    @classmethod
    def fingerprint(cls, path: Path) -> tuple[tuple[Any, ...], int]:
        table = path / f"{TABLE}.lance"
        folder, versions = table.stat(), (table / "_versions").stat()
        return (str(table), folder.st_dev, folder.st_ino, versions.st_ino), versions.st_mtime_ns

    # ------------------------------------------------------------------------------------------------------ what it is

    @property
    @bounded(READING)
    def complete(self) -> bool:  # type: ignore[override]
        with storage_errors(self.path):
            return COMPLETE in self.table.tags.list()

    @property
    @bounded(READING)
    def columns(self) -> dict[str, str]:
        shown = dict(VISIBLE)
        with storage_errors(self.path):
            schema = self.table.schema
        for column in schema:
            if column.name not in shown and not column.name.startswith("r3_"):
                shown[column.name] = TYPE_NAMES.get(column.type, str(column.type))
        return shown

    @property
    @bounded(SEARCHING)
    def approximate(self) -> ApproximateIndex | None:  # type: ignore[override]
        with storage_errors(self.path):
            return read_approximate(self.table)

    @property
    @bounded(SEARCHING)
    def floor_record(self) -> FloorRecord | None:  # type: ignore[override]
        with storage_errors(self.path):
            return read_floor(self.table)

    def write_floor(self, record: FloorRecord) -> None:
        write_floor(self.table, record)

    @property
    @bounded(SEARCHING)
    def tuned_fusion(self) -> HybridFusion | None:  # type: ignore[override]
        with storage_errors(self.path):
            return read_fusion(self.table)

    def write_fusion(self, fusion: HybridFusion | None) -> None:
        write_fusion(self.table, fusion)

    @property
    @bounded(READING)
    def full_text(self) -> FullText:
        with storage_errors(self.path):
            return full_text_state(self.table)

    @bounded(READING)
    def count(self) -> int:
        with storage_errors(self.path):
            return int(self.table.count_rows())

    def sources(self) -> list[SourceCount]:
        return count_sources(self.table)

    def listed(self) -> Iterator[tuple[str, str, str]]:
        columns = ["document", "title", "path"]
        rows = self.table.search().select(columns).to_arrow()
        return zip(*(rows[name].to_pylist() for name in columns), strict=True)

    def count_duplicate_ids(self) -> int:
        return count_duplicate_ids(self.table)

    # ------------------------------------------------------------------------------------------------------- searching

    @bounded(SEARCHING)
    def search(self, vector: np.ndarray, k: int, where: str | None = None, exact: bool = False) -> list[Scored]:
        """Search by cosine: exactly, or through the approximate index, whose candidates are scored exactly."""
        nearest = None if exact else self.approximate
        kept, enough = 1.0, k
        if nearest is not None and where is not None:
            matches = self._matches(where)
            if matches is None or matches <= max(EXACT_MATCHES, EXACT_SHARE * nearest.measured_rows):
                nearest = None
            else:
                kept, enough = matches / nearest.measured_rows, min(k, matches)
        ties = TIES if nearest is None else FEW_TIES

        def scored(everywhere: bool) -> list[Scored]:
            search = self.table.search(vector, vector_column_name=VECTOR, query_type="vector").distance_type("cosine")
            probed = probing(search, nearest, kept, everywhere)
            return _scored(probed, k, ties, where, "_distance", lambda distance: 1.0 - distance)

        rows = scored(everywhere=False)
        if len(rows) < enough and nearest is not None and nearest.used:  # those partitions have no more
            rows = scored(everywhere=True)
        return rows

    @bounded(SEARCHING)
    def search_text(self, query: str, k: int, where: str | None = None) -> list[Scored]:
        search = self.table.search(self._match_query(query), query_type="fts")
        return _scored(search, k, TIES, where, "_score", lambda score: score)

    @bounded(SEARCHING)
    def check_text(self) -> None:
        if not self._has_full_text and self.full_text == "missing":
            raise InputError(
                f"{self.path} has no full-text index, as its first build was interrupted: run `search-r3 index` again, "
                'or search with mode "vector"'
            )
        self._has_full_text = True

    @bounded(SEARCHING)
    def check_filter(self, where: str) -> str:
        """The filter in the form that the table understands: the smallest 64-bit integer, which SQL cannot parse, is
        rewritten as a difference."""
        return self._once("check", where, self._check_filter)

    def _check_filter(self, where: str) -> str:
        columns = ", ".join(f"{name} ({kind})" for name, kind in self.columns.items())
        help_line = f"columns: {columns}; text goes in single quotes, as in title = 'Guide'"
        if ";" in QUOTED.sub("", where):
            raise InputError(f"the filter {where!r} contains a semicolon: give one condition; {help_line}")
        given = where
        where = LEAST.sub(lambda match: f"({1 - 2**63} - 1)" if match["least"] else match[0], given)
        try:
            self.table.search().where(where).select(["id"]).limit(1).to_arrow()
        except (ValueError, RuntimeError, OSError) as error:
            if failed_storage(error) or files_lost(error):
                raise
            reason = brief(error).split(". Valid fields")[0].replace("SELECT 1 FROM t WHERE ", "")
            if (literal := NO_INTEGER.search(reason)) is not None:
                reason = f"a column of 64-bit integers is compared with {literal[1]}"
            raise InputError(f"the filter {given!r} cannot be used ({reason}); {help_line}") from error
        return where

    def _match_query(self, words: str) -> Any:
        """A full-text query that matches any of `words`. Unlike a string given to LanceDB, it has no syntax."""
        if hasattr(self.table, "match_query"):
            return self.table.match_query(words, CONTENT)
        from lancedb.query import MatchQuery

        return MatchQuery(words, CONTENT)  # type: ignore[call-arg]  # pydantic's defaults

    def _matches(self, where: str) -> int | None:
        """How many rows the filter leaves; None if it fails, as the search will report."""
        with suppress(ValueError, RuntimeError, OSError):
            return self._once("count", where, lambda where: int(self.table.count_rows(where)))
        return None

    def _once(self, what: str, where: str, find: Callable[[str], T]) -> T:
        """`find(where)`, which an index at a fixed version finds once: services filter by the same conditions again."""
        if self._filters is None:
            return find(where)
        known = self._filters.get((what, where))
        if known is None:
            known = (find(where),)
            if len(self._filters) >= KEPT_FILTERS:
                self._filters.clear()
            self._filters[what, where] = known
        return known[0]

    # ----------------------------------------------------------------------------------------------------------- rows

    def add(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        columned = [row | {COLUMNS: metadata_columns(json.loads(row[METADATA]), row["id"])} for row in rows]
        new, widened = ColumnTypes(self.table.schema).fit(columned)
        for name in sorted(widened):
            widen(self.table, name)
        if new:
            self.table.add_columns(new_columns(new, ()))
        self.merge(columned, vectors)

    def delete(self, ids: Collection[str]) -> None:
        self.delete_where("id", ids)

    def rows(self) -> Iterator[Row]:
        columns = [name for name in STORED if name in self.table.schema.names]  # format 1 has no source
        yield from self.table.search().select(columns).to_list()

    @bounded(READING)
    def document_rows(self, document: str) -> list[Row]:
        columns = [name for name in STORED if name in self.table.schema.names]
        return self.table.search().where(f"document = {quoted([document])}").select(columns).to_list()

    @bounded(READING)
    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        vector_of = self.vectors_where("id", ids)
        if not len(ids):
            return np.empty((0, self.info.dimension), dtype=np.float32)
        return np.stack([vector_of[identifier] for identifier in ids])

    def matrix(self, texts: bool = False) -> Matrix:
        rows = self.table.search().select(["document", VECTOR, *([CONTENT] if texts else [])]).to_arrow()
        vectors = rows[VECTOR].combine_chunks().flatten().to_numpy().reshape(len(rows), self.info.dimension)
        return Matrix(rows["document"].to_pylist(), vectors, rows[CONTENT].to_pylist() if texts else None)

    # -------------------------------------------------------------------------------------- for builds and maintenance

    def rows_where(self, column: str, values: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """`columns` of the rows that have one of `values` in `column`; None for a column that the table lacks."""
        there = [name for name in columns if name in self.table.schema.names]
        for some in in_parts(values, LOOKED_UP_AT_ONCE):
            rows = self.table.search().where(f"{column} IN ({quoted(some)})").select(there).to_arrow()
            known = {name: rows[name].to_pylist() for name in there}
            yield from zip(*(known.get(name, [None] * len(rows)) for name in columns), strict=True)

    def vectors_where(self, column: str, values: Iterable[str]) -> dict[str, np.ndarray]:
        """The vectors of the rows that have one of `values` in `column`, each float32 (dimension,), by that value."""
        vectors: dict[str, np.ndarray] = {}
        for some in in_parts(values, LOOKED_UP_AT_ONCE):
            rows = self.table.search().where(f"{column} IN ({quoted(some)})").select([column, VECTOR]).to_arrow()
            matrix = rows[VECTOR].combine_chunks().flatten().to_numpy().reshape(len(rows), self.info.dimension)
            vectors.update(zip(rows[column].to_pylist(), matrix, strict=True))
        return vectors

    def delete_where(self, column: str, values: Iterable[str]) -> None:
        """Remove the rows that have one of `values` in `column`, in one commit per 5,000 values."""
        for some in in_parts(values):
            self.table.delete(f"{column} IN ({quoted(some)})")

    def merge(self, rows: list[Row], vectors: np.ndarray, stale: Sequence[str] = (), fresh: bool = False) -> None:
        """Write rows, with their metadata columns, and remove those of the ids `stale`, in one commit.

        Args:
            fresh: none of the rows' ids is in the table, so they are not looked up: every commit of a first build then
                costs the same.
        """
        batch = as_arrow(rows, vectors, self.table.schema)
        if fresh and not stale:
            self.table.add(batch)
            return
        merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        if stale:
            merge = merge.when_not_matched_by_source_delete(f"id IN ({quoted(stale)})")
        merge.execute(batch)

    @bounded(READING)
    def has_document(self, document: str, source: str | None = None) -> bool:
        condition = f"document = {quoted([document])}"
        if source is not None:
            condition = f"{source_condition([source])} AND {condition}"
        return bool(self.table.count_rows(condition))

    def has_prefix(self, prefix: str) -> bool:
        return bool(self.table.count_rows(prefix_condition(prefix)))

    def read_sources(self) -> dict[str, SourceRecord]:
        return read_sources(self.table.schema)

    def count_of_sources(self, names: Iterable[str]) -> int:
        """The number of rows that belong to these sources."""
        return int(self.table.count_rows(source_condition(names)))

    def rows_of_sources(
        self, names: Iterable[str], prefix: str, columns: Sequence[str]
    ) -> Iterator[list[tuple[Any, ...]]]:
        """`columns` of the rows of these sources whose documents' ids begin with `prefix`, a batch at a time."""
        condition = source_condition(names, prefix)
        for batch in self.table.search().where(condition).select(list(columns)).to_batches():
            yield list(zip(*(batch[name].to_pylist() for name in columns), strict=True))

    def delete_source(self, name: str) -> None:
        """Remove the rows of a source."""
        self.table.delete(f"{SOURCE} IS NULL" if name == UNKNOWN else source_condition([name]))


def _scored(
    search: Any, count: int, ties: int, where: str | None, column: str, score: Callable[[float], float]
) -> list[Scored]:
    if where is not None:
        search = search.where(where, prefilter=True)
    try:
        rows = search.select([*FIELDS, column]).limit(count + ties).to_list()
    except (ValueError, RuntimeError, OSError) as error:
        if where is None or failed_storage(error) or files_lost(error):
            raise
        raise InputError(f"the filter {where!r} fails on some rows ({brief(error)}); change it") from error
    scored = [(row, score(row[column])) for row in rows]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]["id"]))[:count]

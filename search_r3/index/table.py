"""`SearchIndex`: one LanceDB table in a folder, holding vectors, full text, and the user's metadata as columns.

Every change is one of LanceDB's versioned commits, so a crash leaves the old version or the new one. What the index
is (model, contract hash, dimension, format) is the table's own schema metadata, written in the commit that creates it.
A tag named "complete" says that a build finished: it points at the version where files were last put in order. A build
of many commits removes it before its first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.approximate import Approximate, read_approximate
from search_r3.index.conversion import clear_unfinished
from search_r3.index.duplicates import count_duplicate_ids
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.full_text import FullText, ensure_full_text, full_text_state
from search_r3.index.index_sources import SourceCount, SourceRecord, count_sources, with_sources
from search_r3.index.search import SearchResult, search_index
from search_r3.index.storage import Place, Remote, brief, connect, explained, open_remote, place_of
from search_r3.index.table_columns import SOURCE, TEXT_HASH, TYPE_NAMES, VISIBLE, table_schema

T = TypeVar("T")
FORMAT_VERSION = 2
TABLE = "chunks"
METADATA_KEY = b"search_r3"
COMPLETE = "complete"
FOLLOW_WRITES = timedelta(seconds=2)  # how soon an open index (a server's) sees what another process committed
LONG = 10.0  # seconds; what failed after as many is not tried in another way
LOOKUPS_FROM = 100_000  # rows; below, reading the column through takes a few milliseconds


class ModelMismatch(InputError):
    """The index was made with another model: embeddings of the two cannot be compared."""


@dataclass(frozen=True)
class IndexInfo:
    """What an index was made with; `created` is UTC in ISO 8601."""

    format_version: int
    model_name: str
    contract_hash: str
    dimension: int
    created: str
    search_r3_version: str = ""
    model_source: str = ""

    @classmethod
    def of(cls, model: Encoder) -> IndexInfo:
        """What an index is that is made now with `model`."""
        from search_r3 import __version__

        created = datetime.now(UTC).isoformat(timespec="seconds")
        source = getattr(model, "source", "")
        return cls(FORMAT_VERSION, model.name, model.contract_hash, model.dimension, created, __version__, source)

    @property
    def identity(self) -> tuple[str, str, int]:
        """What tells an index from another: when it was made, by which contract, and of what dimension."""
        return self.created, self.contract_hash, self.dimension


class SearchIndex:
    """An index on disk, opened for reading: `SearchIndex.open(path)`. `build_index` makes and updates it."""

    def __init__(
        self, path: Path | str, table: Any, info: IndexInfo, *, follow: bool = False, session: Any = None
    ) -> None:
        self.path = path
        self.table = table
        self.info = info
        self._place = place_of(path)
        self._follow, self._session = follow, session
        self._pinned: tuple[int, SearchIndex] | None = None  # the table's version, and the index opened when it had it
        self._has_full_text = False

    @classmethod
    def open_snapshot(cls, path: str | Path) -> SearchIndex:
        """Open the newest version of the index at `path` for a few searches, sooner than `open` does: without LanceDB.

        Raises:
            InputError: as `open`.
        """
        from search_r3.index.snapshot import LanceSnapshot

        place = location(path)
        _check_there(place, path)
        started = time.monotonic()
        with explained(place):
            try:
                table = LanceSnapshot(place, TABLE)
            except (ValueError, OSError) as error:
                if time.monotonic() - started > LONG:
                    raise  # LanceDB would wait as long again
                if isinstance(place, Remote) or not _versions(place):
                    return cls.open(path)  # which says best what is wrong
                raise _damaged(place, error) from error
        return cls(place, table, _read_info(place, table))

    @classmethod
    def open(cls, path: str | Path, *, follow: bool = True) -> SearchIndex:
        """Open the index in the folder `path`, or at a URI such as "s3://bucket/index".

        Args:
            follow: see what others commit, after two seconds; if not, it stays at the version that it was opened at.

        Raises:
            InputError: there is no such folder, it is not an index, the index is damaged, or a newer search-r3 made it.
        """
        return cls._open(path, follow)

    @classmethod
    def _open(cls, path: str | Path, follow: bool, session: Any = None) -> SearchIndex:
        place = location(path)
        _check_there(place, path)
        import lancedb

        session = session or lancedb.Session()
        table = open_table(place, follow, session)
        if table is None:
            raise InputError(f"{path} is not a search-r3 index; give the folder that build_index wrote")
        return cls(place, table, _read_info(place, table), follow=follow, session=session)

    def called(self, path: Path | str) -> SearchIndex:
        """The same, which goes by the name of `path` in messages: a link that leads here."""
        self.path = path
        return self

    def reopened(self) -> SearchIndex:
        """The newest version of what is now where this index was opened, as an object of its own, which stays at that
        version. What LanceDB has cached is shared.

        Raises:
            InputError: as `open`.
        """
        if self._session is None:
            return SearchIndex.open_snapshot(self._place).called(self.path)
        return SearchIndex._open(self._place, False, self._session).called(self.path)

    def pinned(self) -> SearchIndex:
        """The index at the version that it has now, for reads that go together: it sees nothing that is committed
        meanwhile. It is itself if it was opened without following."""
        if not self._follow:
            return self
        version, held = self.table.version, self._pinned
        if held is None or held[0] != version:
            opened = self.reopened()
            with suppress(OSError, RuntimeError, ValueError):  # that version is gone; the newest is as good
                if opened.table.version != version:
                    opened.table.checkout(version)
            self._pinned = held = version, opened
        return held[1]

    def __len__(self) -> int:
        """The number of chunks."""
        with explained(self.path):
            return int(self.table.count_rows())

    def __repr__(self) -> str:
        return f"SearchIndex({str(self.path)!r}, {len(self)} chunks, model {self.info.model_name!r})"

    @property
    def complete(self) -> bool:
        """Whether the last build ran to its end; if not, run it again: it goes on where it stopped."""
        with explained(self.path):
            return COMPLETE in self.table.tags.list()

    def unchanged(self) -> bool:
        """Whether the table still is what was opened, and not another one that LanceDB found in its place."""
        try:
            return _read_info(self.path, self.table).identity == self.info.identity
        except InputError:
            return False

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a filter may name, with "text", "integer", "number" or "true/false"."""
        shown = dict(VISIBLE)
        with explained(self.path):
            schema = self.table.schema
        for column in schema:
            if column.name not in shown and not column.name.startswith("r3_"):
                shown[column.name] = TYPE_NAMES.get(column.type, str(column.type))
        return shown

    @property
    def sources(self) -> list[SourceCount]:
        """Where the documents come from, by name; those of an index of format 1 are of the source "unknown"."""
        return count_sources(self.table)

    @property
    def approximate(self) -> Approximate | None:
        """The approximate index with its measured recall, or None where vectors are searched exactly."""
        with explained(self.path):
            return read_approximate(self.table)

    @property
    def full_text(self) -> FullText:
        """Whether words are found: "current"; "outdated" (made before every word was indexed: searching works, and the
        next build or compaction rebuilds it); or "missing" (the first build was interrupted)."""
        with explained(self.path):
            return full_text_state(self.table)

    def describe(self) -> dict[str, Any]:
        """What the index is, as JSON-ready values; `duplicate_ids` counts the ids of more than one row."""
        with explained(self.path):
            ids = self.following(lambda index: index.table.search().select(["id"]).to_arrow()["id"])
            sources = self.following(lambda index: index.sources)
        return {
            "path": str(self.path),
            "chunks": len(self),
            "documents": sum(source.documents for source in sources),
            "duplicate_ids": count_duplicate_ids(ids),
            "complete": self.complete,
            "columns": self.columns,
            "sources": [asdict(source) for source in sources],
            "approximate": found.to_dict() if (found := self.approximate) else None,
            "full_text": self.full_text,
            **asdict(self.info),
        }

    def check_model(self, model: Encoder) -> None:
        """Refuse a model whose embeddings do not live in the same space as the index's.

        Raises:
            ModelMismatch: the contract hashes differ; both models are named.
        """
        info = _read_info(self.path, self.table)  # LanceDB follows the path: it may be another index by now
        if model.contract_hash != info.contract_hash:
            raise ModelMismatch(
                f"{self.path} was made with {info.model_name} (contract {info.contract_hash[:12]}), but this "
                f"model is {model.name} (contract {model.contract_hash[:12]}): their embeddings cannot be compared. "
                f"Use the index's model, or build a new index with {model.name} in another folder"
            )

    def check_made_with(self, info: IndexInfo) -> None:
        """Refuse an index that was not made with the model that `info` names.

        Raises:
            ModelMismatch: the contract hashes differ.
        """
        if info.contract_hash != self.info.contract_hash:
            raise ModelMismatch(
                f"{self.path} holds an index that was made with {self.info.model_name} (contract "
                f"{self.info.contract_hash[:12]}), not with {info.model_name} (contract {info.contract_hash[:12]}); "
                "nothing was changed"
            )

    def check_full_text(self) -> None:
        """Refuse to look for words where none are indexed.

        Raises:
            InputError: the first build was interrupted before it made the full-text index.
        """
        if not self._has_full_text and self.full_text == "missing":
            raise InputError(
                f"{self.path} has no full-text index, as its first build was interrupted: run `search-r3 index` again, "
                'or search with mode "vector"'
            )
        self._has_full_text = True

    def search(self, query: str, model: Encoder | None, **options: Any) -> SearchResult:
        """Search one version of the index: see `search_r3.index.search.search_index` for the options."""
        with explained(self.path):
            return self.following(lambda index: search_index(index, query, model, **options))

    def following(self, read: Callable[[SearchIndex], T]) -> T:
        """`read(self.pinned())`; once more, at the latest version, if files of an older one were removed under it.

        `compact_index` with `keep=timedelta(0)` does that to a reader that has not seen the latest version yet.
        """
        index = self.pinned()
        try:
            return read(index)
        except (OSError, RuntimeError, ValueError) as error:
            if f"{TABLE}.lance/" not in str(error) or "Not found" not in str(error):
                raise
            newest = None
            with suppress(InputError):  # it is not there, or cannot be read
                newest = index.reopened()
            if newest is None or newest.info.identity != index.info.identity:  # another index was put in its place
                raise
            return read(newest)


def _check_there(place: Place, path: str | Path) -> None:
    if isinstance(place, Path) and not place.exists():
        raise InputError(f"{path} does not exist; make an index there first (search-r3 index SOURCE --into {path})")


def _versions(path: Path) -> bool:
    """Whether a table was ever committed in the folder `path`."""
    versions = path / f"{TABLE}.lance" / "_versions"
    return versions.is_dir() and any(versions.glob("*.manifest"))


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"the index {path} is damaged ({brief(error)}); delete the folder and index again")


def location(path: str | Path) -> Place:
    """Where an index is: a folder, or a place on object storage (see `search_r3.index.storage`)."""
    return place_of(path)


def open_table(path: Path | str, follow: bool = True, session: Any = None) -> Any | None:
    """The LanceDB table in the folder or at the URI `path`, or None where no table was ever committed.

    Args:
        follow: whether the table sees by itself what others commit.
        session: LanceDB's caches (`lancedb.Session`), where they are shared.

    Raises:
        InputError: `path` is a file, may not be read, or its table is damaged.
    """
    path = place_of(path)
    if isinstance(path, Remote):
        return open_remote(path, TABLE, FOLLOW_WRITES if follow else None, session)
    if not path.is_dir():
        raise InputError(f"{path} is a file, not a folder; an index is a folder")
    import lancedb

    try:
        if not _versions(path):
            return None
        interval = FOLLOW_WRITES if follow else None
        return lancedb.connect(str(path), read_consistency_interval=interval, session=session).open_table(TABLE)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; mend its permissions") from error
    except (ValueError, RuntimeError) as error:
        raise _damaged(path, error) from error


def create_table(path: Path | str, info: IndexInfo, sources: Iterable[SourceRecord] = ()) -> Any:
    """Make the empty table in `path`, with its full-text index: rows are searchable as soon as they are committed."""
    schema = table_schema(info.dimension).with_metadata({METADATA_KEY: json.dumps(asdict(info)).encode()})
    schema = with_sources(schema, sources)
    place = place_of(path)
    with explained(place):
        table = connect(place, FOLLOW_WRITES).create_table(TABLE, schema=schema)
        ensure_full_text(table)
    return table


def ensure_lookups(table: Any) -> None:
    """Once a table is large, an index on each column by which a build looks its rows up."""
    from lancedb.index import BTree

    if table.count_rows() < LOOKUPS_FROM:
        return
    indexed = {column for index in table.list_indices() for column in index.columns}
    for column in ("id", "document", TEXT_HASH):
        if column not in indexed:
            table.create_index(column, config=BTree())


def ensure_complete(table: Any) -> None:
    """Say that the index is whole, if nothing says so yet. An older version that says so is as good."""
    if COMPLETE not in table.tags.list():
        table.tags.create(COMPLETE, table.version)


def mark_complete(table: Any) -> None:
    """Say that the version the table is at is whole. It is a tag, so what it names is never removed."""
    if COMPLETE not in (tags := table.tags.list()):
        table.tags.create(COMPLETE, table.version)
    elif tags[COMPLETE]["version"] != table.version:
        table.tags.update(COMPLETE, table.version)


def migrate_rows(table: Any) -> None:
    """Give the rows of an index of format 1 what this format has besides; called before something is written.

    They get the column of their source, empty: nobody knows it. LanceDB has no way to change the description that a
    table was made with, so it goes on to say format 1; the column tells that it is done.
    """
    clear_unfinished(table)
    if SOURCE not in table.schema.names:
        table.add_columns(pa.schema([(SOURCE, pa.string())]))


def migrate(held: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """An index's description of any format up to this one as one of `FORMAT_VERSION`, a step at a time.

    Raises:
        InputError: a newer format; `path` is named in it.
    """
    version = int(held["format_version"])
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has index format {version}, this search-r3 reads up to {FORMAT_VERSION}; upgrade search-r3"
        )
    for older in range(version, FORMAT_VERSION):
        held = _STEPS[older](held) | {"format_version": older + 1}
    return held


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    0: lambda held: {"created": ""} | held,  # before the first release: not all said when they were made
    1: lambda held: held,  # the rows have no source: see `migrate_rows`
}
"""Format -> the step to the next one; a step changes the description, not the rows."""


def _read_info(path: Path | str, table: Any) -> IndexInfo:
    try:
        held = json.loads((table.schema.metadata or {})[METADATA_KEY])
        return IndexInfo(**migrate(held, path))
    except KeyError as error:
        raise InputError(f"{path} holds a LanceDB table that search-r3 did not write; give another folder") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the index {path} is damaged (its description cannot be read); index again") from error

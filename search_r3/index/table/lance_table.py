"""An index's LanceDB table: opened, created, marked complete, and brought from an older format to this one.

Every change is one of LanceDB's versioned commits, so a crash leaves the old version or the new one. What the index
is (model, contract hash, dimension, format) is the table's own schema metadata, written in the commit that creates it.
A tag named "complete" says that a build finished: it points at the version where files were last put in order. A build
of many commits removes it before its first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.index_info import IndexInfo, migrate
from search_r3.index.index_sources import SourceRecord
from search_r3.index.row_keys import SOURCE, TEXT_HASH
from search_r3.index.storage.location import Place, Remote, brief, connect, explained, open_remote, place_of
from search_r3.index.table.conversion import clear_unfinished
from search_r3.index.table.full_text import ensure_full_text
from search_r3.index.table.table_columns import table_schema
from search_r3.index.table.table_sources import with_sources

TABLE = "chunks"
METADATA_KEY = b"search_r3"
COMPLETE = "complete"
FOLLOW_WRITES = timedelta(seconds=2)  # how soon an open index (a server's) sees what another process committed
LOOKUPS_FROM = 100_000  # rows; below, reading the column through takes a few milliseconds


def check_there(place: Place, path: str | Path) -> None:
    if isinstance(place, Path) and not place.exists():
        raise InputError(f"{path} does not exist; make an index there first (search-r3 index SOURCE --into {path})")


def has_versions(path: Path) -> bool:
    """Whether a table was ever committed in the folder `path`."""
    versions = path / f"{TABLE}.lance" / "_versions"
    return versions.is_dir() and any(versions.glob("*.manifest"))


def damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"the index {path} is damaged ({brief(error)}); delete the folder and index again")


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
        if not has_versions(path):
            return None
        interval = FOLLOW_WRITES if follow else None
        return lancedb.connect(str(path), read_consistency_interval=interval, session=session).open_table(TABLE)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; change its permissions") from error
    except (ValueError, RuntimeError) as error:
        raise damaged(path, error) from error


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


def mark_incomplete(table: Any) -> None:
    """Remove the mark that the index is whole, if it has one."""
    if COMPLETE in table.tags.list():
        table.tags.delete(COMPLETE)


def migrate_rows(table: Any) -> None:
    """Give the rows of an index of format 1 what this format has besides; called before something is written.

    They get the column of their source, empty, as it is unknown. LanceDB cannot change the description that a table was
    made with, so it still says format 1; the column shows that this was done.
    """
    clear_unfinished(table)
    if SOURCE not in table.schema.names:
        table.add_columns(pa.schema([(SOURCE, pa.string())]))


def read_info(path: Path | str, table: Any) -> IndexInfo:
    """What the table at `path` says of itself.

    Raises:
        InputError: search-r3 did not write it, it is damaged, or its format is newer.
    """
    try:
        held = json.loads((table.schema.metadata or {})[METADATA_KEY])
        return IndexInfo(**migrate(held, path))
    except KeyError as error:
        raise InputError(f"{path} holds a LanceDB table that search-r3 did not write; give another folder") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the index {path} is damaged (its description cannot be read); index again") from error

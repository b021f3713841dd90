"""An index's LanceDB table: opened, created, marked complete, and migrated from older formats.

Every change is one of LanceDB's versioned commits, so a crash leaves either the old version or the new one. The index's
description (model, contract hash, dimension, format) is stored in the table's schema metadata by the commit that
creates the table. A tag named "complete" marks a finished build; it points to the version that was last compacted. A
build of several commits removes it before the first one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from search_r3.errors import InputError
from search_r3.index.backends.lance.conversion import clear_unfinished
from search_r3.index.backends.lance.full_text import ensure_full_text
from search_r3.index.backends.lance.table_columns import table_schema, user_columns
from search_r3.index.backends.lance.table_sources import with_sources
from search_r3.index.index_info import IndexInfo, migrate
from search_r3.index.index_sources import SourceRecord
from search_r3.index.row_keys import SOURCE, TEXT_HASH
from search_r3.index.storage.location import (
    Location,
    Remote,
    brief,
    connect,
    location_of,
    open_remote,
    options_of,
    storage_errors,
)

TABLE = "chunks"
METADATA_KEY = b"search_r3"
COMPLETE = "complete"
FOLLOW_WRITES = timedelta(seconds=2)  # how soon an open index (a server's) sees another process's commits
OLD_IDS = "id = document AND regexp_like(id, '#[1-9][0-9]*$')"
LOOKUPS_FROM = 100_000  # rows; below that, scanning the column takes a few milliseconds
MOST_FILTERED = 20  # metadata columns that are indexed
SAMPLE_ROWS, LONG_TEXT = 1000, 100  # rows that are looked at; mean characters of text that nobody filters by


def check_there(location: Location, path: str | Path) -> None:
    if isinstance(location, Path) and not location.exists():
        raise InputError(f"{path} does not exist; make an index there first (search-r3 index SOURCE --into {path})")


def has_versions(path: Path) -> bool:
    """Whether a table was ever committed in the folder `path`."""
    versions = path / f"{TABLE}.lance" / "_versions"
    return versions.is_dir() and any(versions.glob("*.manifest"))


def damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"the index {path} is damaged ({brief(error)}); delete the folder and index again")


def open_table(path: Path | str, follow: bool = True, session: Any = None) -> Any | None:
    """The LanceDB table in the folder or at the URI `path`, or None if no table was ever committed there.

    Args:
        follow: whether the table picks up other writers' commits automatically.
        session: LanceDB's caches (`lancedb.Session`), if they are shared.

    Raises:
        InputError: `path` is a file, may not be read, or its table is damaged.
    """
    path = location_of(path)
    if isinstance(path, Remote):
        return open_remote(path, TABLE, FOLLOW_WRITES if follow else None, session)
    if not isinstance(path, Path):
        raise InputError(f"{path} is in Milvus, not in LanceDB")
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


FILE_FORMAT = {"new_table_data_storage_version": "2.1"}
"""Of new tables. In 2.2, LanceDB's default, a page of equal values is laid out whole for each row that is read, so that
of a million rows without titles ten take 10 ms instead of 1 (findings/lance-constant-columns.sh)."""


def create_table(path: Path | str, info: IndexInfo, sources: Iterable[SourceRecord] = ()) -> Any:
    """Create the empty table in `path`, with its full-text index: rows are searchable as soon as they are committed."""
    schema = table_schema(info.dimension).with_metadata({METADATA_KEY: json.dumps(asdict(info)).encode()})
    schema = with_sources(schema, sources)
    location = location_of(path)
    with storage_errors(location):
        options = FILE_FORMAT | (options_of(location) or {})  # which may name another format
        table = connect(location, FOLLOW_WRITES).create_table(TABLE, schema=schema, storage_options=options)
        ensure_full_text(table)
    return table


def ensure_lookups(table: Any) -> None:
    """Once the table is large, index each column that builds look rows up by, and those that filters name: the metadata
    columns, except of long text."""
    from lancedb.index import BTree

    if table.count_rows() < LOOKUPS_FROM:
        return
    indexed = {column for index in table.list_indices() for column in index.columns}
    for column in ("id", "document", TEXT_HASH, *_filtered_columns(table)):
        if column not in indexed:
            table.create_index(column, config=BTree())


def _filtered_columns(table: Any) -> list[str]:
    """The first MOST_FILTERED metadata columns whose values in the first SAMPLE_ROWS rows are no long text."""
    types = {name: kind for name, kind in user_columns(table.schema).items() if not name.startswith("r3_")}
    texts = [name for name, kind in types.items() if kind == pa.string()]
    long = set()
    if texts:
        rows = table.search().select(texts).limit(SAMPLE_ROWS).to_arrow()
        long = {name for name in texts if (pc.mean(pc.utf8_length(rows[name])).as_py() or 0) > LONG_TEXT}
    return [name for name in types if name not in long][:MOST_FILTERED]


def ensure_complete(table: Any) -> None:
    """Mark the index complete unless it is marked already, if only at an older version."""
    if COMPLETE not in table.tags.list():
        table.tags.create(COMPLETE, table.version)


def mark_complete(table: Any) -> None:
    """Mark the table's current version complete. The mark is a tag, so cleanup never removes that version."""
    if COMPLETE not in (tags := table.tags.list()):
        table.tags.create(COMPLETE, table.version)
    elif tags[COMPLETE]["version"] != table.version:
        table.tags.update(COMPLETE, table.version)


def mark_incomplete(table: Any) -> None:
    """Remove the mark that the index is complete, if it has one."""
    if COMPLETE in table.tags.list():
        table.tags.delete(COMPLETE)


def migrate_rows(table: Any) -> None:
    """Add to an index of format 1 what this format has in addition; called before anything is written.

    Rows get an empty source column, as their source is unknown. LanceDB cannot change the description that a table was
    created with, so it still says format 1; the column shows that the migration was done.
    """
    clear_unfinished(table)
    if SOURCE not in table.schema.names:
        table.add_columns(pa.schema([(SOURCE, pa.string())]))


def read_info(path: Path | str, table: Any) -> IndexInfo:
    """The description stored in the table at `path`.

    Raises:
        InputError: search-r3 did not write the table, the description is damaged, or its format is newer.
    """
    try:
        description = json.loads((table.schema.metadata or {})[METADATA_KEY])
        return IndexInfo(**migrate(description, path))
    except KeyError as error:
        raise InputError(
            f"{path} contains a LanceDB table that search-r3 did not write; give another folder"
        ) from error
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the index {path} is damaged (its description cannot be read); index again") from error


def rename_old_ids(table: Any) -> int:
    """Give chunks that an earlier version named differently the ids of `chunking.chunk_ids`, in one commit.

    These are the only chunks of documents whose ids end in "#" and a number; another document's chunk could have
    replaced them. Their vectors stay.

    Returns:
        The number of renamed rows.
    """
    count = int(table.count_rows(OLD_IDS))
    if count:
        table.update(where=OLD_IDS, values_sql={"id": "concat(id, '#1')"})
    return count

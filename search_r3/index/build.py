"""Building an index and keeping it up to date: only what changed is embedded, and work done is never done twice.

Each commit writes a few hundred chunks. A build that is interrupted, by Ctrl-C or by an error, keeps what it had
committed; run again, it recognises those chunks by their hashes and goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from search_r3.errors import InputError
from search_r3.index.chunking import Chunk, chunk_document
from search_r3.index.readers import Skipped, SourceDocument
from search_r3.index.rows import as_arrow, checked_vectors, make_row, where_from
from search_r3.index.table import (
    COMPLETE,
    CONTENT,
    FORMAT_VERSION,
    ROW_HASH,
    TEXT_HASH,
    VECTOR,
    Encoder,
    IndexInfo,
    SearchIndex,
    create_table,
    ensure_full_text,
    missing_columns,
    open_table,
    pa,
    quoted,
    table_schema,
)

COMMIT_EVERY = 256  # chunks: on two CPU cores some ten seconds of embedding, the most that an interruption costs
KEEP_VERSIONS = timedelta(hours=1)  # a server that reads an old version has this long to notice the new one
LOCK = ".build.lock"


@dataclass
class IndexReport:
    """What a build did, in chunks: a long document is several. `embedded` counts texts that went through the model."""

    documents: int = 0
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    embedded: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def chunks(self) -> int:
        return self.added + self.updated + self.unchanged


def build_index(
    path: str | Path,
    documents: Iterable[SourceDocument],
    model: Encoder,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
    prune: bool = True,
    commit_every: int = COMMIT_EVERY,
) -> IndexReport:
    """Make the index in the folder `path`, or bring it up to date with `documents`.

    A chunk whose text, title and `max_length` are as before is not embedded again, even if its metadata changed or it
    moved to another place in its file.

    Args:
        path: a new or empty folder, or an index that a model of the same contract made.
        documents: what to index, usually `open_source(...)`; its `skipped` goes into the report.
        model: embeds the chunks: "title text", as documents.
        batch_size: texts per forward pass.
        max_length: tokens a chunk is cut to; the model's own limit by default.
        progress: show a line on stderr if that is a terminal.
        prune: remove what `documents` no longer has. False adds to what is there.
        commit_every: chunks per commit.

    Raises:
        InputError: a document is broken or its id comes twice, the index was made with another model, the folder holds
            something else, another build is running, or the model gave NaN or the wrong dimension (nothing of that
            batch is written).
    """
    started = time.perf_counter()
    path = Path(path)
    if commit_every < 1 or batch_size < 1:
        raise InputError(f"batch_size is {batch_size} and commit_every is {commit_every}; both must be at least 1")
    report = IndexReport()
    with _locked(path):
        build = _Build(path, model, batch_size, max_length, report)
        with _progress(progress and sys.stderr.isatty()) as show:
            for batch in _batches(documents, commit_every, report):
                build.write(batch)
                show(report)
            build.finish(prune)
    report.skipped = list(getattr(documents, "skipped", []))
    report.seconds = time.perf_counter() - started
    return report


class _Build:
    """One run of `build_index`: the index as it was when the run began, and what the run has seen so far."""

    def __init__(
        self, path: Path, model: Encoder, batch_size: int, max_length: int | None, report: IndexReport
    ) -> None:
        self.model, self.batch_size, self.max_length, self.report = model, batch_size, max_length, report
        self.path = path
        self.table: Any = open_table(path)
        self.row_hashes: dict[str, str] = {}
        self.id_of_text: dict[str, str] = {}
        self.seen: dict[str, str] = {}  # chunk id -> where it came from
        self.before: Any = None
        self.touched = False
        if self.table is None:
            if strangers := [item.name for item in path.iterdir() if item.name not in {LOCK, "chunks.lance"}]:
                raise InputError(f"{path} holds other things ({', '.join(sorted(strangers)[:3])}); give a new folder")
            return
        index = SearchIndex.open(path)
        index.check_model(model)
        held = self.table.search().select(["id", ROW_HASH, TEXT_HASH]).to_arrow()
        ids = held["id"].to_pylist()
        self.row_hashes = dict(zip(ids, held[ROW_HASH].to_pylist(), strict=True))
        self.id_of_text = dict(zip(held[TEXT_HASH].to_pylist(), ids, strict=True))
        self.before = index.table  # a second handle, held at the version the run starts from
        self.before.checkout(self.table.version)
        self.touched = not index.complete
        if self.touched:  # the crash may have come between the table and its full-text index
            ensure_full_text(self.table)

    def write(self, chunks: list[Chunk]) -> None:
        """Embed what is new among `chunks` and commit the rows that changed."""
        rows = []
        for chunk in chunks:
            place = where_from(chunk)
            if chunk.id in self.seen:
                raise InputError(
                    f'the id "{chunk.id}" comes twice: at {self.seen[chunk.id]} and at {place}; give each its own'
                )
            self.seen[chunk.id] = place
            row = make_row(chunk, self.max_length)
            if self.row_hashes.get(chunk.id) == row[ROW_HASH]:
                self.report.unchanged += 1
            else:
                rows.append(row)
        if not rows:
            return
        schema = table_schema(self.model.dimension) if self.table is None else self.table.schema
        new_columns = missing_columns(schema, rows)
        vectors = self._vectors(rows)
        self._touch()
        if new_columns:
            self.table.add_columns(pa.schema(list(new_columns.items())))
        self._merge(rows, vectors)
        updated = sum(row["id"] in self.row_hashes for row in rows)
        self.report.updated += updated
        self.report.added += len(rows) - updated

    def finish(self, prune: bool) -> None:
        """Remove what is gone, fold new rows into the full-text index, compact, and mark the index complete."""
        if not self.seen:
            raise InputError("no documents were given; the index is unchanged")
        gone = [identifier for identifier in self.row_hashes if identifier not in self.seen] if prune else []
        if gone:
            self._touch()
            for start in range(0, len(gone), 500):
                self.table.delete(f"id IN ({quoted(gone[start : start + 500])})")
            self.report.removed = len(gone)
        if self.touched:
            ensure_full_text(self.table)
            first = self.before is None or not self.row_hashes
            self.table.optimize(cleanup_older_than=timedelta(milliseconds=1) if first else KEEP_VERSIONS)
            self.table.tags.create(COMPLETE, self.table.version)

    def _touch(self) -> None:
        """Before the first change: the table exists, and does not say that it is complete."""
        if self.table is None:
            self.table = create_table(self.path, _info(self.model))
        if COMPLETE in self.table.tags.list():
            self.table.tags.delete(COMPLETE)
        self.touched = True

    def _vectors(self, rows: list[dict[str, Any]]) -> np.ndarray:
        """(len(rows), dimension) float32: from the index where it holds the same text, else from the model."""
        vector_of: dict[str, np.ndarray] = {}
        known = {row[TEXT_HASH]: self.id_of_text[row[TEXT_HASH]] for row in rows if row[TEXT_HASH] in self.id_of_text}
        if known:
            held = (
                self.before.search()
                .where(f"id IN ({quoted(set(known.values()))})")
                .select([TEXT_HASH, VECTOR])
                .to_arrow()
            )
            matrix = held[VECTOR].combine_chunks().flatten().to_numpy().reshape(len(held), self.model.dimension)
            vector_of = dict(zip(held[TEXT_HASH].to_pylist(), matrix, strict=True))
        new = {row[TEXT_HASH]: row for row in rows if row[TEXT_HASH] not in vector_of}
        if new:
            texts = [row[CONTENT].strip() for row in new.values()]
            encoded = self.model.encode_document(
                texts, batch_size=self.batch_size, show_progress_bar=False, max_length=self.max_length
            )
            matrix = checked_vectors(encoded, [row["id"] for row in new.values()], self.model)
            vector_of.update(zip(new, matrix, strict=True))
            self.report.embedded += len(texts)
        return np.stack([vector_of[row[TEXT_HASH]] for row in rows])

    def _merge(self, rows: list[dict[str, Any]], vectors: np.ndarray) -> None:
        batch = as_arrow(rows, vectors, self.table.schema)
        self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(batch)


def _info(model: Encoder) -> IndexInfo:
    from search_r3 import __version__

    created = datetime.now(UTC).isoformat(timespec="seconds")
    return IndexInfo(
        FORMAT_VERSION,
        model.name,
        model.contract_hash,
        model.dimension,
        created,
        __version__,
        getattr(model, "source", ""),
    )


def _batches(documents: Iterable[SourceDocument], count: int, report: IndexReport) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    for document in documents:
        report.documents += 1
        for chunk in chunk_document(document):
            batch.append(chunk)
            if len(batch) == count:
                yield batch
                batch = []
    if batch:
        yield batch


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build at a time; a folder that this run made and left without a table is removed again."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder for the index")
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another build is writing to {path}; wait until it is done") from error
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; choose a folder you may write to") from error
    try:
        yield
    finally:
        lock.release()
        if made and not any(item.name != LOCK for item in path.iterdir()):
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()


@contextmanager
def _progress(enabled: bool) -> Iterator[Any]:
    if not enabled:
        yield lambda report: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")
        yield lambda report: bar.update(
            task, description=f"{report.documents:,} documents, {report.chunks:,} chunks, {report.embedded:,} embedded"
        )

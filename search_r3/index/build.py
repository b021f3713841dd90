"""Building an index and keeping it up to date: only what changed is embedded, and work done is never done twice.

Reading, tokenizing, embedding and writing go on side by side (`pipeline`), with so little between them that memory does
not grow with the corpus. What was committed is kept whatever happens: the next run recognizes it and goes on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.index.backend_registry import choose_backend
from search_r3.index.build_report import IndexReport, Removal, progress_line
from search_r3.index.build_run import BuildRun
from search_r3.index.changes import Changes, Window
from search_r3.index.embedding import BATCH_TOKENS, Prepared, embed, prepare
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.pipeline import Pipe, run_stage, start_stage
from search_r3.index.portable_build import build_portable
from search_r3.index.row_keys import TEXT_HASH
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import explained, for_writing, place_of
from search_r3.index.storage.locking import writing
from search_r3.index.table.approximate import APPROXIMATE_FROM

COMMIT_CHUNKS = 256  # on two CPU cores some ten seconds of embedding
COMMIT_SECONDS = 10.0  # the most that an interruption costs; a fast GPU must not make a version for every 256 chunks
COMMIT_AT_MOST = 8192  # chunks that wait for a commit: about 50 MB
ONE_COMMIT = 10**9  # chunks; `commit_every` for changes that are made all at once
WAITING = 2  # windows between two stages
STOP_SECONDS = 1.0


def build_index(
    path: str | Path,
    documents: Iterable[SourceDocument],
    model: Encoder,
    *,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    progress: bool = True,
    prune: bool = True,
    commit_every: int | None = None,
    approximate_from: int | None = APPROXIMATE_FROM,
    queries: Sequence[str] = (),
    wait: float = 0.0,
    maintain: bool = True,
    source: str | None = None,
    take_over: bool = False,
    may_prune: Callable[[Removal], bool] | None = None,
    types: Mapping[str, str] | None = None,
    backend: str | None = None,
) -> IndexReport:
    """Make the index in the folder `path`, or bring its documents of one source up to date with `documents`.

    Each document belongs to a source: the folder or file that it was read from, or what `source` says. Documents of
    other sources stay as they are. A folder inside one that the index has is a part of that source, and a folder around
    some takes them over. The second folder of an index has its name in front of its ids.

    A chunk whose text, title and `max_length` are as before is not embedded again, even if its metadata changed or it
    moved to another place in its file. A document that is given replaces what the index has under its id: all of its
    chunks change in one commit.

    Args:
        path: a new or empty folder, or an index that a model of the same contract made; or a URI ("s3://bucket/index").
        documents: what to index, usually `open_source(...)`; its `skipped` goes into the report. Read in a thread.
        model: embeds the chunks: "title text", as documents.
        batch_size: most texts per forward pass; None leaves it to `batch_tokens`.
        batch_tokens: most tokens per forward pass, padding included.
        max_length: tokens that a chunk, with its title, may have; 512 by default. Longer text is put into more chunks.
        progress: show a line on stderr if that is a terminal.
        prune: remove the documents that `documents` no longer has, of those of the same source. False keeps them.
        commit_every: chunks per commit; a document is never in two. None commits every ten seconds, 256 to 8,192
            chunks, and what is ready when a build is interrupted. With `ONE_COMMIT` and without `prune` an index that
            was whole is whole at every moment.
        approximate_from: rows from which on the index gets an approximate one (see `table/approximate.py`);
            None builds none.
        queries: real queries, at most 200 of which the approximate index's recall is measured with, besides rows.
        wait: seconds to wait for another writer to end.
        maintain: compact files, fold new rows into the indexes and remove old versions where that is due
            (`search_r3.index.table.compaction`). With False, call `maintain_index` now and then; only for
            an index that is whole, written with `ONE_COMMIT`.
        source: a name for the source, which stays the same wherever the documents are read from.
        take_over: replace documents of other sources that have the same ids. Otherwise such documents are left out and
            reported in `conflicts`, unless they are equal.
        may_prune: asked before anything is removed that the source no longer has; False keeps it.
        types: of metadata fields, by name: "text", "integer", "number" or "true/false". A column of another type is
            converted in place.
        backend: where a new index is stored ("lance", "numpy", or one of another package); None goes on with the
            backend of the index at `path`, which is LanceDB for a new one. Others than LanceDB have no prefixes of
            ids, no `types` and nothing to maintain, and are written whole documents at a time, `commit_every` or 8,192
            chunks together.

    Raises:
        IndexBusy: another process is writing, or took over while this one was paused.
        StorageError: object storage failed or did not answer, or the disk is full or fails (DiskError); what was
            committed is kept.
        InputError: a document is broken or its id comes twice, the index was made with another model, the folder holds
            something else, the source's name cannot be used, metadata does not fit its column, or the model gave NaN
            or the wrong dimension (nothing of that batch is written).
    """
    started = time.perf_counter()
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("commit_every", commit_every)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    place = for_writing(place_of(path))
    kind = choose_backend(place, backend)
    if "streaming" not in kind.capabilities:
        if types:
            kind.require("streaming", "types of columns")
        assert isinstance(place, Path)  # `choose_backend` refuses object storage
        return build_portable(
            place,
            kind,
            documents,
            model,
            batch_tokens=batch_tokens,
            batch_size=batch_size,
            max_length=max_length,
            progress=progress,
            prune=prune,
            commit_every=commit_every,
            wait=wait,
            source=source,
            take_over=take_over,
            may_prune=may_prune,
        )
    report = IndexReport()
    with explained(place), writing(place, make=True, wait=wait) as lock:
        build = BuildRun(place, lock, model, commit_every, report, at_once=commit_every == ONE_COMMIT and not prune)
        changes = build.begin(documents, source, take_over, types, max_length, prune)
        with progress_line(progress and sys.stderr.isatty()) as show:
            _run(build, changes, documents, show, batch_tokens, batch_size)
        build.finish(changes, prune, may_prune, approximate_from, queries, maintain)
        changes.close()
    report.skipped = list(getattr(documents, "skipped", []))
    report.seconds = time.perf_counter() - started
    return report


def _run(
    build: BuildRun,
    changes: Changes,
    documents: Iterable[SourceDocument],
    show: Any,
    batch_tokens: int,
    most: int | None,
) -> None:
    """The stages: reading, tokenizing and writing in threads of their own, embedding in this one."""
    model, report = build.model, build.report
    window_size = min(build.commit_every or COMMIT_CHUNKS, COMMIT_CHUNKS)

    def tokenize(window: Window) -> tuple[Window, Prepared]:
        return window, prepare(model, list(window.texts.values()), changes.max_length, batch_tokens, most)

    def encode(given: tuple[Window, Prepared]) -> Window:
        window, prepared = given
        matrix = embed(model, prepared, window.names, changes.max_length)
        vector_of = window.held | dict(zip(window.texts, matrix, strict=True))
        if window.rows:
            window.vectors = np.stack([vector_of[row[TEXT_HASH]] for row in window.rows])
        report.documents += window.documents
        report.embedded += len(matrix)
        report.truncated += prepared.truncated
        show(report)
        return window

    read: Pipe[Window] = Pipe(WAITING)
    tokenized: Pipe[tuple[Window, Prepared]] = Pipe(WAITING)
    encoded: Pipe[Window] = Pipe(WAITING)
    reader = start_stage("read", changes.windows(documents, window_size), lambda window: window, read)
    start_stage("tokenize", read, tokenize, tokenized)
    writer = _Writer(build, encoded)
    writer.start()
    run_stage(tokenized, encode, encoded)
    try:
        writer.join()
    except KeyboardInterrupt:
        writer.join()  # a commit that has begun is done in a moment; the lock is held until then
        raise
    finally:
        reader.join(STOP_SECONDS)  # longer only if it waits for a source that does not answer; it writes nothing
    if writer.error is not None:
        raise writer.error


class _Writer(threading.Thread):
    """Commits what comes. `error` is its own, or the one that ended what came."""

    def __init__(self, build: BuildRun, encoded: Pipe[Window]) -> None:
        super().__init__(name="write", daemon=True)
        self.build, self.encoded = build, encoded
        self.error: BaseException | None = None

    def run(self) -> None:
        waiting: list[Window] = []
        last = time.monotonic()
        exact = self.build.commit_every
        try:
            try:
                for window in self.encoded:
                    waiting.append(window)
                    count = sum(len(held.rows) for held in waiting)
                    late = time.monotonic() - last >= COMMIT_SECONDS or count >= COMMIT_AT_MOST
                    if count >= (exact or COMMIT_CHUNKS) and (exact or late):
                        ready, waiting = waiting, []
                        self.build.commit(ready)
                        last = time.monotonic()
            except BaseException:
                if exact is None and waiting:  # an interruption costs nothing that is embedded already
                    self.build.commit(waiting)
                raise
            self.build.commit(waiting)
        except BaseException as error:
            self.error = error
        self.encoded.abandon()

"""Building an index and keeping it up to date: only what changed is embedded, and finished work is never repeated.

Reading, tokenizing, embedding and writing run concurrently (`pipeline`). The queues between them are short, so memory
does not grow with the corpus. Whatever was committed is kept: the next run recognizes it and continues from there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from search_r3.errors import InputError
from search_r3.index.backends.backend_registry import choose_backend
from search_r3.index.backends.index_backend import IndexBackend
from search_r3.index.backends.lance.approximate import APPROXIMATE_FROM
from search_r3.index.build.build_progress import BuildProgress, shown_progress
from search_r3.index.build.build_report import IndexReport, Removal
from search_r3.index.build.build_run import BuildRun
from search_r3.index.build.embedding import BATCH_TOKENS, Prepared, embed, prepare
from search_r3.index.build.index_diff import ChangeBatch, IndexDiff
from search_r3.index.build.pipeline import Pipe, run_stage, start_stage
from search_r3.index.build.portable_build import build_portable
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.row_keys import TEXT_HASH
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import Location, for_writing, location_of, storage_errors
from search_r3.index.storage.locking import writing

COMMIT_CHUNKS = 256  # about ten seconds of embedding on two CPU cores
COMMIT_SECONDS = 10.0  # the most work an interruption can lose; a fast GPU must not commit every 256 chunks
COMMIT_AT_MOST = 8192  # chunks waiting for a commit: about 50 MB
ONE_COMMIT = 10**9  # chunks; `commit_every` for changes that are made all at once
WAITING = 2  # batches queued between two stages
STOP_SECONDS = 1.0


def build_index(
    path: str | Path,
    documents: Iterable[SourceDocument],
    model: Encoder,
    *,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    progress: bool | Callable[[str], None] = True,
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
    exchange: bool = False,
) -> IndexReport:
    """Create the index in the folder `path`, or bring its documents of one source up to date with `documents`.

    Each document belongs to a source: the folder or file it was read from, or the one that `source` names. Documents of
    other sources are left alone. A folder inside an indexed folder is part of that source; a folder that contains
    indexed folders takes them over. From the second folder on, document ids are prefixed with the folder's name.

    A chunk whose text, title and `max_length` are unchanged is not embedded again, even if its metadata changed or it
    moved within its file. A document replaces what the index has under its id: all of its chunks change in one commit.

    Args:
        path: a new or empty folder, or an index that a model of the same contract made; or a URI ("s3://bucket/index",
            "milvus://HOST:PORT/NAME").
        documents: what to index, usually `open_source(...)`, whose `skipped` goes into the report. Read in a thread.
        model: embeds the chunks ("title text") as documents.
        batch_size: maximum number of texts per forward pass; None leaves it to `batch_tokens`.
        batch_tokens: maximum number of tokens per forward pass, including padding.
        max_length: maximum number of tokens of a chunk with its title; 512 by default. Longer text makes more chunks.
        progress: show a progress line if stderr is a terminal; a function gets such a line every 30 seconds if it is
            none. False shows nothing.
        prune: remove documents of this source that `documents` no longer contains; False keeps them.
        commit_every: chunks per commit; a document is never split between commits. None commits every ten seconds (256
            to 8,192 chunks) and commits what is ready when a build is interrupted. With `ONE_COMMIT`, and without
            `prune` or for some paths of a folder (`PathSource.only`), a complete index stays complete throughout.
        approximate_from: number of rows from which an approximate index is built (`backends/lance/approximate.py`);
            None never builds one.
        queries: real queries; up to 200 of them, in addition to rows, measure the approximate index's recall.
        wait: seconds to wait for another writer to finish.
        maintain: compact files, index new rows and remove old versions where that is due
            (`search_r3.index.backends.lance.compaction`). With False, call `maintain_index` from time to time; only for
            a complete index, written with `ONE_COMMIT`.
        source: a name for the source that stays the same wherever the documents are read from.
        take_over: replace documents of other sources that have the same ids. Otherwise such documents are left out and
            reported in `conflicts`, unless they are equal.
        may_prune: asked before documents that the source no longer has are removed; False keeps them.
        types: types of metadata fields by name: "text", "integer", "number" or "true/false". A column of another type
            is converted in place.
        backend: where a new index is stored ("lance", "numpy", or the name of another package's backend); None uses
            the backend of the index at `path`, or LanceDB for a new one. With other backends than LanceDB, ids have no
            prefixes, `types` is not supported and there is nothing to maintain; whole documents are written in batches
            of `commit_every` or 8,192 chunks.
        exchange: build a new index beside the one at `path`, and let it take its place in one step when it is done;
            only in Milvus.

    Raises:
        IndexBusy: another process is writing, or took over while this one was paused.
        StorageError: object storage failed or did not answer, or the disk is full or failing (DiskError); what was
            committed is kept.
        InputError: a document is malformed or its id is used twice, the index was made with another model, the folder
            contains something else, the source's name cannot be used, metadata does not fit its column, or the model
            returned NaN or the wrong dimension (nothing of that batch is written).
    """
    started = time.perf_counter()
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("commit_every", commit_every)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    location = for_writing(location_of(path))
    some_paths = getattr(documents, "only", None) is not None
    kind = _backend_for(location, backend, exchange, some_paths, types)
    if "streaming" not in kind.capabilities:
        return build_portable(
            location,
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
            exchange=exchange,
        )
    report = IndexReport()
    with storage_errors(location), writing(location, make=True, wait=wait) as lock:
        at_once = commit_every == ONE_COMMIT and (some_paths or not prune)
        build = BuildRun(location, lock, model, commit_every, report, at_once)
        diff = build.begin(documents, source, take_over, types, max_length, prune)
        with shown_progress(documents, progress) as shown:
            _run(build, diff, documents, shown, batch_tokens, batch_size)
        build.finish(diff, prune, may_prune, approximate_from, queries, maintain)
        diff.close()
    report.skipped = list(getattr(documents, "skipped", []))
    report.seconds = time.perf_counter() - started
    return report


def _backend_for(
    location: Location, name: str | None, exchange: bool, some_paths: bool, types: Mapping[str, str] | None
) -> type[IndexBackend]:
    """The backend to build with. Raises InputError if it cannot do what is asked."""
    kind = choose_backend(location, name)
    if exchange:
        kind.require("exchange", "--exchange")
    if some_paths:
        kind.require("streaming", "updates of single paths")
    if types:
        kind.require("streaming", "types of columns")
    return kind


def _run(
    build: BuildRun,
    diff: IndexDiff,
    documents: Iterable[SourceDocument],
    shown: BuildProgress,
    batch_tokens: int,
    most: int | None,
) -> None:
    """Run the stages: reading, tokenizing and writing each in a thread, embedding in this one."""
    model, report = build.model, build.report
    chunks_per_batch = min(build.commit_every or COMMIT_CHUNKS, COMMIT_CHUNKS)

    def tokenize(batch: ChangeBatch) -> tuple[ChangeBatch, Prepared]:
        return batch, prepare(model, list(batch.texts.values()), diff.max_length, batch_tokens, most)

    def encode(given: tuple[ChangeBatch, Prepared]) -> ChangeBatch:
        batch, prepared = given
        shown.begin_batch(batch.position, len(batch.texts), len(batch.rows) + batch.unchanged)
        matrix = embed(model, prepared, batch.names, diff.max_length, shown.advance)
        vector_of = batch.stored_vectors | dict(zip(batch.texts, matrix, strict=True))
        if batch.rows:
            batch.vectors = np.stack([vector_of[row[TEXT_HASH]] for row in batch.rows])
        report.documents += batch.documents
        report.embedded += len(matrix)
        report.truncated += prepared.truncated
        shown.end_batch(batch.documents)
        return batch

    read: Pipe[ChangeBatch] = Pipe(WAITING)
    tokenized: Pipe[tuple[ChangeBatch, Prepared]] = Pipe(WAITING)
    encoded: Pipe[ChangeBatch] = Pipe(WAITING)
    reader = start_stage("read", diff.batches(documents, chunks_per_batch), lambda batch: batch, read)
    start_stage("tokenize", read, tokenize, tokenized)
    writer = _Writer(build, encoded)
    writer.start()
    run_stage(tokenized, encode, encoded)
    try:
        writer.join()
    except KeyboardInterrupt:
        writer.join()  # a commit that has begun finishes in a moment; keep the lock until then
        raise
    finally:
        reader.join(STOP_SECONDS)  # it writes nothing, so one that waits for an unresponsive source may be left behind
    if writer.error is not None:
        raise writer.error


class _Writer(threading.Thread):
    """Commits the batches it receives. `error` is its own, or the one that ended the stages before it."""

    def __init__(self, build: BuildRun, encoded: Pipe[ChangeBatch]) -> None:
        super().__init__(name="write", daemon=True)
        self.build, self.encoded = build, encoded
        self.error: BaseException | None = None

    def run(self) -> None:
        waiting: list[ChangeBatch] = []
        last = time.monotonic()
        exact = self.build.commit_every
        try:
            try:
                for batch in self.encoded:
                    waiting.append(batch)
                    count = sum(len(one.rows) for one in waiting)
                    late = time.monotonic() - last >= COMMIT_SECONDS or count >= COMMIT_AT_MOST
                    if count >= (exact or COMMIT_CHUNKS) and (exact or late):
                        ready, waiting = waiting, []
                        self.build.commit(ready)
                        last = time.monotonic()
            except BaseException:
                if exact is None and waiting:  # an interruption loses nothing that is already embedded
                    self.build.commit(waiting)
                raise
            self.build.commit(waiting)
        except BaseException as error:
            self.error = error
        self.encoded.abandon()

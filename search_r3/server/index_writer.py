"""Writing to a server's index: changes that arrive during a commit share the next one.

A change is answered once it is committed; an invalid one fails without affecting others. Texts are embedded beforehand,
in separate threads. Commits and maintenance (compaction, removal of old versions) alternate in another thread, with
maintenance after the answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from search_r3.index.backends.lance.compaction import KEEP_VERSIONS
from search_r3.index.build.build_index import ONE_COMMIT
from search_r3.index.build.precompute_embeddings import CachedEncoder, precompute_embeddings
from search_r3.index.index_handle import IndexHandle, IndexUnavailable
from search_r3.index.index_info import ModelMismatch
from search_r3.index.maintenance import UnknownDocument, delete_each, maintain_index, update_documents
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import IndexBusy, Location, StorageError, storage_errors
from search_r3.server.batching.queued_encoder import QueuedEncoder
from search_r3.server.logs import log

WAIT_SECONDS = 10.0
"""How long a change waits for another process that is writing to the same index."""
MAX_DOCUMENTS_PER_COMMIT = 1000
"""Maximum number of documents in a commit, unless a single request has more."""


@dataclass(eq=False)
class Change:
    """The change that one request makes: documents to add or replace, or one document to delete.

    Attributes:
        documents: documents to add or replace; empty for a deletion.
        encoder: embeds them. If it is cancelled before the commit begins, nothing is written.
        deleted: id of the document to delete.
        vectors: embeddings of the documents' texts, by text, once they are known.
        chunks: number of chunks of the documents.
        committing: whether its commit has begun.
    """

    documents: list[SourceDocument] = field(default_factory=list)
    encoder: QueuedEncoder | None = None
    deleted: str = ""
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    chunks: int = 0
    committing: bool = False

    @property
    def ids(self) -> set[str]:
        return {document.id for document in self.documents} or {self.deleted}

    @property
    def begun(self) -> bool:
        """Whether embedding or the commit has begun."""
        return self.committing or (self.encoder is not None and self.encoder.begun)


Answer = int | Exception
Waiting = tuple[Change, asyncio.Future[int]]
"""A change, and the future of its answer.

The change itself does not refer to the future: an error in it would keep itself alive through the frames of its
traceback, with everything they refer to.
"""


class IndexWriter:
    """Commits changes in the order in which they become ready.

    Args:
        threads: number of changes whose documents are embedded concurrently; further ones wait.
        wait: seconds that a commit waits for another process that is writing.
    """

    def __init__(self, threads: int, wait: float = WAIT_SECONDS) -> None:
        self._embedding = ThreadPoolExecutor(threads, thread_name_prefix="embed")
        self._committing = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._wait = wait
        self._waiting: deque[Waiting] = deque()
        self._task: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Stop accepting changes."""
        self._embedding.shutdown(wait=False, cancel_futures=True)
        self._committing.shutdown(wait=False, cancel_futures=True)

    async def commit(self, index: IndexHandle, change: Change) -> int:
        """Write `change`; returns the number of chunks of the added or deleted documents.

        If this call is cancelled before the commit begins, nothing is written.

        Raises:
            UnknownDocument: the index does not have the document to delete.
            IndexUnavailable, ModelMismatch: the index is missing, or was replaced by one of another model.
            InputError: as for `build_index` and `delete_documents`.
        """
        loop = asyncio.get_running_loop()
        if change.documents:
            await loop.run_in_executor(self._embedding, _embed, index, change)
        done: asyncio.Future[int] = loop.create_future()
        self._waiting.append((change, done))
        self._begin(index)
        try:
            return await done
        finally:
            del done  # see `Waiting`

    def _begin(self, index: IndexHandle, idle: bool = False) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run(index, idle))

    async def _run(self, index: IndexHandle, idle: bool) -> None:
        with suppress(RuntimeError):  # at shutdown the threads accept no more work, and nobody waits
            await self._commit_all(index, idle)

    async def _commit_all(self, index: IndexHandle, idle: bool) -> None:
        """Commit waiting changes, including those that arrive meanwhile; if `idle`, first do maintenance."""
        loop = asyncio.get_running_loop()
        if self._idle is not None:
            self._idle.cancel()
        if idle:
            await loop.run_in_executor(self._committing, _maintain, index, True)
        committed = False
        while group := self._next():
            committed = True
            changes = [change for change, _ in group]
            answers = await loop.run_in_executor(self._committing, self._commit, index, changes)
            _answer(group, answers)
            for references in (group, changes, answers):  # the frames of an error refer to them: see `Waiting`
                references.clear()
            await loop.run_in_executor(self._committing, _maintain, index, False)
        if committed:
            seconds = KEEP_VERSIONS.total_seconds() + 1
            self._idle = loop.call_later(seconds, self._begin, index, True)

    def _next(self) -> list[Waiting]:
        """The changes to commit together next: either additions or deletions, each id only once."""
        group: list[Waiting] = []
        ids: set[str] = set()
        while self._waiting:
            change, done = self._waiting[0]
            if done.done() or (change.encoder is not None and change.encoder.cancelled):
                self._waiting.popleft()
                done.cancel()
                continue
            other = group and (bool(group[0][0].documents) is not bool(change.documents) or ids & change.ids)
            if other or (group and len(ids) + len(change.ids) > MAX_DOCUMENTS_PER_COMMIT):
                break
            ids |= change.ids
            change.committing = True
            group.append(self._waiting.popleft())
        return group

    def _commit(self, index: IndexHandle, changes: list[Change]) -> list[Answer]:
        """Commit changes; never raises. The index is checked before the answers, so later searches see the changes."""
        try:
            location = index.writable()
            return self._add(location, changes) if changes[0].documents else self._delete(index, location, changes)
        except Exception as error:
            return [error] * len(changes)
        finally:
            index.check()

    def _add(self, location: Location, changes: list[Change]) -> list[Answer]:
        try:
            return self._build(location, changes)
        except (IndexBusy, StorageError, ModelMismatch) as error:  # the changes are valid
            return [error] * len(changes)
        except Exception as error:
            if len(changes) == 1:
                return [error]
        answers: list[Answer] = []
        for change in changes:  # find the invalid one
            answers += self._add(location, [change])
        return answers

    def _build(self, location: Location, changes: list[Change]) -> list[Answer]:
        encoder = changes[0].encoder
        assert encoder is not None
        vectors = {text: vector for change in changes for text, vector in change.vectors.items()}
        documents = [document for change in changes for document in change.documents]
        # One commit: all is embedded before anything is written, so that a timeout leaves the index as it was.
        update_documents(
            location,
            documents,
            CachedEncoder(encoder, vectors),
            progress=False,
            commit_every=ONE_COMMIT,
            wait=self._wait,
            maintain=False,
        )
        return [change.chunks for change in changes]

    def _delete(self, index: IndexHandle, location: Location, changes: list[Change]) -> list[Answer]:
        ids = [change.deleted for change in changes]
        chunks = delete_each(location, ids, wait=self._wait, maintain=False, expected_info=index.info)
        unknown = UnknownDocument("there is no such document")
        return [chunks.get(change.deleted, unknown) for change in changes]


def _embed(index: IndexHandle, change: Change) -> None:
    """Embed the texts that the index lacks, before it is locked for writing."""
    encoder = change.encoder
    assert encoder is not None
    if encoder.cancelled:  # it was cancelled while waiting for a thread
        raise CancelledError
    ahead = CachedEncoder(encoder, change.vectors)  # keeps embeddings if the index is replaced meanwhile

    def embed(now: SearchIndex) -> int:
        with storage_errors(now.path):
            return precompute_embeddings(now, change.documents, ahead)[1]

    change.chunks = index.run(embed)


def _answer(group: Sequence[Waiting], answers: Sequence[Answer]) -> None:
    for (_, done), answer in zip(group, answers, strict=True):
        if done.done():  # nobody is waiting for it
            continue
        if isinstance(answer, Exception):
            done.set_exception(answer)
        else:
            done.set_result(answer)


def _maintain(index: IndexHandle, always: bool) -> None:
    try:
        if maintain_index(index.writable(), wait=0.0, always=always, expected_info=index.info):
            log("full text rebuilt")
    except (IndexBusy, IndexUnavailable, ModelMismatch):
        pass  # left to the other writer, or to the next change
    except Exception as error:
        log("maintenance of the index failed", 30, error)

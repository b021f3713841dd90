"""The changes of a server's index: those that wait while one is committed go together into the next commit.

A change is answered once it is committed. One that is wrong fails alone, also among others. Maintenance (files put
together, old versions removed) comes after the answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.index.ahead import Ahead, embed_ahead
from search_r3.index.build import ONE_COMMIT, build_index
from search_r3.index.compaction import KEEP_VERSIONS
from search_r3.index.maintenance import UnknownDocument, delete_each, maintain_index
from search_r3.index.readers import SourceDocument
from search_r3.index.sources import API
from search_r3.index.storage import IndexBusy, StorageError
from search_r3.server.encoder import QueuedEncoder
from search_r3.server.logs import log

WAIT_SECONDS = 10.0
"""How long a change waits for another process that writes the same index."""
TOGETHER = 1000
"""Documents that go into one commit, at most, unless a single request has more."""


@dataclass
class Change:
    """What one request changes, and how many chunks that were once it is committed.

    Attributes:
        documents: to add, or to replace those with their ids; none for a deletion.
        deleted: id of the document to delete.
        encoder, vectors: embed the documents; what is embedded by now.
        chunks: of the documents.
    """

    done: asyncio.Future[int]
    documents: list[SourceDocument] = field(default_factory=list)
    deleted: str = ""
    encoder: QueuedEncoder | None = None
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    chunks: int = 0

    @property
    def ids(self) -> set[str]:
        return {document.id for document in self.documents} or {self.deleted}


Answer = int | BaseException


class Writer:
    """Commits changes in the order in which they are ready, in one thread at a time.

    Args:
        threads: where the work is done.
        wait: seconds that a commit waits for another process that writes.
    """

    def __init__(self, threads: Executor, wait: float = WAIT_SECONDS) -> None:
        self._threads, self._wait = threads, wait
        self._waiting: deque[Change] = deque()
        self._working: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def add(
        self, index: Any, documents: list[SourceDocument], encoder: QueuedEncoder, follow: Callable[[Any], None]
    ) -> int:
        """Add `documents`, or replace those whose ids the index has; returns their chunks.

        Args:
            index: has a `path` and a `table` to read.
            encoder: of this request. Once it is cancelled nothing of the request is written, unless it is being so.
            follow: called with the index, in a thread, once a change is committed.

        Raises:
            InputError: as `build_index`.
        """
        loop = asyncio.get_running_loop()

        def embedded() -> tuple[dict[str, np.ndarray], int]:
            try:
                return embed_ahead(index.table, documents, encoder)
            except (OSError, RuntimeError):  # files of the version that was open are gone
                follow(index)
                return embed_ahead(index.table, documents, encoder)

        vectors, chunks = await loop.run_in_executor(self._threads, embedded)
        change = Change(loop.create_future(), documents, encoder=encoder, vectors=vectors, chunks=chunks)
        return await self._committed(index, change, follow)

    async def delete(self, index: Any, identifier: str, follow: Callable[[Any], None]) -> int:
        """Delete a document; returns how many chunks it had. Raises UnknownDocument."""
        change = Change(asyncio.get_running_loop().create_future(), deleted=identifier)
        return await self._committed(index, change, follow)

    async def _committed(self, index: Any, change: Change, follow: Callable[[Any], None]) -> int:
        self._waiting.append(change)
        if self._working is None or self._working.done():
            self._working = asyncio.ensure_future(self._work(index, follow))
        return await change.done

    async def _work(self, index: Any, follow: Callable[[Any], None]) -> None:
        loop = asyncio.get_running_loop()
        if self._idle is not None:
            self._idle.cancel()
        while group := self._next():
            try:
                answers = await loop.run_in_executor(self._threads, self._commit, index, group, follow)
            except BaseException as error:
                answers = [error] * len(group)
            for change, answer in zip(group, answers, strict=True):
                if change.done.done():  # nobody waits any more
                    continue
                if isinstance(answer, BaseException):
                    change.done.set_exception(answer)
                else:
                    change.done.set_result(answer)
            await loop.run_in_executor(self._threads, self._maintain, index, False)
        seconds = KEEP_VERSIONS.total_seconds() + 1
        self._idle = loop.call_later(seconds, self._when_idle, index)

    def _when_idle(self, index: Any) -> None:
        if self._working is None or self._working.done():
            asyncio.get_running_loop().run_in_executor(self._threads, self._maintain, index, True)

    def _next(self) -> list[Change]:
        """The changes that are committed together next: additions or deletions, no id twice."""
        group: list[Change] = []
        ids: set[str] = set()
        while self._waiting:
            change = self._waiting[0]
            if change.done.done() or (change.encoder is not None and change.encoder.cancelled):
                self._waiting.popleft()
                change.done.cancel()
                continue
            other = group and (bool(group[0].documents) is not bool(change.documents) or ids & change.ids)
            if other or (group and len(ids) + len(change.ids) > TOGETHER):
                break
            ids |= change.ids
            group.append(self._waiting.popleft())
        return group

    def _commit(self, index: Any, group: list[Change], follow: Callable[[Any], None]) -> list[Answer]:
        try:
            if group[0].documents:
                return self._add(index, group)
            return self._delete(index, group)
        finally:
            follow(index)

    def _add(self, index: Any, group: list[Change]) -> list[Answer]:
        try:
            return self._build(index, group)
        except (IndexBusy, StorageError) as error:
            return [error] * len(group)
        except Exception as error:
            if len(group) == 1:
                return [error]
        answers: list[Answer] = []
        for change in group:  # one of them is wrong
            answers += self._add(index, [change])
        return answers

    def _build(self, index: Any, group: list[Change]) -> list[Answer]:
        encoder = group[0].encoder
        assert encoder is not None
        vectors = {text: vector for change in group for text, vector in change.vectors.items()}
        documents = [document for change in group for document in change.documents]
        # One commit: all is embedded before anything is written, so that a timeout leaves the index as it was.
        build_index(
            index.path,
            documents,
            Ahead(encoder, vectors),
            prune=False,
            progress=False,
            commit_every=ONE_COMMIT,
            wait=self._wait,
            maintain=False,
            source=API,
            take_over=True,
        )
        return [change.chunks for change in group]

    def _delete(self, index: Any, group: list[Change]) -> list[Answer]:
        try:
            chunks = delete_each(index.path, [change.deleted for change in group], wait=self._wait, maintain=False)
        except InputError as error:
            return [error] * len(group)
        unknown = UnknownDocument("there is no such document")
        return [chunks.get(change.deleted, unknown) for change in group]

    def _maintain(self, index: Any, always: bool) -> None:
        try:
            if maintain_index(index.path, wait=0.0, always=always):
                log("full text rebuilt")
        except IndexBusy:
            pass  # who writes there does it, or the next change
        except Exception as error:
            log("maintenance of the index failed", 30, error)

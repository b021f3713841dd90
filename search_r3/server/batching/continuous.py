"""Continuous batching: reasoned queries share one forward pass per token, and each can join and leave at any token.

One thread owns the model. Between tokens it removes queries whose clients have disconnected, admits waiting queries to
free slots, and runs passes over documents and direct queries. Neither side starves: while queries are being generated,
such a pass has at most `shared_tokens` tokens, and before the next one generation gets as much time as the pass took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from search_r3.model.tokenization import TextStream, Tokens
from search_r3.server.batching.batcher import Embedded, Kind
from search_r3.server.batching.query_cache import Key, QueryCache
from search_r3.server.batching.static_batching import Model, QueuedText, StaticBatcher, send_reasoning, shutting_down
from search_r3.server.logs import log
from search_r3.server.metrics import Metrics
from search_r3.server.server_config import ServerConfig

UNREASONED: tuple[Kind, ...] = ("document", "query", "latent", "given", "reading")
"""What is embedded in passes of its own, without generating anything; reasoned queries share theirs."""


class Slots(Protocol):
    """The part of `ConcurrentReasoning` used here."""

    def __len__(self) -> int: ...
    def join(self, texts: Sequence[Tokens], budgets: Sequence[int]) -> list[int]: ...
    def step(self) -> Sequence[Any]: ...
    def leave(self, handles: Sequence[int]) -> None: ...
    def clear(self) -> None: ...


@dataclass(eq=False)
class _Row:
    """A query that is being generated, and all requests that asked it."""

    key: Key
    text: Tokens
    tokenizer: Any
    asked_by: list[QueuedText] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    rewriting: int = 0  # tokens of `written` still to be generated a second time
    seconds: float = 0.0  # its share of the time of its steps
    _stream: TextStream | None = None
    _sent: str = ""

    @property
    def budget(self) -> int:
        return self.key[2]

    @property
    def wanted(self) -> bool:
        return any(not queued.job.future.done() for queued, _ in self.asked_by)

    def attach(self, text: QueuedText) -> None:
        """Add a request for this query; if it streams, send it what is written so far."""
        self.asked_by.append(text)
        if self._streams(text):
            if self._stream is None:
                self._stream = TextStream(self.tokenizer)
                self._sent = "".join(self._stream.push(token) for token in self.written)
            self._send_to([text], self._sent)

    def push(self, token: int) -> None:
        """Add a token."""
        if self.rewriting:
            self.rewriting -= 1
            return
        self.written.append(token)
        if self._stream is not None:
            self._send(self._stream.push(token))

    def finish(self) -> None:
        """Flush the stream: the trace is complete."""
        if self._stream is not None:
            self._send(self._stream.finish())

    def fail(self, error: BaseException) -> None:
        """Fail all requests that asked this query."""
        for queued, _ in self.asked_by:
            queued.job.fail(error)

    def _send(self, piece: str) -> None:
        self._sent += piece
        self._send_to([text for text in self.asked_by if self._streams(text)], piece)

    def _send_to(self, texts: Sequence[QueuedText], piece: str) -> None:
        for queued, _ in texts:
            if piece and queued.job.on_text is not None and not queued.job.future.done():
                try:
                    queued.job.on_text(piece)
                except Exception as error:  # only this listener's error
                    queued.job.fail(error)

    @staticmethod
    def _streams(text: QueuedText) -> bool:
        queued, position = text
        return position == 0 and queued.job.on_text is not None


class ContinuousBatcher(StaticBatcher):
    """A `Batcher` that generates the reasoning of many queries concurrently, in slots.

    Args:
        model: embeds documents and direct queries; provides the tokenizer.
        slots: generate the reasoning; used only from the batcher's thread.
        clock: returns seconds, for sharing time.
    """

    def __init__(
        self,
        model: Model,
        slots: Slots,
        config: ServerConfig,
        cache: QueryCache,
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(model, config, cache, metrics, start=False)
        self._slots, self._clock = slots, clock
        self._rows: dict[int, _Row] = {}
        self._owed = 0.0  # seconds of generation before the next pass over documents or direct queries
        metrics.watch_slots(config.slots, lambda: len(self._rows))
        self._thread.start()

    def _run(self) -> None:
        while self._wait():
            self._admit()
            self._step()
            self._run_pass()
        for row in self._rows.values():
            row.fail(shutting_down())
        self._rows.clear()

    def _wait(self) -> bool:
        """Wait until there is something to do; False if the batcher is to stop."""
        with self._changed:
            while not (self._rows or self._queues or self._closing):
                self._changed.wait()
            return bool(self._rows or self._queues) and not self._giving_up

    def _others_wait(self) -> bool:
        return bool(self._rows) or super()._others_wait()

    def _admit(self) -> None:
        """Admit waiting queries to free slots; a query whose answer is cached or being generated needs none."""
        free = self.config.slots - len(self._rows)
        if free <= 0:
            return
        with self._changed:
            batch = self._next_batch(("reasoned",), free, self.config.shared_tokens)
        if batch is None:
            return
        joining: dict[Key, _Row] = {}
        for queued, position in batch[1]:
            text = queued.job.texts[position]
            key = self._key(queued.job, text)
            row = joining.get(key) or next((row for row in self._rows.values() if row.key == key), None)
            if row is None and (cached := self.cache.get(key)) is not None:
                send_reasoning(queued.job, position, cached)
                queued.set_answer(position, cached)
                continue
            if row is None:
                row = joining[key] = _Row(key, text, self.model.tokenizer)
            row.attach((queued, position))
        if joining:
            self._join(list(joining.values()))

    def _join(self, rows: Sequence[_Row]) -> None:
        started = self._clock()
        try:
            handles = self._slots.join([row.text for row in rows], [row.budget for row in rows])
        except Exception as error:
            if len(rows) == 1:
                log("query failed", 40, error)
                rows[0].fail(error)
                return
            for row in rows:  # separately, so that only the query that causes the error fails
                self._join([row])
            return
        seconds = self._clock() - started
        self._owed = max(0.0, self._owed - seconds)
        for handle, row in zip(handles, rows, strict=True):
            row.seconds += seconds / len(rows)
            self._rows[handle] = row
            self.metrics.tokens.labels("prompt").inc(len(row.text.ids))

    def _step(self) -> None:
        """Generate one token of every query that is still wanted."""
        started = self._clock()
        try:
            if gone := [handle for handle, row in self._rows.items() if not row.wanted]:
                self._slots.leave(gone)
                for handle in gone:
                    del self._rows[handle]
            steps = self._slots.step() if self._rows else []
        except Exception as error:
            self._regenerate_separately(error)
            return
        if not steps:
            return
        seconds = self._clock() - started
        self._owed = max(0.0, self._owed - seconds)
        self.metrics.batch_texts.labels("reasoned").observe(len(steps))
        self.metrics.batch_seconds.labels("reasoned").observe(seconds)
        for step in steps:
            row = self._rows[step.handle]
            row.seconds += seconds / len(steps)
            if self._advance(row, step):
                del self._rows[step.handle]

    def _advance(self, row: _Row, step: Any) -> bool:
        """Apply a step's result to a query; returns whether it has finished."""
        if step.reasoned is None:
            self.metrics.tokens.labels("reasoning").inc()
            self.metrics.reasoning_rate.add(1)
            row.push(step.token)
            return False
        row.finish()
        self._record_seconds("reasoned", row.seconds)
        reasoned = step.reasoned
        answer = Embedded(reasoned.embedding, reasoned.text, int(reasoned.num_tokens), bool(reasoned.forced))
        self._set_answer(row.asked_by, answer, row.key)
        return True

    def _regenerate_separately(self, error: Exception) -> None:
        """After a failed step: generate each query again, one by one, so that only the one that caused it fails."""
        rows = list(self._rows.values())
        log("step failed", 40, error, texts=len(rows))
        self._rows.clear()
        self._slots.clear()
        for row in rows:
            if len(rows) == 1:
                row.fail(error)
                continue
            row.rewriting = len(row.written)
            try:
                self._slots.join([row.text], [row.budget])
                while len(self._slots) and row.wanted and not self._giving_up:
                    for step in self._slots.step():
                        self._advance(row, step)
            except Exception as its_own:
                log("query failed", 40, its_own)
                row.fail(its_own)
            if self._giving_up:
                row.fail(shutting_down())
            self._slots.clear()

    def _run_pass(self) -> None:
        """Run one pass over documents, or over queries without reasoning in words, if it is their turn."""
        if self._rows and self._owed > 0:
            return
        with self._changed:
            batch = self._next_batch(UNREASONED, None, self.config.shared_tokens if self._rows else None)
        if batch is not None:
            started = self._clock()
            self._run_batch(*batch)
            self._owed = self._clock() - started

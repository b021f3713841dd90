"""Continuous batching: reasoned queries share one pass a token, and each joins and leaves at a token of its own.

One thread owns the model. Between two tokens it lets go of queries that nobody waits for, lets waiting ones into free
slots, and passes over documents and direct queries. Neither side starves: while queries are being written, such a pass
has at most `shared_tokens` tokens, and as long as it took belongs to the writing before the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from search_r3.model.tokenization import TextStream, Tokens
from search_r3.server.batching.batcher import Embedded
from search_r3.server.batching.query_cache import Key, ReasonedCache
from search_r3.server.batching.static_batching import Model, ThreadBatcher, Unit, shutting_down, tell_all
from search_r3.server.logs import log
from search_r3.server.metrics import Metrics
from search_r3.server.server_config import ServerConfig


class Slots(Protocol):
    """What of `ConcurrentReasoning` is used here."""

    def __len__(self) -> int: ...
    def join(self, texts: Sequence[Tokens], budgets: Sequence[int]) -> list[int]: ...
    def step(self) -> Sequence[Any]: ...
    def leave(self, handles: Sequence[int]) -> None: ...
    def clear(self) -> None: ...


@dataclass(eq=False)
class _Row:
    """A query that is being written, and everyone who asked it."""

    key: Key
    text: Tokens
    tokenizer: Any
    units: list[Unit] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    again: int = 0  # tokens of `written` that are being written a second time
    seconds: float = 0.0  # its share of the time that its steps took
    _stream: TextStream | None = None
    _shown: str = ""

    @property
    def budget(self) -> int:
        return self.key[2]

    @property
    def wanted(self) -> bool:
        return any(not line.work.future.done() for line, _ in self.units)

    def attach(self, unit: Unit) -> None:
        """One more who asked; who listens is told what is written already."""
        self.units.append(unit)
        if self._listens(unit):
            if self._stream is None:
                self._stream = TextStream(self.tokenizer)
                self._shown = "".join(self._stream.push(token) for token in self.written)
            self._tell([unit], self._shown)

    def push(self, token: int) -> None:
        """One more token."""
        if self.again:
            self.again -= 1
            return
        self.written.append(token)
        if self._stream is not None:
            self._say(self._stream.push(token))

    def finish(self) -> None:
        """There is no more to come."""
        if self._stream is not None:
            self._say(self._stream.finish())

    def _say(self, piece: str) -> None:
        self._shown += piece
        self._tell([unit for unit in self.units if self._listens(unit)], piece)

    def _tell(self, units: Sequence[Unit], piece: str) -> None:
        for line, _ in units:
            if piece and line.work.on_text is not None and not line.work.future.done():
                try:
                    line.work.on_text(piece)
                except Exception as error:  # its own fault, and nobody else's
                    line.work.fail(error)

    @staticmethod
    def _listens(unit: Unit) -> bool:
        line, place = unit
        return place == 0 and line.work.on_text is not None


class ContinuousBatcher(ThreadBatcher):
    """A `Batcher` that writes many queries' reasoning side by side, in slots.

    Args:
        model: for documents, direct queries and the tokenizer.
        slots: where queries are reasoned about; used from the batcher's thread alone.
        clock: seconds, for the sharing of time.
    """

    def __init__(
        self,
        model: Model,
        slots: Slots,
        config: ServerConfig,
        cache: ReasonedCache,
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._slots, self._clock = slots, clock
        self._rows: dict[int, _Row] = {}
        self._owed = 0.0  # seconds that belong to the writing before the next pass
        metrics.watch_slots(config.slots, lambda: len(self._rows))
        super().__init__(model, config, cache, metrics)

    def _run(self) -> None:
        while self._wait():
            self._let_in()
            self._write()
            self._pass()
        for row in self._rows.values():
            self._fail(row, shutting_down())
        self._rows.clear()

    def _wait(self) -> bool:
        """Until there is something to do; False if there will be nothing more."""
        with self._changed:
            while not (self._rows or self._queues or self._closing):
                self._changed.wait()
            return bool(self._rows or self._queues) and not self._giving_up

    def _let_in(self) -> None:
        """Waiting queries into free slots; who asks what is known or being written needs none."""
        free = self.config.slots - len(self._rows)
        if free <= 0:
            return
        with self._changed:
            batch = self._take(("reasoned",), free, self.config.shared_tokens)
        if batch is None:
            return
        joining: dict[Key, _Row] = {}
        for line, place in batch[1]:
            text = line.work.texts[place]
            key = self._key(line.work, text)
            row = joining.get(key) or next((row for row in self._rows.values() if row.key == key), None)
            if row is None and (known := self.cache.get(key)) is not None:
                tell_all(line.work, place, known)
                line.give(place, known)
                continue
            if row is None:
                row = joining[key] = _Row(key, text, self.model.tokenizer)
            row.attach((line, place))
        if joining:
            self._begin(list(joining.values()))

    def _begin(self, rows: Sequence[_Row]) -> None:
        started = self._clock()
        try:
            handles = self._slots.join([row.text for row in rows], [row.budget for row in rows])
        except Exception as error:
            if len(rows) == 1:
                log("query failed", 40, error)
                self._fail(rows[0], error)
                return
            for row in rows:  # whose fault was it?
                self._begin([row])
            return
        seconds = self._clock() - started
        self._owed = max(0.0, self._owed - seconds)
        for handle, row in zip(handles, rows, strict=True):
            row.seconds += seconds / len(rows)
            self._rows[handle] = row
            self.metrics.tokens.labels("prompt").inc(len(row.text.ids))

    def _write(self) -> None:
        """One token of every query that somebody waits for."""
        started = self._clock()
        try:
            if gone := [handle for handle, row in self._rows.items() if not row.wanted]:
                self._slots.leave(gone)
                for handle in gone:
                    del self._rows[handle]
            steps = self._slots.step() if self._rows else []
        except Exception as error:
            self._write_alone(error)
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
        """What a step did for a query; whether it has ended."""
        if step.reasoned is None:
            self.metrics.tokens.labels("reasoning").inc()
            self.metrics.reasoning_rate.add(1)
            row.push(step.token)
            return False
        row.finish()
        self._took("reasoned", row.seconds)
        found = step.reasoned
        answer = Embedded(found.embedding, found.text, int(found.num_tokens), bool(found.forced))
        self._give(row.units, answer, row.key)
        return True

    def _write_alone(self, error: Exception) -> None:
        """A step failed: write each query again from its beginning, alone, so that it fails only whose fault it was."""
        rows = list(self._rows.values())
        log("step failed", 40, error, texts=len(rows))
        self._rows.clear()
        self._slots.clear()
        for row in rows:
            if len(rows) == 1:
                self._fail(row, error)
                continue
            row.again = len(row.written)
            try:
                self._slots.join([row.text], [row.budget])
                while len(self._slots) and row.wanted and not self._giving_up:
                    for step in self._slots.step():
                        self._advance(row, step)
            except Exception as its_own:
                log("query failed", 40, its_own)
                self._fail(row, its_own)
            if self._giving_up:
                self._fail(row, shutting_down())
            self._slots.clear()

    def _pass(self) -> None:
        """One pass over documents or direct queries, if it is their turn."""
        if self._rows and self._owed > 0:
            return
        with self._changed:
            batch = self._take(("document", "query"), None, self.config.shared_tokens if self._rows else None)
        if batch is not None:
            started = self._clock()
            self._do(*batch)
            self._owed = self._clock() - started

    def _fail(self, row: _Row, error: BaseException) -> None:
        for line, _ in row.units:
            line.work.fail(error)

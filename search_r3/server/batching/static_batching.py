"""One thread that owns the model: what waits is taken in batches of one kind, kinds in turn, requests side by side.

Within a kind, requests share by tokens (self-clocked fair queueing: Golestani, 1994): the next text is the one that
would end first if all requests that wait advanced at the same rate. So a request of a thousand documents is done in
many passes, a short text that arrives meanwhile goes before the long ones, and no text waits for ever. There is no
waiting for a batch to fill: it is what has gathered while the last one ran. This is static batching, where a batch of
reasoned queries ends when the longest does; `continuous` builds on it.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import numpy as np

from search_r3.model.tokenization import TextStream, Tokens
from search_r3.server.batching.batcher import Closed, Embedded, Kind, Work
from search_r3.server.batching.query_cache import Key, ReasonedCache
from search_r3.server.errors import ApiError
from search_r3.server.logs import log
from search_r3.server.metrics import Metrics
from search_r3.server.server_config import ServerConfig

SMOOTHING = 0.2
"""Weight of the newest batch in the running mean of seconds a text."""


class Model(Protocol):
    """What of `SearchR3` is used here."""

    contract_hash: str
    tokenizer: Any

    def encode_document(self, texts: Any, *, batch_size: int, show_progress_bar: bool | None) -> Any: ...
    def encode_query(self, texts: Any, *, reasoning: bool, batch_size: int, show_progress_bar: bool | None) -> Any: ...
    def reason(
        self,
        texts: Any,
        *,
        max_reasoning_tokens: Sequence[int],
        batch_size: int,
        show_progress_bar: bool | None,
        on_token: Callable[[int, int], None] | None,
    ) -> Any: ...


@dataclass(eq=False)
class Line:
    """A work in the queue: which of its texts are still to be begun, and the answers so far."""

    work: Work
    todo: deque[int]
    answers: list[Embedded | None]
    started_at: int = 0
    """Virtual time, in tokens, at which its next text begins."""

    @property
    def next_tokens(self) -> int:
        """Tokens of its next text."""
        return len(self.work.texts[self.todo[0]].ids)

    def give(self, place: int, answer: Embedded) -> None:
        """The answer to the text at `place`; with the last one the work is finished."""
        self.answers[place] = answer
        done = [a for a in self.answers if a is not None]
        if len(done) == len(self.answers):
            self.work.finish(done)


Unit = tuple[Line, int]
"""One text of a work."""


class _AbandonedError(Exception):
    """Nobody waits for the running batch any more."""


class ThreadBatcher:
    """A `Batcher` over a synchronous model."""

    def __init__(self, model: Model, config: ServerConfig, cache: ReasonedCache, metrics: Metrics) -> None:
        self.model, self.config, self.cache, self.metrics = model, config, cache, metrics
        self._queues: OrderedDict[Kind, list[Line]] = OrderedDict()
        self._virtual_time: dict[Kind, int] = {}
        self._seconds: dict[Kind, float] = {}
        self._changed = threading.Condition()
        self._closing = self._giving_up = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        """See `Batcher.submit`. What the cache holds is answered at once."""
        line = Line(work, deque(), [None] * len(work.texts))
        for place, text in enumerate(work.texts):
            known = self.cache.get(self._key(work, text)) if work.kind == "reasoned" else None
            if work.kind == "reasoned":
                self.metrics.cache.labels("yes" if known else "no").inc()
            if known is None:
                line.todo.append(place)
            else:
                tell_all(work, place, known)
                line.give(place, known)
        with self._changed:
            if self._closing:
                raise Closed
            if line.todo:
                line.started_at = self._virtual_time.get(work.kind, 0)
                self._queues.setdefault(work.kind, []).append(line)
                self._changed.notify()

    def waiting(self) -> tuple[int, int]:
        """See `Batcher.waiting`."""
        with self._changed:
            lines = [line for queue in self._queues.values() for line in queue if not line.work.future.done()]
            texts = sum(len(line.todo) for line in lines)
            return texts, sum(len(line.work.texts[place].ids) for line in lines for place in line.todo)

    def seconds_left(self) -> float:
        """See `Batcher.seconds_left`: texts that wait, times the seconds that their kind has taken of late."""
        with self._changed:
            return sum(
                len(line.todo) * self._seconds.get(kind, 0.0) for kind, queue in self._queues.items() for line in queue
            )

    def close(self, grace: float) -> bool:
        """See `Batcher.close`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(grace)
        if not self._thread.is_alive():
            return True
        with self._changed:
            self._giving_up = True
            for queue in self._queues.values():
                for line in queue:
                    line.work.fail(shutting_down())
            self._changed.notify()
        self._thread.join(2)
        return False

    def _key(self, work: Work, text: Tokens) -> Key:
        return self.model.contract_hash, text.ids, work.budget

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (batch := self._take()):
                    if self._closing:
                        return
                    self._changed.wait()
            self._do(*batch)

    def _take(
        self, kinds: Sequence[Kind] = get_args(Kind), most_texts: int | None = None, most_tokens: int | None = None
    ) -> tuple[Kind, list[Unit]] | None:
        """The next batch: of the kind whose turn it is, requests sharing it by tokens, until it is full."""
        most_texts = min(most_texts or self.config.batch_texts, self.config.batch_texts)
        most_tokens = most_tokens or self.config.batch_tokens
        for kind in [key for key in self._queues if key in kinds]:
            waiting = [line for line in self._queues.pop(kind) if not (line.work.future.done() or self._giving_up)]
            order = [(line.started_at + line.next_tokens, place, line) for place, line in enumerate(waiting)]
            heapq.heapify(order)
            units: list[Unit] = []
            tokens = 0
            while order and len(units) < most_texts:
                ends_at, place, line = order[0]
                if units and tokens + line.next_tokens > most_tokens:
                    break
                heapq.heappop(order)
                tokens += line.next_tokens
                self._virtual_time[kind] = line.started_at = ends_at
                units.append((line, line.todo.popleft()))
                line.work.begun = True
                if line.todo:
                    heapq.heappush(order, (line.started_at + line.next_tokens, place, line))
            if waiting := [line for line in waiting if line.todo]:
                self._queues[kind] = waiting  # at the end: the other kinds' turn
            if units:
                return kind, units
        return None

    def _do(self, kind: Kind, units: list[Unit]) -> None:
        started = time.perf_counter()
        try:
            self._embed(kind, units)
        except _AbandonedError:
            return
        except Exception as error:
            lines = list(dict.fromkeys(line for line, _ in units))
            if len(lines) == 1:
                log("batch failed", 40, error, kind=kind, texts=len(units))
                lines[0].work.fail(error)
                return
            for line in lines:  # whose fault was it?
                self._do(kind, [unit for unit in units if unit[0] is line])
            return
        seconds = time.perf_counter() - started
        self._took(kind, seconds / len(units))
        self.metrics.batch_texts.labels(kind).observe(len(units))
        self.metrics.batch_seconds.labels(kind).observe(seconds)

    def _took(self, kind: Kind, seconds: float) -> None:
        """Remember what one text of this kind took."""
        mean = self._seconds.get(kind, seconds)
        self._seconds[kind] = mean + SMOOTHING * (seconds - mean)

    def _embed(self, kind: Kind, units: list[Unit]) -> None:
        places: dict[tuple[Tokens, int], list[Unit]] = {}  # the same text twice is one row
        for line, place in units:
            places.setdefault((line.work.texts[place], line.work.budget), []).append((line, place))
        texts, budgets = [text for text, _ in places], [budget for _, budget in places]
        if kind == "reasoned":
            answers = self._reason(texts, list(places.values()), budgets)
        else:
            if kind == "document":
                vectors = self.model.encode_document(texts, batch_size=len(texts), show_progress_bar=False)
            else:
                vectors = self.model.encode_query(
                    texts, reasoning=False, batch_size=len(texts), show_progress_bar=False
                )
            answers = [Embedded(vector) for vector in vectors]
        self.metrics.tokens.labels("prompt").inc(sum(len(text.ids) for text in texts))
        for (text, budget), answer in zip(places, answers, strict=True):
            key = (self.model.contract_hash, text.ids, budget) if kind == "reasoned" else None
            self._give(places[text, budget], answer, key)

    def _give(self, units: Sequence[Unit], answer: Embedded, key: Key | None) -> None:
        """The answer to everyone who asked for it, and into the cache where it has a key."""
        bad = not np.isfinite(answer.vector).all() or not answer.vector.any()
        if key is not None and not bad:
            self.cache.put(key, answer)
        for line, place in units:
            if bad:
                line.work.fail(ApiError(500, f"the model gave no usable embedding for text {place}", "bad_embedding"))
            else:
                line.give(place, answer)

    def _reason(self, texts: list[Tokens], units: list[list[Unit]], budgets: list[int]) -> list[Embedded]:
        works = [line.work for row in units for line, _ in row]
        listeners = [[w.on_text for line, place in row if place == 0 and (w := line.work).on_text] for row in units]
        streams = [TextStream(self.model.tokenizer) if row else None for row in listeners]

        def on_token(row: int, token: int) -> None:
            if self._giving_up or all(work.future.done() for work in works):
                raise _AbandonedError
            if (stream := streams[row]) is not None:
                tell(listeners[row], stream.push(token))

        found = self.model.reason(
            texts, max_reasoning_tokens=budgets, batch_size=len(texts), show_progress_bar=False, on_token=on_token
        )
        for row, stream in enumerate(streams):
            if stream is not None:
                tell(listeners[row], stream.finish())
        self.metrics.tokens.labels("reasoning").inc(sum(r.num_tokens for r in found))
        return [Embedded(r.embedding, r.text, int(r.num_tokens), bool(r.forced)) for r in found]


def shutting_down() -> ApiError:
    """What to tell those whose work is given up."""
    return ApiError(503, "the server is shutting down; try again", "shutting_down")


def tell(listeners: Sequence[Callable[[str], None] | None], piece: str) -> None:
    """A piece of an analysis to those who listen."""
    for listener in listeners:
        if piece and listener is not None:
            listener(piece)


def tell_all(work: Work, place: int, known: Embedded) -> None:
    """The whole analysis at once, to one who listens."""
    if work.on_text is not None and place == 0:
        tell([work.on_text], known.reasoning or "")

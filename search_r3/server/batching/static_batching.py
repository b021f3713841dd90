"""Static batching: one thread owns the model and runs waiting texts in single-kind batches, round-robin over kinds.

Within a kind, requests share the model by tokens (self-clocked fair queueing: Golestani, 1994): the next text is the
one that would finish first if all waiting requests advanced equally fast. So a request of a thousand documents takes
many passes, a short text that arrives meanwhile overtakes the long ones, and no text starves. Oversized jobs (a client
posts megabytes, of which 512 tokens are read) run one text at a time, when nothing else waits or with a tenth of the
tokens that other jobs have had. The thread never waits for a batch to fill: it takes what arrived during the previous
one. A batch of reasoned queries ends when the longest one does; `continuous` extends this module to avoid that.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

import numpy as np

from search_r3.model.tokenization import TextStream, Tokens
from search_r3.server.batching.batcher import BatcherClosed, Embedded, EmbeddingJob, Kind
from search_r3.server.batching.query_cache import Key, QueryCache
from search_r3.server.errors import ApiError
from search_r3.server.logs import log
from search_r3.server.metrics import Metrics
from search_r3.server.server_config import ServerConfig

SMOOTHING = 0.2
"""Weight of the latest batch in the running mean of seconds per text."""
OVERSIZED_SHARE = 0.1
"""Tokens that oversized jobs get per token of other jobs while those wait."""
OVERSIZED_CREDIT = 1024
"""Maximum number of tokens of that share that can be saved up."""


class Model(Protocol):
    """The part of `SearchR3` used here."""

    contract_hash: str
    tokenizer: Any

    def encode_document(self, texts: Any, *, batch_size: int, show_progress_bar: bool | None) -> Any: ...
    def encode_query(self, texts: Any, *, reasoning: Any, batch_size: int, show_progress_bar: bool | None) -> Any: ...
    def encode_with_reasoning(
        self, texts: Any, reasoning: Any, *, batch_size: int, show_progress_bar: bool | None
    ) -> Any: ...
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
class QueuedJob:
    """A job in the queue: the positions of its texts that have not begun (`todo`), and the answers so far."""

    job: EmbeddingJob
    todo: deque[int]
    answers: list[Embedded | None]
    started_at: int = 0
    """Virtual time in tokens at which its next text begins."""

    @property
    def next_tokens(self) -> int:
        """The number of tokens of its next text."""
        return self.job.tokens_of(self.todo[0])

    def set_answer(self, position: int, answer: Embedded) -> None:
        """Set the answer for the text at `position`; the last one finishes the job."""
        self.answers[position] = answer
        done = [a for a in self.answers if a is not None]
        if len(done) == len(self.answers):
            self.job.finish(done)


QueuedText = tuple[QueuedJob, int]
"""A text of a job: the job, and the text's position in it."""


def tokens_of(batch: Sequence[QueuedText]) -> int:
    """The number of tokens of a batch, including those that may be generated."""
    return sum(queued.job.tokens_of(position) + queued.job.budget for queued, position in batch)


class _JobsCancelled(Exception):
    """All jobs of the running batch were cancelled."""


class StaticBatcher:
    """A `Batcher` over a synchronous model.

    Args:
        start: start the thread that owns the model; a subclass that has more to set up starts it itself.
    """

    def __init__(
        self, model: Model, config: ServerConfig, cache: QueryCache, metrics: Metrics, *, start: bool = True
    ) -> None:
        self.model, self.config, self.cache, self.metrics = model, config, cache, metrics
        self._queues: OrderedDict[Kind, list[QueuedJob]] = OrderedDict()
        self._virtual_time: dict[Kind, int] = {}
        self._oversized_credit = 0.0  # tokens
        self._seconds: dict[Kind, float] = {}
        self._changed = threading.Condition()
        self._closing = self._giving_up = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        if start:
            self._thread.start()

    def submit(self, job: EmbeddingJob) -> None:
        """See `Batcher.submit`. Cached answers are set immediately."""
        queued = QueuedJob(job, deque(), [None] * len(job.texts))
        for position, text in enumerate(job.texts):
            cached = self.cache.get(self._key(job, text)) if job.kind == "reasoned" else None
            if job.kind == "reasoned":
                self.metrics.cache.labels("yes" if cached else "no").inc()
            if cached is None:
                queued.todo.append(position)
            else:
                send_reasoning(job, position, cached)
                queued.set_answer(position, cached)
        with self._changed:
            if self._closing:
                raise BatcherClosed
            if queued.todo:
                queued.started_at = self._virtual_time.get(job.kind, 0)
                self._queues.setdefault(job.kind, []).append(queued)
                self._changed.notify()

    def waiting(self) -> tuple[int, int]:
        """See `Batcher.waiting`."""
        with self._changed:
            jobs = [queued for queue in self._queues.values() for queued in queue if not queued.job.future.done()]
            texts = sum(len(queued.todo) for queued in jobs)
            return texts, sum(queued.job.tokens_of(position) for queued in jobs for position in queued.todo)

    def seconds_left(self) -> float:
        """See `Batcher.seconds_left`: waiting texts times the recent mean of seconds per text of their kind."""
        with self._changed:
            return sum(
                len(queued.todo) * self._seconds.get(kind, 0.0)
                for kind, queue in self._queues.items()
                for queued in queue
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
                for queued in queue:
                    queued.job.fail(shutting_down())
            self._changed.notify()
        self._thread.join(2)
        return False

    def _key(self, job: EmbeddingJob, text: Tokens) -> Key:
        return self.model.contract_hash, text.ids, job.budget

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (batch := self._next_batch()):
                    if self._closing:
                        return
                    self._changed.wait()
            self._run_batch(*batch)

    def _next_batch(
        self, kinds: Sequence[Kind] = get_args(Kind), most_texts: int | None = None, most_tokens: int | None = None
    ) -> tuple[Kind, list[QueuedText]] | None:
        """The next batch of the kind whose turn it is, filled with texts of requests that share it by tokens."""
        most_texts = min(most_texts or self.config.batch_texts, self.config.batch_texts)
        most_tokens = most_tokens or self.config.batch_tokens
        busy = self._others_wait()
        for kind in [key for key in self._queues if key in kinds]:
            waiting = [q for q in self._queues.pop(kind) if not (q.job.future.done() or self._giving_up)]
            oversized = [q for q in waiting if q.job.oversized]
            # A text longer than the maximum credit waits for just that much, so that it does not starve.
            if oversized and not (busy and self._oversized_credit < min(oversized[0].next_tokens, OVERSIZED_CREDIT)):
                batch = self._fair_share(kind, oversized, 1, most_tokens)
                self._oversized_credit = max(0.0, self._oversized_credit - tokens_of(batch))
            else:
                batch = self._fair_share(kind, [q for q in waiting if not q.job.oversized], most_texts, most_tokens)
                credit = self._oversized_credit + OVERSIZED_SHARE * tokens_of(batch)
                self._oversized_credit = min(credit, OVERSIZED_CREDIT)
            if waiting := [queued for queued in waiting if queued.todo]:
                self._queues[kind] = waiting  # at the end, so that the other kinds are next
            if batch:
                return kind, batch
        return None

    def _others_wait(self) -> bool:
        """Whether any job waits that is not oversized."""
        return any(not (q.job.oversized or q.job.future.done()) for queue in self._queues.values() for q in queue)

    def _fair_share(self, kind: Kind, waiting: list[QueuedJob], most_texts: int, most_tokens: int) -> list[QueuedText]:
        """Texts in the order in which they would finish if all jobs advanced equally fast, until the batch is full."""
        order = [(queued.started_at + queued.next_tokens, position, queued) for position, queued in enumerate(waiting)]
        heapq.heapify(order)
        batch: list[QueuedText] = []
        tokens = 0
        while order and len(batch) < most_texts:
            ends_at, position, queued = order[0]
            if batch and tokens + queued.next_tokens > most_tokens:
                break
            heapq.heappop(order)
            tokens += queued.next_tokens
            self._virtual_time[kind] = queued.started_at = ends_at
            batch.append((queued, queued.todo.popleft()))
            queued.job.begun = True
            if queued.todo:
                heapq.heappush(order, (queued.started_at + queued.next_tokens, position, queued))
        return batch

    def _run_batch(self, kind: Kind, batch: list[QueuedText]) -> None:
        started = time.perf_counter()
        try:
            self._embed(kind, batch)
        except _JobsCancelled:
            return
        except Exception as error:
            jobs = list(dict.fromkeys(queued for queued, _ in batch))
            if len(jobs) == 1:
                log("batch failed", 40, error, kind=kind, texts=len(batch))
                jobs[0].job.fail(error)
                return
            for failed in jobs:  # separately, so that only the job that causes the error fails
                self._run_batch(kind, [text for text in batch if text[0] is failed])
            return
        seconds = time.perf_counter() - started
        self._record_seconds(kind, seconds / len(batch))
        self.metrics.batch_texts.labels(kind).observe(len(batch))
        self.metrics.batch_seconds.labels(kind).observe(seconds)

    def _record_seconds(self, kind: Kind, seconds: float) -> None:
        """Update the running mean of seconds per text of this kind."""
        mean = self._seconds.get(kind, seconds)
        self._seconds[kind] = mean + SMOOTHING * (seconds - mean)

    def _embed(self, kind: Kind, batch: list[QueuedText]) -> None:
        rows: dict[tuple[Tokens, int, tuple[int, ...]], list[QueuedText]] = {}  # a repeated text is embedded once
        for queued, position in batch:
            job = queued.job
            rows.setdefault((job.texts[position], job.budget, job.trace_of(position)), []).append((queued, position))
        texts, budgets, traces = (list(column) for column in zip(*rows, strict=True))
        if kind == "reasoned":
            answers = self._reason(texts, list(rows.values()), budgets)
        else:
            settings: dict[str, Any] = {"batch_size": len(texts), "show_progress_bar": False}
            if kind == "document":
                vectors = self.model.encode_document(texts, **settings)
            elif kind == "given":
                vectors = self.model.encode_with_reasoning(texts, traces, **settings)
            else:
                vectors = self.model.encode_query(texts, reasoning="latent" if kind == "latent" else False, **settings)
            answers = [Embedded(vector) for vector in vectors]
        self.metrics.tokens.labels("prompt").inc(sum(len(text.ids) + len(trace) for text, _, trace in rows))
        for row, answer in zip(rows, answers, strict=True):
            key = (self.model.contract_hash, row[0].ids, row[1]) if kind == "reasoned" else None
            self._set_answer(rows[row], answer, key)

    def _set_answer(self, texts: Sequence[QueuedText], answer: Embedded, key: Key | None) -> None:
        """Answer every text of a row; with a key, also cache the answer."""
        bad = not np.isfinite(answer.vector).all() or not answer.vector.any()
        if key is not None and not bad:
            asked = min(queued.job.submitted for queued, _ in texts)
            self.cache.put(key, replace(answer, remembered_ms=round((time.monotonic() - asked) * 1e3, 1)))
        for queued, position in texts:
            if bad:
                queued.job.fail(
                    ApiError(500, f"the model returned no usable embedding for text {position}", "bad_embedding")
                )
            else:
                queued.set_answer(position, answer)

    def _reason(self, texts: list[Tokens], rows: list[list[QueuedText]], budgets: list[int]) -> list[Embedded]:
        jobs = [queued.job for row in rows for queued, _ in row]
        listeners = [[job.on_text for q, position in row if position == 0 and (job := q.job).on_text] for row in rows]
        streams = [TextStream(self.model.tokenizer) if row else None for row in listeners]

        def on_token(row: int, token: int) -> None:
            if self._giving_up or all(job.future.done() for job in jobs):
                raise _JobsCancelled
            if (stream := streams[row]) is not None:
                _send(listeners[row], stream.push(token))

        reasoned = self.model.reason(
            texts, max_reasoning_tokens=budgets, batch_size=len(texts), show_progress_bar=False, on_token=on_token
        )
        for row, stream in enumerate(streams):
            if stream is not None:
                _send(listeners[row], stream.finish())
        self.metrics.tokens.labels("reasoning").inc(sum(r.num_tokens for r in reasoned))
        return [Embedded(r.embedding, r.text, int(r.num_tokens), bool(r.forced)) for r in reasoned]


def shutting_down() -> ApiError:
    """The error for jobs that a shutdown drops."""
    return ApiError(503, "the server is shutting down; try again", "shutting_down")


def _send(listeners: Sequence[Callable[[str], None] | None], piece: str) -> None:
    for listener in listeners:
        if piece and listener is not None:
            listener(piece)


def send_reasoning(job: EmbeddingJob, position: int, answer: Embedded) -> None:
    """Send the whole reasoning in one piece to a job that streams it."""
    if job.on_text is not None and position == 0:
        _send([job.on_text], answer.reasoning or "")

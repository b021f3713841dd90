"""What the routes submit to the model, an `EmbeddingJob`, and the protocol of what runs it, a `Batcher`.

A job is one request's texts of one kind. Both batchers run the model in one dedicated thread: `static_batching` batch
by batch, `continuous` with reasoned queries that join and leave at every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from search_r3.model.tokenization import Tokens

Kind = Literal["document", "query", "reasoned", "latent", "given", "reading"]
"""How a text is embedded; "given" is a query with reasoning that the client gives, "reading" one with passages."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """The result for one text: a float32 unit vector, and for a reasoned query the reasoning.

    Attributes:
        remembered_ms: of an answer from the cache: the milliseconds from question to answer when it was written.
    """

    vector: np.ndarray
    reasoning: str | None = None
    num_tokens: int = 0
    forced: bool = False
    remembered_ms: float | None = None


@dataclass(eq=False)
class EmbeddingJob:
    """Texts of one request to embed.

    Attributes:
        kind: how to embed them.
        texts: their tokens, already truncated; of queries with passages, each a `ReadingTurn`.
        budget: maximum number of reasoning tokens per query.
        on_text: called with each piece of the first text's reasoning, from the batcher's thread.
        oversized: whether a text is far longer than the part of it that is read. While other jobs wait, such jobs get
            only a small share of the model.
        traces: for the kind "given", the tokens of each text's reasoning, already truncated; one may be empty.
        future: resolves to the answers, in the order of `texts`. Canceling it drops texts that have not begun.
        begun: whether a batch with one of its texts was started.
        submitted: time of submission (monotonic seconds).
    """

    kind: Kind
    texts: Sequence[Tokens]
    budget: int = 0
    on_text: Callable[[str], None] | None = None
    oversized: bool = False
    traces: Sequence[tuple[int, ...]] = ()
    future: Future[list[Embedded]] = field(default_factory=Future)
    begun: bool = False
    submitted: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        """The number of tokens of all texts, with those of given reasoning."""
        return sum(map(self.tokens_of, range(len(self.texts))))

    def trace_of(self, position: int) -> tuple[int, ...]:
        """The given reasoning of the text at `position`; empty for other kinds."""
        return self.traces[position] if self.traces else ()

    def tokens_of(self, position: int) -> int:
        """The number of tokens of the text at `position`, with those of its given reasoning."""
        return len(self.texts[position].ids) + len(self.trace_of(position))

    def finish(self, answers: list[Embedded]) -> None:
        """Set the answers, unless the job is cancelled."""
        self._settle(lambda: self.future.set_result(answers))

    def fail(self, error: BaseException) -> None:
        """Set an error instead, unless the job is cancelled."""
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, change: Callable[[], None]) -> None:
        with suppress(InvalidStateError):  # it may be cancelled concurrently
            change()


class BatcherClosed(Exception):
    """The batcher accepts no more jobs."""


class Batcher(Protocol):
    """Runs jobs, several at once if possible. Thread-safe."""

    def submit(self, job: EmbeddingJob) -> None:
        """Accept `job`, whose future will get the answers. Raises BatcherClosed after `close`."""
        ...

    def waiting(self) -> tuple[int, int]:
        """The numbers of texts and of tokens that were submitted but have not begun."""
        ...

    def seconds_left(self) -> float:
        """An estimate of how long the submitted texts will take."""
        ...

    def close(self, grace: float) -> bool:
        """Finish submitted jobs within `grace` seconds and stop; returns False if some had to be dropped."""
        ...

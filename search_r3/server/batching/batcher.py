"""What the routes ask of the model, an `EmbeddingJob`, and the protocol of what runs it, a `Batcher`.

A job is one request's texts of one kind. Both batchers run the model on one thread of their own: `static_batching`
batch by batch, `continuous` with queries that are reasoned about and join and leave token by token.
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

Kind = Literal["document", "query", "reasoned"]


@dataclass(frozen=True, slots=True)
class Embedded:
    """One text's answer: a float32 unit vector, and for a reasoned query what was written before it."""

    vector: np.ndarray
    reasoning: str | None = None
    num_tokens: int = 0
    forced: bool = False


@dataclass(eq=False)
class EmbeddingJob:
    """Texts of one request, to be embedded.

    Attributes:
        kind: how.
        texts: what, as tokens that are cut to length already.
        budget: tokens of reasoning for each query, at most.
        on_text: called with each piece of the first text's reasoning, from the batcher's thread.
        oversized: a text is far longer than what is read of it. Beside others such jobs get a small share of the model.
        future: becomes the answers, in the order of `texts`. Cancel it, and what has not begun is dropped.
        begun: whether a batch with a text of it was started.
    """

    kind: Kind
    texts: Sequence[Tokens]
    budget: int = 0
    on_text: Callable[[str], None] | None = None
    oversized: bool = False
    future: Future[list[Embedded]] = field(default_factory=Future)
    begun: bool = False
    submitted: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return sum(len(text.ids) for text in self.texts)

    def finish(self, answers: list[Embedded]) -> None:
        """Set the answers, unless the job is cancelled."""
        self._settle(lambda: self.future.set_result(answers))

    def fail(self, error: BaseException) -> None:
        """Set an error instead, unless the job is cancelled."""
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, change: Callable[[], None]) -> None:
        with suppress(InvalidStateError):  # cancelled, perhaps this instant
            change()


class BatcherClosed(Exception):
    """The batcher accepts no more jobs."""


class Batcher(Protocol):
    """Runs jobs, several at once where it can. Thread-safe."""

    def submit(self, job: EmbeddingJob) -> None:
        """Accept `job`; its future gets the answers. Raises BatcherClosed after `close`."""
        ...

    def waiting(self) -> tuple[int, int]:
        """Texts and tokens that were submitted and have not begun."""
        ...

    def seconds_left(self) -> float:
        """An estimate of how long the submitted texts will take."""
        ...

    def close(self, grace: float) -> bool:
        """Finish what was submitted within `grace` seconds and stop; False if something had to be dropped."""
        ...

"""What the routes ask of the model, and the protocol of whoever does it: a `Batcher`.

One `Work` is one request's texts of one kind. Both batchers run the model on one thread of their own: `worker` batch by
batch, `continuous` with reasoned queries that join and leave token by token.
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
class Work:
    """Texts of one request, to be embedded.

    Attributes:
        kind: how.
        texts: what, as tokens that are cut to length already.
        budget: tokens that each query may be reasoned about.
        on_text: is told each piece of the first text's analysis, from the batcher's thread.
        future: becomes the answers, in the order of `texts`. Cancel it, and what has not begun is dropped.
        begun: whether a batch with a text of it was started.
    """

    kind: Kind
    texts: Sequence[Tokens]
    budget: int = 0
    on_text: Callable[[str], None] | None = None
    future: Future[list[Embedded]] = field(default_factory=Future)
    begun: bool = False
    submitted: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return sum(len(text.ids) for text in self.texts)

    def finish(self, answers: list[Embedded]) -> None:
        """Give the answers, unless nobody wants them any more."""
        self._settle(lambda: self.future.set_result(answers))

    def fail(self, error: BaseException) -> None:
        """Give an error instead."""
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, change: Callable[[], None]) -> None:
        with suppress(InvalidStateError):  # cancelled, perhaps this instant
            change()


class Closed(Exception):
    """The batcher takes no more work."""


class Batcher(Protocol):
    """Does Work, several at once where it can; safe to call from any thread."""

    def submit(self, work: Work) -> None:
        """Take `work`; its future gets the answers. Raises Closed after `close`."""
        ...

    def waiting(self) -> tuple[int, int]:
        """Texts and tokens that were submitted and not begun."""
        ...

    def seconds_left(self) -> float:
        """About how long the work in hand will take."""
        ...

    def close(self, grace: float) -> bool:
        """Finish what was submitted within `grace` seconds and stop; False if something had to be given up."""
        ...

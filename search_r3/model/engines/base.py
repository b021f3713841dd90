"""What an engine is: token ids in, hidden states at the embed token out. One protocol, several ways to run the LLM.

An engine knows nothing of prompts, only of a shared prefix and of rows that follow it. Each is held to the same golden
vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass
class Generation:
    """One continued row.

    Attributes:
        token_ids: what was written before the embed token; at most the budget.
        embedding: float32 (dim,), L2-normalised: the state at the embed token.
        forced: the model did not emit the token (out of budget, or it ended its turn), so it was appended.
        ended: the end-of-turn token that it wrote instead, if that is why; it was not fed in.
    """

    token_ids: list[int]
    embedding: np.ndarray
    forced: bool
    ended: int | None = None


class Engine(Protocol):
    """Runs one LLM. Results do not depend on how rows are batched."""

    dimension: int

    def embed(
        self, prefix: Sequence[int], rows: list[list[int]], batch_size: int, progress: Callable[[int], None] | None
    ) -> np.ndarray:
        """The unit embedding at the last token of `prefix + row`, for each row: float32 (len(rows), dim)."""
        ...

    def generate(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        *,
        max_new_tokens: int | Sequence[int],
        temperature: float,
        seed: int | Sequence[int],
        batch_size: int,
        progress: Callable[[int], None] | None,
        samples: int = 1,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """Continue each `prefix + row` until the embed token, feed that token, and return the state at it.

        With `samples`, each row is continued so many times (sampled apart): a row's samples stand together in the
        list. Its prefill is shared where the engine can. `max_new_tokens` may be a number for each row, `seed` one for
        each sample of that list: then a sample does not depend on what is sampled beside it. `on_token` is called with
        a sample's place in that list and a token's id as soon as the token is written (the embed token is not); what
        it raises ends the call.
        """
        ...


def of_each(budget: int | Sequence[int], rows: int) -> list[int]:
    """The budget of each row, where there may be one for all."""
    return [budget] * rows if isinstance(budget, int) else list(budget)

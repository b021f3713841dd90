"""The result of reasoning about a query: the reasoning trace, and the embedding after it. The trace may be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search_r3.errors import InputError
from search_r3.model.engines.base import broadcast_budget

REASONING_TEXT_TOKENS = 512
"""Tokens read of a `reasoning_text`, reasoning about the query in someone's own words."""


@dataclass
class Reasoned:
    """The result of reasoning about a query and embedding it in one pass.

    Attributes:
        text: the reasoning, without the embed token.
        embedding: float32 (dimension,), unit length.
        num_tokens: number of reasoning tokens, without the embed token.
        forced: whether the embed token was appended, because the token budget was used up or the model ended its turn.
        token_ids: the whole input, including prompt and embed token: a forward pass over these ids gives `embedding` at
            the last position.
    """

    text: str
    embedding: np.ndarray
    num_tokens: int
    forced: bool
    token_ids: list[int]

    @property
    def reasoning_ids(self) -> list[int]:
        """The reasoning tokens, for `SearchR3.encode_with_reasoning`."""
        return self.token_ids[-1 - self.num_tokens : -1]


def checked_budgets(budget: int | Sequence[int], texts: int, temperature: float, samples: int) -> list[int]:
    """The budget of each of `texts` queries. Raises InputError if an argument of `SearchR3.reason` is invalid."""
    budgets = broadcast_budget(budget, texts)
    if len(budgets) != texts:
        raise InputError(f"{len(budgets)} values of max_reasoning_tokens for {texts} texts; give one per text")
    if min(budgets, default=0) < 0:
        raise InputError(f"max_reasoning_tokens must be 0 or more, got {min(budgets)}")
    if temperature < 0:
        raise InputError(f"temperature must be 0 or more, got {temperature}")
    if samples < 1:
        raise InputError(f"samples must be 1 or more, got {samples}")
    return budgets


def check_reasoning_text(reasoning: object) -> None:
    """Raise InputError if `reasoning` contradicts a given `reasoning_text`, which the model reads instead of its own.

    Args:
        reasoning: how the query is to be embedded: must be True.
    """
    if reasoning is not True:
        raise InputError(
            f"reasoning_text is read in place of the model's reasoning, so reasoning must be True, got {reasoning!r}"
        )

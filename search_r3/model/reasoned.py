"""The result of reasoning about a query: the reasoning trace, and the embedding after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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

"""What comes out when a model reasons about a query: the trace and the embedding after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Reasoned:
    """A query, reasoned about and embedded in one pass.

    Attributes:
        text: the reasoning, without the embed token.
        embedding: float32 (dim,), unit length.
        num_tokens: tokens of the reasoning; the embed token is not counted.
        forced: the model did not emit the embed token within its budget, so it was appended.
        token_ids: everything that was fed in, prompt and embed token included: a forward pass over them gives
            `embedding` at the last position.
    """

    text: str
    embedding: np.ndarray
    num_tokens: int
    forced: bool
    token_ids: list[int]

    @property
    def reasoning_ids(self) -> list[int]:
        """The tokens of the reasoning, as `SearchR3.encode_with_reasoning` takes them."""
        return self.token_ids[-1 - self.num_tokens : -1]

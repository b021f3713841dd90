"""What the index asks of a model, so that it imports none: to build, to measure and to search it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Encoder(Protocol):
    """What the index asks of a model; `SearchR3` has it.

    An encoder may also have `count_tokens(texts: Sequence[str]) -> list[int]`, the number of tokens of each text as
    `max_length` counts them. Chunks are then measured with it, so that none is too long to be embedded whole; without
    it their tokens are estimated (`search_r3.index.token_limit`).
    """

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def contract_hash(self) -> str: ...
    def encode_document(
        self, texts: Any, *, batch_size: int = ..., show_progress_bar: bool | None = ..., max_length: Any = ...
    ) -> np.ndarray: ...
    def encode_query(self, texts: Any, *, reasoning: Any = ..., max_reasoning_tokens: int = ...) -> np.ndarray: ...
    def reason(self, texts: Any, *, max_reasoning_tokens: int = ...) -> Sequence[Any]: ...

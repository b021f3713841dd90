"""What the index asks of a model: to build, to measure and to search it. No module of the index knows a model's class.

`SearchR3` is one encoder. A model of another kind needs the methods of `Encoder`; with `Tokenizes` or `CountsTokens` it
is measured and batched by its own tokens, as SearchR3 is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

DOCUMENT_TOKENS = 512
"""Tokens that a chunk may have with its title, unless the caller says otherwise: what a document is cut to."""
CountTokens = Callable[[Sequence[str]], list[int]]
"""The number of tokens of each text, as `max_length` counts them."""


class Encoder(Protocol):
    """Turns texts into vectors. A complete encoder, on sentence-transformers::

        class Sentences:
            name, contract_hash, dimension = "all-MiniLM-L6-v2", "all-MiniLM-L6-v2", 384

            def __init__(self):
                self.model = SentenceTransformer(self.name)

            def encode_document(self, texts, *, batch_size=32, show_progress_bar=None, max_length=None):
                return self.model.encode(list(texts), batch_size=batch_size, normalize_embeddings=True)

            def encode_query(self, texts, *, reasoning=False, max_reasoning_tokens=0):
                return self.encode_document(texts)

            def reason(self, texts, *, max_reasoning_tokens=0):
                raise InputError("this model does not reason; search with reasoning=False")

    All arrays are float32, one row a text. Encoders of the same `contract_hash` give comparable vectors; an index
    refuses the others. Besides, an encoder may have `source` (where it was loaded from, which an index keeps),
    `adaptive_rule` (when to reason, for `reasoning="auto"`), and `token_counter` (a picklable `CountTokens`, by which
    the driver of a Ray build measures chunks without the model).
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


class CountsTokens(Protocol):
    """An encoder that counts tokens. Chunks are measured with it, so that none is too long to be embedded whole;
    without it their tokens are estimated (`search_r3.index.chunking.token_limit`)."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...


class Tokenizes(Protocol):
    """An encoder that tokenizes documents ahead, in another thread than embeds them, and is batched by their tokens."""

    def tokenize_documents(self, texts: Sequence[str], limit: int) -> tuple[list[Any], list[int]]:
        """What `encode_document` takes in place of each text, cut to `limit` tokens; and the number of tokens of each
        text, where `limit` + 1 stands for any larger number."""
        ...

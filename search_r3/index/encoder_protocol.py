"""What the index requires of a model for building and searching. No module of the index depends on a model's class.

`SearchR3` is one encoder. Another model needs the methods of `Encoder`; if it also has those of `Tokenizes` or
`CountsTokens`, its own tokens are used for chunk limits and batches, as for SearchR3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

DOCUMENT_TOKENS = 512
"""Default maximum of tokens of a chunk with its title; longer documents are truncated to this."""
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

    All arrays are float32, one row per text. Encoders with the same `contract_hash` produce comparable vectors; an
    index refuses all others. An encoder whose queries may change while its documents do not (a query adapter) also has
    `document_spaces`: hashes, of which an index stores the first and accepts each. An encoder may also have `source`
    (where it was loaded from, recorded in the index), `adaptive_rule` (when to reason, for `reasoning="auto"`), and
    `token_counter` (a picklable `CountTokens` with which the driver of a Ray build measures chunks without the model).
    `normalize_query(text)` returns what is embedded in place of a query (typos corrected, say).
    If `encode_document` has an argument `on_batch`, it is a function to call after each forward pass with its number of
    texts: a build shows progress that often instead of once a call.
    One that can be searched with `read` also has `reading` (any value but None), the argument `passages` of its methods
    for queries (for each text, a list of texts), and may have `what_is_read(passages)`, the part of each that it uses.
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


def document_spaces(model: Any) -> tuple[str, ...]:
    """The encoder's `document_spaces`; () if it has none, so that only its `contract_hash` counts."""
    return tuple(getattr(model, "document_spaces", ()))


class ReadsReasoning(Protocol):
    """An encoder that can read reasoning about a query that it did not write (`reasoning_text` of a search)."""

    def encode_with_reasoning(
        self, texts: Any, reasoning: Sequence[str], *, max_reasoning_tokens: int | None = ...
    ) -> np.ndarray: ...
    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...


class CountsTokens(Protocol):
    """An encoder that counts tokens, so that no chunk is too long to be embedded whole. For other encoders, tokens are
    estimated (`search_r3.index.chunking.token_limit`)."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...


class Tokenizes(Protocol):
    """An encoder that tokenizes documents ahead, in another thread than embedding; batches use its token counts."""

    def tokenize_documents(self, texts: Sequence[str], limit: int) -> tuple[list[Any], list[int]]:
        """Tokenize each text, cut to `limit` tokens, as input for `encode_document`; also returns each text's number of
        tokens, where `limit` + 1 stands for any larger number."""
        ...

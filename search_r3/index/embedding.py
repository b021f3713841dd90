"""Texts into vectors on the way into an index: tokens first, then batches of like length under a budget of tokens.

A batch costs what its longest text costs for each of its rows, so texts are put together by length; the budget counts
that padding. What comes out is checked row by row before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_r3.index.chunking.token_limit import TokenLimit, estimated_tokens
from search_r3.index.encoder_protocol import DOCUMENT_TOKENS, CountTokens, Encoder
from search_r3.index.table.table_rows import checked_vectors

BATCH_TOKENS = 16_384  # 32 chunks of the 512 tokens that a document is cut to
CHARACTERS_PER_TOKEN = 4  # of English; for encoders that do not tokenize ahead


@dataclass(frozen=True)
class Prepared:
    """Texts as the model takes them, which of them go through it together, and how many lose their end."""

    texts: list[Any]
    batches: list[list[int]]
    truncated: int = 0


def token_limit(model: Encoder, max_length: int | None) -> TokenLimit:
    """The tokens that a chunk may have to be embedded whole, measured by the model if it counts tokens."""
    return TokenLimit(max_length or DOCUMENT_TOKENS, _counter(model))


def _counter(model: Encoder) -> CountTokens | None:
    return getattr(model, "count_tokens", None)


def prepare(
    model: Encoder, texts: Sequence[str], max_length: int | None, batch_tokens: int, batch_size: int | None
) -> Prepared:
    """Tokenize, if the encoder does that ahead, and put into batches of like length."""
    limit = max_length or DOCUMENT_TOKENS
    ready: list[Any] = list(texts)
    lengths = [min(limit, 1 + len(text) // CHARACTERS_PER_TOKEN) for text in texts]
    counts: list[int] = []
    if texts and (tokenize := getattr(model, "tokenize_documents", None)) is not None:
        ready, counts = tokenize(texts, limit)
        lengths = [min(limit, count) for count in counts]
    elif texts:
        counts = (_counter(model) or estimated_tokens)(texts)
    truncated = sum(count > limit for count in counts)
    return Prepared(ready, list(by_length(lengths, batch_tokens, batch_size or len(ready))), truncated)


def by_length(lengths: Sequence[int], budget: int, most: int) -> Iterator[list[int]]:
    """Positions in batches, longest first: at most `most` texts and, padded, `budget` tokens (or one text)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = min(most, max(1, budget // max(1, lengths[order[start]])))
        yield order[start : start + count]
        start += count


def embed(model: Encoder, prepared: Prepared, ids: Sequence[str], max_length: int | None) -> np.ndarray:
    """(texts, dimension) float32, in the texts' order; `ids` name them in errors.

    Raises:
        InputError: the model gave another shape, NaN, infinity or only zeros.
    """
    out = np.empty((len(prepared.texts), model.dimension), dtype=np.float32)
    for batch in prepared.batches:
        encoded = model.encode_document(
            [prepared.texts[i] for i in batch], batch_size=len(batch), show_progress_bar=False, max_length=max_length
        )
        out[batch] = checked_vectors(encoded, [ids[i] for i in batch], model)
    return out

"""Texts into vectors on the way into an index: tokens first, then batches of like length under a budget of tokens.

A batch costs what its longest text costs for each of its rows, so texts are put together by length; the budget counts
that padding. What comes out is checked row by row before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from search_r3.index.encoder_protocol import Encoder
from search_r3.index.table_rows import checked_vectors
from search_r3.index.token_limit import TokenLimit, estimated_tokens
from search_r3.model.tokenization import Text, Tokens, token_rows

BATCH_TOKENS = 16_384  # 32 chunks of the 512 tokens that a document is cut to
CHARACTERS_PER_TOKEN = 4  # English; only for encoders whose tokenizer is not ours


@dataclass(frozen=True)
class Prepared:
    """Texts as the model takes them, which of them go through it together, and how many lose their end."""

    texts: list[Text]
    batches: list[list[int]]
    truncated: int = 0


def token_limit(model: Encoder, max_length: int | None) -> TokenLimit:
    """The tokens that a chunk may have to be embedded whole, measured by the model if it counts tokens."""
    from search_r3.model.searchr3 import DEFAULT_DOCUMENT_TOKENS

    return TokenLimit(max_length or DEFAULT_DOCUMENT_TOKENS, getattr(model, "count_tokens", None))


def prepare(
    model: Encoder, texts: Sequence[str], max_length: int | None, batch_tokens: int, batch_size: int | None
) -> Prepared:
    """Tokenize and put into batches; an encoder with a tokenizer of its own is given the texts as they are."""
    from search_r3.model.searchr3 import DEFAULT_DOCUMENT_TOKENS, SearchR3

    limit = max_length or DEFAULT_DOCUMENT_TOKENS
    ready: list[Text] = list(texts)
    lengths = [min(limit, 1 + len(text) // CHARACTERS_PER_TOKEN) for text in texts]
    if isinstance(model, SearchR3) and texts:
        rows = token_rows(model.tokenizer, texts, limit + 1)
        ready = [Tokens(tuple(row[:limit])) for row in rows]
        counts = [len(row) for row in rows]
        lengths = [min(limit, count) for count in counts]
    else:
        counts = getattr(model, "count_tokens", estimated_tokens)(texts) if texts else []
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

"""Embedding texts for an index: tokenized first, then batched by length under a token budget.

Every row of a batch is padded to its longest text, so texts of similar length share a batch; the budget includes the
padding. Each vector is checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_r3.index.backends.lance.table_rows import checked_vectors
from search_r3.index.chunking.token_limit import TokenLimit, estimated_tokens
from search_r3.index.encoder_protocol import DOCUMENT_TOKENS, CountTokens, Encoder

BATCH_TOKENS = 16_384  # 32 chunks of the 512 tokens that a document is truncated to
CHARACTERS_PER_TOKEN = 4  # in English; for encoders that do not tokenize ahead


@dataclass(frozen=True)
class Prepared:
    """Texts ready for the model (`texts`), their positions by batch, how many of them are truncated, and their lengths
    in tokens as far as they are embedded."""

    texts: list[Any]
    batches: list[list[int]]
    truncated: int = 0
    lengths: Sequence[int] = ()


def token_limit(model: Encoder, max_length: int | None) -> TokenLimit:
    """The token limit of chunks that are embedded whole, measured by the model if it can count tokens."""
    return TokenLimit(max_length or DOCUMENT_TOKENS, _counter(model))


def _counter(model: Encoder) -> CountTokens | None:
    return getattr(model, "count_tokens", None)


def prepare(
    model: Encoder, texts: Sequence[str], max_length: int | None, batch_tokens: int, batch_size: int | None
) -> Prepared:
    """Tokenize, if the encoder does that ahead, and batch texts of similar length, in batches that are no larger than
    the encoder gains from: progress is reported after each."""
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
    budget = min(batch_tokens, getattr(model, "enough_tokens", None) or batch_tokens)
    return Prepared(ready, list(by_length(lengths, budget, batch_size or len(ready))), truncated, lengths)


def by_length(lengths: Sequence[int], budget: int, most: int) -> Iterator[list[int]]:
    """Batches of positions, longest texts first: at most `most` texts and `budget` tokens including padding, but at
    least one text."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = min(most, max(1, budget // max(1, lengths[order[start]])))
        yield order[start : start + count]
        start += count


def embed(
    model: Encoder,
    prepared: Prepared,
    ids: Sequence[str],
    max_length: int | None,
    on_share: Callable[[float], None] = lambda share: None,
) -> np.ndarray:
    """Embed the prepared texts: (texts, dimension) float32, in their order.

    Args:
        ids: names of the texts, for errors.
        on_share: called after every forward pass with the share of the tokens (0 to 1) that are embedded.

    Raises:
        InputError: the model returned the wrong shape, NaN, infinity or a row of zeros.
    """
    out = np.empty((len(prepared.texts), model.dimension), dtype=np.float32)
    tokens = sum(prepared.lengths)
    done = 0
    for batch in prepared.batches:
        encoded = model.encode_document(
            [prepared.texts[i] for i in batch], batch_size=len(batch), show_progress_bar=False, max_length=max_length
        )
        out[batch] = checked_vectors(encoded, [ids[i] for i in batch], model)
        done += sum(prepared.lengths[i] for i in batch)
        on_share(done / tokens)
    return out

"""Embedding texts for an index: tokenized first, then batched by length under a token budget.

Every row of a batch is padded to its longest text, so texts of similar length share a batch; the budget includes the
padding. Each vector is checked before anything is written.
"""

from __future__ import annotations

import inspect
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
    """Tokenize, if the encoder does that ahead, and batch texts of similar length."""
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
    return Prepared(ready, list(by_length(lengths, batch_tokens, batch_size or len(ready))), truncated, lengths)


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
        on_share: called with the share of the tokens (0 to 1) that are embedded, after each batch, and after each
            forward pass if the encoder says when it was.

    Raises:
        InputError: the model returned the wrong shape, NaN, infinity or a row of zeros.
    """
    out = np.empty((len(prepared.texts), model.dimension), dtype=np.float32)
    total = sum(prepared.lengths)
    embedded = 0  # tokens of the batches before
    options: dict[str, Any] = {"show_progress_bar": False, "max_length": max_length}
    reports = "on_batch" in inspect.signature(model.encode_document).parameters
    for batch in prepared.batches:
        tokens = sum(prepared.lengths[i] for i in batch)
        if reports:
            options["on_batch"] = _each_pass(on_share, embedded, tokens, len(batch), total)
        encoded = model.encode_document([prepared.texts[i] for i in batch], batch_size=len(batch), **options)
        out[batch] = checked_vectors(encoded, [ids[i] for i in batch], model)
        embedded += tokens
        on_share(embedded / total)
    return out


def _each_pass(
    on_share: Callable[[float], None], before: int, tokens: int, texts: int, total: int
) -> Callable[[int], None]:
    """An `on_batch` for a batch of so many tokens and texts, which are of about the same length."""
    done = 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        on_share((before + tokens * done / texts) / total)

    return on_batch

"""Reranking by embeddings: the cosine of the query's and each document's, as in a search by vectors.

It needs no further model, but it is no second opinion: documents that the same model found keep about their order. It
helps where another method found them, such as a search by words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from search_r3.rerankers.base import Kind, ReadingLimit, Scores, nothing

BATCH = 32
"""Documents in one call of the model."""


class EmbeddingReranker:
    """Scores documents by the cosine of embeddings: `raw` is the cosine, `relevance` the same without negative values.

    Args:
        model: a SearchR3, or an object with its methods `encode_query` and `encode_document`.
        reasoning: let the model reason about the query first.
        max_reasoning_tokens: maximum number of reasoning tokens.
    """

    kind: Kind = "embeddings"

    def __init__(self, model: Any, *, reasoning: bool = True, max_reasoning_tokens: int = 32) -> None:
        self._model, self._reasoning, self._budget = model, reasoning, max_reasoning_tokens

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    def score(
        self,
        query: str,
        documents: Sequence[str],
        *,
        limit: ReadingLimit = ReadingLimit(),  # noqa: B008  # frozen
        between: Callable[[], None] = nothing,
    ) -> Scores:
        """See `search_r3.rerankers.base.Reranker`. Only `limit.document_tokens` is considered; `tokens` is 0: the model
        counts them."""
        rows = []
        query_D = np.asarray(
            self._model.encode_query([query], reasoning=self._reasoning, max_reasoning_tokens=self._budget)
        ).reshape(-1)
        for start in range(0, len(documents), BATCH):
            between()
            batch = list(documents[start : start + BATCH])
            rows.append(self._model.encode_document(batch, max_length=limit.document_tokens, show_progress_bar=False))
        documents_ND = np.concatenate(rows) if rows else np.zeros((0, len(query_D)), dtype=np.float32)
        raw = (documents_ND @ query_D).astype(np.float32)
        return Scores(np.clip(raw.astype(np.float64), 0, 1), raw, 0)

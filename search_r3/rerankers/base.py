"""The protocol of a reranker: how well does each of a few documents answer a query?

A retriever compares a query with millions of documents by vectors that were computed before; a reranker reads the query
beside each document, which is slower and usually better, so it gets only the first hits of a search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from search_r3.errors import InputError
from search_r3.ranking import top_k

Kind = Literal["cross-encoder", "embeddings"]
"""What scores: a model that reads query and document together, or the cosine of their embeddings."""


class TooManyTokens(InputError):
    """Query and documents together have more tokens than a call may read."""


@dataclass(frozen=True)
class Scores:
    """The scores of N documents for one query.

    Attributes:
        relevance: (N,) float64 between 0 and 1, higher is better; only comparable within one reranker.
        raw: (N,) float32, what `relevance` is computed from and documents are ordered by: a cross-encoder's logits, or
            cosines.
        tokens: the number of tokens that were read, the query's counted as often as it was read.
    """

    relevance: np.ndarray
    raw: np.ndarray
    tokens: int

    def best(self, n: int | None = None) -> list[int]:
        """The numbers of the best `n` documents (of all, if None), best first; ties go to the earlier document."""
        if not len(self.raw):
            return []
        return top_k(self.raw[None], len(self.raw) if n is None else n)[1][0].tolist()


@dataclass(frozen=True)
class ReadingLimit:
    """How much of the texts is read.

    Attributes:
        document_tokens: of one document; None is as much as the reranker reads.
        total_tokens: of all documents, each with the query; None is no limit.
        truncate: read the first tokens of a document that is longer than the reranker reads; otherwise refuse it.
    """

    document_tokens: int | None = None
    total_tokens: int | None = None
    truncate: bool = True


class Reranker(Protocol):
    """Scores documents for a query. Thread-safe."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    def score(
        self,
        query: str,
        documents: Sequence[str],
        *,
        limit: ReadingLimit = ...,
        between: Callable[[], None] = ...,
    ) -> Scores:
        """Score each document.

        Args:
            limit: how much of the texts is read.
            between: called between steps; may raise to end the call.

        Raises:
            TooManyTokens, TextTooLong: beyond `limit`.
        """
        ...


def nothing() -> None:
    """The default of `Reranker.score`'s `between`."""

"""The retriever protocol, for mining negatives and for evaluation: index texts, then rank them.

Search-R3's baselines (BM25, any sentence-transformers model) implement this protocol, so that every comparison searches
the same texts for the same queries and breaks ties in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from search_r3.errors import InputError


@runtime_checkable
class Retriever(Protocol):
    """Index documents once, then search them exactly."""

    name: str

    def index(self, documents: list[str]) -> None:
        """Index `documents` (full texts), replacing any previous corpus."""
        ...

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best `min(k, len(documents))` documents of every query.

        Returns:
            scores (Q, k) float32, descending, and indices (Q, k) int64 into the indexed list; ties go to the smaller
            index.

        Raises:
            InputError: nothing is indexed, or k is below 1.
        """
        ...


def require_searchable(name: str, indexed: bool, k: int) -> None:
    """Raise InputError unless something is indexed and k is at least 1."""
    if not indexed:
        raise InputError(f"{name} has nothing to search: call index(documents) with at least one document first")
    if k < 1:
        raise InputError(f"k must be 1 or more, got {k}")


def require_texts(what: str, texts: Sequence[str]) -> None:
    """Raise InputError if `texts` is a single string or contains anything but strings."""
    if isinstance(texts, str):
        raise InputError(f"{what} is a single string; pass a list of strings")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{what}[{position}] is a {type(text).__name__}; expected a string")

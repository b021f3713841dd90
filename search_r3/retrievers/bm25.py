"""BM25 by bm25s: k1 = 1.2, b = 0.75, Lucene's idf, English stop words, no stemmer.

The tokenizer is bm25s's own: lower case, words of two or more word characters. Robertson & Zaragoza (2009); the variant
is the one that Lucene computes (Kamphuis et al. 2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from search_r3.optional import require
from search_r3.ranking import top_k
from search_r3.retrievers.base import require_searchable, require_texts


class BM25Retriever:
    """BM25 over full texts. A document that shares no term with the query scores exactly 0.

    Args:
        k1: how fast a repeated term saturates.
        b: how much a long document is penalized, 0 to 1.
        stopwords: a language supported by bm25s ("en"), or None to keep all words.
    """

    name = "bm25"

    def __init__(self, k1: float = 1.2, b: float = 0.75, stopwords: str | None = "en") -> None:
        self._bm25s = require("bm25s", "evaluation", "BM25")
        self.k1, self.b, self.stopwords = k1, b, stopwords
        self._index: Any = None
        self._size = 0
        self._empty = False

    @property
    def identity(self) -> dict[str, object]:
        """Everything that determines a score, for resuming an evaluation and for its record."""
        return {
            "retriever": "bm25s",
            "method": "lucene",
            "k1": self.k1,
            "b": self.b,
            "stopwords": self.stopwords,
            "stemmer": None,
        }

    def index(self, documents: list[str]) -> None:
        require_texts("documents", documents)
        self._size = len(documents)
        tokens = self._bm25s.tokenize(documents, stopwords=self.stopwords, show_progress=False, return_ids=False)
        self._empty = not any(tokens)  # bm25s cannot index a corpus without a single term
        if self._size and not self._empty:
            self._index = self._bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
            self._index.index(tokens, show_progress=False)

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        require_texts("queries", queries)
        require_searchable(self.name, self._size > 0, k)
        scores = np.zeros((len(queries), min(k, self._size)), dtype=np.float32)
        indices = np.zeros_like(scores, dtype=np.int64)
        if not queries:
            return scores, indices
        all_tokens = self._bm25s.tokenize(queries, stopwords=self.stopwords, show_progress=False, return_ids=False)
        for row, tokens in enumerate(all_tokens):
            scores[row : row + 1], indices[row : row + 1] = top_k(self._scores(tokens)[None], k)
        return scores, indices

    def _scores(self, tokens: list[str]) -> np.ndarray:
        known = [] if self._empty else [token for token in tokens if token in self._index.vocab_dict]
        if not known:
            return np.zeros(self._size, dtype=np.float32)
        return np.asarray(self._index.get_scores(known), dtype=np.float32)

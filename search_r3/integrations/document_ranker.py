"""The ranker shared by all framework adapters: a cross-encoder or a SearchR3 model's embeddings, loaded on first use.

It can be pickled: the other process loads the models again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.integrations.framework_encoder import (
    EncodingConfig,
    TextEncoder,
    absolute_model_name,
    has_visible_character,
    name_and_model,
    replace_lone_surrogates,
)
from search_r3.rerankers.base import Reranker


class DocumentRanker:
    """Puts texts in order for a query. Thread-safe.

    Args:
        reranker: a sentence-transformers CrossEncoder, by folder or hub id; or an object with the method `score` of
            `search_r3.rerankers.base.Reranker`. None compares the embeddings of `model`.
        model: for embeddings: a name, a folder, a hub id or a loaded SearchR3; None is the package's default adapter.
        settings: fields of `search_r3.integrations.framework_encoder.EncodingConfig`.

    Raises:
        InputError: a setting is invalid. Models are loaded at first use, and refused then.
    """

    def __init__(self, reranker: Any = None, model: Any = None, **settings: Any) -> None:
        name, loaded = name_and_model(model)
        self.encoder = TextEncoder(EncodingConfig(model=name, **settings), loaded)
        given = hasattr(reranker, "score")
        self.reranker_name = str(reranker.name) if given else None if reranker is None else str(reranker)
        self._reranker: Reranker | None = reranker if given else None
        self._given = given
        self._lock = threading.Lock()

    @property
    def reranker(self) -> Reranker:
        """What scores, loaded on first use. Raises InputError if it cannot be loaded."""
        with self._lock:
            if self._reranker is None:
                if self.reranker_name is None:
                    from search_r3.rerankers.embedding_reranker import EmbeddingReranker

                    self._reranker = EmbeddingReranker(_as_model(self.encoder))
                else:
                    from search_r3.rerankers.cross_encoder import CrossEncoderReranker

                    self._reranker = CrossEncoderReranker(self.reranker_name, self.encoder.config.device)
            return self._reranker

    def rank(self, query: str, texts: Sequence[str], top_n: int | None = None) -> list[tuple[int, float]]:
        """The numbers of the best `top_n` texts (of all, if None), best first, with their relevance, 0 to 1.

        Raises:
            InputError: the query has no visible character, or `top_n` is below 1.
        """
        if not isinstance(query, str) or not has_visible_character(query):
            raise InputError("the query is empty: it contains no visible character")
        if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
            raise InputError(f"the number of documents to return must be a whole number of 1 or more, not {top_n!r}")
        if not texts:
            return []
        scores = self.reranker.score(replace_lone_surrogates(query), [replace_lone_surrogates(text) for text in texts])
        return [(i, float(scores.relevance[i])) for i in scores.best(top_n)]

    def __deepcopy__(self, memo: Any) -> DocumentRanker:
        return self

    def __copy__(self) -> DocumentRanker:
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._given:
            raise InputError("a reranker that was given as an object cannot be pickled; give its name or folder")
        name = self.reranker_name
        return {"encoder": self.encoder, "reranker_name": None if name is None else absolute_model_name(name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.encoder, self.reranker_name = state["encoder"], state["reranker_name"]
        self._reranker, self._given, self._lock = None, False, threading.Lock()


def _as_model(encoder: TextEncoder) -> Any:
    """The encoder with the methods of a SearchR3; its settings say how queries are embedded."""
    return SimpleNamespace(
        name=encoder.config.model or "the default adapter",
        encode_query=lambda texts, **_: np.asarray([encoder.embed_query(text) for text in texts], dtype=np.float32),
        encode_document=lambda texts, **_: np.asarray(encoder.embed_documents(texts), dtype=np.float32),
    )

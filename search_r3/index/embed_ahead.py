"""Embedding what a change needs before the index is held for writing, so that others' changes do not wait for it.

What the index has already is not embedded again. What changes there in between costs nothing: the commit looks again,
and embeds what it still lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from search_r3.index.changes import Changes
from search_r3.index.embedding import BATCH_TOKENS, embed, prepare, token_limit
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.index_sources import API, Scope, SourceRecord
from search_r3.index.portable_build import missing_vectors
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.index.table.lance_backend import LanceBackend
from search_r3.index.table.table_columns import ColumnTypes


class CachedEncoder:
    """An encoder that has the embeddings of some texts already; others go to `model`.

    Args:
        model: gives its name, contract and dimension, and embeds what is not in `vectors`.
        vectors: text -> its embedding, (dimension,) float32.
    """

    def __init__(self, model: Encoder, vectors: dict[str, np.ndarray]) -> None:
        self.model, self.vectors = model, vectors
        self.name, self.dimension, self.contract_hash = model.name, model.dimension, model.contract_hash
        self.source = getattr(model, "source", "")
        if (count := getattr(model, "count_tokens", None)) is not None:
            self.count_tokens = count

    def encode_document(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """(len(texts), dimension) float32."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        if unknown:
            rows = np.asarray(self.model.encode_document(unknown, **options), dtype=np.float32)
            self.vectors |= dict(zip(unknown, rows, strict=True))
        return np.stack([self.vectors[text] for text in texts])

    def encode_query(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """As `model`."""
        return self.model.encode_query(texts, **options)

    def reason(self, texts: Sequence[str], **options: Any) -> list[Any]:
        """As `model`."""
        return list(self.model.reason(texts, **options))


def embed_ahead(
    index: SearchIndex, documents: Sequence[SourceDocument], model: Encoder
) -> tuple[dict[str, np.ndarray], int]:
    """The embeddings of the documents' texts that an index lacks, by text; and how many chunks the documents have.

    Args:
        index: opened for reading.
        documents: as `build_index` takes them.
        model: the index's; one whose `encode_document` takes texts.

    Raises:
        InputError: a document is broken, an id comes twice, or its metadata does not go with the index's; or the model
            gave NaN or the wrong dimension.
    """
    if "streaming" not in index.backend.capabilities:
        return missing_vectors(index.backend, documents, model)
    backend = cast(LanceBackend, index.backend)  # the only backend with that capability
    vectors: dict[str, np.ndarray] = {}
    chunks = 0
    scope = Scope(SourceRecord(API), take_over=True)
    changes = Changes(backend, ColumnTypes(backend.table.schema), None, scope, token_limit(model, None))
    try:
        for window in changes.windows(documents, len(documents) or 1):
            texts = list(window.texts.values())
            matrix = embed(model, prepare(model, texts, None, BATCH_TOKENS, None), window.names, None)
            vectors |= dict(zip(texts, matrix, strict=True))
            chunks += window.unchanged + len(window.rows)
    finally:
        changes.close()
    return vectors, chunks

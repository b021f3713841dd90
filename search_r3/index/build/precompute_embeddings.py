"""Embedding the texts of a change before the write lock is taken, so that other writers do not wait for the model.

Texts that the index already has are not embedded again. If the index changes in between, nothing is lost: the commit
compares again and embeds whatever is still missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.backends.lance.table_columns import ColumnTypes
from search_r3.index.build.embedding import BATCH_TOKENS, embed, prepare, token_limit
from search_r3.index.build.index_diff import IndexDiff
from search_r3.index.build.portable_build import missing_vectors
from search_r3.index.encoder_protocol import Encoder, document_spaces
from search_r3.index.index_sources import API, Scope, SourceRecord
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument


class CachedEncoder:
    """An encoder that already has the embeddings of some texts; other texts go to `model`.

    Args:
        model: provides name, contract and dimension, and embeds texts that are not in `vectors`.
        vectors: text -> its embedding, (dimension,) float32.
    """

    def __init__(self, model: Encoder, vectors: dict[str, np.ndarray]) -> None:
        self.model, self.vectors = model, vectors
        self.name, self.dimension, self.contract_hash = model.name, model.dimension, model.contract_hash
        self.source, self.document_spaces = getattr(model, "source", ""), document_spaces(model)
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
        """See `model`."""
        return self.model.encode_query(texts, **options)

    def reason(self, texts: Sequence[str], **options: Any) -> list[Any]:
        """See `model`."""
        return list(self.model.reason(texts, **options))


def precompute_embeddings(
    index: SearchIndex, documents: Sequence[SourceDocument], model: Encoder
) -> tuple[dict[str, np.ndarray], int]:
    """Embed the documents' texts that an index lacks.

    Args:
        index: opened for reading.
        documents: as for `build_index`.
        model: the index's model; its `encode_document` must take texts.

    Returns:
        The embeddings by text, each (dimension,) float32, and the number of chunks of the documents.

    Raises:
        InputError: a document is malformed, an id is used twice, metadata does not fit the index's columns, or the
            model returned NaN or the wrong dimension.
    """
    if "streaming" not in index.backend.capabilities:
        return missing_vectors(index.backend, documents, model)
    backend = cast(LanceBackend, index.backend)  # the only backend with that capability
    vectors: dict[str, np.ndarray] = {}
    chunks = 0
    scope = Scope(SourceRecord(API), take_over=True)
    diff = IndexDiff(backend, ColumnTypes(backend.table.schema), None, scope, token_limit(model, None))
    try:
        for batch in diff.batches(documents, len(documents) or 1):
            texts = list(batch.texts.values())
            matrix = embed(model, prepare(model, texts, None, BATCH_TOKENS, None), batch.names, None)
            vectors |= dict(zip(texts, matrix, strict=True))
            chunks += batch.unchanged + len(batch.rows)
    finally:
        diff.close()
    return vectors, chunks

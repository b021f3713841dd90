"""LlamaIndex asks a SearchR3 embedding for queries and texts, and gets what the model gives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from llama_index.core import Document, VectorStoreIndex

from search_r3 import InputError, SearchR3
from search_r3.integrations.llama_index import SearchR3Embedding


def test_queries_and_texts_go_to_their_own_sides(tiny: SearchR3):
    embedding = SearchR3Embedding(tiny, max_reasoning_tokens=3)
    text = "the train to Vienna"
    assert np.allclose(
        embedding.get_query_embedding(text), tiny.encode_query([text], max_reasoning_tokens=3)[0], atol=1e-6
    )
    texts = [text, "bread", "yeast"]
    assert np.allclose(embedding.get_text_embedding_batch(texts), tiny.encode_document(texts), atol=1e-6)
    assert np.allclose(embedding.get_text_embedding(text), tiny.encode_document([text])[0], atol=1e-6)
    assert np.allclose(
        asyncio.run(embedding.aget_query_embedding(text)), embedding.get_query_embedding(text), atol=1e-6
    )
    assert np.allclose(asyncio.run(embedding.aget_text_embedding_batch(texts)), tiny.encode_document(texts), atol=1e-6)


def test_an_index_of_llama_index_searches_with_it(tiny: SearchR3):
    embedding = SearchR3Embedding(tiny, reasoning=False)
    texts = ["Bread needs flour.", "The train leaves at nine.", "Aspirin lowers the risk of heart attack."]
    index = VectorStoreIndex.from_documents([Document(text=text) for text in texts], embed_model=embedding)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("when does the train leave")
    scores = tiny.similarity(
        tiny.encode_query(["when does the train leave"], reasoning=False), tiny.encode_document(texts)
    )
    assert found.text == texts[int(scores.argmax())]
    assert found.score == pytest.approx(float(scores.max()), abs=1e-4)


def test_its_settings_are_recorded_and_checked(tiny_model: Path):
    embedding = SearchR3Embedding(tiny_model, reasoning=False, embed_batch_size=4, device="cpu")
    record = embedding.to_dict()
    assert (record["class_name"], record["model_name"]) == ("SearchR3Embedding", str(tiny_model))
    again = SearchR3Embedding.from_dict(record)
    assert (again.model_name, again.reasoning, again.embed_batch_size) == (str(tiny_model), False, 4)
    assert len(again.get_query_embedding("bread")) == 32
    with pytest.raises(InputError, match="unknown setting 'reasonings'"):
        SearchR3Embedding(tiny_model, reasonings=True)
    with pytest.raises(InputError, match="max_length"):
        SearchR3Embedding(tiny_model, max_length=0)

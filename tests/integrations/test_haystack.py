"""Haystack components: they run in a pipeline, are written to its YAML and read from it, and name bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore

from search_r3 import InputError, SearchR3
from search_r3.integrations.haystack import SearchR3DocumentEmbedder, SearchR3TextEmbedder


def test_a_document_is_embedded_with_its_title_and_stays_as_it_was(tiny: SearchR3, tiny_model: Path):
    embedder = SearchR3DocumentEmbedder(str(tiny_model), meta_fields_to_embed=["title"], device="cpu")
    given = [Document(content="It needs flour.", meta={"title": "Bread"}), Document(content="At nine.")]
    done = embedder.run(given)
    assert np.allclose(
        [d.embedding for d in done["documents"]], tiny.encode_document(["Bread It needs flour.", "At nine."]), atol=1e-6
    )
    assert [d.content for d in done["documents"]] == ["It needs flour.", "At nine."]
    assert [d.embedding for d in given] == [None, None]
    assert done["meta"] == {"model": tiny.name, "contract_hash": tiny.contract_hash}


def test_a_query_is_reasoned_about(tiny: SearchR3, tiny_model: Path):
    embedder = SearchR3TextEmbedder(str(tiny_model), max_reasoning_tokens=3, device="cpu")
    embedder.warm_up()
    found = embedder.run("the train")["embedding"]
    assert np.allclose(found, tiny.encode_query(["the train"], max_reasoning_tokens=3)[0], atol=1e-6)


def test_a_pipeline_read_from_yaml_searches(tiny_model: Path):
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    documents = [Document(content=text) for text in ("Bread needs flour.", "The train leaves at nine.")]
    indexing = Pipeline()
    indexing.add_component("embedder", SearchR3DocumentEmbedder(str(tiny_model), device="cpu"))
    store.write_documents(indexing.run({"embedder": {"documents": documents}})["embedder"]["documents"])
    searching = Pipeline()
    searching.add_component("embedder", SearchR3TextEmbedder(str(tiny_model), reasoning=False, device="cpu"))
    again = _through_yaml(searching)
    again.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    again.connect("embedder.embedding", "retriever.query_embedding")
    found = again.run({"embedder": {"text": "train"}})["retriever"]["documents"]
    assert len(found) == 1
    assert found[0].content in {document.content for document in documents}


def _through_yaml(pipeline: Pipeline) -> Pipeline:
    text = pipeline.dumps()
    assert "search_r3.integrations.haystack.SearchR3TextEmbedder" in text
    try:
        return Pipeline.loads(text)
    except Exception as error:  # Haystack 3 reads only what its user allows
        if "allow" not in str(error).lower():
            raise
        return Pipeline.loads(text, allowed_modules=["search_r3.integrations.haystack"])


def test_everything_that_a_component_is_made_from_comes_back_from_its_dictionary():
    query = {"model": "m", "reasoning": False, "max_reasoning_tokens": 5, "device": "cpu", "dtype": "float32"}
    texts = {"model": "m", "batch_size": 3, "max_length": 9, "meta_fields_to_embed": ["title"]}
    texts |= {"embedding_separator": "\n", "device": None, "dtype": "float32"}
    for kind, settings in ((SearchR3TextEmbedder, query), (SearchR3DocumentEmbedder, texts)):
        written = kind(**settings).to_dict()
        assert written["init_parameters"] == settings
        assert list(written["init_parameters"]) == list(settings)
        again = kind.from_dict(written)
        assert type(again) is kind
        assert again.to_dict() == written


def test_bad_input_is_told(tiny_model: Path):
    with pytest.raises(InputError, match="takes one string"):
        SearchR3TextEmbedder(str(tiny_model)).run(["a", "b"])
    with pytest.raises(InputError, match="takes a list of Documents"):
        SearchR3DocumentEmbedder(str(tiny_model)).run("text")
    with pytest.raises(InputError, match="batch_size"):
        SearchR3DocumentEmbedder(str(tiny_model), batch_size=0)

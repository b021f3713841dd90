"""LangChain's own standard suites, unit and integration, on a tiny model and a tiny index; and what they do not ask."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from search_r3 import InputError, SearchR3
from search_r3.index.search_index import SearchIndex
from search_r3.integrations.langchain import SearchR3Embeddings, SearchR3Retriever


class _Embeddings:
    model_folder: Path

    @pytest.fixture(autouse=True)
    def _tiny(self, tiny_model: Path) -> None:
        self.model_folder = tiny_model

    @property
    def embeddings_class(self) -> type[SearchR3Embeddings]:
        return SearchR3Embeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": self.model_folder, "device": "cpu", "max_reasoning_tokens": 2}


class TestEmbeddingsUnit(_Embeddings, EmbeddingsUnitTests):
    pass


class TestEmbeddingsIntegration(_Embeddings, EmbeddingsIntegrationTests):
    test_aembed_query = pytest.mark.asyncio(EmbeddingsIntegrationTests.test_aembed_query)
    test_aembed_documents = pytest.mark.asyncio(EmbeddingsIntegrationTests.test_aembed_documents)


class TestRetrieverIntegration(RetrieversIntegrationTests):
    index: Path
    loaded: SearchR3
    test_ainvoke_returns_documents = pytest.mark.asyncio(RetrieversIntegrationTests.test_ainvoke_returns_documents)

    @pytest.fixture(autouse=True)
    def _tiny(self, tiny_index: Path, tiny: SearchR3) -> None:
        self.index, self.loaded = tiny_index, tiny

    @property
    def retriever_constructor(self) -> type[SearchR3Retriever]:
        return SearchR3Retriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"index": self.index, "model": self.loaded, "max_reasoning_tokens": 2}

    @property
    def retriever_query_example(self) -> str:
        return "train to Vienna"


def test_queries_and_documents_go_to_their_own_sides(tiny: SearchR3):
    plain = SearchR3Embeddings(tiny, reasoning=False)
    thinking = SearchR3Embeddings(tiny, max_reasoning_tokens=3)
    text = "the train to Vienna"
    assert np.allclose(plain.embed_query(text), tiny.encode_query([text], reasoning=False)[0], atol=1e-6)
    assert np.allclose(thinking.embed_query(text), tiny.encode_query([text], max_reasoning_tokens=3)[0], atol=1e-6)
    assert np.allclose(plain.embed_documents([text, "bread"]), tiny.encode_document([text, "bread"]), atol=1e-6)
    assert not np.allclose(plain.embed_query(text), plain.embed_documents([text])[0], atol=1e-3)
    assert not np.allclose(plain.embed_query(text), thinking.embed_query(text), atol=1e-3)


def test_calls_from_several_threads_give_what_one_gives(tiny: SearchR3):
    embeddings = SearchR3Embeddings(tiny, max_reasoning_tokens=2)
    texts = [f"question {number}" for number in range(6)]
    alone = [embeddings.embed_query(text) for text in texts]

    async def together() -> list[list[float]]:
        return await asyncio.gather(*(embeddings.aembed_query(text) for text in texts))

    assert np.allclose(asyncio.run(together()), alone, atol=1e-5)


def test_a_vector_store_takes_it(tiny: SearchR3):
    store = InMemoryVectorStore(SearchR3Embeddings(tiny, reasoning=False))
    store.add_texts(["Bread needs flour.", "The train leaves at nine."])
    (found,) = store.similarity_search("train", k=1)
    assert found.page_content in ("Bread needs flour.", "The train leaves at nine.")


def test_the_retriever_finds_what_the_index_finds_and_says_where_it_stands(tiny_index: Path):
    retriever = SearchR3Retriever(index=tiny_index, mode="text", k=2)
    found = retriever.invoke("train to Vienna")
    assert found[0].page_content == "The train to Vienna leaves at nine."
    assert found[0].metadata["document"] == "train"
    assert found[0].metadata["lang"] == "en"
    assert found[0].metadata["score"] > 0
    assert [d.metadata["document"] for d in retriever.invoke("nine Wien train", where="lang = 'de'")] == ["zug"]


def test_the_retriever_reads_the_first_hits(tiny_index: Path, reader: SearchR3):
    retriever = SearchR3Retriever(index=str(tiny_index), model=reader, reasoning=False, read=2, hops=2)
    index = SearchIndex.open(tiny_index)
    expected = index.search("train to Vienna", reader, k=5, reasoning=False, read=2, hops=2)
    found = retriever.invoke("train to Vienna")
    assert [document.metadata["score"] for document in found] == [hit.score for hit in expected.hits]
    with pytest.raises(InputError, match="hops is 2, but nothing is read"):
        retriever.invoke("train to Vienna", read=0)


def test_the_retriever_embeds_a_query_behind_an_agents_own_reasoning(tiny_index: Path, tiny: SearchR3):
    retriever = SearchR3Retriever(index=str(tiny_index), model=tiny, reasoning=False)
    found = retriever.invoke("train to Vienna", reasoning_text="railway")
    expected = SearchIndex.open(tiny_index).search("train to Vienna", tiny, k=5, reasoning_text="railway")
    assert [document.metadata["score"] for document in found] == [hit.score for hit in expected.hits]
    assert found != retriever.invoke("train to Vienna")


def test_the_retriever_finds_the_model_that_made_the_index(tiny_index: Path):
    retriever = SearchR3Retriever(index=tiny_index, reasoning=False, device="cpu")
    assert len(retriever.invoke("bread", k=5)) == 5


def test_another_model_is_refused(tiny_index: Path, other_tiny_model: Path):
    retriever = SearchR3Retriever(index=tiny_index, model=other_tiny_model, device="cpu")
    with pytest.raises(InputError, match="contract"):
        retriever.invoke("bread")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_reasoning_tokens": -1}, "max_reasoning_tokens must be a whole number of 0 or more, not -1"),
        ({"batch_size": 0}, "batch_size"),
        ({"reasoning": "auto"}, "reasoning must be True or False"),
        ({"model": 7}, "model is a int"),
    ],
)
def test_a_wrong_setting_is_told_at_once(settings: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told):
        SearchR3Embeddings(**settings)


def test_an_index_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        SearchR3Retriever(index=tmp_path / "none")

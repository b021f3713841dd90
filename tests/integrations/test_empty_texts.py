"""One text that holds nothing does not cost the others: each framework gets what its users expect, and it is named."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path

import numpy as np
import pytest
from haystack import Document
from haystack.document_stores.in_memory import InMemoryDocumentStore
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode

from search_r3 import InputError, SearchR3
from search_r3.integrations.framework_encoder import has_visible_character, replace_lone_surrogates
from search_r3.integrations.haystack import SearchR3DocumentEmbedder, SearchR3TextEmbedder
from search_r3.integrations.langchain import SearchR3Embeddings
from search_r3.integrations.llama_index import SearchR3Embedding

BLANK = ["", " ", "\n\t", "\u200b", "\ufeff", "\xa0\u2003", "\u200b\u200d\u2060 \r", "\0", "\ud800", "\udc00 "]
VISIBLE = ["x", ".", "\u200bx", "\ufffd", "é", "😀", "\u0301", "\u4e00", "\ud800x"]


@pytest.mark.parametrize("text", BLANK)
def test_nothing_can_be_seen(text: str) -> None:
    assert not has_visible_character(text)


@pytest.mark.parametrize("text", VISIBLE)
def test_something_can_be_seen(text: str) -> None:
    assert has_visible_character(text)


def test_halves_of_surrogate_pairs_are_joined_or_replaced() -> None:
    assert replace_lone_surrogates("a \ud83d\ude00 b") == "a 😀 b"
    assert replace_lone_surrogates("\ud83d alone, \udc00 too") == "\ufffd alone, \ufffd too"
    assert replace_lone_surrogates("plain é 😀") == "plain é 😀"


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
@pytest.mark.parametrize("empty", BLANK)
def test_where_every_text_must_have_a_vector_an_empty_one_has_one_that_no_search_finds(
    tiny: SearchR3, framework: str, empty: str
) -> None:
    if framework == "langchain":
        embed = SearchR3Embeddings(tiny, reasoning=False).embed_documents
    else:
        embed = SearchR3Embedding(tiny, reasoning=False).get_text_embedding_batch
    texts = ["Bread needs flour.", empty, "The train leaves at nine."]
    with pytest.warns(UserWarning, match=r"1 of 3 texts contain no visible character \(number 2\)"):
        rows = np.array(embed(texts))
    filled = tiny.encode_document([texts[0], texts[2]])
    assert np.allclose(rows[[0, 2]], filled, atol=1e-6)
    assert np.linalg.norm(rows[1]) == pytest.approx(1.0, abs=1e-5)  # cosine stores divide by it
    assert np.allclose(rows[1], -tiny.encode_document(["."])[0], atol=1e-6)
    with pytest.warns(UserWarning, match="2 of 2 texts"):
        alone = embed([empty, empty])
    assert np.allclose(alone, [rows[1], rows[1]], atol=1e-6)  # whatever else is in the batch


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_a_text_with_half_of_a_surrogate_pair_is_embedded_without_it(tiny: SearchR3, framework: str) -> None:
    texts = ["broken \ud83d emoji", "whole \ud83d\ude00 emoji"]
    expected = tiny.encode_document(["broken \ufffd emoji", "whole 😀 emoji"])
    if framework == "langchain":
        embeddings = SearchR3Embeddings(tiny, reasoning=False)
        found, query = embeddings.embed_documents(texts), embeddings.embed_query(texts[0])
    else:
        embedding = SearchR3Embedding(tiny, reasoning=False)
        found, query = embedding.get_text_embedding_batch(texts), embedding.get_query_embedding(texts[0])
    assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(query, tiny.encode_query(["broken \ufffd emoji"], reasoning=False)[0], atol=1e-6)


@pytest.mark.parametrize("empty", BLANK)
def test_a_query_that_is_empty_is_refused(tiny: SearchR3, tiny_model: Path, empty: str) -> None:
    embed = (
        SearchR3Embeddings(tiny).embed_query,
        SearchR3Embedding(tiny).get_query_embedding,
        SearchR3TextEmbedder(str(tiny_model), device="cpu").run,
    )
    for one in embed:
        with pytest.raises(InputError, match="the query is empty: it contains no visible character"):
            one(empty)


def test_what_is_no_string_is_refused_with_its_place(tiny: SearchR3) -> None:
    with pytest.raises(InputError, match="text 2 of 3 is a NoneType, not a string"):
        SearchR3Embeddings(tiny).embed_documents(["a", None, ""])  # type: ignore[list-item]


def test_many_empty_texts_are_counted_and_the_first_named(tiny: SearchR3) -> None:
    with pytest.warns(UserWarning, match=r"8 of 9 texts .* \(number 1, 2, 3, 4, 5, \.\.\.\)"):
        SearchR3Embeddings(tiny).embed_documents([""] * 8 + ["x"])


def test_nothing_is_said_and_nothing_loaded_where_there_is_no_need(tiny: SearchR3) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SearchR3Embeddings(tiny).embed_documents([]) == []
        assert len(SearchR3Embeddings(tiny).embed_documents(["a", "b"])) == 2


def test_a_vector_store_of_langchain_takes_an_empty_text_and_finds_it_last(tiny: SearchR3) -> None:
    store = InMemoryVectorStore(SearchR3Embeddings(tiny, reasoning=False))
    with pytest.warns(UserWarning, match="no visible character"):
        store.add_texts(["Bread needs flour.", "", "The train leaves at nine."])
    assert store.similarity_search("train", k=3)[-1].page_content == ""


def test_an_index_of_llama_index_takes_an_empty_node(tiny: SearchR3) -> None:
    embedding = SearchR3Embedding(tiny, reasoning=False)
    nodes = [TextNode(text=text) for text in ("Bread needs flour.", " \u200b", "The train leaves at nine.")]
    with pytest.warns(UserWarning, match="no visible character"):
        index = VectorStoreIndex(nodes, embed_model=embedding)
    assert index.as_retriever(similarity_top_k=3).retrieve("train")[-1].text == " \u200b"
    with pytest.warns(UserWarning, match="no visible character"):
        assert len(asyncio.run(embedding.aget_text_embedding(" "))) == 32


@pytest.mark.parametrize("content", [None, *BLANK])
def test_haystack_passes_a_document_without_text_on_without_an_embedding(
    tiny: SearchR3, tiny_model: Path, content: str | None
) -> None:
    embedder = SearchR3DocumentEmbedder(str(tiny_model), device="cpu", meta_fields_to_embed=["title"])
    titled = Document(content=content, meta={"title": "Bread"}, id="titled")  # Haystack hashes what it can encode
    given = [Document(content="It needs flour."), Document(content=content, id="the-empty-one"), titled]
    with pytest.warns(UserWarning, match="1 of 3 documents have no text to embed .* embedding: the-empty-one"):
        done = embedder.run(given)["documents"]
    assert [document.id for document in done] == [document.id for document in given]
    assert done[1].embedding is None
    assert np.allclose(done[0].embedding, tiny.encode_document(["It needs flour."])[0], atol=1e-6)
    expected = replace_lone_surrogates(f"Bread {content or ''}")
    assert np.allclose(done[2].embedding, tiny.encode_document([expected])[0], atol=1e-6)
    if content is None or content.isprintable():
        store = InMemoryDocumentStore()
        assert store.write_documents(done) == 3
        assert len(store.embedding_retrieval([0.1] * 32, top_k=5)) == 2


def test_a_model_asked_directly_names_a_text_that_is_no_unicode(tiny: SearchR3) -> None:
    for ask in (tiny.encode_document, tiny.encode_query, tiny.reason):
        with pytest.raises(InputError, match=r"text 2 of 2 contains half of a surrogate .* at character 3\)"):
            ask(["fine 😀", "a \ud83d"])

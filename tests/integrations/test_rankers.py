"""The rankers of LangChain, LlamaIndex and Haystack: one order, by a cross-encoder or by embeddings."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from haystack import Document, Pipeline
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import NodeWithScore, TextNode

from search_r3 import InputError, SearchR3
from search_r3.integrations.document_ranker import DocumentRanker
from search_r3.integrations.haystack import SearchR3Ranker
from search_r3.integrations.langchain import SearchR3Reranker as LangChainReranker
from search_r3.integrations.llama_index import SearchR3Reranker as LlamaIndexReranker
from search_r3.rerankers.cross_encoder import CrossEncoderReranker

QUERY = "the train to Vienna"
TEXTS = ["Bread needs flour.", "The train leaves at nine.", "Vienna", "where is the train to vienna"]


def test_a_cross_encoder_ranks_in_all_frameworks(tiny_cross_encoder: Path) -> None:
    folder = str(tiny_cross_encoder)
    scores = CrossEncoderReranker(folder, "cpu").score(QUERY, TEXTS)
    expected = [(TEXTS[i], scores.relevance[i]) for i in scores.best(2)]

    documents = [LangChainDocument(text, metadata={"n": n}) for n, text in enumerate(TEXTS)]
    chosen = LangChainReranker(reranker=folder, top_n=2, device="cpu").compress_documents(documents, QUERY)
    assert [one.page_content for one in chosen] == [text for text, _ in expected]
    np.testing.assert_allclose([one.metadata["relevance_score"] for one in chosen], [one for _, one in expected])
    assert all("n" in one.metadata for one in chosen)
    assert "relevance_score" not in documents[scores.best(1)[0]].metadata

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]
    ranked = LlamaIndexReranker(reranker=folder, top_n=2, device="cpu").postprocess_nodes(nodes, query_str=QUERY)
    assert [one.node.text for one in ranked] == [text for text, _ in expected]
    np.testing.assert_allclose([one.score for one in ranked], [one for _, one in expected])
    assert nodes[0].score == 0.5

    ranker = SearchR3Ranker(folder, top_k=2, device="cpu")
    found = ranker.run(QUERY, [Document(content=text) for text in TEXTS])["documents"]
    assert [one.content for one in found] == [text for text, _ in expected]
    np.testing.assert_allclose([one.score for one in found], [one for _, one in expected])
    assert len(ranker.run(QUERY, [Document(content=text) for text in TEXTS], top_k=3)["documents"]) == 3
    titled = SearchR3Ranker(folder, meta_fields_to_embed=["title"], device="cpu")
    (one,) = titled.run(QUERY, [Document(content="b", meta={"title": "a"})])["documents"]
    assert one.score == pytest.approx(CrossEncoderReranker(folder, "cpu").score(QUERY, ["a b"]).relevance[0])


def test_embeddings_rank_without_a_cross_encoder(tiny: SearchR3, tiny_model: Path) -> None:
    query = tiny.encode_query([QUERY], max_reasoning_tokens=3)
    cosines = tiny.similarity(query, tiny.encode_document(TEXTS, show_progress_bar=False))[0]
    found = LangChainReranker(model=tiny, max_reasoning_tokens=3).compress_documents(
        [LangChainDocument(text) for text in TEXTS], QUERY
    )
    assert [one.page_content for one in found] == [TEXTS[i] for i in np.argsort(-cosines)]
    ranker = SearchR3Ranker(model=str(tiny_model), max_reasoning_tokens=3, device="cpu")
    ranker.warm_up()
    assert [one.content for one in ranker.run(QUERY, [Document(content=text) for text in TEXTS])["documents"]] == [
        one.page_content for one in found
    ]
    assert ranker.run(QUERY, []) == {"documents": []}


def test_rankers_are_written_and_read_again(tiny_cross_encoder: Path) -> None:
    pipeline = Pipeline()
    pipeline.add_component("ranker", SearchR3Ranker(str(tiny_cross_encoder), top_k=1, device="cpu"))
    text = pipeline.dumps()
    try:
        again = Pipeline.loads(text)
    except Exception as error:  # Haystack 3 reads only what its user allows
        if "allow" not in str(error).lower():
            raise
        again = Pipeline.loads(text, allowed_modules=["search_r3.integrations.haystack"])
    documents = [Document(content=one) for one in TEXTS]
    assert len(again.run({"ranker": {"query": QUERY, "documents": documents}})["ranker"]["documents"]) == 1

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    ranker = LlamaIndexReranker(reranker=str(tiny_cross_encoder), top_n=1, device="cpu")
    best = ranker.postprocess_nodes(nodes, query_str=QUERY)[0].node.text
    for other in (copy.deepcopy(ranker), LlamaIndexReranker.from_json(ranker.to_json())):
        assert other.postprocess_nodes(nodes, query_str=QUERY)[0].node.text == best
    shared = pickle.loads(pickle.dumps(DocumentRanker(str(tiny_cross_encoder), device="cpu")))
    assert TEXTS[shared.rank(QUERY, TEXTS, 1)[0][0]] == best


def test_bad_input_is_named(tiny_cross_encoder: Path) -> None:
    ranker = DocumentRanker(str(tiny_cross_encoder), device="cpu")
    with pytest.raises(InputError, match="the query is empty"):
        ranker.rank(" ", TEXTS)
    with pytest.raises(InputError, match="must be a whole number of 1 or more, not 0"):
        ranker.rank(QUERY, TEXTS, 0)
    with pytest.raises(InputError, match="needs the query"):
        LlamaIndexReranker(reranker=str(tiny_cross_encoder)).postprocess_nodes([])
    with pytest.raises(InputError, match="no cross-encoder at"):
        DocumentRanker("./nowhere").rank(QUERY, TEXTS)

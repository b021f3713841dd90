"""Clients of other projects against the server, unchanged: Cohere's, and Haystack's for TEI and for OpenAI."""

from __future__ import annotations

import numpy as np
import pytest
from serving_tools import Running

from search_r3 import SearchR3

DOCUMENTS = ["Bread needs flour.", "The train to Vienna leaves at nine."]


def test_coheres_clients(served: Running) -> None:
    import cohere

    name = served.ask("GET", "/v1/models").json["data"][0]["reranker"]
    newer = cohere.ClientV2(api_key="none", base_url=served.url)
    found = newer.rerank(model=name, query="train", documents=DOCUMENTS, top_n=1, max_tokens_per_doc=100)
    assert len(found.results) == 1
    assert 0 <= found.results[0].relevance_score <= 1
    older = cohere.Client(api_key="none", base_url=served.url)
    found = older.rerank(query="train", documents=[{"text": one} for one in DOCUMENTS], return_documents=True)
    assert {one.index: one.document.text for one in found.results} == dict(enumerate(DOCUMENTS))
    with pytest.raises(cohere.errors.NotFoundError, match=r"rerank-v3\.5"):
        newer.rerank(model="rerank-v3.5", query="train", documents=DOCUMENTS)


def test_haystacks_clients_of_tei(served: Running, tiny: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    from haystack import Document
    from haystack_integrations.components.embedders.huggingface_api import (
        HuggingFaceAPIDocumentEmbedder,
        HuggingFaceAPITextEmbedder,
    )
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the client refuses this machine's addresses too
    expected = tiny.encode_document(DOCUMENTS, show_progress_bar=False)
    where = {"api_type": "text_embeddings_inference", "api_params": {"url": served.url}, "token": None}
    documents = [Document(content=text) for text in DOCUMENTS]
    embedded = HuggingFaceAPIDocumentEmbedder(**where, progress_bar=False).run(documents)["documents"]
    np.testing.assert_allclose([one.embedding for one in embedded], expected, atol=1e-5)
    one = HuggingFaceAPITextEmbedder(**where).run(DOCUMENTS[0])["embedding"]
    np.testing.assert_allclose(one, expected[0], atol=1e-5)
    ranked = HuggingFaceTEIRanker(url=served.url, top_k=1, token=None).run(query="train", documents=documents)
    cosines = tiny.similarity(tiny.encode_query(["train"], reasoning=False), expected)[0]
    assert [one.content for one in ranked["documents"]] == [DOCUMENTS[int(np.argmax(cosines))]]


def test_haystacks_clients_of_openai(served: Running, tiny: SearchR3) -> None:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    where = {"api_key": Secret.from_token("none"), "api_base_url": f"{served.url}/v1", "model": tiny.name}
    documents = [Document(content=text) for text in DOCUMENTS]
    embedded = OpenAIDocumentEmbedder(**where, progress_bar=False).run(documents)["documents"]
    expected = tiny.encode_document(DOCUMENTS, show_progress_bar=False)
    np.testing.assert_allclose([one.embedding for one in embedded], expected, atol=1e-5)
    one = OpenAITextEmbedder(**where).run(DOCUMENTS[1])["embedding"]
    np.testing.assert_allclose(one, expected[1], atol=1e-5)

"""Cohere's own client against the server; it is not among the requirements, so the test runs where it is installed."""

from __future__ import annotations

import pytest
from serving_tools import Running

cohere = pytest.importorskip("cohere", reason="cohere is not installed: pip install cohere")

DOCUMENTS = ["Bread needs flour.", "The train to Vienna leaves at nine."]


def test_coheres_clients(served: Running) -> None:
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

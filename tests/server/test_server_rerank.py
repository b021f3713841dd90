"""POST /v1/rerank: the scores of a cross-encoder or of embeddings, Cohere's and Jina's forms, errors and limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_tools import Running, running

from search_r3 import SearchR3
from search_r3.index.search_index import SearchIndex
from search_r3.rerankers.cross_encoder import CrossEncoderReranker
from search_r3.server.service import Loaded

QUERY = "the train to Vienna"
DOCUMENTS = ["Bread needs flour.", "The train to Vienna leaves at nine.", "Vienna", "abcd " * 100]


@pytest.fixture(scope="module")
def reranker(tiny_cross_encoder: Path) -> CrossEncoderReranker:
    return CrossEncoderReranker(tiny_cross_encoder, "cpu")


@pytest.fixture(scope="module")
def reranking(
    tiny: SearchR3, make_index: Callable[[], SearchIndex], reranker: CrossEncoderReranker
) -> Iterator[Running]:
    index = make_index()
    with running(lambda: Loaded.of(tiny, index, reranker), max_items=6, max_request_tokens=150) as server:
        yield server


def test_documents_come_in_the_order_of_the_cross_encoder(reranking: Running, reranker: CrossEncoderReranker) -> None:
    scores = reranker.score(QUERY, DOCUMENTS[:3])
    answer = reranking.post("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS[:3]}).json
    assert answer["model"] == "tiny-cross-encoder"
    assert answer["kind"] == "cross-encoder"
    assert [one["index"] for one in answer["results"]] == scores.best()
    found = {one["index"]: one["relevance_score"] for one in answer["results"]}
    np.testing.assert_allclose([found[i] for i in range(3)], scores.relevance, atol=1e-5)
    assert answer["usage"] == {
        "prompt_tokens": scores.tokens, "completion_tokens": 0, "total_tokens": scores.tokens
    }  # fmt: skip
    assert all(list(one) == ["index", "relevance_score"] for one in answer["results"])


def test_coheres_and_jinas_fields(reranking: Running) -> None:
    documents = ["Bread needs flour.", {"text": "The train leaves at nine.", "title": "Trains", "year": 2020}]
    for path in ("/v1/rerank", "/v2/rerank"):
        body = {"model": "tiny-cross-encoder", "query": QUERY, "documents": documents, "return_documents": True}
        results = reranking.post(path, {**body, "top_n": 5, "max_tokens_per_doc": 4}).json["results"]
        returned = {one["index"]: one["document"] for one in results}
        assert returned == {0: {"text": documents[0]}, 1: documents[1]}
        (best,) = reranking.post(path, {**body, "top_n": 1}).json["results"]
        assert 0 <= best["relevance_score"] <= 1


def test_without_a_cross_encoder_the_embeddings_score_and_the_answer_says_so(served: Running, tiny: SearchR3) -> None:
    answer = served.post("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}).json
    assert (answer["model"], answer["kind"]) == (tiny.name, "embeddings")
    cosines = tiny.similarity(tiny.encode_query([QUERY]), tiny.encode_document(DOCUMENTS, show_progress_bar=False))[0]
    found = {one["index"]: one["relevance_score"] for one in answer["results"]}
    np.testing.assert_allclose([found[i] for i in range(4)], np.clip(cosines, 0, 1), atol=1e-4)
    assert answer["usage"]["prompt_tokens"] > 100
    models = served.ask("GET", "/v1/models").json["data"][0]
    assert (models["reranker"], models["reranker_kind"]) == (tiny.name, "embeddings")
    for path in ("/v1/rerank", "/v2/rerank"):
        assert served.post(path, {"query": QUERY, "documents": ["x"], "model": "rerank-v3.5"}).status == 404


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"query": QUERY}, 400, "missing_field", "documents"),
        ({"query": QUERY, "documents": []}, 400, "invalid_value", "documents"),
        ({"query": " ", "documents": ["x"]}, 400, "invalid_value", "query"),
        ({"query": QUERY, "documents": ["x", " "]}, 400, "invalid_value", "documents.1"),
        ({"query": QUERY, "documents": [{"title": "x"}]}, 400, "missing_field", "documents.0.text"),
        ({"query": QUERY, "documents": [5]}, 400, "invalid_value", "documents.0"),
        ({"query": QUERY, "documents": ["x"], "top_n": 0}, 400, "invalid_value", "top_n"),
        ({"query": QUERY, "documents": ["x"], "rank_fields": ["a"]}, 400, "unknown_field", "rank_fields"),
        ({"query": QUERY, "documents": ["x"], "model": "other"}, 404, "model_not_found", "model"),
        ({"query": QUERY, "documents": ["x"] * 7}, 400, "too_many_items", "documents"),
        ({"query": QUERY, "documents": [DOCUMENTS[3]] * 4}, 413, "too_many_tokens", "documents"),
    ],
)
def test_what_is_wrong_is_named(reranking: Running, body: Any, status: int, code: str, param: str) -> None:
    answer = reranking.post("/v1/rerank", body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (status, code, param)


def test_embeddings_have_the_same_limits(tiny: SearchR3) -> None:
    with running(lambda: Loaded.of(tiny), max_items=3, max_request_tokens=60) as server:
        for documents, status in ((["x"] * 3, 200), (["x"] * 4, 400), ([DOCUMENTS[3]], 413)):
            assert server.post("/v1/rerank", {"query": QUERY, "documents": documents}).status == status


def test_keys_bodies_and_queues_are_checked_as_everywhere(tiny: SearchR3) -> None:
    body = {"query": QUERY, "documents": ["x"]}
    with running(lambda: Loaded.of(tiny), api_keys=("secret",), max_body=2000) as server:
        for path in ("/v1/rerank", "/v2/rerank"):
            assert server.post(path, body).status == 401
            assert server.post(path, body, Authorization="Bearer secret").status == 200
            large = {**body, "documents": ["x" * 3000]}
            assert server.post(path, large, Authorization="Bearer secret").error["code"] == "body_too_large"
            plain = {"Authorization": "Bearer secret", "Content-Type": "text/plain"}
            assert server.ask("POST", path, b"{}", plain).status == 415
        server.service.config = server.service.config.__class__(api_keys=("secret",), queue=1)
        with server.service.inside():
            answer = server.post("/v1/rerank", body, Authorization="Bearer secret")
        assert (answer.status, answer.error["code"]) == (429, "queue_full")


def test_a_search_reranks_its_first_hits(reranking: Running, reranker: CrossEncoderReranker) -> None:
    body = {"query": QUERY, "k": 2, "reasoning": False, "mode": "text", "explain": True}
    plain = reranking.post("/v1/search", {**body, "query": "the train vienna water", "k": 3}).json
    answer = reranking.post("/v1/search", {**body, "query": "the train vienna water", "rerank": 3})
    assert answer.status == 200, answer.body
    texts = [f"{hit['title']} {hit['text']}".strip() for hit in plain["hits"]]
    scores = reranker.score("the train vienna water", texts)
    assert [hit["id"] for hit in answer.json["hits"]] == [plain["hits"][i]["id"] for i in scores.best(2)]
    for rank, (hit, i) in enumerate(zip(answer.json["hits"], scores.best(2), strict=True), start=1):
        assert hit["score"] == hit["scores"]["rerank"] == pytest.approx(scores.relevance[i], abs=1e-5)
        assert hit["ranks"]["rerank"] == rank
    assert len(answer.json["explanation"]["hits"]) == 2
    assert reranking.post("/v1/search", {**body, "rerank": 1}).error["code"] == "conflict"


def test_a_search_cannot_be_reranked_without_a_cross_encoder(served: Running) -> None:
    answer = served.post("/v1/search", {"query": QUERY, "mode": "text", "reasoning": False, "rerank": 10})
    assert (answer.status, answer.error["code"]) == (400, "no_reranker")

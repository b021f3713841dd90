"""The routes of Text Embeddings Inference, by a real client of it and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_tools import Running, running

from search_r3 import SearchR3
from search_r3.rerankers.cross_encoder import CrossEncoderReranker
from search_r3.server.service import Loaded

TEXTS = ["Bread needs flour.", "The train to Vienna leaves at nine."]
LONG = "The train leaves. " * 400


def test_hugging_faces_client_works_unchanged(served: Running, tiny: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client posts to the URL that it is given, without adding a path."""
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the client refuses this machine's addresses too
    documents = tiny.encode_document(TEXTS, show_progress_bar=False)
    for url in (served.url, f"{served.url}/embed"):
        client = InferenceClient(model=url)
        np.testing.assert_allclose(client.feature_extraction(TEXTS), documents, atol=1e-5)
        one = client.feature_extraction(TEXTS[0], normalize=True, truncate=True, truncation_direction="left")
        np.testing.assert_allclose(one, documents[:1], atol=1e-5)
        query = client.feature_extraction("train", prompt_name="query")
        np.testing.assert_allclose(query, tiny.encode_query(["train"], reasoning=False), atol=1e-5)


def test_embeddings_are_unit_vectors_whatever_normalize_says(served: Running) -> None:
    """Haystack's HuggingFaceAPIDocumentEmbedder sends false unless it is told otherwise."""
    found = [served.post("/embed", {"inputs": TEXTS, "normalize": said}).json for said in (False, True, None)]
    assert found[0] == found[1] == found[2]
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)


def test_the_answer_is_a_list_of_vectors(served: Running, tiny: SearchR3) -> None:
    found = served.post("/embed", {"inputs": TEXTS[0], "dimensions": tiny.dimension}).json
    np.testing.assert_allclose(found, tiny.encode_document(TEXTS[:1], show_progress_bar=False), atol=1e-5)
    info = served.ask("GET", "/info").json
    assert (info["model_id"], info["max_input_length"], info["auto_truncate"]) == (tiny.name, 512, True)
    assert info["max_client_batch_size"] == 2048
    assert served.ask("GET", "/health").status == 200
    assert b"search_r3_requests_total" in served.ask("GET", "/metrics").body


def test_texts_are_put_in_order(tiny: SearchR3, tiny_cross_encoder: Path, served: Running) -> None:
    reranker = CrossEncoderReranker(tiny_cross_encoder, "cpu")
    scores = reranker.score("train", TEXTS)
    with running(lambda: Loaded.of(tiny, None, reranker)) as server:
        ranks = server.post("/rerank", {"query": "train", "texts": TEXTS, "return_text": True}).json
        raw = server.post("/rerank", {"query": "train", "texts": TEXTS, "raw_scores": True}).json
        assert server.ask("GET", "/info").json["reranker_id"] == "tiny-cross-encoder"
        refused = server.post("/rerank", {"query": "train", "texts": [LONG], "truncate": False})
        assert (refused.status, refused.error["code"]) == (413, "context_length_exceeded")
    assert [(one["index"], one["text"]) for one in ranks] == [(i, TEXTS[i]) for i in scores.best()]
    np.testing.assert_allclose([one["score"] for one in ranks], scores.relevance[scores.best()], atol=1e-5)
    np.testing.assert_allclose([one["score"] for one in raw], scores.raw[scores.best()], atol=1e-5)
    by_embeddings = {"query": "train", "texts": [LONG]}
    assert served.post("/rerank", by_embeddings).status == 200
    assert served.post("/rerank", by_embeddings | {"truncate": False}).error["param"] == "texts"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"inputs": 5}, 400, "inputs"),
        ({"inputs": []}, 400, "inputs"),
        ({"inputs": [" "]}, 400, "inputs.0"),
        ({"inputs": "x", "normalize": 1}, 400, "normalize"),
        ({"inputs": "x", "prompt_name": "passage"}, 400, "prompt_name"),
        ({"inputs": "x", "dimensions": 7}, 400, "dimensions"),
        ({"inputs": LONG, "truncate": False}, 413, "inputs"),
        ({"inputs": "x", "model": "y"}, 400, "model"),
    ],
)
def test_what_is_wrong_is_named(served: Running, body: Any, status: int, param: str) -> None:
    for path in ("/embed", "/"):
        answer = served.post(path, body)
        assert (answer.status, answer.error["param"]) == (status, param)


def test_keys_and_limits_hold_here_too(tiny: SearchR3) -> None:
    bodies = {"/embed": {"inputs": "x"}, "/": {"inputs": "x"}, "/rerank": {"query": "x", "texts": ["x"]}}
    with running(lambda: Loaded.of(tiny), api_keys=("secret",), max_body=2000, max_items=1) as server:
        for path, body in bodies.items():
            assert server.post(path, body).status == 401
            assert server.post(path, body, Authorization="Bearer secret").status == 200
            listed = "texts" if "texts" in body else "inputs"
            two = server.post(path, body | {listed: ["x", "y"]}, Authorization="Bearer secret")
            assert (two.status, two.error["param"]) == (400, listed)
            large = server.post(path, body | {listed: ["x" * 3000]}, Authorization="Bearer secret")
            assert large.status == 413
        assert server.ask("GET", "/info").status == 401
        assert server.ask("GET", "/").status == 200  # the page

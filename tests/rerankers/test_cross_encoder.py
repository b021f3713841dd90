"""A cross-encoder scores each pair for itself, reads no more than it can, and refuses models that give no score."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from cross_encoders import MAX_TOKENS, save_cross_encoder

from search_r3.errors import InputError
from search_r3.model.text_limit import TextTooLong
from search_r3.rerankers.base import ReadingLimit, TooManyTokens
from search_r3.rerankers.cross_encoder import CrossEncoderReranker

QUERY = "train to vienna"
DOCUMENTS = ["bread needs flour", "a train leaves at nine", "vienna", "x " * 200, "where is the train to vienna"]


@pytest.fixture(scope="module")
def reranker(tiny_cross_encoder: Path) -> CrossEncoderReranker:
    return CrossEncoderReranker(tiny_cross_encoder, "cpu")


def test_scores_are_the_librarys_whatever_the_model_was_saved_with(
    reranker: CrossEncoderReranker, tiny_cross_encoder: Path
) -> None:
    from sentence_transformers import CrossEncoder
    from torch.nn import Identity

    scores = reranker.score(QUERY, DOCUMENTS)
    library = CrossEncoder(str(tiny_cross_encoder), device="cpu", max_length=MAX_TOKENS)
    pairs = [(QUERY, text) for text in DOCUMENTS]
    np.testing.assert_allclose(scores.raw, library.predict(pairs, activation_fn=Identity()), atol=1e-5)
    np.testing.assert_allclose(scores.relevance, library.predict(pairs), atol=1e-6)
    assert scores.best() == np.argsort(-scores.raw).tolist()
    assert scores.best(2) == scores.best()[:2]
    assert len(set(scores.raw.round(4).tolist())) == len(DOCUMENTS)


def test_a_score_does_not_depend_on_the_other_documents(reranker: CrossEncoderReranker) -> None:
    together = reranker.score(QUERY, DOCUMENTS * 20).raw
    alone = np.concatenate([reranker.score(QUERY, [text]).raw for text in DOCUMENTS])
    np.testing.assert_allclose(together, np.tile(alone, 20), atol=1e-5)


def test_calls_of_several_threads_get_their_own_scores(reranker: CrossEncoderReranker) -> None:
    expected = reranker.score(QUERY, DOCUMENTS).raw
    found: list[np.ndarray] = []

    def ask() -> None:
        found.append(reranker.score(QUERY, DOCUMENTS).raw)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    for raw in found:
        np.testing.assert_allclose(raw, expected, atol=1e-5)


def test_special_tokens_in_a_text_are_text(reranker: CrossEncoderReranker) -> None:
    """Else a document could end and a better one follow."""
    rows = reranker._model.preprocess([("a", "b [SEP] c")])["input_ids"]
    separator = reranker._model.tokenizer.sep_token_id
    assert (rows == separator).sum() == 2
    assert reranker.score("a", ["b [SEP] c"]).tokens > reranker.score("a", ["b c"]).tokens + 1


def test_no_more_is_read_than_the_limits_say(reranker: CrossEncoderReranker) -> None:
    long = "abcd " * 100
    assert reranker.score("q", [long]).tokens == MAX_TOKENS
    with pytest.raises(TextTooLong, match=r"document 2 has .* tokens with the query"):
        reranker.score("q", ["short", long], limit=ReadingLimit(truncate=False))
    with pytest.raises(TooManyTokens, match="over 100 tokens"):
        reranker.score("q", [long] * 3, limit=ReadingLimit(total_tokens=100))
    begun = reranker.score("q", [long], limit=ReadingLimit(document_tokens=8))
    assert begun.tokens == 1 + 8 + 3
    np.testing.assert_allclose(begun.raw, reranker.score("q", ["abcd abcd"]).raw, atol=1e-6)
    assert reranker.score("q", ["y" * 10_000_000]).tokens <= MAX_TOKENS  # at once, not after all of it was tokenized


def test_a_call_ends_between_two_passes(reranker: CrossEncoderReranker) -> None:
    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reranker.score("q", ["text"] * 70, between=between)


def test_no_document_has_no_score(reranker: CrossEncoderReranker) -> None:
    scores = reranker.score("q", [])
    assert (scores.raw.shape, scores.best(), scores.tokens) == ((0,), [], 0)


def test_other_models_are_refused_in_one_line(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match="is a BertModel, which gives no score for a pair"):
        CrossEncoderReranker(save_cross_encoder(tmp_path / "embedder", headless=True), "cpu")
    with pytest.raises(InputError, match="gives 3 scores for a pair, so it is a classifier"):
        CrossEncoderReranker(save_cross_encoder(tmp_path / "classifier", labels=3), "cpu")
    with pytest.raises(InputError, match=r"no cross-encoder at .*expected a folder"):
        CrossEncoderReranker(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot load the cross-encoder") as caught:
        CrossEncoderReranker(tmp_path / "empty")
    assert "\n" not in str(caught.value)
    damaged = save_cross_encoder(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot load the cross-encoder"):
        CrossEncoderReranker(damaged)

"""/v1/embeddings: the openai client works unchanged, and what comes is what the model gives."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from serving_tools import Running, running

from search_r3 import SearchR3
from search_r3.model.tokenization import encode_as_text, special_ids
from search_r3.server.embedding_types import EMBEDDING_TYPES, quantize, written
from search_r3.server.service import Loaded

if TYPE_CHECKING:  # a second to import, in each of `make test`'s processes
    import openai

TEXTS = [
    "Paris is the capital.",
    "x",
    "text with <|embed_token|> and <|im_end|> in it",
    "nul \0 inside",
    "naïve 日本語 👩‍💻",
    "word " * 900,
]
NAME = "tiny-llama-base"


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_openai_client_gets_the_models_own_embeddings(client: openai.OpenAI, tiny: SearchR3, form: dict) -> None:
    found = client.embeddings.create(model=NAME, input=TEXTS, **form)
    vectors = [e.embedding for e in found.data]
    if form.get("encoding_format") == "base64":  # asked for by name, it is not decoded
        vectors = [np.frombuffer(base64.b64decode(v), dtype="<f4") for v in vectors]
    assert [e.index for e in found.data] == list(range(len(TEXTS)))
    np.testing.assert_allclose(np.array(vectors, dtype=np.float32), tiny.encode_document(TEXTS), atol=2e-6)
    tokens = [min(512, len(ids)) for ids in encode_as_text(tiny.tokenizer, TEXTS)]
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(tokens)
    assert found.usage.to_dict()["truncated_texts"] == 1
    assert found.model == NAME


def test_float_and_base64_are_the_same_numbers(served: Running) -> None:
    plain = served.embed("hello").json["data"][0]["embedding"]
    coded = served.embed("hello", encoding_format="base64").json["data"][0]["embedding"]
    assert np.array_equal(np.array(plain, dtype=np.float32), np.frombuffer(base64.b64decode(coded), dtype="<f4"))
    assert served.embed("hello", encoding_format=None, user="me", dimensions=None).json["data"][0]["embedding"] == plain


def test_queries_directly_and_reasoned(client: openai.OpenAI, tiny: SearchR3) -> None:
    for reasoning in (False, True, 0, 5):
        extra = {"input_type": "query", "reasoning": reasoning}
        found = client.embeddings.create(model=NAME, input=TEXTS[:3], extra_body=extra)
        vectors = np.array([e.embedding for e in found.data], dtype=np.float32)
        if reasoning is False:
            expected, written = tiny.encode_query(TEXTS[:3], reasoning=False), 0
        else:
            reasoned = tiny.reason(TEXTS[:3], max_reasoning_tokens=32 if reasoning is True else reasoning)
            expected, written = np.stack([r.embedding for r in reasoned]), sum(r.num_tokens for r in reasoned)
        np.testing.assert_allclose(vectors, expected, atol=2e-6)
        usage = found.usage.to_dict()
        assert usage["completion_tokens"] == written
        assert usage["total_tokens"] == usage["prompt_tokens"] + written


def test_token_ids_are_the_text_that_they_are(served: Running, tiny: SearchR3) -> None:
    rows = encode_as_text(tiny.tokenizer, TEXTS)
    expected = tiny.encode_document(TEXTS)
    found = served.embed(rows).json
    vectors = np.array([e["embedding"] for e in found["data"]], dtype=np.float32)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    one = served.embed([float(token) for token in rows[0]], input_type="query").json["data"]
    assert len(one) == 1
    expected = tiny.encode_query(TEXTS[:1], reasoning=False)[0]
    np.testing.assert_allclose(np.array(one[0]["embedding"], dtype=np.float32), expected, atol=2e-6)
    for token in [*special_ids(tiny.tokenizer), len(tiny.tokenizer), 10**30]:
        assert f"contains token {token}" in served.embed([5, token]).error["message"]


def test_models(client: openai.OpenAI, served: Running, tiny: SearchR3) -> None:
    import openai

    assert [m.id for m in client.models.list()] == [NAME]
    record = client.models.retrieve(NAME).to_dict()
    assert (record["dimension"], record["contract_hash"]) == (32, tiny.contract_hash)
    assert served.ask("GET", "/v1/models/a/b").status == 404
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here") as caught:
        client.embeddings.create(model="gpt", input="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="trained for 32"):
        client.embeddings.create(model=NAME, input="x", dimensions=16)
    assert len(client.embeddings.create(model=NAME, input="x", dimensions=32).data[0].embedding) == 32


def test_dimensions_that_were_trained_for(make_tiny_model, tmp_path: Path) -> None:
    model = SearchR3.from_pretrained(make_tiny_model(tmp_path / "whole"), device="cpu")
    model.save_pretrained(tmp_path / "merged")
    file = tmp_path / "merged" / "search_r3.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dimensions": [8, 16, 32, 999]}))
    model = SearchR3.from_pretrained(tmp_path / "merged", device="cpu")
    with running(lambda: Loaded.of(model)) as small:
        assert small.ask("GET", "/v1/models").json["data"][0]["dimensions"] == [8, 16, 32]
        found = np.array(small.embed("hello", dimensions=8).json["data"][0]["embedding"])
        whole = model.encode_document(["hello"])[0, :8]
        np.testing.assert_allclose(found, whole / np.linalg.norm(whole), atol=1e-6)
        assert small.embed("hello", dimensions=4).error["code"] == "unsupported_dimensions"
        assert small.post("/v1/search", {"query": "x"}).error["code"] == "no_index"
        assert "/v1/search" not in small.ask("GET", "/openapi.json").json["paths"]


BAD = [
    ({}, "'model' is missing"),
    ({"model": NAME}, "'input' is missing"),
    ([], "expected an object"),
    ({"model": NAME, "input": ""}, "input: empty; give at least one visible character"),
    ({"model": NAME, "input": ["x", " \u200b\0"]}, "input.1: empty; give at least one visible character"),
    ({"model": NAME, "input": []}, "not empty"),
    ({"model": NAME, "input": [[]]}, "input.0: empty"),
    ({"model": NAME, "input": ["x", 1]}, "input.1: expected text"),
    ({"model": NAME, "input": [1, True]}, "input.1: expected a whole number"),
    ({"model": NAME, "input": [[1], "x"]}, "input.1: expected a list"),
    ({"model": NAME, "input": {"a": 1}}, "give a text"),
    ({"model": NAME, "input": "x", "temperature": 1}, "field 'temperature'"),
    ({"model": NAME, "input": "x", "items[]": 1}, "field 'items[]'"),
    ({"model": NAME, "input": "x", "dimensions": "32"}, "dimensions: "),
    ({"model": NAME, "input": "x", "encoding_format": "hex"}, "encoding_format: "),
    ({"model": NAME, "input": "x", "reasoning": True}, '"input_type": "query"'),
    ({"model": NAME, "input": "x", "reasoning": 0}, '"input_type": "query"'),
    ({"model": NAME, "input": "x", "input_type": "query", "reasoning": -1}, "reasoning"),
    ({"model": NAME, "input": "x", "input_type": "query", "reasoning": 257}, "the limit is 256"),
    ({"model": NAME, "input": "x", "input_type": "query", "reasoning": "auto"}, "search-r3 study"),
    ({"model": NAME, "input": "y" * 100_001, "input_type": "query"}, "over 100,000 characters"),
    (b'{"model": "x", "input": "\\ud800"}', "surrogate"),
    (b'{"model": "x", "input": NaN}', "not JSON"),
    (b'{"model": "x", "dimensions": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"model": "\xff"}', "not UTF-8"),
    (b"", "not JSON"),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=[m for _, m in BAD])
def test_rubbish_is_400_in_openais_form(served: Running, body: object, message: str) -> None:
    answer = served.post("/v1/embeddings", body)
    assert answer.status == 400
    assert message in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"


def test_a_text_of_a_megabyte_is_read_as_far_as_the_model_reads(served: Running, tiny: SearchR3) -> None:
    long = "all work and no play " * 50_000
    found = served.embed(long).json
    assert found["usage"] == {
        "prompt_tokens": 512, "completion_tokens": 0, "total_tokens": 512, "truncated_texts": 1, "split_texts": 0
    }  # fmt: skip
    expected = tiny.encode_document([long[:10_000]])[0]
    np.testing.assert_allclose(np.array(found["data"][0]["embedding"], dtype=np.float32), expected, atol=2e-6)


def test_queries_behind_given_reasoning(served: Running, tiny: SearchR3) -> None:
    body = {"model": tiny.name, "input": ["a", "a", "b"], "input_type": "query", "reasoning": True}
    answer = served.post("/v1/embeddings", body | {"reasoning_text": ["first", "second", ""]}).json
    vectors = [item["embedding"] for item in answer["data"]]
    expected = tiny.encode_query(["a", "a", "b"], reasoning_text=["first", "second", ""])
    assert np.allclose(vectors, expected, atol=1e-5), "one text behind two analyses is two rows"
    tokens = sum(tiny.count_tokens(["a", "a", "b", "first", "second"]))
    assert answer["usage"] == {
        "prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens, "truncated_texts": 0, "split_texts": 0
    }  # fmt: skip
    one = served.post("/v1/embeddings", body | {"input": "a", "reasoning": None, "reasoning_text": "first"}).json
    assert np.allclose(one["data"][0]["embedding"], expected[0], atol=1e-5)


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"reasoning_text": ["x", "y"]}, 409, "reasoning_text"),
        ({"reasoning_text": "x", "reasoning": 3}, 409, "reasoning"),
        ({"reasoning_text": "x" * 100_001}, 400, "reasoning_text"),
        ({"reasoning_text": "x", "input_type": "document"}, 400, "reasoning_text"),
    ],
)
def test_given_reasoning_that_does_not_fit_is_refused(served: Running, tiny: SearchR3, more, status, param) -> None:
    answer = served.post("/v1/embeddings", {"model": tiny.name, "input": "a", "input_type": "query"} | more)
    assert (answer.status, answer.error["param"]) == (status, param)


def test_binary_embeddings_are_those_of_sentence_transformers(served: Running, tiny: SearchR3) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    rows = tiny.encode_document(TEXTS, show_progress_bar=False)
    for precision in ("binary", "ubinary"):
        found = [one["embedding"] for one in served.embed(TEXTS, encoding_format=precision).json["data"]]
        assert found == quantize_embeddings(rows, precision).tolist()


@pytest.mark.parametrize("form", ["int8", "uint8"])
def test_bytes_are_those_of_sentence_transformers_with_ranges_of_unit_vectors(
    served: Running, tiny: SearchR3, form: str
) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    plain = [one["embedding"] for one in served.embed(TEXTS).json["data"]]
    ranges = np.array([[-1.0] * tiny.dimension, [1.0] * tiny.dimension])
    expected = quantize_embeddings(np.array(plain, dtype=np.float32), form, ranges=ranges)
    found = [one["embedding"] for one in served.embed(TEXTS, encoding_format=form).json["data"]]
    assert found == expected.tolist()
    alone = served.embed(TEXTS[0], encoding_format=form).json["data"][0]["embedding"]
    assert np.abs(np.array(alone) - found[0]).max() <= 1, "the ranges do not depend on the other texts"


def test_cosines_of_bytes_are_those_of_the_vectors() -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    rows = np.random.default_rng(0).normal(size=(20, 576)).astype(np.float32)
    rows[:, 0] += 20  # one large component, as language models have
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    steps = np.stack([quantize(row, "int8") for row in rows]).astype(np.float32) + 1
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    np.testing.assert_allclose(steps @ steps.T, rows @ rows.T, atol=0.01)
    edges = np.array([[-1, -1e-9, 0, 0.5, 1, 1.0000001, -1.0000001]], dtype=np.float32)
    ranges = np.array([[-1.0] * edges.shape[1], [1.0] * edges.shape[1]])
    for form in ("uint8", "int8"):
        assert np.array_equal(quantize(edges[0], form), quantize_embeddings(edges, form, ranges=ranges)[0])


def test_float16_is_written_in_few_digits_that_read_back_exactly(served: Running) -> None:
    rows = np.array([0, 0.1, -0.5, 1, 6e-8, 3.3e-5, -1e-9, 0.33333], dtype="<f4")
    assert np.array_equal(np.array(written(rows, "float16"), dtype=np.float16), rows.astype(np.float16))
    every = np.arange(2**15, dtype=np.uint16).view(np.float16)
    every = every[np.abs(every) <= 1]
    assert np.array_equal(written(every.astype("<f4"), "float16").astype(np.float16), every)
    plain = np.array(served.embed("hello").json["data"][0]["embedding"], dtype=np.float32)
    answer = served.embed("hello", encoding_format="float16").json["data"][0]["embedding"]
    assert np.array_equal(np.array(answer, dtype=np.float16), plain.astype(np.float16))
    assert max(len(str(number).strip("-0.").split("e")[0]) for number in answer) <= 5
    assert written(np.array([1 / 3], dtype="<f4"), "float16").tolist() == [0.33325]


def test_an_unknown_type_is_refused_with_the_known_ones(served: Running) -> None:
    wrong = served.embed(TEXTS, encoding_format="int4").error
    assert (wrong["param"], wrong["message"]) == (
        "encoding_format",
        "encoding_format: expected one of float, base64, float16, int8, uint8, binary, ubinary",
    )


def test_several_types_at_once_are_those_of_sentence_transformers(served: Running, tiny: SearchR3) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    asked = list(EMBEDDING_TYPES)
    rows = [one["embedding"] for one in served.embed(TEXTS, embedding_types=asked).json["data"]]
    plain = np.array([row["float"] for row in rows], dtype=np.float32)
    np.testing.assert_allclose(plain, tiny.encode_document(TEXTS, show_progress_bar=False), atol=2e-6)
    assert all(list(row) == asked for row in rows)
    ranges = np.array([[-1.0] * tiny.dimension, [1.0] * tiny.dimension])
    for form in ("int8", "uint8", "binary", "ubinary"):
        assert [row[form] for row in rows] == quantize_embeddings(plain, form, ranges=ranges).tolist()
    for row, vector in zip(rows, plain, strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(row["base64"]), dtype="<f4"), vector)
        assert np.array_equal(np.array(row["float16"], dtype=np.float16), vector.astype(np.float16))


def test_a_list_of_one_type_is_answered_by_an_object_too(served: Running, client: openai.OpenAI) -> None:
    int8 = served.embed("hello", encoding_format="int8").json["data"][0]["embedding"]
    assert served.embed("hello", embedding_types=["int8"]).json["data"][0]["embedding"] == {"int8": int8}
    found = client.embeddings.create(model=NAME, input="hello", extra_body={"embedding_types": ["int8", "ubinary"]})
    assert cast(dict, found.data[0].embedding)["int8"] == int8  # beside the base64 that the client itself asks for
    assert served.embed("hello", embedding_types=None).json == served.embed("hello").json


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (
            {"embedding_types": ["int4"]},
            400,
            "embedding_types: expected a list of float, base64, float16, int8, uint8, ",
        ),
        ({"embedding_types": "int8"}, 400, "embedding_types: expected a list of float, "),
        ({"embedding_types": []}, 400, "embedding_types: expected a list of float, "),
        ({"embedding_types": ["int8"], "encoding_format": "int8"}, 409, "both name the type of the embeddings"),
    ],
)
def test_types_that_are_not_a_list_of_known_ones_are_refused(served: Running, more, status, message) -> None:
    answer = served.embed(TEXTS, **more)
    assert (answer.status, answer.error["param"]) == (status, "embedding_types")
    assert message in answer.error["message"]

"""A text of more tokens than the server reads is refused, truncated or split, as the server or the request says."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from processes import eventually
from serving_tools import Answer, Running, running

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.index.search_index import SearchIndex
from search_r3.model.text_limit import mean_of_parts
from search_r3.model.tokenization import Tokens, encode_as_text
from search_r3.server.logs import LOGGER
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded, Service

LONG = "How do I read a file line by line in Python? Open it and iterate over the lines."
BREAD = "Baking Bread needs flour, water and yeast."
"""A document of the index, as it is embedded."""
MOST = 8


@pytest.fixture(scope="module")
def limited(tiny: SearchR3, make_index: Callable[[], SearchIndex]) -> Iterator[Running]:
    index = make_index()
    with running(lambda: Loaded.of(tiny, index), max_tokens=MOST, writable=True) as found:
        yield found


@pytest.fixture(scope="module")
def ids(tiny: SearchR3) -> tuple[int, ...]:
    return tuple(encode_as_text(tiny.tokenizer, [LONG])[0])


def vector(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    return np.array(answer.json["data"][0]["embedding"], dtype=np.float32)


def usage(answer: Answer) -> tuple[int, int, int]:
    found = answer.json["usage"]
    return found["prompt_tokens"], found["truncated_texts"], found["split_texts"]


@pytest.mark.parametrize("kind", ["document", "query"])
@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, slice(MOST)),
        ({"too_long": "truncate"}, slice(MOST)),
        ({"truncate": True}, slice(MOST)),  # Text Embeddings Inference
        ({"truncate_prompt_tokens": -1}, slice(MOST)),  # vLLM
        ({"truncate_prompt_tokens": 5}, slice(5)),
        ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, slice(-5, None)),
        ({"truncation_side": "left"}, slice(-MOST, None)),
    ],
    ids=str,
)
def test_a_longer_text_is_truncated_and_counted(
    limited: Running, tiny: SearchR3, ids: tuple[int, ...], kind: str, fields: dict, kept: slice
) -> None:
    answer = limited.embed(LONG, input_type=kind, **fields)
    text = [Tokens(ids[kept])]
    expected = tiny.encode_document(text) if kind == "document" else tiny.encode_query(text, reasoning=False)
    np.testing.assert_allclose(vector(answer), expected[0], atol=2e-6)
    assert usage(answer) == (len(ids[kept]), 1, 0)


def test_a_longer_document_is_the_mean_of_its_parts(limited: Running, tiny: SearchR3, ids: tuple[int, ...]) -> None:
    answer = limited.embed([LONG, "lines"], too_long="split")
    count = -(-len(ids) // MOST)
    ends = [len(ids) * number // count for number in range(count + 1)]
    parts = [Tokens(ids[start:end]) for start, end in itertools.pairwise(ends)]
    expected = mean_of_parts(tiny.encode_document(parts), [len(part.ids) for part in parts])
    np.testing.assert_allclose(vector(answer), expected, atol=2e-6)
    second = np.array(answer.json["data"][1]["embedding"], dtype=np.float32)
    np.testing.assert_allclose(second, tiny.encode_document(["lines"])[0], atol=2e-6)
    assert usage(answer) == (len(ids) + tiny.count_tokens(["lines"])[0], 0, 1)


@pytest.mark.parametrize("fields", [{"too_long": "error"}, {"truncate": False}], ids=str)
def test_a_longer_text_is_refused_where_the_request_says_so(limited: Running, fields: dict) -> None:
    answer = limited.embed(["lines", LONG], **fields)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (413, "context_length_exceeded", "input")
    assert f"text 2 of 2 has over {MOST} tokens" in answer.error["message"]
    assert limited.embed("lines", **fields).status == 200


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"truncate": True, "too_long": "error"}, 409, "truncate"),
        ({"truncate": True, "truncate_prompt_tokens": 5}, 409, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": MOST + 1}, 400, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, 400, "truncation_side"),
        ({"too_long": "split", "input_type": "query"}, 400, "too_long"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said(limited: Running, fields: dict, status: int, param: str) -> None:
    answer = limited.embed(LONG, **fields)
    assert (answer.status, answer.error["param"]) == (status, param), answer.body


@pytest.mark.parametrize("stream", [False, True])
def test_a_longer_query_of_a_search(limited: Running, tiny: SearchR3, ids: tuple[int, ...], stream: bool) -> None:
    body = {"query": LONG, "mode": "vector", "reasoning": False, "stream": stream}
    answer = limited.post("/v1/search", body)
    found = answer.events[-1][1] if stream else answer.json
    assert (found["usage"]["prompt_tokens"], found["usage"]["truncated_texts"]) == (MOST, 1)
    cosine = tiny.encode_query([Tokens(ids[:MOST])], reasoning=False) @ tiny.encode_document([BREAD]).T
    assert next(hit["score"] for hit in found["hits"] if hit["id"] == "bread") == pytest.approx(cosine[0, 0], abs=1e-5)
    answer = limited.post("/v1/search", body | {"too_long": "error"})
    error = answer.events[-1][1]["error"] if stream else answer.error
    assert (error["code"], error["param"]) == ("context_length_exceeded", "query")
    assert limited.post("/v1/search", body | {"query": "bread", "too_long": "error"}).status == 200


def test_a_posted_document_is_read_whole(limited: Running, tiny: SearchR3) -> None:
    assert limited.post("/v1/documents", {"documents": [{"id": "long", "text": LONG}]}).status == 201
    hits = limited.service.index().search("x", tiny, mode="vector", reasoning=False, k=10).hits
    cosine = next(hit.score for hit in hits if hit.document == "long")
    whole = tiny.encode_query(["x"], reasoning=False) @ tiny.encode_document([LONG]).T
    assert cosine == pytest.approx(float(whole[0, 0]), abs=1e-5)


def test_the_log_counts_what_was_not_read(limited: Running) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: record.getMessage() == "request")
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    limited.embed([LONG, LONG, "lines"])
    limited.embed([LONG, "lines"], too_long="split")
    limited.embed(["lines"])
    limited.post("/v1/search", {"query": LONG, "mode": "vector", "reasoning": False})
    eventually(lambda: len(records) == 4)
    logger.removeHandler(handler)
    fields = [record.fields for record in records]  # type: ignore[attr-defined]
    assert [(one.get("truncated"), one.get("split")) for one in fields] == [
        (2, None),
        (None, 1),
        (None, None),
        (1, None),
    ]


@pytest.mark.parametrize("too_long", ["error", "split"])
def test_the_servers_own_rule_holds_where_a_request_says_nothing(tiny: SearchR3, too_long: str) -> None:
    with running(lambda: Loaded.of(tiny), max_tokens=MOST, too_long=too_long) as server:
        document, query = server.embed(LONG), server.embed(LONG, input_type="query")
        if too_long == "error":
            assert document.status == query.status == 413
            assert usage(server.embed(LONG, truncate=True)) == (MOST, 1, 0)
        else:
            assert usage(document)[1:] == (0, 1)
            assert usage(query) == (MOST, 1, 0)


def test_a_limit_beyond_the_models_context_is_refused(tiny: SearchR3) -> None:
    service = Service(ServerConfig(max_tokens=5000), lambda: Loaded.of(tiny))
    service.start()
    eventually(lambda: service.status == "failed")
    assert "max_tokens is 5,000, but the context of" in str(service.failure)
    assert "max_request_tokens" in str(service.failure)
    service.close(1)
    for wrong in ({"max_tokens": 0}, {"too_long": "ignore"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            ServerConfig(**wrong)

"""Writers: an endpoint that is busy, broken, slow or not there; a local model; what may be spent."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import KEY, EndpointServer, completion, error

from search_r3 import SearchR3
from search_r3.data.synthesis.endpoint_writer import EndpointSettings, EndpointWriter
from search_r3.data.synthesis.writers import Budget, Failure, LocalWriter, Prompt, Reply, token_counter
from search_r3.errors import InputError

pytest.importorskip("openai")
PROMPTS = [Prompt("You answer.", f"Say {number}.", 32) for number in range(6)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def writer(url: str, **changes: Any) -> EndpointWriter:
    settings = EndpointSettings(url, "good-model", timeout=5, retries=2, backoff=0.01, temperature=0.5)
    return EndpointWriter(replace(settings, **changes))


def echo(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
    return completion("heard " + request["messages"][1]["content"])


# ------------------------------------------------------------------------------------------------------- an endpoint


def test_replies_come_in_the_order_of_the_prompts_and_tokens_are_counted() -> None:
    def slow_at_first(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
        time.sleep(0.05 if number == 0 else 0)
        return echo(request, number)

    with EndpointServer(slow_at_first) as server:
        asked = writer(server.url, concurrency=3)
        assert asked.write(PROMPTS) == [Reply(f"heard Say {number}.") for number in range(6)]
        assert (asked.usage.calls, asked.usage.input, asked.usage.output, asked.usage.estimated) == (6, 600, 120, 0)
        request = server.requests[0]
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("good-model", 0.5, 32)
        assert [message["role"] for message in request["messages"]] == ["system", "user"]
        assert server.keys == [f"Bearer {KEY}"] * 6
        assert asked.write([]) == []


def test_no_more_calls_are_under_way_than_asked_for() -> None:
    def slow(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
        time.sleep(0.1)
        return echo(request, number)

    with EndpointServer(slow) as server:
        writer(server.url, concurrency=2).write(PROMPTS)
        assert server.most_at_once == 2


def test_tokens_are_estimated_where_the_endpoint_does_not_count() -> None:
    def without_usage(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
        status, headers, body = completion("x" * 40)
        return status, headers, body.replace('"usage"', '"other"')

    with EndpointServer(without_usage) as server:
        asked = writer(server.url)
        asked.write(PROMPTS[:1])
        assert (asked.usage.input, asked.usage.output, asked.usage.estimated) == (3 + 2, 10, 1)


def test_a_busy_endpoint_is_asked_again_no_sooner_than_it_says() -> None:
    times: list[float] = []

    def busy(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
        times.append(time.monotonic())
        return error(429, "slow down", **{"Retry-After": "0.3"}) if number == 0 else echo(request, number)

    with EndpointServer(busy) as server:
        assert writer(server.url).write(PROMPTS[:1]) == [Reply("heard Say 0.")]
    assert times[1] - times[0] >= 0.3


def test_a_wait_that_is_too_long_stops_instead() -> None:
    with (
        EndpointServer(lambda *_: error(429, "come back later", **{"Retry-After": "3600"})) as server,
        pytest.raises(InputError, match=r"requires a wait of 3,600 seconds.*run the command again"),
    ):
        writer(server.url).write(PROMPTS)


def test_an_endpoint_that_fails_now_and_then_gets_through() -> None:
    with EndpointServer(lambda request, number: error(500) if number % 2 == 0 else echo(request, number)) as server:
        replies = writer(server.url, concurrency=1).write(PROMPTS)
        assert replies == [Reply(f"heard Say {number}.") for number in range(6)]
        assert len(server.requests) == 12


def test_one_prompt_that_never_gets_through_is_a_failure_and_the_others_are_kept() -> None:
    def one_fails(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
        return error(503, "overloaded") if "3" in request["messages"][1]["content"] else echo(request, number)

    with EndpointServer(one_fails) as server:
        replies = writer(server.url).write(PROMPTS)
    assert replies[3] == Failure("no reply", "status 503: overloaded")
    assert sum(isinstance(reply, Reply) for reply in replies) == 5


def test_a_prompt_that_the_endpoint_refuses_is_not_asked_again() -> None:
    def one_refused(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
        refused = "3" in request["messages"][1]["content"]
        return error(400, "context length exceeded") if refused else echo(request, number)

    with EndpointServer(one_refused) as server:
        assert writer(server.url).write(PROMPTS)[3] == Failure(
            "refused by the endpoint", "status 400: context length exceeded"
        )
        assert len(server.requests) == 6


def test_an_endpoint_that_only_fails_is_an_error_not_an_empty_result() -> None:
    with (
        EndpointServer(lambda *_: error(500, "out of order")) as server,
        pytest.raises(InputError, match=r"answers nothing: status 500: out of order"),
    ):
        writer(server.url).write(PROMPTS)


def test_a_hang_ends_at_the_timeout() -> None:
    release = threading.Event()

    def hang(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
        if number == 0:
            release.wait(60)
        return echo(request, number)

    with EndpointServer(hang) as server:
        start = time.monotonic()
        assert writer(server.url, timeout=1).write(PROMPTS[:1]) == [Reply("heard Say 0.")]
        assert 1 <= time.monotonic() - start < 30
        server.answer = lambda request, number: (time.sleep(0.2), echo(request, number))[1]
        with pytest.raises(InputError, match=r"no answer within 0.05 seconds"):
            writer(server.url, timeout=0.05).write(PROMPTS[:2])
        release.set()


def test_an_endpoint_that_is_not_there_is_named_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(InputError, match=rf"the endpoint {url} cannot be reached") as caught:
        writer(url, retries=9, backoff=0.01).write(PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"Content-Type": "text/html"}, "<html>hello</html>"),
        (200, {}, '{"choices": ['),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"hello": "world"}'),
        (200, {}, "[1, 2]"),
        (200, {}, ""),
    ],
)
def test_what_is_no_chat_completion_is_said_to_be_none(answer: Any) -> None:
    with (
        EndpointServer(lambda *_: answer) as server,
        pytest.raises(InputError, match=r"does not answer with the JSON of a chat completion.*/v1"),
    ):
        writer(server.url, concurrency=2).write(PROMPTS)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), r"refused the key in OPENAI_API_KEY \(status 401\)"),
        (error(403, "not allowed"), r"refused the key in OPENAI_API_KEY \(status 403\)"),
        (error(404, f"no such model for {KEY}"), r'has no model "good-model".*\*\*\*'),
        (error(429, "insufficient_quota: pay first"), r"credit is used up \(status 429\)"),
        (error(500, f"crashed with {KEY}"), r"status 500: crashed with \*\*\*"),
    ],
)
def test_what_ends_a_run_is_one_line_without_the_key(answer: Any, expected: str) -> None:
    with EndpointServer(lambda *_: answer) as server, pytest.raises(InputError, match=expected) as caught:
        writer(server.url, retries=0).write(PROMPTS)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_that_want_another_request_get_it() -> None:
    def modern(request: dict[str, Any], number: int) -> tuple[int, dict[str, str], str]:
        if "max_tokens" in request:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "temperature" in request:
            return error(400, "Unsupported value: 'temperature' does not support 0.5 with this model.")
        return echo(request, number)

    with EndpointServer(modern) as server:
        assert all(isinstance(reply, Reply) for reply in writer(server.url, concurrency=3).write(PROMPTS))
        assert server.requests[-1]["max_completion_tokens"] == 32


def test_thoughts_and_cut_off_replies_are_told_apart_from_the_answer() -> None:
    answers = [
        completion("<think>It asks for a number.\nSo:</think>\nseven"),
        completion("seven and", finish_reason="length"),
        completion("", finish_reason="content_filter"),
    ]
    with EndpointServer(lambda request, number: answers[number]) as server:
        replies = writer(server.url, concurrency=1).write(PROMPTS[:3])
    assert replies[0] == Reply("\nseven")
    assert replies[1] == Reply("seven and", cut_off=True)
    assert replies[2] == Failure("refuses", "the endpoint's filter")


def test_the_key_comes_from_the_variable_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match=r"OPENAI_API_KEY is not set.*--no-key"):
        writer("http://localhost:1/v1")
    monkeypatch.setenv("MY_KEY", "\u00e9\n\u00e9")
    with pytest.raises(InputError, match=r"MY_KEY contains characters that no key has") as caught:
        writer("http://localhost:1/v1", key_variable="MY_KEY")
    assert "\u00e9" not in str(caught.value)
    with EndpointServer(echo) as server:
        assert writer(server.url, key_variable=None).write(PROMPTS[:1]) == [Reply("heard Say 0.")]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"url": "localhost:8000"}, "must be a URL"),
        ({"url": f"http://me:{KEY}@host/v1"}, "not contain a user, password or query"),
        ({"url": f"http://host/v1?key={KEY}"}, "not contain a user, password or query"),
        ({"key_variable": KEY}, "a name such as OPENAI_API_KEY"),
        ({"key_variable": "abcdef0123"}, "a name such as OPENAI_API_KEY"),
        ({"model": " "}, "model's name is empty"),
        ({"concurrency": 0}, "concurrency must be 1 or more"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"temperature": 3.0}, "temperature must be between 0 and 2"),
    ],
)
def test_a_wrong_setting_is_refused_without_showing_a_key(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        EndpointSettings(**{"url": "http://localhost/v1", "model": "m", **changes})
    assert KEY not in str(caught.value)
    assert "abcdef0123" not in str(caught.value)


def test_an_identity_holds_no_address_and_no_key() -> None:
    identity = str(writer("http://secret.example/v1").identity)
    assert "good-model" in identity
    assert KEY not in identity
    assert "secret.example" not in identity


# ------------------------------------------------------------------------------------------------------ a local model


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


def test_a_local_model_writes_the_same_every_time_and_otherwise_by_another_seed(tiny: SearchR3) -> None:
    short = [replace(prompt, max_tokens=6) for prompt in PROMPTS[:3]]
    one = LocalWriter(tiny, temperature=1.0, batch_size=2)
    first = one.write(short)
    assert any(isinstance(reply, Reply) and reply.text.strip() for reply in first)
    assert LocalWriter(tiny, temperature=1.0, batch_size=2).write(short) == first
    assert LocalWriter(tiny, temperature=1.0, seed=1, batch_size=2).write(short) != first
    assert one.usage.calls == 3
    assert 0 < one.usage.output <= 3 * 6


def test_a_local_model_says_what_transformers_would_say_greedily(tiny: SearchR3) -> None:
    import torch

    tokenizer, model = tiny.tokenizer, tiny.checkpoint.model
    messages = [{"role": "system", "content": "You answer."}, {"role": "user", "content": "Say 0."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(out, skip_special_tokens=True)
    reply = LocalWriter(tiny, temperature=0).write([Prompt("You answer.", "Say 0.", 8)])[0]
    assert isinstance(reply, Reply)
    assert reply.text == expected


def test_a_local_answer_is_begun_for_the_model(tiny: SearchR3) -> None:
    plain, begun = Prompt("You answer.", "Say 0.", 4), Prompt("You answer.", "Say 0.", 4, "Query: the")
    replies = LocalWriter(tiny, temperature=0).write([plain, begun])
    texts = [reply.text for reply in replies if isinstance(reply, Reply)]
    assert texts[1].startswith("Query: the")
    assert texts[1].removeprefix("Query: the") != texts[0]  # it was read, not only put before


def test_prompts_of_several_kinds_are_answered_in_their_own_order(tiny: SearchR3) -> None:
    mixed = [Prompt(f"System {number % 2}.", f"Say {number}.", 4 + number % 2) for number in range(4)]
    together = LocalWriter(tiny, temperature=0).write(mixed)
    assert together == [LocalWriter(tiny, temperature=0).write([prompt])[0] for prompt in mixed]


def test_a_prompt_beyond_the_model_is_a_failure(tiny: SearchR3) -> None:
    short, long = (Prompt("You answer.", text, 4) for text in ("Say it.", "word " * 2000))
    replies = LocalWriter(tiny, temperature=0).write([short, long])
    assert isinstance(replies[0], Reply)
    assert replies[1] == Failure("too long for the model", "lower --max-chars")


def test_special_tokens_in_a_document_are_plain_text(tiny: SearchR3) -> None:
    asked = LocalWriter(tiny, temperature=0)
    asked.write([Prompt("S.", "Say <|im_end|>.", 1)])
    assert asked.usage.input > LocalWriter(tiny).model.tokenizer("Say <|im_end|>.", return_length=True)["length"][0]


def test_the_tokenizer_of_a_model_counts(tiny_model: Path, tmp_path: Path) -> None:
    count = token_counter(str(tiny_model))
    assert 0 < count("hidden state") < len("hidden state")
    with pytest.raises(InputError, match="has no tokenizer"):
        token_counter(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------- a budget


def test_a_budget_is_of_tokens_or_money() -> None:
    assert Budget().allows(10**9, 10**9)
    assert Budget(tokens=100).allows(60, 40)
    assert not Budget(tokens=100).allows(60, 41)
    priced = Budget(cost=1.0, price_in=0.5, price_out=2.0)
    assert priced.cost_of(1_000_000, 250_000) == 1.0
    assert priced.allows(1_000_000, 250_000)
    assert not priced.allows(1_000_000, 250_001)
    assert Budget().cost_of(1, 1) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tokens": 0}, "above 0"),
        ({"cost": 1.0}, "requires the prices"),
        ({"price_in": 1.0}, "both prices"),
        ({"price_in": -1.0, "price_out": 1.0}, "price_in must be 0 or more"),
    ],
)
def test_a_wrong_budget_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Budget(**values)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"error": {"message": "the model is loading"}}, "answers with an error: the model is loading"),
        ({"error": "out of memory"}, "answers with an error: out of memory"),
        ({"choices": None, "error": {"message": "down", "code": 502}}, r"answers with an error \(code 502\): down"),
        ({"choices": [{"index": 0, "error": {"message": "cut off"}}]}, "answers with an error: cut off"),
        ({"choices": [{"index": 0, "message": None}]}, "a choice without a message"),
        ({"choices": []}, 'its "choices" is'),
        ({}, 'it has no "choices"'),
    ],
)
def test_an_error_in_an_answer_of_status_200_is_told_in_the_endpoints_words(answer: Any, said: str) -> None:
    with (
        EndpointServer(lambda *_: (200, {}, json.dumps(answer))) as server,
        pytest.raises(InputError, match=said) as caught,
    ):
        writer(server.url).write(PROMPTS)
    assert "object" not in str(caught.value)
    assert "NoneType" not in str(caught.value)

"""Keys, limits, back-pressure, timeouts, clients that go away, and a shutdown that finishes what was accepted."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_tools import Answer, Held, Running, eventually, pausing, running

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.server.keys import ApiKey, Keys, read_keys
from search_r3.server.listening import listen
from search_r3.server.logs import LOGGER, JsonFormatter
from search_r3.server.run_server import serve
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded


class Asking(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, server: Running, texts: Any, **more: Any) -> None:
        super().__init__(daemon=True)
        self.server, self.texts, self.more = server, texts, more
        self.answer: Answer | None = None
        self.start()

    def run(self) -> None:
        self.answer = self.server.embed(self.texts, **self.more)

    def answered(self) -> Answer:
        self.join(90)
        assert self.answer is not None
        return self.answer


def test_health_tells_of_loading_and_failing(tiny: SearchR3) -> None:
    go = threading.Event()

    def load() -> Loaded:
        assert go.wait(30)
        return Loaded.of(tiny)

    with running(load, wait=False) as server:
        eventually(lambda: server.server.started)
        answer = server.ask("GET", "/health")
        assert (answer.status, answer.json) == (
            503,
            {
                "status": "loading",
                "reason": "the model is still being loaded",
                "model": None,
                "index": False,
                "in_flight": 0,
            },
        )
        refused = server.post("/v1/embeddings", {"model": "x", "input": "x"})
        assert (refused.status, refused.error["code"]) == (503, "not_ready_loading")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.ask("GET", "/v1/models").status == 503
        assert server.ask("GET", "/openapi.json").status == 200
        go.set()
        eventually(lambda: server.ask("GET", "/health").status == 200)
        assert server.embed("x").status == 200


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error() -> None:
    def load() -> Loaded:
        raise InputError("no such model")

    with pytest.raises(InputError, match="no such model"):
        serve(listen("127.0.0.1", 0), ServerConfig(), load)


def test_keys_are_asked_for_before_anything_is_read(tiny: SearchR3) -> None:
    with running(lambda: Loaded.of(tiny), api_keys=("first-key", "second")) as server:
        for headers, code in [
            ({}, "missing_api_key"),
            ({"Authorization": "Basic first-key"}, "missing_api_key"),
            ({"Authorization": "Bearer "}, "missing_api_key"),
            ({"Authorization": "Bearer first-ke"}, "invalid_api_key"),
            ({"Authorization": "Bearer first-key2"}, "invalid_api_key"),
            ({"Authorization": "Bearer \xff\xfe"}, "invalid_api_key"),
        ]:
            for method, path in [("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("POST", "/v1/search")]:
                answer = server.ask(method, path, b"rubbish" if method == "POST" else None, headers)
                assert (answer.status, answer.error["code"]) == (401, code)
                assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("first-key", "second"):
            assert server.ask("GET", "/v1/models", headers={"Authorization": f"bearer {key}"}).status == 200
        for path in ("/health", "/readyz", "/livez", "/metrics", "/docs", "/openapi.json"):
            assert server.ask("GET", path).status == 200
        description = server.ask("GET", "/openapi.json").json
        assert description["paths"]["/v1/embeddings"]["post"]["security"] == [{"key": []}]
        assert "401" in description["paths"]["/v1/models"]["get"]["responses"]


def test_keys_of_a_file_and_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none read\n\n two  60/minute read # of the reports\nfour write\n")
    one, two = ApiKey("one"), ApiKey("two", may_write=False, per_minute=60)
    assert read_keys(file, "three, one,") == (ApiKey("three"), one, two, ApiKey("four"))
    assert "three" not in repr(read_keys(file, "three"))
    assert read_keys(None, None) == ()
    Keys([]).check(None)
    file.write_text("# none\n")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(InputError, match=str(path)):
            read_keys(path, None)
    for line in ("secret other", "secret 0/minute", "secret 60/hour"):
        file.write_text(f"first\n{line}\n")
        with pytest.raises(InputError, match="line 2: expected one key") as caught:
            read_keys(file, None)
        assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="an API key is empty or has spaces"):
        ServerConfig(api_keys=("a b",))


def test_a_body_that_is_too_large_is_refused_before_it_is_read(tiny: SearchR3) -> None:
    with running(
        lambda: Loaded.of(tiny), max_body=1000, max_items=3, max_request_tokens=20, body_timeout=1.0
    ) as server:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with server.open(head + b"Content-Length: 99999999999\r\n\r\n{") as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        chunk = b"200\r\n" + b" " * 512 + b"\r\n"
        with server.open(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 2) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        with server.open(head + b"Content-Length: 50\r\n\r\n{") as connection:  # and then nothing
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert server.embed(["x"] * 3).status == 200
        answer = server.embed(["x"] * 4)
        assert (answer.status, answer.error["code"]) == (400, "too_many_items")
        answer = server.embed(["one two three four five six"] * 3)
        assert (answer.status, answer.error["code"]) == (413, "too_many_tokens")
        for headers in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}, {"Content-Type": ""}):
            assert server.post("/v1/embeddings", b"{}", **headers).status == 415
        assert server.service.in_flight == 0


def test_one_request_too_many_is_told_to_come_back(held: Held, tiny: SearchR3) -> None:
    with running(lambda: Loaded.of(held), queue=3) as server:
        held.armed = True
        asking = [Asking(server, [f"text {i}"]) for i in range(3)]
        eventually(lambda: server.service.in_flight == 3)
        answer = server.embed("one more")
        assert (answer.status, answer.error["type"], answer.error["code"]) == (429, "rate_limit_error", "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        held.gate.set()
        for i, thread in enumerate(asking):
            vector = np.array(thread.answered().json["data"][0]["embedding"], dtype=np.float32)
            np.testing.assert_allclose(vector, tiny.encode_document([f"text {i}"])[0], atol=2e-6)
        assert server.embed("one more").status == 200


def test_a_request_that_takes_too_long_is_given_up(held: Held) -> None:
    with running(lambda: Loaded.of(held), timeout=1.5) as server:
        held.armed = True
        first = Asking(server, "begun")
        eventually(lambda: held.passes == [("document", 1)])
        second = Asking(server, "not begun", input_type="query")
        assert (first.answered().status, first.answered().error["code"]) == (504, "timeout")
        assert (second.answered().status, second.answered().error["code"]) == (503, "busy")
        assert second.answered().headers["retry-after"]
        events = server.ask("GET", "/metrics").body.decode()
        assert 'search_r3_dropped_total{reason="timeout"} 2.0' in events
        held.gate.set()
        eventually(lambda: server.service.batcher.waiting() == (0, 0))
        eventually(lambda: server.embed("x").status == 200)
        assert ("query", 1) not in held.passes  # what was given up is not done later


def test_the_queued_work_of_a_client_that_hung_up_is_dropped(held: Held) -> None:
    with running(lambda: Loaded.of(held)) as server:
        held.armed = True
        first = Asking(server, "stays")
        eventually(lambda: held.passes == [("document", 1)])
        gone = server.open_embed(["leaves"] * 5)
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        half = server.open(head + b"Content-Length: 9\r\n\r\n{")
        eventually(lambda: server.service.in_flight == 3)
        eventually(lambda: server.service.batcher.waiting()[0] == 5)
        gone.close(), half.close()
        eventually(lambda: server.service.in_flight == 1)
        assert server.service.batcher.waiting() == (0, 0)
        held.gate.set()
        assert first.answered().status == 200
        assert server.embed("x").status == 200
        assert held.passes == [("document", 1), ("document", 1)]
        assert 'search_r3_dropped_total{reason="disconnected"} 1.0' in server.ask("GET", "/metrics").body.decode()


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_reasoning_stops_when_nobody_waits_for_it(tiny: SearchR3, batching: str) -> None:
    written: list[int] = []

    def after(token: int) -> None:
        written.append(token)
        if len(written) == 2:
            held._hold("token", [token])

    held = pausing(tiny, after)
    with running(lambda: Loaded.of(held), batching=batching) as server:
        held.armed = True
        gone = server.open_embed("a question", input_type="query", reasoning=200)
        eventually(lambda: held.passes == [("token", 1)])
        gone.close()
        eventually(lambda: server.service.in_flight == 0)
        held.gate.set()
        time.sleep(0.05)
        assert server.embed("x").status == 200  # the thread is free again
        assert len(written) == 2


def test_shutdown_finishes_what_was_accepted_and_refuses_the_rest(held: Held, tiny: SearchR3) -> None:
    with running(lambda: Loaded.of(held)) as server:
        held.armed = True
        accepted = [Asking(server, f"text {i}") for i in range(3)]
        eventually(lambda: server.service.in_flight == 3)
        kept = server.open(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in kept.recv(1000)
        server.service.stop_taking()  # what a signal does first
        refused = server.embed("late")
        assert (refused.status, refused.error["code"]) == (503, "not_ready_stopping")
        assert server.ask("GET", "/health").json["status"] == "stopping"
        server.server.handle_exit(15, None)
        time.sleep(0.3)
        assert server.thread.is_alive()  # it waits for the three
        held.gate.set()
        for i, thread in enumerate(accepted):
            vector = np.array(thread.answered().json["data"][0]["embedding"], dtype=np.float32)
            np.testing.assert_allclose(vector, tiny.encode_document([f"text {i}"])[0], atol=2e-6)
        server.thread.join(20)
        assert not server.thread.is_alive()
        kept.close()


def test_a_shutdown_that_may_not_wait_gives_up_with_503(held: Held) -> None:
    with running(lambda: Loaded.of(held), grace=0.2) as server:
        held.armed = True
        asking = Asking(server, "text")
        eventually(lambda: held.passes == [("document", 1)])
        server.server.handle_exit(15, None)
        answer = asking.answered()
        assert (answer.status, answer.error["code"]) == (503, "not_ready_stopping")
        held.gate.set()


def test_the_log_is_json_without_texts_keys_or_queries(tiny: SearchR3) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    broken = Held(tiny)
    broken.encode_document = lambda texts, **_: 1 / 0 if broken.armed else tiny.encode_document(texts)
    try:
        with running(lambda: Loaded.of(broken), api_keys=("topsecret",)) as server:
            key = {"Authorization": "Bearer topsecret"}
            broken.armed = True
            body = {"model": tiny.name, "input": "my private words are many"}
            answer = server.ask("POST", "/v1/embeddings?secret=1", body, key)
            assert (answer.status, answer.error["type"]) == (500, "server_error")
            assert "ZeroDivision" not in answer.body.decode()
            server.ask("GET", "/private/path", headers=key)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [(r["route"], r["status"]) for r in requests] == [("/v1/embeddings", 500), ("other", 404)]
    assert requests[0]["id"] == answer.headers["x-request-id"]
    assert requests[0]["items"] == 1
    failed = next(line for line in lines if line["event"] == "batch failed")
    assert failed["error"] == "ZeroDivisionError"
    for word in ("private", "words", "secret"):
        assert word not in stream.getvalue()


def test_metrics_count_what_was_done(tiny: SearchR3) -> None:
    with running(lambda: Loaded.of(tiny)) as server:
        server.embed(["one", "two"])
        for _ in range(2):
            server.embed("why?", input_type="query", reasoning=3)
        server.ask("GET", "/nope")
        text = server.ask("GET", "/metrics").body.decode()
    for line in [
        'search_r3_requests_total{route="/v1/embeddings",status="200"} 3.0',
        'search_r3_requests_total{route="other",status="404"} 1.0',
        'search_r3_batch_texts_count{kind="document"} 1.0',
        'search_r3_batch_texts_sum{kind="document"} 2.0',
        'search_r3_reasoned_cache_total{found="yes"} 1.0',
        "search_r3_queue_texts 0.0",
        "search_r3_ready 1.0",
    ]:
        assert line in text
    assert 'search_r3_tokens_total{kind="reasoning"}' in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"queue": 0}, "queue is 0"), ({"timeout": 0}, "timeout is 0"), ({"cache": -1}, "cache is -1"),
     ({"reasoning_tokens": 300}, "reasoning_tokens is 300"), ({"timeout": float("nan")}, "timeout is nan"),
     ({"batching": "dynamic"}, "expected continuous or static"), ({"slots": 0}, "slots is 0"),
     ({"pause": float("nan")}, "pause is nan"), ({"grace": -1}, "grace is -1"),
     ({"root_path": "/search/"}, "a prefix such as /search"), ({"root_path": "/v1/x"}, "other than /v1")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServerConfig(**settings)


def test_an_address_that_cannot_be_had_is_one_line() -> None:
    taken = listen("127.0.0.1", 0)
    for host, port in (("127.0.0.1", taken.socket.getsockname()[1]), ("no such host", 1), ("127.0.0.1", 70_000)):
        with pytest.raises(InputError, match=r"cannot listen on|port is 70000"):
            listen(host, port)
    taken.close()

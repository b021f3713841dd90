"""An endpoint is asked again while there is hope, no sooner than it says, and by all threads alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from processes import eventually

from search_r3.data.io.endpoint import (
    AskDifferentlyError,
    Endpoint,
    EndpointSettings,
    NoAnswerError,
    RefusedError,
    StoppedError,
    Threads,
    Wording,
    key_from,
    retry_after,
)
from search_r3.errors import InputError

openai = pytest.importorskip("openai")
import httpx  # noqa: E402  # openai's own

KEY = "sk-secret-7Rk2Qz"
WORDING = Wording(slow="wait", unusable="no good ({reason})", no_credit="no money ({code})")


def endpoint(retries: int = 2) -> Endpoint:
    settings = EndpointSettings("http://localhost:9/v1", "m", timeout=5, retries=retries, backoff=0.001)
    return Endpoint(settings, KEY, WORDING)


def status(code: int, said: str = "it went wrong", **headers: str) -> Exception:
    response = httpx.Response(code, headers=headers, request=httpx.Request("POST", "http://localhost:9/v1"))
    return openai.APIStatusError(said, response=response, body={"message": said})


def calls(*results: object) -> Callable[[], object]:
    """Calls that raise or return `results` in order."""
    left = list(results)

    def call() -> object:
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    return call


def test_as_many_further_tries_as_asked_for_and_the_last_failure_is_told() -> None:
    stop = threading.Event()
    assert endpoint().ask(calls(status(500), status(429), "yes"), stop) == "yes"
    with pytest.raises(NoAnswerError, match=r"status 503: down, says \*\*\*") as caught:
        endpoint().ask(calls(status(500), status(429), status(503, f"down, says {KEY}"), "yes"), stop)
    assert caught.value.tries == 3


def test_a_call_in_another_form_is_no_further_try() -> None:
    assert endpoint(retries=0).ask(calls(AskDifferentlyError(), AskDifferentlyError(), "yes"), threading.Event())


def test_an_endpoint_that_never_answered_is_sooner_given_up() -> None:
    asked = endpoint(retries=9)
    with pytest.raises(InputError, match=r"localhost:9/v1: no good \(what\?\)"):
        asked.ask(calls(ValueError("what?"), ValueError("what?"), "yes"), threading.Event())
    asked.answered = True
    assert asked.ask(calls(ValueError("what?"), ValueError("what?"), "yes"), threading.Event()) == "yes"


def test_what_waiting_cannot_fix_ends_at_once() -> None:
    stop = threading.Event()
    with pytest.raises(RefusedError, match="status 400: too long"):
        endpoint().ask(calls(status(400, "too long"), "yes"), stop)
    for code, said, message in [(401, "no", "refused the key in OPENAI_API_KEY"), (402, "pay", r"no money \(402\)")]:
        with pytest.raises(InputError, match=message):
            endpoint().ask(calls(status(code, said), "yes"), stop)
    with pytest.raises(InputError, match="by the call itself"):
        endpoint().ask(calls(InputError("by the call itself"), "yes"), stop)


def test_a_wait_that_one_thread_is_told_is_kept_by_the_others() -> None:
    asked, told, times = endpoint(), threading.Event(), []

    def first() -> None:
        told.set()
        raise calls(status(429, **{"Retry-After": "0.4"}))()  # type: ignore[misc]

    def busy(number: int, stop: threading.Event) -> None:
        if number == 0:
            asked.ask(lambda: first() if not told.is_set() else None, stop)
        else:
            eventually(lambda: asked._not_before > 0)  # the first has heard
            asked.ask(lambda: times.append(time.monotonic()), stop)

    start = time.monotonic()
    threads = Threads(busy, range(2), 2)
    assert sorted(number for number, _ in threads) == [0, 1]
    threads.stop(wait=True)
    assert times[0] - start >= 0.35


def test_who_waits_is_woken_when_the_run_ends() -> None:
    asked, stop = endpoint(), threading.Event()
    threading.Timer(0.05, stop.set).start()
    start = time.monotonic()
    with pytest.raises(StoppedError):
        asked.ask(calls(status(429, **{"Retry-After": "60"}), "yes"), stop)
    assert time.monotonic() - start < 30


def test_threads_give_everything_once_and_the_first_error_is_raised() -> None:
    threads = Threads(lambda number, stop: number * number, range(20), 3)
    assert dict(threads) == {number: number * number for number in range(20)}
    threads.stop(wait=True)
    seen: list[int] = []

    def third_fails(number: int, stop: threading.Event) -> None:
        seen.append(number)
        if number == 2:
            raise InputError("the third")
        stop.wait(30 if number > 2 else 0)

    threads = Threads(third_fails, range(20), 1)
    with pytest.raises(InputError, match="the third"):
        dict(threads)
    threads.stop(wait=True)
    assert len(seen) <= 4  # nothing more was begun
    assert dict(Threads(third_fails, [], 3)) == {}


def test_a_key_is_read_from_the_environment_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    assert key_from("MY_KEY", "") == KEY
    assert key_from(None, "") == "none"
    with pytest.raises(InputError, match="say which"):
        key_from("MY_OTHER_KEY", "say which")


def test_retry_after_is_seconds_milliseconds_or_a_date() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 27 < retry_after({"retry-after": date}) <= 30
    assert retry_after({}) == retry_after({"retry-after": "soon"}) == 0

"""An OpenAI-compatible endpoint asked by several threads: what is tried again, how long is waited, when it is given up.

A call is tried again after a timeout, a lost connection or a status that passes (408, 409, 429, 5xx), with a doubling
wait that honors Retry-After (RFC 9110, 10.2.3). The key comes from the environment and goes into no file and no line.
"""

from __future__ import annotations

import json
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from search_r3.errors import InputError
from search_r3.optional import require

MAX_WAIT = 120.0
"""Seconds that a wait between two tries may take; a longer wait ends the run, to be continued later."""
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Capitals only: a key that is given by mistake is not taken for a name, and so never shown."""
Answer = TypeVar("Answer")


class AskDifferentlyError(Exception):
    """The call is to be made again at once, in another form."""


class NoAnswerError(Exception):
    """Every try failed: how many there were, and what the last one met."""

    def __init__(self, tries: int, detail: str) -> None:
        super().__init__(detail)
        self.tries, self.detail = tries, detail


class RefusedError(Exception):
    """The endpoint will not do this one call, whatever is waited: the status, and what it said."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}: {said}")
        self.status, self.said = status, said


class ErrorAnswerError(Exception):
    """The endpoint answered with status 200 and an error in the body: what it said, and its code if it gave one."""

    def __init__(self, said: str, code: int | None = None) -> None:
        super().__init__(said)
        self.said, self.code = said, code


class StoppedError(Exception):
    """Another thread failed, or a person stopped the run."""


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Where the model is, and how patiently it is asked."""

    url: str
    """The base URL, which usually ends in /v1."""
    model: str
    """The model's name there."""
    key_variable: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key; None where the endpoint wants none."""
    concurrency: int = 8
    """Calls under way at once."""
    timeout: float = 120.0
    """Seconds that one call may take."""
    retries: int = 5
    """Further tries after a timeout, a lost connection, or an answer of 408, 409, 429 or 5xx."""
    backoff: float = 1.0
    """Seconds before the second try; doubled each time, and never less than the endpoint's Retry-After."""
    temperature: float | None = 0.7
    """For an LLM that writes. None leaves it to the endpoint."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("the endpoint must be a URL such as https://api.openai.com/v1 or http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError("the endpoint's URL must hold no user, password or query; the key goes into a variable")
        if not self.model.strip():
            raise InputError("the model's name is empty; name one that the endpoint serves")
        if self.key_variable is not None and not _VARIABLE.fullmatch(self.key_variable):
            raise InputError("the key's variable must have a name such as OPENAI_API_KEY; never give the key itself")
        for name, least in (("concurrency", 1), ("retries", 0), ("backoff", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if not self.timeout > 0:
            raise InputError(f"timeout must be above 0 seconds, not {self.timeout}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise InputError(f"temperature must be between 0 and 2, not {self.temperature}")

    def read_key(self) -> str:
        """The key, as `key_from` reads it."""
        return key_from(
            self.key_variable,
            f"no key: the variable {self.key_variable} is not set; set it, name another with --key-variable, or "
            "give --no-key if the endpoint wants none",
        )


@dataclass(frozen=True, slots=True)
class Wording:
    """Parts of error messages that depend on the caller."""

    slow: str
    """What can be done about calls that time out."""
    unusable: str
    """What an answer that is none may mean; "{reason}" stands for what is wrong with it."""
    no_credit: str
    """That the account is empty; "{code}" stands for the status."""


class Endpoint:
    """One endpoint, shared by the threads that ask it: a wait that it asks of one of them is kept by all.

    Args:
        settings: where it is, and how patiently it is asked.
        key: what is sent to it, and hidden in everything that it says.

    Attributes:
        client: OpenAI's own client, which tries nothing again by itself.
        answered: to be set once a call was answered; who never answered is sooner given up.

    Raises:
        InputError: the package openai is missing.
    """

    def __init__(self, settings: EndpointSettings, key: str, wording: Wording) -> None:
        openai = require("openai", "synthesis", "an endpoint")
        self.settings, self.wording = settings, wording
        self.client = openai.OpenAI(api_key=key, base_url=settings.url, timeout=settings.timeout, max_retries=0)
        self.answered = False
        self._openai, self._key = openai, key
        self._lock = threading.Lock()
        self._not_before = 0.0  # time.monotonic(); a Retry-After holds for every thread

    def __str__(self) -> str:
        return f"the endpoint {self.settings.url}"

    def ask(self, call: Callable[[], Answer], stop: threading.Event) -> Answer:
        """What `call` returns, which uses `client` and is made again while there is hope.

        An endpoint that never answered is more likely a wrong address than a busy one, so it has two tries only.

        Args:
            call: may raise the client's errors, `AskDifferentlyError`, or ValueError and its like for an answer that
                is none.
            stop: ends the waiting.

        Raises:
            NoAnswerError: there were `retries` further tries.
            RefusedError: this call is refused.
            StoppedError: `stop` is set.
            InputError: no call can succeed, or the endpoint wants a very long wait.
        """
        tries = 0
        while True:
            self._wait(stop)
            try:
                return call()
            except InputError:
                raise
            except AskDifferentlyError:
                continue
            except (
                self._openai.APIError,
                *(ErrorAnswerError, ValueError, TypeError, AttributeError, KeyError, IndexError),
            ) as error:
                detail, asked_to_wait = self._detail(error, tries)
            if tries >= self.settings.retries:
                raise NoAnswerError(tries + 1, detail)
            if asked_to_wait > MAX_WAIT:
                raise InputError(
                    f"{self} asks to wait {asked_to_wait:,.0f} seconds ({detail}); run the same command then"
                )
            if asked_to_wait:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + asked_to_wait)
            wait = min(MAX_WAIT, self.settings.backoff * 2**tries) * random.uniform(0.8, 1.2)
            stop.wait(max(wait, asked_to_wait))
            tries += 1

    def _detail(self, error: Exception, tries: int) -> tuple[str, float]:
        """What went wrong, and the seconds that the endpoint asks to wait.

        Raises:
            RefusedError, InputError: another try cannot succeed.
        """
        if isinstance(error, self._openai.APITimeoutError):
            return f"no answer within {self.settings.timeout:g} seconds; {self.wording.slow}", 0.0
        if isinstance(error, self._openai.APIStatusError):
            self._give_up_on(error.status_code, self.reason(error), str(error))
            return f"status {error.status_code}: {self.reason(error)}", retry_after(error.response.headers)
        said, colon = self.reason(error), ":"
        if isinstance(error, self._openai.APIConnectionError):
            said, colon = self.reason(error.__cause__ or error), ""
            detail = f"cannot be reached ({said}); does it run, is the URL right?"
        elif isinstance(error, ErrorAnswerError):
            if error.code is not None:
                self._give_up_on(error.code, said, said)
            detail = f"it answers with an error{f' (code {error.code})' if error.code else ''}: {said}"
        else:
            detail = self.wording.unusable.format(reason=said)
        if not self.answered and tries >= 1:
            raise InputError(f"{self}{colon} {detail}") from None
        return detail, 0.0

    def reason(self, error: BaseException) -> str:
        """One short line of what went wrong, in which the key cannot stand."""
        if isinstance(error, json.JSONDecodeError):
            error = ValueError(_no_json(error.doc))
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(said or error or type(error).__name__).split()) or type(error).__name__
        return (text.replace(self._key, "***") if len(self._key) > 4 else text)[:200]

    def _give_up_on(self, code: int, said: str, whole: str) -> None:
        """Raise for a status that no waiting helps; return for one that passes (408, 409, 429, 5xx)."""
        settings = self.settings
        if code in (401, 403):
            source = f"the key in {settings.key_variable}" if settings.key_variable else "a call without a key"
            raise InputError(f"{self} refused {source} (status {code}); check the key and what it may use")
        if code == 404:
            raise InputError(f'{self} has no model "{settings.model}", or is not the base URL (status 404): {said}')
        if code == 402 or "insufficient_quota" in whole:
            raise InputError(f"{self}: {self.wording.no_credit.format(code=code)}")
        if code not in (408, 409, 429) and code < 500:
            raise RefusedError(code, said)

    def _wait(self, stop: threading.Event) -> None:
        while not stop.is_set() and (left := self._not_before - time.monotonic()) > 0:
            stop.wait(left)
        if stop.is_set():
            raise StoppedError


class Threads(Generic[Answer]):
    """`ask(number, stop)` for each of `numbers`, at most `count` at once; iterate for (number, answer) as they come.

    The first error of a thread is raised where it is iterated. The threads are daemons, so that a process can end
    without waiting for them; `stop` must be called in any case, since it is what ends them.
    """

    def __init__(self, ask: Callable[[int, threading.Event], Answer], numbers: Sequence[int], count: int) -> None:
        self._ask = ask
        self._left = len(numbers)
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, Answer | None, BaseException | None]] = queue.SimpleQueue()
        self._stop = threading.Event()
        for number in numbers:
            self._todo.put(number)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(min(count, len(numbers)))]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[int, Answer]]:
        while self._left:
            number, answer, error = self._done.get()
            if error is not None:
                raise error
            self._left -= 1
            yield number, answer  # type: ignore[misc]  # there is an answer where there is no error

    def stop(self, wait: bool) -> None:
        """Begin nothing more; with `wait`, return when the calls under way have ended."""
        self._stop.set()
        for thread in self._threads if wait else ():
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                number = self._todo.get_nowait()
            except queue.Empty:
                return
            try:
                self._done.put((number, self._ask(number, self._stop), None))
            except BaseException as error:
                self._done.put((number, None, error))


def listed(answer: Any, part: str) -> list[Any]:
    """The list `part` of a client's answer ("data", "choices"), which is not empty.

    Raises:
        ErrorAnswerError: the answer holds an error in its place, in one of the forms that servers use.
        ValueError: it is no such answer; the message says what it is instead.
    """
    if isinstance(answer, str):
        raise ValueError(_no_json(answer))
    found = getattr(answer, part, None)
    if isinstance(found, list) and found:
        return found
    for name in ("error", "detail", "message"):
        if (error := getattr(answer, name, None)) not in (None, "", [], {}):
            raise said_by(error, getattr(answer, "code", None))
    raise ValueError(f'it has no "{part}"' if found is None else f'its "{part}" is {str(found)[:60]!r}')


def _no_json(text: str) -> str:
    return f"it is no JSON but begins {' '.join(text.split())[:60]!r}"


def said_by(error: Any, code: Any = None) -> ErrorAnswerError:
    """An error as a server puts it into an answer, a text or an object with `message` and perhaps `code`."""
    if isinstance(error, dict):
        code = error.get("code") or error.get("status") or code
        error = error.get("message") or error.get("detail") or error
    known = isinstance(code, int | str) and not isinstance(code, bool) and re.fullmatch(r"[45]\d\d", str(code))
    return ErrorAnswerError(" ".join(str(error).split()), int(str(code)) if known else None)


def key_from(variable: str | None, missing: str) -> str:
    """The key that stands in an environment variable; "none" where none is wanted.

    Raises:
        InputError: the variable is not set (`missing` is the message), or holds what cannot be sent; its value is
            never shown.
    """
    if variable is None:
        return "none"
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(missing)
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the variable {variable} holds characters that no key has; set it again")
    return key


def retry_after(headers: Any) -> float:
    """Seconds that an answer asks to wait: "retry-after-ms", or "retry-after" as seconds or as a date; 0 if none."""
    try:
        if headers.get("retry-after-ms"):
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "").strip()
        if not value:
            return 0.0
        if re.fullmatch(r"[0-9.]+", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0

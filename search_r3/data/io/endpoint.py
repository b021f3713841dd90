"""A client for OpenAI-compatible endpoints, shared by several threads: retries, waits and error messages.

A call is retried after a timeout, a lost connection or a transient status (408, 409, 429, 5xx), with exponential
backoff that honors Retry-After (RFC 9110, section 10.2.3). The API key comes from the environment and is never written
to a file or shown in a message.
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
"""Maximum wait between two attempts in seconds; if a longer one is required, the run stops and can be resumed later."""
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Capitals only, so that a key given by mistake is not accepted as a name and never shown."""
_INVALID_RESPONSE = (ValueError, TypeError, AttributeError, KeyError, IndexError)
"""Errors raised when a response does not have the expected form."""
Answer = TypeVar("Answer")


class AskDifferentlyError(Exception):
    """The call must be repeated at once in another form."""


class NoAnswerError(Exception):
    """Every attempt failed; holds their number and the last error."""

    def __init__(self, tries: int, detail: str) -> None:
        super().__init__(detail)
        self.tries, self.detail = tries, detail


class RefusedError(Exception):
    """The endpoint rejected this call permanently; holds the status and the message."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}: {said}")
        self.status, self.said = status, said


class ErrorAnswerError(Exception):
    """The endpoint answered with status 200 but an error in the body; holds the message and the code, if any."""

    def __init__(self, said: str, code: int | None = None) -> None:
        super().__init__(said)
        self.said, self.code = said, code


class StoppedError(Exception):
    """Another thread failed, or the user stopped the run."""


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Address and model of an endpoint, and how calls are made and retried."""

    url: str
    """The base URL, which usually ends in /v1."""
    model: str
    """The model's name at the endpoint."""
    key_variable: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the API key; None if the endpoint requires none."""
    concurrency: int = 8
    """Maximum number of concurrent calls."""
    timeout: float = 120.0
    """Timeout of a call in seconds."""
    retries: int = 5
    """Retries after a timeout, a lost connection, or a status of 408, 409, 429 or 5xx."""
    backoff: float = 1.0
    """Seconds before the first retry; doubled each time, and never less than the endpoint's Retry-After."""
    temperature: float | None = 0.7
    """Sampling temperature of a generating model; None uses the endpoint's default."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("the endpoint must be a URL such as https://api.openai.com/v1 or http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(
                "the endpoint's URL must not contain a user, password or query; pass the key in a variable"
            )
        if not self.model.strip():
            raise InputError("the model's name is empty; name one that the endpoint serves")
        if self.key_variable is not None and not _VARIABLE.fullmatch(self.key_variable):
            raise InputError("the key's variable must have a name such as OPENAI_API_KEY; never give the key itself")
        for name, least in (("concurrency", 1), ("retries", 0), ("backoff", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise InputError(f"timeout must be above 0 seconds, got {self.timeout}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise InputError(f"temperature must be between 0 and 2, got {self.temperature}")

    def read_key(self) -> str:
        """The API key, as `key_from` reads it."""
        return key_from(
            self.key_variable,
            f"no key: the variable {self.key_variable} is not set; set it, name another with --key-variable, or "
            "use --no-key if the endpoint requires none",
        )


@dataclass(frozen=True, slots=True)
class Wording:
    """The parts of error messages that depend on the caller."""

    slow: str
    """What to do about calls that time out."""
    unusable: str
    """The likely cause of an invalid response; "{reason}" is replaced by what is wrong with it."""
    no_credit: str
    """The message for an account without credit; "{code}" is replaced by the status."""


class Endpoint:
    """One endpoint, shared by several threads: a wait requested in one response delays all of them.

    Args:
        settings: address, model and retries.
        key: the API key; it is masked in all messages.

    Attributes:
        client: the OpenAI client, with its own retries disabled.
        answered: set it to True once a call has succeeded; until then, calls are given up sooner.

    Raises:
        InputError: the package openai is not installed.
    """

    def __init__(self, settings: EndpointSettings, key: str, wording: Wording) -> None:
        openai = require("openai", "synthesis", "an endpoint")
        self.settings, self.wording = settings, wording
        self.client = openai.OpenAI(api_key=key, base_url=settings.url, timeout=settings.timeout, max_retries=0)
        self.answered = False
        self._openai, self._key = openai, key
        self._lock = threading.Lock()
        self._not_before = 0.0  # time.monotonic(); Retry-After applies to all threads

    def __str__(self) -> str:
        return f"the endpoint {self.settings.url}"

    def ask(self, call: Callable[[], Answer], stop: threading.Event) -> Answer:
        """Return the result of `call`, which uses `client` and is retried after transient errors.

        An endpoint that has never answered is more likely a wrong address than busy, so it gets only two attempts.

        Args:
            call: may raise the client's errors, `AskDifferentlyError`, or ValueError and similar for an invalid
                response.
            stop: ends the waiting.

        Raises:
            NoAnswerError: all `retries` failed.
            RefusedError: the endpoint rejected this call.
            StoppedError: `stop` is set.
            InputError: no call can succeed, or the endpoint requires a wait of more than `MAX_WAIT`.
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
            except (self._openai.APIError, ErrorAnswerError, *_INVALID_RESPONSE) as error:
                detail, asked_to_wait = self._detail(error, tries)
            if tries >= self.settings.retries:
                raise NoAnswerError(tries + 1, detail)
            if asked_to_wait > MAX_WAIT:
                raise InputError(
                    f"{self} requires a wait of {asked_to_wait:,.0f} seconds ({detail}); then run the command again"
                )
            if asked_to_wait:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + asked_to_wait)
            wait = min(MAX_WAIT, self.settings.backoff * 2**tries) * random.uniform(0.8, 1.2)
            stop.wait(max(wait, asked_to_wait))
            tries += 1

    def _detail(self, error: Exception, tries: int) -> tuple[str, float]:
        """What went wrong, and the seconds to wait that the endpoint requests.

        Raises:
            RefusedError, InputError: a retry cannot succeed.
        """
        if isinstance(error, self._openai.APITimeoutError):
            return f"no answer within {self.settings.timeout:g} seconds; {self.wording.slow}", 0.0
        if isinstance(error, self._openai.APIStatusError):
            self._give_up_on(error.status_code, self.reason(error), str(error))
            return f"status {error.status_code}: {self.reason(error)}", retry_after(error.response.headers)
        said, colon = self.reason(error), ":"
        if isinstance(error, self._openai.APIConnectionError):
            said, colon = self.reason(error.__cause__ or error), ""
            detail = f"cannot be reached ({said}); check that it is running and that the URL is right"
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
        """One short line on what went wrong, with the key masked."""
        if isinstance(error, json.JSONDecodeError):
            error = ValueError(_no_json(error.doc))
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(said or error or type(error).__name__).split()) or type(error).__name__
        return (text.replace(self._key, "***") if len(self._key) > 4 else text)[:200]

    def _give_up_on(self, code: int, said: str, whole: str) -> None:
        """Raise for a permanent error; return for a transient status (408, 409, 429, 5xx)."""
        settings = self.settings
        if code in (401, 403):
            source = f"the key in {settings.key_variable}" if settings.key_variable else "a call without a key"
            raise InputError(f"{self} refused {source} (status {code}); check the key and its permissions")
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
    """Run `ask(number, stop)` for each of `numbers` in at most `count` threads; iterate to get (number, answer) as
    completed.

    The first error of a thread is raised during iteration. The threads are daemons, so a process can exit without
    waiting for them; `stop` must always be called to end them.
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
        """Start no further calls; with `wait`, return when the current ones have ended."""
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
    """The non-empty list `part` ("data", "choices") of a client's response.

    Raises:
        ErrorAnswerError: the response holds an error instead, in one of the forms that servers use.
        ValueError: the response has another form; the message describes it.
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
    return f"it is not JSON but begins {' '.join(text.split())[:60]!r}"


def said_by(error: Any, code: Any = None) -> ErrorAnswerError:
    """The error in a server's response, a text or an object with `message` and optionally `code`."""
    if isinstance(error, dict):
        code = error.get("code") or error.get("status") or code
        error = error.get("message") or error.get("detail") or error
    known = isinstance(code, int | str) and not isinstance(code, bool) and re.fullmatch(r"[45]\d\d", str(code))
    return ErrorAnswerError(" ".join(str(error).split()), int(str(code)) if known else None)


def key_from(variable: str | None, missing: str) -> str:
    """The API key in an environment variable; "none" if `variable` is None.

    Raises:
        InputError: the variable is not set (`missing` is the message), or contains characters that cannot be sent; its
            value is never shown.
    """
    if variable is None:
        return "none"
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(missing)
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the variable {variable} contains characters that no key has; set it again")
    return key


def retry_after(headers: Any) -> float:
    """Seconds to wait according to "retry-after-ms", or "retry-after" in seconds or as a date; 0 if neither is
    given."""
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

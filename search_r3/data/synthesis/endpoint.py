"""An LLM behind any OpenAI-compatible endpoint as a writer: several calls at once, patient with a busy server.

A call is tried again after a timeout, a lost connection or a status that passes (408, 409, 429, 5xx), with a doubling
wait that honours Retry-After (RFC 9110, 10.2.3). The key comes from the environment and goes into no file and no line.
"""

from __future__ import annotations

import os
import queue
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from search_r3.data.synthesis.writers import Failure, Prompt, Reply, Usage, count_characters, without_thoughts
from search_r3.errors import InputError

MAX_WAIT = 120.0
"""Seconds that a wait between two tries may take; who is told to wait longer stops and comes back later."""
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Capitals only: a key that is given by mistake is not taken for a name, and so never shown."""


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Where the LLM is, and how patiently it is asked."""

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
    """None leaves it to the endpoint."""

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
        """The key, from the environment only.

        Raises:
            InputError: the variable is not set, or holds what cannot be sent; its value is never shown.
        """
        if self.key_variable is None:
            return "none"
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise InputError(
                f"no key: the variable {self.key_variable} is not set; set it, name another with --key-variable, or "
                "give --no-key if the endpoint wants none"
            )
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"the variable {self.key_variable} holds characters that no key has; set it again")
        return key


class EndpointWriter:
    """An LLM behind an OpenAI-compatible endpoint, asked by several threads with the official client.

    Raises:
        InputError: the package openai is missing, or there is no key.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        try:
            import openai
        except ImportError as error:
            raise InputError("an endpoint needs the package openai; run: pip install 'search-r3[synthesis]'") from error
        self._openai = openai
        self.settings = settings
        self.name = settings.model
        self.batch = max(16, 2 * settings.concurrency)
        self.usage = Usage()
        self._key = settings.read_key()
        self._client = openai.OpenAI(api_key=self._key, base_url=settings.url, timeout=settings.timeout, max_retries=0)
        self._lock = threading.Lock()
        self._answered = False
        self._not_before = 0.0  # a Retry-After holds for every thread
        self._limit_name = "max_tokens"  # newer OpenAI models refuse it, older servers know nothing else
        self._send_temperature = settings.temperature is not None

    @property
    def identity(self) -> dict[str, Any]:
        wanted = self.settings
        return {
            "writer": "endpoint",
            "model": wanted.model,
            "temperature": wanted.temperature,
        }

    def write(self, prompts: Sequence[Prompt]) -> list[Reply | Failure]:
        """See `Writer.write`. Threads are daemons: Ctrl-C does not wait for calls under way."""
        todo: queue.SimpleQueue[tuple[int, Prompt]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Reply | Failure | BaseException]] = queue.SimpleQueue()
        stop = threading.Event()
        for number, prompt in enumerate(prompts):
            todo.put((number, prompt))

        def run() -> None:
            while not stop.is_set():
                try:
                    number, prompt = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((number, self._ask(prompt, stop)))
                except BaseException as error:
                    done.put((number, error))

        for _ in range(min(self.settings.concurrency, len(prompts))):
            threading.Thread(target=run, daemon=True).start()
        answers: dict[int, Reply | Failure] = {}
        try:
            while len(answers) < len(prompts):
                number, answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                answers[number] = answer
        finally:
            stop.set()
        failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
        if failures and len(failures) == len(prompts) and (not self._answered or len(prompts) > 3):
            raise InputError(f"{self._where} answers nothing: {failures[0].detail}")
        return [answers[number] for number in range(len(prompts))]

    def _ask(self, prompt: Prompt, stop: threading.Event) -> Reply | Failure:
        tries = 0
        while True:
            self._wait(stop)
            if stop.is_set():
                return Failure("stopped")
            detail, asked_to_wait = "", 0.0
            sent = self._options(prompt)
            try:
                return self._call(prompt, sent)
            except self._openai.APITimeoutError:
                detail = f"no answer within {self.settings.timeout:g} seconds; is it too busy? raise --timeout"
            except self._openai.APIConnectionError as error:
                detail = f"cannot be reached ({self._reason(error.__cause__ or error)}); does it run, is the URL right?"
                if not self._answered and tries >= 1:
                    raise InputError(f"{self._where} {detail}") from None
            except self._openai.APIStatusError as error:
                if error.status_code == 400 and self._adapt(str(error), sent):
                    continue
                refused = self._judge(error)
                if refused:
                    return refused
                detail = f"status {error.status_code}: {self._reason(error)}"
                asked_to_wait = retry_after(error.response.headers)
            except (self._openai.APIError, ValueError, TypeError, AttributeError, KeyError, IndexError):
                detail = "it does not answer with the JSON of a chat completion; should the URL end in /v1?"
                if not self._answered and tries >= 1:
                    raise InputError(f"{self._where}: {detail}") from None
            if tries >= self.settings.retries:
                return Failure("no reply", detail)
            if asked_to_wait > MAX_WAIT:
                raise InputError(
                    f"{self._where} asks to wait {asked_to_wait:,.0f} seconds ({detail}); run the same command then"
                )
            wait = min(MAX_WAIT, self.settings.backoff * 2**tries) * random.uniform(0.8, 1.2)
            if asked_to_wait:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + asked_to_wait)
            stop.wait(max(wait, asked_to_wait))
            tries += 1

    def _options(self, prompt: Prompt) -> dict[str, Any]:
        options: dict[str, Any] = {self._limit_name: prompt.max_tokens}
        if self._send_temperature:
            options["temperature"] = self.settings.temperature
        return options

    def _call(self, prompt: Prompt, options: dict[str, Any]) -> Reply | Failure:
        messages: Any = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        answer = self._client.chat.completions.create(model=self.settings.model, messages=messages, **options)
        choice = answer.choices[0]
        text = choice.message.content or ""
        if not isinstance(text, str):
            raise TypeError("the content is no text")
        used = getattr(answer, "usage", None)
        read, written = getattr(used, "prompt_tokens", None), getattr(used, "completion_tokens", None)
        with self._lock:
            self._answered = True
            self.usage.calls += 1
            if isinstance(read, int) and isinstance(written, int):
                self.usage.input += read
                self.usage.output += written
            else:
                self.usage.input += count_characters(prompt.system) + count_characters(prompt.user)
                self.usage.output += count_characters(text)
                self.usage.estimated += 1
        if choice.finish_reason == "content_filter" or getattr(choice.message, "refusal", None):
            return Failure("refuses", "the endpoint's filter")
        return Reply(without_thoughts(text), choice.finish_reason == "length")

    def _judge(self, error: Any) -> Failure | None:
        """What a status means: None to try again, a Failure for this prompt alone, InputError for all prompts."""
        code, model = error.status_code, self.settings.model
        if code in (401, 403):
            source = f"the key in {self.settings.key_variable}" if self.settings.key_variable else "a call without key"
            raise InputError(f"{self._where} refused {source} (status {code}); check the key and what it may use")
        if code == 404:
            raise InputError(
                f'{self._where} has no model "{model}", or is not the base URL (status 404): {self._reason(error)}'
            )
        if code == 402 or "insufficient_quota" in str(error):
            raise InputError(
                f"{self._where}: the account's credit is used up (status {code}); run again when it is not"
            )
        if code in (408, 409, 429) or code >= 500:
            return None
        return Failure("refused by the endpoint", f"status {code}: {self._reason(error)}")

    def _adapt(self, message: str, sent: dict[str, Any]) -> bool:
        """Whether the next try will differ from `sent`: some models want another limit's name, or no temperature."""
        if "max_completion_tokens" in message and "max_tokens" in sent:
            self._limit_name = "max_completion_tokens"
        elif "temperature" in message and "temperature" in sent:
            self._send_temperature = False
        else:
            return False
        return True

    def _wait(self, stop: threading.Event) -> None:
        while not stop.is_set() and (left := self._not_before - time.monotonic()) > 0:
            stop.wait(left)

    @property
    def _where(self) -> str:
        return f"the endpoint {self.settings.url}"

    def _reason(self, error: BaseException) -> str:
        """One short line of what went wrong, in which the key cannot stand."""
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(said or error or type(error).__name__).split()) or type(error).__name__
        return (text.replace(self._key, "***") if len(self._key) > 4 else text)[:200]


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

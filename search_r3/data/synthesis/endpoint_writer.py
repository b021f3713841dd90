"""A writer that uses an LLM behind an OpenAI-compatible endpoint, with concurrent calls and retries.

Retries are in `data.io.endpoint`; this module builds the chat requests and reads the responses.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from search_r3.data.io.endpoint import (
    AskDifferentlyError,
    Endpoint,
    EndpointSettings,
    NoAnswerError,
    RefusedError,
    Threads,
    Wording,
    listed,
    said_by,
)
from search_r3.data.synthesis.writers import Failure, Prompt, Reply, Usage, count_characters, without_thinking
from search_r3.errors import InputError

_WORDING = Wording(
    slow="it may be overloaded; raise --timeout",
    unusable="it does not answer with the JSON of a chat completion ({reason}); should the URL end in /v1?",
    no_credit="the account's credit is used up (status {code}); add credit and run again",
)


class EndpointWriter:
    """An LLM behind an OpenAI-compatible endpoint, called by several threads with the official client.

    Raises:
        InputError: the package openai is not installed, or there is no key.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.name = settings.model
        self.batch = max(16, 2 * settings.concurrency)
        self.usage = Usage()
        self._endpoint = Endpoint(settings, settings.read_key(), _WORDING)
        self._lock = threading.Lock()
        self._limit_name = "max_tokens"  # newer OpenAI models reject it, older servers accept nothing else
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
        """See `Writer.write`. Ctrl-C does not wait for running calls."""
        threads = Threads(
            lambda number, stop: self._ask(prompts[number], stop), range(len(prompts)), self.settings.concurrency
        )
        try:
            answers = dict(threads)
        finally:
            threads.stop(wait=False)
        failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
        if failures and len(failures) == len(prompts) and (not self._endpoint.answered or len(prompts) > 3):
            raise InputError(f"{self._endpoint} answers nothing: {failures[0].detail}")
        return [answers[number] for number in range(len(prompts))]

    def _ask(self, prompt: Prompt, stop: threading.Event) -> Reply | Failure:
        try:
            return self._endpoint.ask(lambda: self._call(prompt), stop)
        except NoAnswerError as error:
            return Failure("no reply", error.detail)
        except RefusedError as error:
            return Failure("refused by the endpoint", str(error))

    def _call(self, prompt: Prompt) -> Reply | Failure:
        import openai

        messages: Any = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        sent = self._options(prompt)
        try:
            answer = self._endpoint.client.chat.completions.create(model=self.settings.model, messages=messages, **sent)
        except openai.BadRequestError as error:
            if self._adapt(str(error), sent):
                raise AskDifferentlyError from None
            raise
        choice = listed(answer, "choices")[0]
        if failed := getattr(choice, "error", None):
            raise said_by(failed)
        if choice.message is None:
            raise ValueError("a choice without a message")
        text = choice.message.content or ""
        if not isinstance(text, str):
            raise TypeError("the content is not text")
        used = getattr(answer, "usage", None)
        read, written = getattr(used, "prompt_tokens", None), getattr(used, "completion_tokens", None)
        with self._lock:
            self._endpoint.answered = True
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
        return Reply(without_thinking(text), choice.finish_reason == "length")

    def _options(self, prompt: Prompt) -> dict[str, Any]:
        options: dict[str, Any] = {self._limit_name: prompt.max_tokens}
        if self._send_temperature:
            options["temperature"] = self.settings.temperature
        return options

    def _adapt(self, message: str, sent: dict[str, Any]) -> bool:
        """Whether the next attempt will differ from `sent`: some models require another limit name, or no
        temperature."""
        if "max_completion_tokens" in message and "max_tokens" in sent:
            self._limit_name = "max_completion_tokens"
        elif "temperature" in message and "temperature" in sent:
            self._send_temperature = False
        else:
            return False
        return True

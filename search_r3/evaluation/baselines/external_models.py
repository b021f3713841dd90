"""External models as systems: `st:MODEL`, `endpoint:MODEL@URL`, or a YAML file with options.

A file also gives the prompt before a query (Qwen3-Embedding: "Instruct: ...\\nQuery: "), the price of tokens, and the
environment variable that holds the key; the key itself is never in a file or on the command line.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from search_r3.config import load_config
from search_r3.data.io.endpoint import EndpointSettings, key_from
from search_r3.errors import InputError
from search_r3.files import expand_user

FILE_ENDINGS = (".yaml", ".yml")
OPENAI_URL = "https://api.openai.com/v1"
URL_VARIABLE = "OPENAI_BASE_URL"
"""Environment variable with the default address of endpoints; the OpenAI client reads the same variable."""
KEY_VARIABLE = "OPENAI_API_KEY"
TOKEN_LIMIT = 1_000_000
"""Estimated tokens that may be sent to an endpoint without approval: about four million characters of English."""
_PREFIX = "endpoint:"


@dataclass(frozen=True)
class ExternalModelConfig:
    """An external model, as described in its YAML file."""

    model: str
    """The model: a sentence-transformers name or folder, or its name at the endpoint."""
    endpoint: str | None = None
    """The base URL of an OpenAI-compatible endpoint, usually ending in /v1; without one, sentence-transformers runs."""
    query_prompt: str | None = None
    """Prompt before every query. None: the sentence-transformers model's own prompt, or nothing for an endpoint."""
    document_prompt: str | None = None
    """Prompt before every document; None as above."""
    key_variable: str | None = KEY_VARIABLE
    """The environment variable that holds the endpoint's key; null if it requires none."""
    max_characters: int | None = None
    """Texts are truncated to this length, including the prompt, for endpoints that reject long ones. None: no limit."""
    price: float | None = None
    """Price per million tokens, in any currency, used to show the cost of a run."""
    token_limit: int = TOKEN_LIMIT
    """Sending more estimated tokens than this requires approval."""
    concurrency: int = 4
    """Maximum number of concurrent calls."""
    timeout: float = 120.0
    """Timeout of a call in seconds."""
    retries: int = 5
    """Retries after a timeout, a lost connection, an invalid response, or a status of 408, 409, 429 or 5xx."""
    backoff: float = 1.0
    """Seconds before the first retry; doubled each time, and never less than the endpoint's Retry-After."""

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise InputError("the model's name is empty; name one")
        if self.endpoint is not None:
            self.settings()  # checks the address, the variable's name and the numbers
        for name in ("max_characters", "token_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise InputError(f"price must be 0 or more, not {self.price}")

    def settings(self) -> EndpointSettings:
        """The settings of the endpoint. Raises InputError for an invalid address or number."""
        return EndpointSettings(
            url=self.endpoint or "",
            model=self.model,
            key_variable=self.key_variable,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.backoff,
            temperature=None,
        )

    def read_key(self) -> str:
        """The API key from the environment; "none" if none is required.

        Raises:
            InputError: the variable is not set, or contains characters that cannot be sent. Its value is never shown.
        """
        return key_from(
            self.key_variable,
            f"no key for {self.model}: the variable {self.key_variable} is not set; set it, or describe the system in "
            "a YAML file that names another (key_variable: NAME) or requires none (key_variable: null)",
        )


@dataclass(frozen=True)
class CostApproval:
    """How the cost of an endpoint is approved and reported."""

    yes: bool = False
    """Send everything without asking."""
    price: float | None = None
    """Price per million tokens; overrides that of a YAML file."""
    ask: Callable[[str], bool] | None = None
    """Asks the user for approval; None refuses anything above the limit, as without a terminal."""
    report: Callable[[str], None] | None = None
    """Called with one line before and after texts are sent."""

    def __post_init__(self) -> None:
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise InputError(f"the price per million tokens must be 0 or more, not {self.price}")


def parse_external_model(source: str) -> ExternalModelConfig | None:
    """The external model described by `source` (a spec without its label); None if it is a built-in system.

    Raises:
        InputError: an address is invalid, or a file cannot be read, has unknown keys or wrong values.
    """
    if source.startswith("st:"):
        return ExternalModelConfig(model=source.removeprefix("st:"))
    if source.startswith(_PREFIX):
        return _from_spec(source)
    if source.endswith(FILE_ENDINGS) and not expand_user(source).is_dir():
        return _from_file(expand_user(source))
    return None


def is_local(url: str) -> bool:
    """Whether an address is local (localhost, 127.*, ::1) and so costs nothing."""
    host = (urlsplit(url).hostname or "").lower()
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


def _from_spec(source: str) -> ExternalModelConfig:
    match = re.fullmatch(r"(?P<model>@?[^@]+)(?:@(?P<url>.+))?", source.removeprefix(_PREFIX))
    if match is None:
        raise InputError(f"bad system {source!r}; expected endpoint:MODEL@URL, such as endpoint:NAME@{OPENAI_URL}")
    url = match["url"] or os.environ.get(URL_VARIABLE) or OPENAI_URL
    return ExternalModelConfig(model=match["model"], endpoint=url, key_variable=None if is_local(url) else KEY_VARIABLE)


def _from_file(path: Path) -> ExternalModelConfig:
    return load_config(path, ExternalModelConfig)

"""How systems that are not ours are named: `st:MODEL`, `endpoint:MODEL@URL`, or a YAML file with its options.

A file also gives what the model expects in front of a query (Qwen3-Embedding: "Instruct: ...\\nQuery: "), what its
tokens cost, and which environment variable holds the key; the key itself stands in no file and on no command line.
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
"""Where an endpoint is whose address is not given; the variable that OpenAI's own client reads."""
KEY_VARIABLE = "OPENAI_API_KEY"
TOKEN_LIMIT = 1_000_000
"""Estimated tokens that are sent to an endpoint without asking: about four million characters of English."""
_PREFIX = "endpoint:"


@dataclass(frozen=True)
class ExternalModelConfig:
    """A system that is not ours, as its YAML file describes it."""

    model: str
    """The model: a sentence-transformers name or folder, or what the endpoint calls it."""
    endpoint: str | None = None
    """The base URL of an OpenAI-compatible endpoint, usually ending in /v1; without one, sentence-transformers runs."""
    query_prompt: str | None = None
    """Put in front of every query. None: a sentence-transformers model's own prompt, nothing for an endpoint."""
    document_prompt: str | None = None
    """Put in front of every document; None as above."""
    key_variable: str | None = KEY_VARIABLE
    """The environment variable that holds the endpoint's key; null where it wants none."""
    max_characters: int | None = None
    """Texts are cut here, for endpoints that refuse long ones (after the prompt is put in front). None cuts nothing."""
    price: float | None = None
    """Of a million tokens, in any currency, to show what a run costs."""
    token_limit: int = TOKEN_LIMIT
    """More estimated tokens than these are only sent after a yes."""
    concurrency: int = 4
    """Calls under way at once."""
    timeout: float = 120.0
    """Seconds that one call may take."""
    retries: int = 5
    """Further tries after a timeout, a lost connection, an answer that is none, or a status of 408, 409, 429 or 5xx."""
    backoff: float = 1.0
    """Seconds before the second try; doubled each time, and never less than the endpoint's Retry-After."""

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
        """How the endpoint is called. Raises InputError for an address or a number that cannot be."""
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
        """The key, from the environment; "none" where none is wanted.

        Raises:
            InputError: the variable is not set, or holds what cannot be sent. Its value is never shown.
        """
        return key_from(
            self.key_variable,
            f"no key for {self.model}: the variable {self.key_variable} is not set; set it, or describe the system in "
            "a YAML file that names another (key_variable: NAME) or wants none (key_variable: null)",
        )


@dataclass(frozen=True)
class CostApproval:
    """Who approves what an endpoint costs, and where it is reported."""

    yes: bool = False
    """Send whatever is needed without asking."""
    price: float | None = None
    """Of a million tokens, in place of a file's."""
    ask: Callable[[str], bool] | None = None
    """Asks the user; None where there is no terminal to ask on: then too much is refused."""
    say: Callable[[str], None] | None = None
    """Called with a line for what will be sent, and for what was."""

    def __post_init__(self) -> None:
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise InputError(f"the price must be 0 or more a million tokens, not {self.price}")


def parse_external_model(source: str) -> ExternalModelConfig | None:
    """What `source` (a spec without its label) says of a system that is not ours; None if it names one of ours.

    Raises:
        InputError: an address that is none, or a file that cannot be read, has unknown keys or wrong values.
    """
    if source.startswith("st:"):
        return ExternalModelConfig(model=source.removeprefix("st:"))
    if source.startswith(_PREFIX):
        return _from_spec(source)
    if source.endswith(FILE_ENDINGS) and not expand_user(source).is_dir():
        return _from_file(expand_user(source))
    return None


def is_local(url: str) -> bool:
    """Whether an address is this machine's own (localhost, 127.*, ::1), which costs nothing."""
    host = (urlsplit(url).hostname or "").lower()
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


def _from_spec(source: str) -> ExternalModelConfig:
    found = re.fullmatch(r"(?P<model>@?[^@]+)(?:@(?P<url>.+))?", source.removeprefix(_PREFIX))
    if found is None:
        raise InputError(f"bad system {source!r}; expected endpoint:MODEL@URL, such as endpoint:NAME@{OPENAI_URL}")
    url = found["url"] or os.environ.get(URL_VARIABLE) or OPENAI_URL
    return ExternalModelConfig(model=found["model"], endpoint=url, key_variable=None if is_local(url) else KEY_VARIABLE)


def _from_file(path: Path) -> ExternalModelConfig:
    return load_config(path, ExternalModelConfig)

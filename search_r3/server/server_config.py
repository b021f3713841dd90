"""The settings of a server: limits on requests, queues and time, and its API keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from search_r3.errors import InputError
from search_r3.model.text_limit import TooLong
from search_r3.server.keys import ApiKey

Batching = Literal["continuous", "static"]
COUNTS = (
    "max_items", "max_tokens", "max_request_tokens", "max_body", "max_bodies", "queue", "slots", "shared_tokens",
    "batch_texts", "batch_tokens", "search_threads", "add_threads",
)  # fmt: skip
ORIGIN = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@dataclass(frozen=True)
class ServerConfig:
    """The settings of one server; `search-r3 serve --help` has an option for most."""

    api_keys: tuple[str | ApiKey, ...] = ()
    """Keys that clients must send (`Authorization: Bearer KEY`); if empty, no key is needed. One given as a string may
    do everything."""
    cors_origins: tuple[str, ...] = ()
    """Origins of pages that may use it from a browser, such as "https://app.example.org"; by default none."""
    writable: bool = False
    """Whether clients may add and delete documents."""
    root_path: str = ""
    """The prefix below which a proxy serves it, such as "/search", whether or not the proxy removes it from paths."""
    max_items: int = 2048
    """Texts per request: OpenAI's limit, which its clients respect."""
    max_tokens: int | None = None
    """Tokens that are read of one text, up to what the model's context leaves; by default 512."""
    too_long: TooLong = "truncate"
    """What happens to a longer text, unless its request says so: it is refused (error), read as far as `max_tokens`
    (truncate), or, if it is a document, embedded in parts (split; queries are then truncated)."""
    max_request_tokens: int = 300_000
    """Tokens per request, over all texts as far as they are read: OpenAI's limit."""
    max_body: int = 16_000_000
    """Bytes of a request's body."""
    max_bodies: int = 128_000_000
    """Bytes of all large bodies in flight together; one more gets 429."""
    queue: int = 256
    """Requests in flight, waiting or being answered; one more gets 429."""
    timeout: float = 300.0
    """Seconds until a request times out: 503 if it was never begun, else 504."""
    body_timeout: float = 30.0
    """Seconds within which a request's body must arrive."""
    pause: float = 0.0
    """Seconds between SIGTERM and the shutdown: not ready any more, so that a load balancer sends requests elsewhere,
    but those that still arrive are answered."""
    grace: float = 30.0
    """Seconds that a shutdown waits for accepted requests."""
    reasoning_tokens: int = 32
    """The budget of `reasoning: true`."""
    max_reasoning_tokens: int = 256
    """The largest budget that a request may ask for."""
    cache: int = 10_000
    """Number of reasoned queries to cache, about 3 kB each; 0 disables the cache."""
    batching: Batching = "continuous"
    """How reasoned queries share the model: each joins and leaves at any token, or in fixed batches."""
    slots: int = 32
    """Reasoned queries that are generated concurrently; further ones wait for a free slot."""
    shared_tokens: int = 256
    """Tokens in one pass over documents or direct queries while queries are being generated; the pass delays them."""
    batch_texts: int = 32
    """Texts in one pass of the model."""
    batch_tokens: int = 2048
    """Tokens in one pass over documents or direct queries; on two CPU cores it delays others by about a second."""
    search_threads: int = 32
    """Concurrent searches; each waits for the model most of the time."""
    add_threads: int = 32
    """Requests whose documents are embedded concurrently for one index; further ones wait and delay no search."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            if (count := getattr(self, name)) is not None and count < 1:
                raise InputError(f"{name} is {count}; expected at least 1")
        _check_choice("batching", self.batching, get_args(Batching))
        _check_choice("too_long", self.too_long, get_args(TooLong))
        for name in ("timeout", "body_timeout"):
            if not 0 < getattr(self, name) <= 86_400:
                raise InputError(f"{name} is {getattr(self, name)}; expected seconds, over 0 and at most a day")
        for name in ("pause", "grace"):
            if not 0 <= getattr(self, name) <= 86_400:
                raise InputError(f"{name} is {getattr(self, name)}; expected seconds, from 0 to a day")
        if self.cache < 0:
            raise InputError(f"cache is {self.cache}; expected 0 or more")
        if not 0 <= self.reasoning_tokens <= self.max_reasoning_tokens <= 4096:
            raise InputError(
                f"reasoning_tokens is {self.reasoning_tokens} and max_reasoning_tokens is {self.max_reasoning_tokens}; "
                "expected the first to be at most the second, and that at most 4,096"
            )
        self._check_root_path()
        self._check_access()

    def _check_access(self) -> None:
        for key in self.api_keys:
            if isinstance(key, str):
                ApiKey(key)  # raises if it is none
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise InputError(
                    f"{origin!r} is no origin that can be allowed; name each, such as https://app.example.org, with a "
                    "port if it has one, and without a path"
                )

    def _check_root_path(self) -> None:
        if self.root_path and (not ROOT_PATH.fullmatch(self.root_path) or self.root_path.split("/")[1] in ("v1", "v2")):
            raise InputError(
                f"root_path is {self.root_path!r}; expected a prefix such as /search, without a slash at its end, and "
                "other than /v1 and /v2, where the routes of the server itself begin"
            )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; expected {' or '.join(choices)}")

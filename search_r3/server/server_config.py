"""The settings of a server: limits on requests, queues and time, and its API keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from search_r3.errors import InputError

Batching = Literal["continuous", "static"]
COUNTS = (
    "max_items", "max_tokens", "max_body", "max_bodies", "queue", "slots", "shared_tokens", "batch_texts",
    "batch_tokens", "search_threads", "add_threads",
)  # fmt: skip


@dataclass(frozen=True)
class ServerConfig:
    """The settings of one server; `search-r3 serve --help` has an option for most."""

    api_keys: tuple[str, ...] = ()
    """Who may call /v1: `Authorization: Bearer KEY` with one of these; anyone if there are none."""
    writable: bool = False
    """Whether clients may add and delete documents."""
    max_items: int = 2048
    """Texts a request: OpenAI's own limit, which its clients keep to."""
    max_tokens: int = 300_000
    """Tokens a request, all texts together, as they are read (each is cut at 512): OpenAI's own limit."""
    max_body: int = 16_000_000
    """Bytes of a request's body."""
    max_bodies: int = 128_000_000
    """Bytes of all large bodies in flight together; one more gets 429."""
    queue: int = 256
    """Requests in flight, waiting or being answered; one more gets 429."""
    timeout: float = 300.0
    """Seconds until a request times out: 503 if it was never begun, else 504."""
    body_timeout: float = 30.0
    """Seconds in which a request's body must have arrived."""
    grace: float = 30.0
    """Seconds that a shutdown waits for what was accepted."""
    reasoning_tokens: int = 32
    """The budget of `reasoning: true`."""
    max_reasoning_tokens: int = 256
    """The largest budget that a request may ask for."""
    cache: int = 10_000
    """Reasoned queries that are cached, about 3 kB each; 0 for none."""
    batching: Batching = "continuous"
    """How reasoned queries share the model: each joins and leaves on its own, or in batches of one budget."""
    slots: int = 32
    """Reasoned queries that are written side by side; the next one waits for the first that ends."""
    shared_tokens: int = 256
    """Tokens in one pass over documents or direct queries while queries are being written, which it keeps waiting."""
    batch_texts: int = 32
    """Texts in one pass of the model."""
    batch_tokens: int = 2048
    """Tokens in one pass over documents or direct queries: on two CPU cores about a second, which others wait."""
    search_threads: int = 32
    """Searches side by side; each waits for the model most of its time."""
    add_threads: int = 32
    """Requests whose documents are embedded side by side; the next one waits. They keep no search waiting."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.batching not in get_args(Batching):
            raise InputError(f"batching is {self.batching!r}; expected {' or '.join(get_args(Batching))}")
        for name in ("timeout", "body_timeout"):
            if not 0 < getattr(self, name) <= 86_400:
                raise InputError(f"{name} is {getattr(self, name)}; expected seconds, over 0 and at most a day")
        if self.grace < 0 or self.cache < 0:
            raise InputError(f"grace is {self.grace} and cache is {self.cache}; expected 0 or more")
        if not 0 <= self.reasoning_tokens <= self.max_reasoning_tokens <= 4096:
            raise InputError(
                f"reasoning_tokens is {self.reasoning_tokens} and max_reasoning_tokens is {self.max_reasoning_tokens}; "
                "expected the first to be at most the second, and that at most 4,096"
            )
        for key in self.api_keys:
            if not key or not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
                raise InputError("an API key is empty or has spaces or characters beyond ASCII; give printable ones")

"""Reasoning about queries, written by another model: an LLM behind an OpenAI-compatible endpoint, or a local one.

A small model embeds a query better with true words than with those that it can write itself, so a larger one may write
them. Every reply is cached by the writer, the instruction and the query, so that a repeated query costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from search_r3.data.io.endpoint import EndpointSettings
from search_r3.data.synthesis.endpoint_writer import EndpointWriter
from search_r3.data.synthesis.writers import LocalWriter, Prompt, Reply, Writer
from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.model.resolve import cache_dir

INSTRUCTION = (
    "Enrich the search query in a few words: its core concepts and how they relate, key terms with short definitions, "
    "synonyms and related terms, connected topics and uses. If you know the answer, state it. Reply with these words "
    "only, in English, without a heading."
)
"""That of our checkpoints' conversation with reasoning, for a model that does not know the embed token."""
MAX_TOKENS = 96
"""Most tokens that a writer may write about a query."""
PREFIX = "endpoint:"
OPENAI_URL = "https://api.openai.com/v1"
URL_VARIABLE = "OPENAI_BASE_URL"
KEY_VARIABLE = "OPENAI_API_KEY"
FORMAT = 1


@dataclass(frozen=True)
class Written:
    """The reasoning about some queries, and what it cost now; cached replies cost nothing.

    Attributes:
        writer: the model's name.
        texts: one for each query, in order.
        cached: how many of them come from the cache.
        tokens_read, tokens_written: by the writer.
        estimated: calls whose tokens the endpoint did not report, so that they are estimated from characters.
        seconds: wall time.
    """

    writer: str
    texts: list[str]
    cached: int
    tokens_read: int
    tokens_written: int
    estimated: int
    seconds: float

    @property
    def cost(self) -> dict[str, Any]:
        """Everything but the texts, JSON-ready."""
        return {name: value for name, value in asdict(self).items() if name != "texts"}

    @property
    def line(self) -> str:
        """The cost in one line."""
        about = " (estimated)" if self.estimated else ""
        return (
            f"writer {self.writer}: {len(self.texts) - self.cached:,} of {len(self.texts):,} queries written, "
            f"{self.tokens_read:,} tokens read and {self.tokens_written:,} written{about}, {self.seconds:.1f} s"
        )


class ReasoningWriter:
    """Writes reasoning about queries, and caches it.

    Args:
        writer: answers the prompts.
        folder: the cache; by default `written` in the cache folder.
    """

    def __init__(self, writer: Writer, folder: str | Path | None = None) -> None:
        self.writer = writer
        self.folder = Path(folder) if folder is not None else cache_dir() / "written"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines a reply, except the query."""
        # A reply is stored for each query, whatever else was written with it.
        settings = {name: value for name, value in self.writer.identity.items() if name != "batch_size"}
        return {"format": FORMAT, "instruction": INSTRUCTION, "max_tokens": MAX_TOKENS, **settings}

    def write(self, queries: Sequence[str]) -> Written:
        """The reasoning about each query: from the cache, else by the writer, batch by batch.

        Raises:
            InputError: the writer is not available, or gives no reply to a query.
        """
        started, before = time.perf_counter(), (self.writer.usage.input, self.writer.usage.output)
        estimated = self.writer.usage.estimated
        known = {query: text for query in dict.fromkeys(queries) if (text := self._cached(query)) is not None}
        left = [query for query in dict.fromkeys(queries) if query not in known]
        for first in range(0, len(left), self.writer.batch):
            some = left[first : first + self.writer.batch]
            replies = self.writer.write([Prompt(INSTRUCTION, f"Query: {query}", MAX_TOKENS) for query in some])
            for query, reply in zip(some, replies, strict=True):
                if isinstance(reply, Reply):
                    known[query] = " ".join(reply.text.split())
                    self._keep(query, known[query])
            if failed := [(query, r) for query, r in zip(some, replies, strict=True) if not isinstance(r, Reply)]:
                query, failure = failed[0]
                detail = f": {failure.detail}" if failure.detail else ""
                raise InputError(f"{self.writer.name} wrote nothing about {query[:60]!r}, {failure.reason}{detail}")
        usage = self.writer.usage
        return Written(
            self.writer.name,
            [known[query] for query in queries],
            sum(query not in left for query in queries),
            usage.input - before[0],
            usage.output - before[1],
            usage.estimated - estimated,
            time.perf_counter() - started,
        )

    def _path(self, query: str) -> Path:
        about = json.dumps([self.identity, query], sort_keys=True)
        name = hashlib.sha256(about.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _cached(self, query: str) -> str | None:
        try:
            record = json.loads(self._path(query).read_text(encoding="utf-8"))
            return record["text"] if record["query"] == query and isinstance(record["text"], str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, query: str, text: str) -> None:
        atomic_write_text(self._path(query), json.dumps({"query": query, "text": text}, ensure_ascii=False) + "\n")


def open_writer(spec: str, *, device: str | None = None, dtype: str = "auto") -> Writer:
    """The writer that a name stands for, which decodes greedily.

    Args:
        spec: "endpoint:MODEL@URL" for a model behind an OpenAI-compatible endpoint (without @URL, the one in
            OPENAI_BASE_URL, else OpenAI's; the key is read from OPENAI_API_KEY, none is sent to this machine); else a
            local chat model: a name, a folder or a hub id.

    Raises:
        InputError: the address is invalid, there is no key, or there is no such model.
    """
    if not spec.startswith(PREFIX):
        from search_r3.model.searchr3 import SearchR3

        return LocalWriter(SearchR3.from_pretrained(spec, device=device, dtype=dtype), temperature=0.0)
    match = re.fullmatch(r"(?P<model>@?[^@]+)(?:@(?P<url>.+))?", spec.removeprefix(PREFIX))
    if match is None:
        raise InputError(f"bad writer {spec!r}; expected endpoint:MODEL@URL, such as endpoint:NAME@{OPENAI_URL}")
    url = match["url"] or os.environ.get(URL_VARIABLE) or OPENAI_URL
    here = (urlsplit(url).hostname or "").lower() in ("localhost", "127.0.0.1", "::1")
    return EndpointWriter(EndpointSettings(url, match["model"], None if here else KEY_VARIABLE, temperature=0.0))

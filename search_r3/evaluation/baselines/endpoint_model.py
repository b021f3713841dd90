"""Embeddings from any OpenAI-compatible endpoint (POST /embeddings), with batching, retries and a cache.

Each finished call of up to 32 texts is cached immediately, keyed by its texts rather than their data set, so an
interrupted run sends only the missing texts. What will be sent is reported first; above a limit, it needs approval.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from search_r3.data.io.endpoint import Endpoint, NoAnswerError, RefusedError, Threads, Wording, listed
from search_r3.data.synthesis.writers import CHARACTERS_A_TOKEN, count_characters
from search_r3.errors import InputError
from search_r3.evaluation.baselines.external_models import CostApproval, ExternalModelConfig, is_local
from search_r3.evaluation.embedding_cache import EmbeddingCache, Encoded
from search_r3.progress import progress_bar

UNIT = 32
"""Texts sent and cached together; a smaller batch size splits a unit into several calls."""
_WORDING = Wording(
    slow="raise timeout in the system's YAML file",
    unusable="it does not answer with embeddings ({reason}); should the URL end in /v1?",
    no_credit="the account has no credit left (status {code}); add credit and run again",
)


@dataclass
class PendingTexts:
    """The distinct texts to embed for one side (with prompt, truncated), in units, and the units that are cached."""

    side: str
    units: list[list[str]]
    cached: dict[int, Encoded]
    rows_of: list[int]
    """For each requested text, its index among the distinct texts."""

    @property
    def missing(self) -> list[int]:
        """Indices of the units that must be sent."""
        return [number for number in range(len(self.units)) if number not in self.cached]

    @property
    def texts(self) -> int:
        """Number of texts that must be sent."""
        return sum(len(self.units[number]) for number in self.missing)

    @property
    def tokens(self) -> int:
        """Approximate number of tokens that must be sent, estimated from the length of the texts."""
        return sum(count_characters(text) for number in self.missing for text in self.units[number])


class EndpointEncoder:
    """A model behind an endpoint, called with the OpenAI client from several threads; rows are unit vectors.

    Args:
        config: the model and its address; `config.endpoint` is set.
        approval: who approves the cost.
        batch_size: texts in one call, at most 32.

    Raises:
        InputError: the package openai is not installed, there is no key, or batch_size is below 1.
    """

    def __init__(
        self, config: ExternalModelConfig, approval: CostApproval | None = None, batch_size: int = UNIT
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, not {batch_size}")
        self.config, self.approval = config, approval or CostApproval()
        self.batch_size = min(batch_size, UNIT)
        settings = config.settings()
        self.url = settings.url.rstrip("/")
        self.calls = self.tokens = 0
        self._endpoint = Endpoint(replace(settings, url=self.url), config.read_key(), _WORDING)
        self._lock = threading.Lock()
        self._approved = 0  # estimated tokens approved so far
        self._dimension: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Everything known that determines a ranking, except the key; the address is hashed."""
        return {
            "retriever": "endpoint",
            "model": self.config.model,
            "endpoint": hashlib.sha256(self.url.encode()).hexdigest()[:16],
            "query_prompt": self.config.query_prompt,
            "document_prompt": self.config.document_prompt,
            "max_characters": self.config.max_characters,
            "dtype": "float32",
            "max_length": None,
        }

    def plan(self, texts: Sequence[str], side: str, cache: EmbeddingCache | None) -> PendingTexts:
        """What has to be sent to embed `texts` as `side` ("query" or "document"); sends nothing."""
        prompt = (self.config.query_prompt if side == "query" else self.config.document_prompt) or ""
        sent = [f"{prompt}{text}"[: self.config.max_characters] for text in texts]
        index_of = {text: index for index, text in enumerate(dict.fromkeys(sent))}
        distinct = list(index_of)
        units = [distinct[start : start + UNIT] for start in range(0, len(distinct), UNIT)]
        cached: dict[int, Encoded] = {}
        for number, unit in enumerate(units):
            stored = cache.stored(_ids(unit), unit, self._text_identity) if cache else None
            if stored is not None:
                cached[number] = stored
        return PendingTexts(side, units, cached, [index_of[text] for text in sent])

    def approve(self, name: str, works: Sequence[PendingTexts]) -> None:
        """Report what `works` will send and cost, and ask for approval above the limit.

        The limit applies to everything that one encoder sends. A local server without a price needs no approval.

        Raises:
            InputError: the limit is exceeded without approval.
        """
        tokens = sum(work.tokens for work in works)
        if not tokens:
            return
        counts = " and ".join(
            f"{work.texts:,} {'queries' if work.side == 'query' else 'documents'}" for work in works if work.texts
        )
        stored = sum(len(unit) for work in works for unit in work.units) - sum(work.texts for work in works)
        line = f"{name}: {counts} to embed, about {tokens:,} tokens (characters / {CHARACTERS_A_TOKEN})"
        line += self._cost(tokens) + (f"; {stored:,} are in the cache" if stored else "")
        limit = self.config.token_limit
        free = self._price is None and is_local(self.url)
        if self._approved + tokens <= limit or self.approval.yes or free:
            self._report(line)
        elif self.approval.ask is None:
            raise InputError(f"{line}: over the limit of {limit:,} tokens; pass --yes to send them")
        elif not self.approval.ask(f"{line}. Send them?"):
            raise InputError(f"{name}: nothing was sent")
        self._approved += tokens

    def run(
        self,
        work: PendingTexts,
        cache: EmbeddingCache | None,
        *,
        label: str = "texts",
        show_progress: bool | None = None,
    ) -> tuple[np.ndarray, float]:
        """Embed the missing texts of `work`; returns unit rows for all its texts, float32 (n, dim), and the duration of
        the calls in seconds.

        The duration is the sum over all calls, including cached ones, although calls run concurrently. After an error
        or Ctrl-C, running calls are awaited and cached, since they are paid for.

        Raises:
            InputError: the endpoint refuses, does not answer, or answers with NaN or with another dimension.
        """
        done = dict(work.cached)
        sent_before = (self.calls, self.tokens)
        threads = Threads(
            lambda number, stop: self._unit(work.units[number], cache, stop), work.missing, self.config.concurrency
        )
        try:
            with progress_bar(label, work.texts, show_progress) as advance:
                for number, answer in threads:
                    done[number] = answer
                    advance(len(work.units[number]))
        except KeyboardInterrupt:
            self._report("waiting for running calls, which are paid for; press Ctrl-C again to abandon them")
            raise
        finally:
            threads.stop(wait=True)
            calls, tokens = self.calls - sent_before[0], self.tokens - sent_before[1]
            if calls:
                self._report(f"{label}: {calls:,} calls, {tokens:,} tokens read{self._cost(tokens)}")
        return self._assemble(work, done, cache)

    def encode(self, texts: Sequence[str], side: str) -> np.ndarray:
        """Embed `texts` without a cache: unit rows, float32 (n, dim)."""
        work = self.plan(texts, side, None)
        self.approve(self.config.model, [work])
        return self.run(work, None, show_progress=False)[0]

    # ------------------------------------------------------------------------------------------------ one unit of work

    @property
    def _text_identity(self) -> dict[str, Any]:
        """Everything that determines the embedding of a text as sent, with its prompt and truncated."""
        return {name: self.identity[name] for name in ("retriever", "model", "endpoint", "dtype")}

    def _unit(self, texts: list[str], cache: EmbeddingCache | None, stop: threading.Event) -> Encoded:
        def encode(part: Sequence[str]) -> np.ndarray:
            batches = [part[start : start + self.batch_size] for start in range(0, len(part), self.batch_size)]
            return np.concatenate([self._ask(list(batch), stop) for batch in batches])

        if cache is not None:
            return cache.encode(encode, _ids(texts), texts, self._text_identity, step=UNIT, show_progress=False)
        started = time.perf_counter()
        rows = encode(texts)
        return Encoded(rows, time.perf_counter() - started, 0, 0)

    def _assemble(
        self, work: PendingTexts, done: dict[int, Encoded], cache: EmbeddingCache | None
    ) -> tuple[np.ndarray, float]:
        parts = [done[number].rows for number in range(len(work.units))]
        if not parts:
            return np.zeros((0, self._dimension or 0), dtype=np.float32), 0.0
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) > 1:
            where = f"; the cache in {cache.folder} may be from another model; move it away" if cache else ""
            raise InputError(f"{self._endpoint}: embeddings of {widths[0]} and of {widths[-1]} dimensions{where}")
        self._check_dimension(widths[0])
        return np.concatenate(parts)[work.rows_of], sum(encoded.seconds for encoded in done.values())

    def _ask(self, texts: list[str], stop: threading.Event) -> np.ndarray:
        """Unit rows of one call, retried after transient errors."""
        try:
            return self._endpoint.ask(lambda: self._call(texts), stop)
        except NoAnswerError as error:
            raise InputError(
                f"{self._endpoint} failed after {error.tries} tries, {error.detail}; finished embeddings are kept, so "
                "the same command resumes from here"
            ) from None
        except RefusedError as error:
            raise InputError(
                f"{self._endpoint} refused a text (status {error.status}): {error.said}. If it is too long, cut texts "
                "by max_characters in the system's YAML file"
            ) from None

    def _call(self, texts: list[str]) -> np.ndarray:
        # Floats, not base64, which is smaller but not supported by every server.
        answer = self._endpoint.client.embeddings.create(model=self.config.model, input=texts, encoding_format="float")
        rows = _rows_of(answer, len(texts))
        used = getattr(answer, "usage", None)
        read = getattr(used, "prompt_tokens", None) or getattr(used, "total_tokens", None)
        with self._lock:
            self._endpoint.answered = True
            self.calls += 1
            self.tokens += read if isinstance(read, int) else sum(map(count_characters, texts))
            self._check_dimension(rows.shape[1])
        if not np.isfinite(rows).all():
            raise InputError(f"{self._endpoint} answered with NaN or infinity; its weights or dtype are broken")
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not norms.all():
            empty = texts[int(np.argmin(norms))][:60]
            raise InputError(
                f"{self._endpoint} answered with an embedding of zeros for {empty!r}, which has no direction"
            )
        return rows / norms

    def _check_dimension(self, width: int) -> None:
        if self._dimension is None:
            self._dimension = width
        if width != self._dimension:
            raise InputError(
                f"{self._endpoint} answered with {width} dimensions, but earlier with {self._dimension}; "
                "check that it serves a single model"
            )

    @property
    def _price(self) -> float | None:
        return self.config.price if self.approval.price is None else self.approval.price

    def _cost(self, tokens: int) -> str:
        """The cost of `tokens`, to be appended to a message; "" without a price."""
        if self._price is None:
            return ""
        cost = tokens * self._price / 1e6
        return f", {f'{cost:,.2f}' if cost >= 0.005 or not cost else 'under 0.01'} at {self._price:g} per million"

    def _report(self, line: str) -> None:
        if self.approval.report is not None:
            self.approval.report(line)


def _rows_of(answer: Any, expected: int) -> np.ndarray:
    """The embeddings of a response in the order of its texts, float32 (n, dim); raises ValueError or similar."""
    data = listed(answer, "data")
    if len(data) != expected:
        raise ValueError(f"{len(data)} embeddings for {expected} texts")
    if not all(isinstance(getattr(item, "embedding", None), list) for item in data):
        raise ValueError('an item of its "data" has no list of numbers as "embedding"')
    indices = [item.index for item in data]
    if any(index is not None for index in indices):
        if sorted(indices) != list(range(expected)):
            raise ValueError(f"the indices are not those of {expected} texts")
        data.sort(key=lambda item: item.index)
    rows = np.asarray([item.embedding for item in data], dtype=np.float32)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"embeddings of shape {rows.shape}")
    return rows


def _ids(unit: Sequence[str]) -> list[str]:
    """Cache ids. A unit is identified by its texts alone, so that it can be used for any data set with these texts."""
    return [str(index) for index in range(len(unit))]

"""The model as the index uses it, with every text going through the batcher; one object per request.

`SearchIndex.search` and `build_index` are synchronous and request embeddings as they need them (mode "auto" does so
twice, and so does a search that reads). They run in a thread that waits here while the batcher combines the texts of
many requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any

import numpy as np

from search_r3.index.encoder_protocol import DOCUMENT_TOKENS, document_spaces
from search_r3.model.reading import Passages, reading_turns
from search_r3.model.reasoned import REASONING_TEXT_TOKENS
from search_r3.model.text_limit import TextLimit, read_texts
from search_r3.model.tokenization import Tokens, count_tokens, reasoning_tokens
from search_r3.server.batching.batcher import Batcher, Embedded, EmbeddingJob, Kind
from search_r3.server.tracing import NO_TRACES, Tracing


class QueuedEncoder:
    """Implements the index's encoder protocol with a batcher. `cancel` ends every wait, present and future.

    Args:
        model: a SearchR3, for its name, contract and tokenizer; its encoding methods are not used.
        batcher: runs the model.
        limit: how much of a query is read; of a chunk, it is what the index says.
        on_text: called with each piece of a query's reasoning while it is generated.
        tracing: has a span for each wait.
    """

    def __init__(
        self,
        model: Any,
        batcher: Batcher,
        limit: TextLimit,
        on_text: Callable[[str], None] | None = None,
        tracing: Tracing = NO_TRACES,
    ) -> None:
        self._model, self._batcher, self._limit, self._on_text = model, batcher, limit, on_text
        self._tracing = tracing
        self._lock = threading.Lock()
        self._cancelled = False
        self._running: EmbeddingJob | None = None
        self._known: dict[tuple[Any, ...], list[Embedded]] = {}
        self._begun = False
        self.prompt_tokens = 0
        self.reasoning_tokens = 0
        self.truncated_texts = 0  # of the query: 1 if only a part of it is read
        self.remembered_ms: float | None = None  # what the reasoning took when it was written, if it was cached

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def source(self) -> str:
        return self._model.source

    @property
    def dimension(self) -> int:
        return self._model.dimension

    @property
    def contract_hash(self) -> str:
        return self._model.contract_hash

    @property
    def document_spaces(self) -> tuple[str, ...]:
        return document_spaces(self._model)

    @property
    def adaptive_rule(self) -> Any:
        return self._model.adaptive_rule

    @property
    def reading(self) -> Any:
        return self._model.reading

    def normalize_query(self, text: str) -> str:
        return self._model.normalize_query(text)

    def what_is_read(self, passages: Sequence[str]) -> list[str]:
        return self._model.what_is_read(passages)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return count_tokens(self._model.tokenizer, texts)

    def encode_document(self, texts: Sequence[str], *, max_length: int | None = None, **_: Any) -> np.ndarray:
        limit = TextLimit(max_length or DOCUMENT_TOKENS)
        return np.stack([answer.vector for answer in self._wait("document", texts, limit=limit)])

    def encode_query(
        self,
        texts: Sequence[str],
        *,
        reasoning: Any = True,
        max_reasoning_tokens: int = 32,
        passages: Passages | None = None,
    ) -> np.ndarray:
        direct: Kind = "query" if passages is None else "reading"
        kind: Kind = "latent" if reasoning == "latent" else "reasoned" if reasoning else direct
        budget = max_reasoning_tokens if kind == "reasoned" else 0
        return np.stack([answer.vector for answer in self._wait(kind, texts, budget, passages)])

    def reason(
        self, texts: Sequence[str], *, max_reasoning_tokens: int = 32, passages: Passages | None = None
    ) -> list[Any]:
        return [
            SimpleNamespace(text=a.reasoning or "", embedding=a.vector, num_tokens=a.num_tokens, forced=a.forced)
            for a in self._wait("reasoned", texts, max_reasoning_tokens, passages)
        ]

    def encode_with_reasoning(
        self,
        texts: Sequence[str],
        reasoning: Sequence[str],
        *,
        max_reasoning_tokens: int | None = None,
        passages: Passages | None = None,
    ) -> np.ndarray:
        limit = REASONING_TEXT_TOKENS if max_reasoning_tokens is None else max_reasoning_tokens
        traces = given_traces(self._model, reasoning, limit)
        return np.stack([answer.vector for answer in self._wait("given", texts, passages=passages, traces=traces)])

    @property
    def begun(self) -> bool:
        """Whether the request has begun: one of its texts is in a batch, or `begin` was called."""
        running = self._running
        return self._begun or (running is not None and running.begun)

    def begin(self) -> None:
        """Mark the request as begun, although it needs no embeddings."""
        self._begun = True

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def step(self) -> None:
        """Mark the request as begun. Raises CancelledError if `cancel` was called; to be called between long steps."""
        self._check_cancelled(0)
        self.begin()

    def cancel(self) -> None:
        """Drop texts that have not begun; waiting calls raise CancelledError."""
        with self._lock:
            self._cancelled = True
            if self._running is not None:
                self._running.future.cancel()

    def _check_cancelled(self, _: int) -> None:
        if self._cancelled:
            raise CancelledError

    def _wait(
        self,
        kind: Kind,
        texts: Sequence[str],
        budget: int = 0,
        passages: Passages | None = None,
        traces: Sequence[tuple[int, ...]] = (),
        limit: TextLimit | None = None,
    ) -> list[Embedded]:
        key = kind, tuple(texts), budget, None if passages is None else tuple(map(tuple, passages)), tuple(traces)
        if key in self._known:  # a search that is repeated because the index was replaced
            return self._known[key]
        read = read_texts(self._model, texts, limit or self._limit, self._check_cancelled, queries=kind != "document")
        rows: Sequence[Tokens] = read.rows
        if kind != "document":
            self.truncated_texts = read.truncated
        if passages is not None:
            rows = reading_turns(self._model, rows, passages)
        job = EmbeddingJob(kind, rows, budget, self._on_text if kind == "reasoned" else None, traces=traces)
        with self._lock:
            if self._cancelled:
                raise CancelledError
            self._running = job
        with self._tracing.span("encode", kind=kind, texts=len(rows)) as span:
            self._batcher.submit(job)
            try:
                answers = job.future.result()
                self._begun = True  # also if the answers were cached
            finally:
                self._begun = self._begun or job.begun
            span.set(prompt_tokens=job.tokens, reasoning_tokens=sum(answer.num_tokens for answer in answers))
        if kind != "document":
            self._known[key] = answers
        self.prompt_tokens += job.tokens
        self.reasoning_tokens += sum(answer.num_tokens for answer in answers)
        self.remembered_ms = next((a.remembered_ms for a in answers if a.remembered_ms is not None), self.remembered_ms)
        return answers


def given_traces(model: Any, texts: Sequence[str], limit: int = REASONING_TEXT_TOKENS) -> list[tuple[int, ...]]:
    """The first `limit` tokens of each given reasoning, for `EmbeddingJob.traces`; none for a blank text.

    Raises:
        InputError: a text is no valid Unicode.
    """
    embed_id = model.contract.embed_token_id
    return [tuple(reasoning_tokens(model.tokenizer, text, embed_id, limit)) for text in texts]

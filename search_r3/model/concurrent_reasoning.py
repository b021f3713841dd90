"""Concurrent reasoning about queries that join and finish independently: `SearchR3.reason` for a server.

The engine's continuous batch generates the tokens; this module adds the conversation and the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from search_r3.errors import InputError
from search_r3.model.reasoned import Reasoned
from search_r3.model.tokenization import DEFAULT_QUERY_TOKENS, Text, check_queries

if TYPE_CHECKING:
    from search_r3.model.engines.continuous_batching import ContinuousBatch


@dataclass(frozen=True, slots=True)
class Progress:
    """The result of a step for one query: the next reasoning token, or `reasoned` if the query has finished."""

    handle: int
    token: int | None = None
    reasoned: Reasoned | None = None


class ConcurrentReasoning:
    """Reasons about queries greedily, token by token, with the same results as `SearchR3.reason`.

    Args:
        model: a SearchR3 whose engine has continuous batching.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._template = model.templates["reasoning"]
        self._slots: ContinuousBatch = model.engine.continuous_batch(self._template.prefix)
        self._rows: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Number of queries in progress."""
        return len(self._rows)

    def join(self, texts: Sequence[Text], budgets: Sequence[int]) -> list[int]:
        """Start these queries, each with its budget of reasoning tokens. Returns their handles.

        Raises:
            InputError: a text is empty or has over 100,000 characters, or a budget is below 0; no query is started.
        """
        check_queries(texts)
        for budget in budgets:
            if budget < 0:
                raise InputError(f"max_reasoning_tokens must be 0 or more, got {budget}")
        ids = self._model.token_rows(texts, DEFAULT_QUERY_TOKENS, queries=True)
        rows = [[*row, *self._template.suffix] for row in ids]
        handles = self._slots.join(rows, budgets)
        self._rows.update(zip(handles, rows, strict=True))
        return handles

    def step(self) -> list[Progress]:
        """Generate one token for every query. After an error none can continue: call `clear` and start again."""
        out = []
        for step in self._slots.step():
            if step.done is None:
                out.append(Progress(step.handle, step.token))
                continue
            reasoned = self._model.reasoned(self._rows.pop(step.handle), step.done)
            out.append(Progress(step.handle, reasoned=reasoned))
        return out

    def leave(self, handles: Sequence[int]) -> None:
        """Cancel these queries; finished ones are ignored."""
        self._slots.leave(handles)
        for handle in handles:
            self._rows.pop(handle, None)

    def clear(self) -> None:
        """Cancel all queries and free their memory."""
        self._slots.clear()
        self._rows.clear()


def concurrent_reasoning_of(model: Any) -> ConcurrentReasoning | None:
    """`ConcurrentReasoning` for `model`; None if its engine has no continuous batching or the model is not an LLM."""
    spec = getattr(model, "engine_spec", None)
    return ConcurrentReasoning(model) if spec is not None and spec.continuous_batching else None

"""Queries that are reasoned about concurrently, each begun and ended at its own time: `SearchR3.reason` for a server.

The rows are the engine's continuous batch; here are the conversation and the text around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from search_r3.errors import InputError
from search_r3.model.searchr3 import DEFAULT_QUERY_TOKENS, Reasoned
from search_r3.model.tokenization import Text, check_queries, token_rows

if TYPE_CHECKING:
    from search_r3.model.engines.continuous_batching import ContinuousBatch


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did for one query: wrote `token` of its analysis, or ended it with `reasoned`."""

    handle: int
    token: int | None = None
    reasoned: Reasoned | None = None


class ConcurrentReasoning:
    """Queries that are reasoned about greedily, token by token; what each gives is what `SearchR3.reason` gives.

    Args:
        model: a SearchR3 whose engine has continuous batching.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._frame = model.frames["reasoning"]
        self._slots: ContinuousBatch = model.engine.continuous_batch(self._frame.prefix)
        self._rows: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Queries under way."""
        return len(self._rows)

    def join(self, texts: Sequence[Text], budgets: Sequence[int]) -> list[int]:
        """Begin these queries; each may be reasoned about for so many tokens. Returns their handles.

        Raises:
            InputError: an empty text, one of over 100,000 characters, or a budget under 0. Then none has begun.
        """
        check_queries(texts)
        for budget in budgets:
            if budget < 0:
                raise InputError(f"max_reasoning_tokens must be 0 or more, not {budget}")
        ids = token_rows(self._model.tokenizer, texts, DEFAULT_QUERY_TOKENS)
        rows = [[*row, *self._frame.suffix] for row in ids]
        handles = self._slots.join(rows, budgets)
        self._rows.update(zip(handles, rows, strict=True))
        return handles

    def step(self) -> list[Progress]:
        """One token of every query. After an error none can be continued: `clear`, and begin again."""
        out = []
        for step in self._slots.step():
            if step.done is None:
                out.append(Progress(step.handle, step.token))
                continue
            written, row = step.done.token_ids, self._rows.pop(step.handle)
            reasoned = Reasoned(
                text=self._model.tokenizer.decode(written).strip(),
                embedding=step.done.embedding,
                num_tokens=len(written),
                forced=step.done.forced,
                token_ids=[*self._frame.prefix, *row, *written, self._model.contract.embed_token_id],
            )
            out.append(Progress(step.handle, reasoned=reasoned))
        return out

    def leave(self, handles: Sequence[int]) -> None:
        """Give up these queries; those that have ended are ignored."""
        self._slots.leave(handles)
        for handle in handles:
            self._rows.pop(handle, None)

    def clear(self) -> None:
        """Give up all queries and let go of their memory."""
        self._slots.clear()
        self._rows.clear()


def concurrent_reasoning_of(model: Any) -> ConcurrentReasoning | None:
    """`ConcurrentReasoning` by `model`; None if its engine has no continuous batching, or the model is no LLM."""
    spec = getattr(model, "engine_spec", None)
    return ConcurrentReasoning(model) if spec is not None and spec.continuous_batching else None

"""Continuous batching (Orca, OSDI 2022): rows that are generated together, but join and leave independently.

Rows that join together are prefilled together, directly into their slots of the cache and, if the session supports it
(`chunked_prefill`), in the same pass as the other rows' next token. From then on, all rows share one forward pass per
token. A row that ends leaves immediately, and the last row moves into its slot, so the rows stay dense. The tokens of a
row do not depend on the others, because each has its own positions and mask. Slots begin with the prefix and are
reused.

A new token is in the same column of the cache for all rows, so a row that joined late has a gap: it attends to the
columns before `start` and to those from `begin` on. `_align` closes the gaps when they have grown.

Shape suffixes: B rows, L tokens, V vocabulary, D dimension, P tokens of the shared prefix, T columns of the cache,
K key-value heads, E dimension of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.model.engines.base import Generation
from search_r3.model.engines.chunked_prefill import SessionInput
from search_r3.model.engines.llama_forward import Prefix, Session

MAX_GAP = 32
"""Unused columns tolerated before gaps are closed; attention reads them for nothing."""
COLUMNS = 64
"""Number of columns by which the cache grows at a time."""
KEPT = 8
"""Number of slots whose memory is kept when all rows have left."""


@dataclass(frozen=True, slots=True)
class Step:
    """The result of a step for one row: the next token, or `done` if the row has ended and left."""

    handle: int
    token: int | None = None
    done: Generation | None = None


@dataclass(slots=True)
class _Row:
    handle: int
    budget: int
    start: int  # the row attends to the columns before this one
    begin: int  # and to those from this one on
    written: list[int] = field(default_factory=list)

    def length(self, columns: int) -> int:
        """Number of tokens in the cache, including the prefix: the position of the next token."""
        return self.start + columns - self.begin


_Joining = list[tuple[int, list[int], int]]
"""Rows that will be prefilled together: handle, tokens, budget."""


class ContinuousBatch:
    """Rows sharing one prefix that can join and leave between steps, decoded greedily. Use one thread at a time.

    Args:
        prefix: the beginning of every row, whose keys and values are computed once (by `start`).
        start: (prefix, rows, tokens) -> a session that begins with the prefix, with room for this many rows and tokens.
        open_session: (keys and values (B, K, T, E), rows, tokens) -> a session that begins with these keys and values.
        head: a function from states (B, D) to logits (B, V).
        device: the model's device.
        embed_id: the token whose state is the embedding.
        stop_ids: end-of-turn tokens (S,); a row that samples one gets the embed token instead.
        vocab_size: ids from this one on are never sampled.
    """

    def __init__(
        self,
        prefix: Sequence[int],
        *,
        start: Callable[[Sequence[int], int, int], Session],
        open_session: Callable[[Prefix, int, int], Session],
        head: Callable[[Tensor], Tensor],
        device: Any,
        embed_id: int,
        stop_ids: Tensor,
        vocab_size: int,
    ) -> None:
        self.prefix = tuple(prefix)
        self._begin_session, self._open_session, self._head, self._device = start, open_session, head, device
        self._embed_id, self._stop_ids, self._vocab_size = embed_id, stop_ids, vocab_size
        self._handles = 0
        self.clear()

    def __len__(self) -> int:
        return len(self._rows) + len(self._joining)

    @property
    def columns(self) -> int:
        """Number of columns of the cache that a step reads."""
        return self._columns

    def clear(self) -> None:
        """Drop all rows and free their memory."""
        self._joining: _Joining = []  # to be prefilled in the next step
        self._cache: Prefix = []  # each layer's keys and values, (slots, K, columns allocated, E)
        self._parts: list[Tensor] = []  # the same memory: one tensor (layers * 2, ...) if all have one shape
        self._lent: int | None = None  # number of slots that the session uses
        self._begins: Prefix = []  # keys and values of the prefix, for one row
        self._session: Any = None  # uses `_cache` directly if it is in place
        self._empty()

    def _empty(self) -> None:
        self._rows: list[_Row] = []
        self._columns = 0
        self._state_BD: Tensor | None = None  # the states from which the next tokens are chosen

    @torch.inference_mode()
    def join(self, rows: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[int]:
        """Add rows, each continued by at most its budget of tokens. Returns the rows' handles.

        They are prefilled now or, if others are in progress and the session can do both at once, in the pass of the
        next step. On an exception no row has joined, and the others are unchanged.
        """
        handles = range(self._handles, self._handles + len(rows))
        joining = [(handle, list(row), budget) for handle, row, budget in zip(handles, rows, budgets, strict=True)]
        if self._rows and self._session.in_place:
            self._joining += joining
        else:
            self._prefill(joining)
        self._handles += len(rows)
        return list(handles)

    def _prefill(self, joining: _Joining) -> None:
        session, *tokens, last_B = self._prompts(joining)
        self._admit(joining, session, session.feed(*tokens, None, last_B))

    def _prompts(self, joining: _Joining) -> tuple[Any, Tensor, Tensor, Tensor]:
        """A session that begins with the prefix, and what to feed it: ids and positions (B, L), last columns (B,)."""
        rows = [row for _, row, _ in joining]
        size, longest, prefix = len(rows), max(len(row) for row in rows), len(self.prefix)
        # Padding is on the right, where causality ignores it.
        ids_BL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self._device)
        position_BL = prefix + torch.arange(longest, device=self._device).expand(size, -1)
        last_B = torch.tensor([len(row) - 1 for row in rows], device=self._device)
        if not self._rows:  # the prefix may have changed, or may not have been computed yet
            begins = self._begin_session(self.prefix, 1, 0).prefix()
            self._session, self._lent = self._open_session([], 0, 0), None
            if self._session.in_place:
                self._session.shared = len(self.prefix)
            if not _same(begins, self._begins):
                self._cache, self._parts, self._begins = [], [], begins
        if not self._session.in_place:
            return self._begin_session(self.prefix, size, longest), ids_BL, position_BL, last_B
        first = len(self._rows)
        self._reserve(self._begins, first + size, max(self._columns, prefix + longest) + 1)
        session = copy.copy(self._session)
        session.keys = [keys[first : first + size] for keys, _ in self._cache]
        session.values = [values[first : first + size] for _, values in self._cache]
        session.length = prefix
        self._lend(first)
        return session, ids_BL, position_BL, last_B

    def _admit(self, joining: _Joining, session: Any, state_BD: Tensor) -> None:
        """Assign the next slots to rows that a session has prefilled."""
        lengths = [len(self.prefix) + len(row) for _, row, _ in joining]
        size, total, end = len(self._rows), len(self._rows) + len(lengths), max(lengths)
        columns = max(self._columns, end)
        if not session.in_place:
            pairs = session.keys_and_values()
            self._reserve(pairs, total, columns + 1)
            for kept, new in zip(self._cache, pairs, strict=True):
                for part, new_part in zip(kept, new, strict=True):
                    part[size:total, :, :end] = new_part[:, :, :end]
        if columns > self._columns:  # no row attends to the columns in between
            self._align(columns)
        self._rows += [
            _Row(handle, budget, length, columns) for (handle, _, budget), length in zip(joining, lengths, strict=True)
        ]
        self._state_BD = state_BD if self._state_BD is None else torch.cat([self._state_BD, state_BD])

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """Generate one token for every row in one pass; rows that end are embedded by the same pass and leave.

        After an exception the rows cannot be continued: call `clear`.
        """
        joining, self._joining = self._joining, []
        if joining and not self._rows:  # all other rows have left
            self._prefill(joining)
            joining = []
        rows = self._rows
        if not rows or self._state_BD is None:
            return []
        self._reserve(self._cache, len(rows), self._columns + 1)
        logits_BV = self._head(self._state_BD)[:, : self._vocab_size].float()
        chosen_B = logits_BV.argmax(-1)
        out_B = torch.tensor([len(row.written) == row.budget for row in rows], device=self._device)
        ended_B = torch.isin(chosen_B, self._stop_ids) & (chosen_B != self._embed_id)
        forced_B = (ended_B | out_B) & (chosen_B != self._embed_id)
        next_B = torch.where(forced_B, self._embed_id, chosen_B)
        prompts = self._prompts(joining) if joining else None
        self._state_BD, joined_BD = self._feed(next_B, prompts)
        state_BD = self._state_BD
        # The only synchronization with the device in a step.
        tokens, forced, ended = torch.stack([next_B, forced_B.long(), torch.where(ended_B, chosen_B, -1)]).tolist()
        steps, leaving = [], []
        for slot, row in enumerate(rows):
            if tokens[slot] != self._embed_id:
                row.written.append(tokens[slot])
                steps.append(Step(row.handle, token=tokens[slot]))
                continue
            embedding = torch.nn.functional.normalize(state_BD[slot].float(), dim=-1).cpu().numpy()
            end = ended[slot] if ended[slot] >= 0 else None
            done = Generation(row.written, np.asarray(embedding, dtype=np.float32), bool(forced[slot]), end)
            steps.append(Step(row.handle, done=done))
            leaving.append(slot)
        if prompts is not None and joined_BD is not None:
            self._admit(joining, prompts[0], joined_BD)
        self._remove(leaving)
        return steps

    @torch.inference_mode()
    def leave(self, handles: Sequence[int]) -> None:
        """Remove these rows; handles of rows that have ended are ignored."""
        gone = set(handles)
        self._joining = [one for one in self._joining if one[0] not in gone]
        self._remove([slot for slot, row in enumerate(self._rows) if row.handle in gone])

    def _feed(self, next_B: Tensor, prompts: tuple[Any, Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """Feed one token per row, and `prompts` in the same pass; the states (B, D) of both."""
        rows, columns, joined_BD = self._rows, self._columns, None
        position_B1 = torch.tensor([[row.length(columns)] for row in rows], device=self._device)
        mask_BT = None
        if any(row.begin > row.start for row in rows):
            column_T = torch.arange(columns + 1, device=self._device)
            start_B1, begin_B1 = torch.tensor([[[r.start], [r.begin]] for r in rows], device=self._device).unbind(1)
            mask_BT = ((column_T < start_B1) | (column_T >= begin_B1)).long()
        if self._session.in_place:
            self._session.length = columns
            if prompts is not None:
                session, ids_BL, position_BL, last_B = prompts
                joining = SessionInput(session, ids_BL, position_BL, None, last_B)
                running = SessionInput(self._session, next_B[:, None], position_B1, mask_BT)
                state_BD, joined_BD = self._session.feed_together([running, joining])
            else:
                state_BD = self._session.feed(next_B[:, None], position_B1, mask_BT, None)
        else:
            size = len(rows)
            pairs = [(keys[:size, :, :columns], values[:size, :, :columns]) for keys, values in self._cache]
            session = self._open_session(pairs, size, 1)
            state_BD = session.feed(next_B[:, None], position_B1, mask_BT, None)
            for (keys, values), (new_keys, new_values) in zip(self._cache, session.keys_and_values(), strict=True):
                keys[:size, :, columns] = new_keys[:, :, columns]
                values[:size, :, columns] = new_values[:, :, columns]
        self._columns += 1
        return state_BD, joined_BD

    def _reserve(self, like: Prefix, rows: int, columns: int) -> None:
        """Allocate at least this many rows and columns, with the shapes and dtype of `like`."""
        have_rows, have_columns = (self._cache[0][0].shape[0], self._cache[0][0].shape[2]) if self._cache else (0, 0)
        if rows > have_rows or columns > have_columns:
            more_rows = have_rows if rows <= have_rows else 1 << (rows - 1).bit_length()
            more_columns = have_columns if columns <= have_columns else -(-columns // COLUMNS) * COLUMNS + COLUMNS
            size, end, begins = len(self._rows), self._columns, self._begins
            # Masked columns must be finite: 0 times infinity is NaN.
            shapes = [(more_rows, part.shape[1], more_columns, part.shape[3]) for pair in like for part in pair]
            if len(set(shapes)) == 1:  # one allocation, so that a row of all layers can be moved at once
                parts = [like[0][0].new_zeros(len(shapes), *shapes[0])]
                flat = list(parts[0])
            else:
                parts = flat = [like[0][0].new_zeros(shape) for shape in shapes]
            for index, part in enumerate(flat):
                if begins:
                    begin = begins[index // 2][index % 2]
                    part[:, :, : begin.shape[2]] = begin
                if self._cache and size:
                    part[:size, :, :end] = self._cache[index // 2][index % 2][:size, :, :end]
            self._parts, self._cache = parts, list(zip(flat[::2], flat[1::2], strict=True))
            self._lent = None
        self._lend(rows)

    def _lend(self, rows: int) -> None:
        """Let an in-place session use the first `rows` slots."""
        if self._lent != rows and self._session.in_place:
            self._session.keys = [keys[:rows] for keys, _ in self._cache]
            self._session.values = [values[:rows] for _, values in self._cache]
            self._lent = rows

    def _align(self, columns: int) -> None:
        """Close all gaps and continue at column `columns`, which must not be before the end of any row."""
        for slot, row in enumerate(self._rows):
            length = row.length(self._columns)
            if row.begin > row.start and row.begin < self._columns:
                for part in self._parts:
                    moved = part[..., slot, :, row.begin : self._columns, :].clone()
                    part[..., slot, :, row.start : length, :] = moved
            row.start, row.begin = length, columns
        self._columns = columns

    def _remove(self, leaving: Sequence[int]) -> None:
        """Remove the rows in these slots; the last rows move into the slots."""
        if len(leaving) == len(self._rows):
            self._empty()
            if self._session is None or not self._session.in_place or (self._cache and len(self._cache[0][0]) > KEPT):
                self._cache, self._parts = [], []
            return
        if leaving:
            assert self._state_BD is not None
            gone, size = set(leaving), len(self._rows) - len(leaving)
            own = slice(len(self.prefix) if self._begins else 0, self._columns)  # all slots begin with the prefix
            movers = iter(slot for slot in range(size, len(self._rows)) if slot not in gone)
            order = [slot if slot not in gone else next(movers) for slot in range(size)]
            for slot, source in enumerate(order):
                if slot != source:
                    for part in self._parts:
                        part[..., slot, :, own, :] = part[..., source, :, own, :]
            self._rows = [self._rows[slot] for slot in order]
            self._state_BD = self._state_BD[torch.tensor(order, device=self._device)]
            self._lend(size)
        longest = max(row.length(self._columns) for row in self._rows)
        if self._columns - longest > MAX_GAP:
            self._align(longest)


def _same(a: Prefix, b: Prefix) -> bool:
    """Whether two caches of the same prefix come from the same weights; the last layer depends on all others."""
    return bool(a) and bool(b) and all(torch.equal(one, other) for one, other in zip(a[-1], b[-1], strict=True))

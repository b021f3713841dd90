"""The reference engine: runs a transformers causal LM token by token; one pass gives reasoning and embedding.

Shape suffixes: B rows of a batch, L tokens, V vocabulary, D dimension, P tokens of the shared prefix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from search_r3.model.engines.base import Generation, broadcast_budget
from search_r3.model.engines.continuous_batching import ContinuousBatch
from search_r3.model.engines.llama_forward import (
    Layer,
    LlamaSession,
    Prefix,
    Session,
    SoftSession,
    TransformersSession,
    merge_projections,
)

COMPACT_BELOW = 0.75
"""Finished rows are removed from the key-value cache once less than this fraction of its rows is unfinished."""
TOKENS_A_PASS = 2048
"""Maximum number of tokens per pass on a CPU: beyond that they only evict each other from the CPU caches."""


class TorchEngine:
    """Runs `model` (a causal LM with a backbone and a head) on its device.

    Args:
        model: a transformers causal LM whose vocabulary has the embed token. Its weights may change between calls.
        embed_id: the token whose state is the embedding.
        stop_ids: end-of-turn tokens; a row that samples one gets the embed token instead.
        vocab_size: ids from this one on are padding rows, which are never sampled.
    """

    def __init__(self, model: Any, *, embed_id: int, stop_ids: Sequence[int], vocab_size: int) -> None:
        TorchEngine.load_weights(self, model)
        self.embed_id = embed_id
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=model.device)
        self.vocab_size = vocab_size
        self.dimension = model.config.get_text_config().hidden_size
        self._lock = threading.Lock()
        self._weights: list[tuple[int, int]] = []
        self._layers: list[Layer] | None = None
        self._prefixes: dict[tuple[int, ...], Prefix] = {}

    def embed(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """See `Engine.embed`. One prefill per batch; rows are padded on the right, where causality ignores padding."""
        device = self.model.device
        out = np.empty((len(rows), self.dimension), dtype=np.float32)
        known = self._known(prefix) if rows else []
        for chosen in batches_by_length(rows, batch_size, TOKENS_A_PASS if device.type == "cpu" else None):
            longest = len(rows[chosen[0]])
            padded_BL = np.zeros((len(chosen), longest), dtype=np.int64)  # filled faster than a tensor of lists
            for place, i in enumerate(chosen):
                padded_BL[place, : len(rows[i])] = rows[i]
            ids_BL = torch.from_numpy(padded_BL).to(device)
            last_B = torch.tensor([len(rows[i]) - 1 for i in chosen], device=device)
            with torch.inference_mode():
                session = self._session(known, len(chosen), longest)
                position_BL = len(prefix) + torch.arange(longest, device=device).expand(len(chosen), -1)
                out[chosen] = _unit(session.feed(ids_BL, position_BL, None, last_B))
            if progress:
                progress(len(chosen))
        return out

    def generate(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        *,
        max_new_tokens: int | Sequence[int] = 32,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
        samples: int = 1,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """See `Engine.generate`. Greedy at temperature 0, else plain sampling (no top-p or top-k, which bias ratios).

        A sample depends on the seed and the batch or, if each sample has its own seed, only on its row and seed; a
        greedy one only on its row. A row is prefilled once for all its samples. `batch_size` counts samples.
        """
        budgets = broadcast_budget(max_new_tokens, len(rows))
        draws_SN: Tensor | None = None
        if not isinstance(seed, int):
            draws = [np.random.default_rng(own).random(max(budgets) + 1) for own in seed]
            draws_SN = torch.from_numpy(np.array(draws))
        generator = torch.Generator(device=self.model.device).manual_seed(seed if isinstance(seed, int) else 0)
        out: list[Generation | None] = [None] * (len(rows) * samples)
        for chosen in batches_by_length(rows, max(1, batch_size // samples)):
            batch = [rows[i] for i in chosen]
            on_batch_token = None if on_token is None else _renumbered(on_token, chosen, samples)
            random: torch.Generator | Tensor = generator
            if draws_SN is not None:
                random = draws_SN.unflatten(0, (-1, samples))[chosen].flatten(0, 1).to(self.model.device)
            with torch.inference_mode():
                own = [budgets[i] for i in chosen]
                written = self._continue(prefix, batch, own, temperature, random, samples, on_batch_token)
            for position, i in enumerate(chosen):
                out[i * samples : (i + 1) * samples] = written[position * samples : (position + 1) * samples]
            if progress:
                progress(len(chosen))
        return [generation for generation in out if generation is not None]

    def embed_latent(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        steps: int,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Feed `steps` soft tokens behind each `prefix + row`; the unit mean of the states at them, float32 (N, D).

        A soft token is softmax(logits) @ the input embeddings, with the logits at the state before it, over the ids
        below `vocab_size` (LaSER, arXiv 2603.01425). A row's result does not depend on its batch.
        """
        device = self.model.device
        out = np.empty((len(rows), self.dimension), dtype=np.float32)
        for chosen in batches_by_length(rows, batch_size, TOKENS_A_PASS if device.type == "cpu" else None):
            with torch.inference_mode():
                out[chosen] = self._latent(prefix, [rows[i] for i in chosen], steps)
            if progress:
                progress(len(chosen))
        return out

    def _latent(self, prefix: Sequence[int], rows: list[list[int]], steps: int) -> np.ndarray:
        longest, table_VD = max(len(row) for row in rows), self.model.get_input_embeddings().weight[: self.vocab_size]
        padded = _padded_left(rows, len(prefix), steps, self.model.device)
        session = cast(SoftSession, self._start(prefix, len(rows), longest + steps, fine=True))
        length = len(prefix) + longest
        state_BD = session.feed(padded.ids_BL, padded.position_BL, padded.mask(length), None)
        total_BD = torch.zeros_like(state_BD, dtype=torch.float32)
        for step in range(steps):
            share_BV = torch.softmax(self.head(state_BD)[:, : self.vocab_size].float(), -1)
            soft_BD = share_BV.to(table_VD.dtype) @ table_VD
            position_B1 = len(prefix) + padded.lengths_B[:, None] + step
            state_BD = session.feed_embeddings(soft_BD[:, None], position_B1, padded.mask(length + step + 1))
            total_BD += state_BD.float()
        return _unit(total_BD)

    def load_weights(self, model: Any) -> None:
        """See `TrainableEngine.load_weights`."""
        self.model, self.backbone, self.head = model, decoder_of(model), model.get_output_embeddings()

    def continuous_batch(self, prefix: Sequence[int]) -> ContinuousBatch:
        """A batch of rows that begin with `prefix`, in which rows can join and leave between two tokens."""
        return ContinuousBatch(
            prefix,
            start=lambda prefix, size, room: self._start(prefix, size, room, fine=True),
            open_session=lambda prefix, size, room: self._session(prefix, size, room, fine=True),
            head=self.head,
            device=self.model.device,
            embed_id=self.embed_id,
            stop_ids=self.stop_ids,
            vocab_size=self.vocab_size,
        )

    def _continue(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        budgets: list[int],
        temperature: float,
        random: torch.Generator | Tensor,
        samples: int,
        on_token: Callable[[int, int], None] | None,
    ) -> list[Generation]:
        device, size, budget = self.model.device, len(rows), max(budgets)
        budget_B = torch.tensor(budgets, device=device)
        longest = max(len(row) for row in rows)
        padded = _padded_left(rows, len(prefix), budget + 1, device)
        mask_BT = padded.mask_BT

        session = self._start(prefix, size, longest + budget + 1, fine=True)
        length = len(prefix) + longest
        state_BD = session.feed(padded.ids_BL, padded.position_BL, padded.mask(length), None)
        position_B = len(prefix) + padded.lengths_B
        if samples > 1:  # repeat each row of the session with its keys and values
            copies = torch.arange(size, device=device).repeat_interleave(samples)
            session.keep(copies)
            state_BD, position_B, budget_B = state_BD[copies], position_B[copies], budget_B[copies]
            mask_BT = None if mask_BT is None else mask_BT[copies]
            size *= samples
        alive = list(range(size))  # the sample in each row of the session
        running = [True] * size  # whether each row of the session is unfinished
        written: list[list[int]] = [[] for _ in alive]
        done: list[Generation | None] = [None] * size
        for step in range(budget + 1):
            drawn = random if isinstance(random, torch.Generator) else random[alive, step]
            sampled_B = self._choose(state_BD, temperature, drawn)
            ended_B = torch.isin(sampled_B, self.stop_ids) & (sampled_B != self.embed_id)
            forced_B = ended_B | ((sampled_B != self.embed_id) & (step >= budget_B))
            next_B = torch.where(forced_B, self.embed_id, sampled_B)
            ended_B = torch.where(ended_B, sampled_B, -1)
            length += 1
            mask = None if mask_BT is None else mask_BT[:, :length]
            state_BD = session.feed(next_B[:, None], position_B[:, None], mask, None)
            position_B = position_B + 1
            # The only synchronization with the device in a step.
            tokens, forced, ended = torch.stack([next_B, forced_B.long(), ended_B]).tolist()
            for row, sample in enumerate(alive):
                if running[row] and tokens[row] == self.embed_id:
                    end = ended[row] if ended[row] >= 0 else None
                    embedding = _unit(state_BD[row : row + 1])[0]
                    done[sample] = Generation(written[sample], embedding, bool(forced[row]), end)
                    running[row] = False
                elif running[row]:
                    written[sample].append(tokens[row])
                    if on_token is not None:
                        on_token(sample, tokens[row])
            if not any(running):
                break
            if sum(running) < COMPACT_BELOW * len(running):
                left = [row for row, unfinished in enumerate(running) if unfinished]
                keep = torch.tensor(left, device=device)
                session.keep(keep)
                position_B, state_BD, budget_B = position_B[keep], state_BD[keep], budget_B[keep]
                mask_BT = None if mask_BT is None else mask_BT[keep]
                alive, running = [alive[row] for row in left], [True] * len(left)
        return [generation for generation in done if generation is not None]

    def _choose(self, state_BD: Tensor, temperature: float, random: torch.Generator | Tensor) -> Tensor:
        """The next token of each row; `random` is a generator, or one number in [0, 1) per row."""
        logits_BV = self.head(state_BD)[:, : self.vocab_size].float()
        if temperature == 0:
            return logits_BV.argmax(-1)
        probabilities_BV = torch.softmax(logits_BV / temperature, -1)
        if isinstance(random, torch.Generator):
            return torch.multinomial(probabilities_BV, 1, generator=random)[:, 0]
        reached_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)  # inverse transform sampling
        drawn_B1 = (random * reached_BV[:, -1])[:, None]
        return torch.searchsorted(reached_BV, drawn_B1, right=True)[:, 0].clamp_max(self.vocab_size - 1)

    def _start(self, prefix: Sequence[int], size: int, room: int, fine: bool = False) -> Session:
        """A session of `size` rows that begins with the prefix, whose keys and values are computed once.

        Args:
            room: tokens per row that will be fed.
            fine: whether the session is for generation, where an engine that rounds activations should round less.
        """
        return self._session(self._known(prefix), size, room, fine)

    def _known(self, prefix: Sequence[int]) -> Prefix:
        """The keys and values of the prefix, with the weights as they are now."""
        with self._lock, torch.inference_mode():
            if self._weights_now() != self._weights:  # trained or moved since the last call
                self._prefixes.clear()
                self._layers = merge_projections(self.model)
                self._weights = self._weights_now()
            key = tuple(prefix)
            if key and key not in self._prefixes:
                first = self._prefix_session(len(key))
                ids_1P = torch.tensor([key], device=self.model.device)
                first.feed(ids_1P, torch.arange(len(key), device=self.model.device)[None], None, None)
                self._prefixes[key] = first.prefix()
            return self._prefixes.get(key, [])

    def _weights_now(self) -> list[tuple[int, int]]:
        """What changes when a weight is trained or moved."""
        return [(p.data_ptr(), p._version) for p in self.model.parameters()]

    def _prefix_session(self, room: int) -> Session:
        """The session that computes a prefix of `room` tokens."""
        return self._session([], 1, room, fine=True)

    def _session(self, prefix: Prefix, size: int, room: int, fine: bool = False) -> Session:
        if self._layers is None:
            return TransformersSession(self.backbone, prefix, size)
        return LlamaSession(self.backbone, self._layers, prefix, size, room)


@dataclass
class _Padded:
    """Rows that are to be continued, padded between the prefix and the row: every row's next token is in one column."""

    ids_BL: Tensor
    position_BL: Tensor
    lengths_B: Tensor
    mask_BT: Tensor | None
    """0 at padding, for the prefix, the rows and what follows them; None without padding."""

    def mask(self, length: int) -> Tensor | None:
        """The mask's first `length` columns."""
        return None if self.mask_BT is None else self.mask_BT[:, :length]


def _padded_left(rows: list[list[int]], prefix: int, room: int, device: torch.device) -> _Padded:
    """`rows` behind a prefix of `prefix` tokens, with `room` for tokens that follow."""
    longest = max(len(row) for row in rows)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    ids_BL = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    pads_B = longest - lengths_B
    column_L = torch.arange(longest, device=device)
    position_BL = (prefix + column_L[None] - pads_B[:, None]).clamp_min(0)
    mask_BT = None
    if min(len(row) for row in rows) < longest:
        mask_BT = torch.ones(len(rows), prefix + longest + room, dtype=torch.long, device=device)
        mask_BT[:, prefix : prefix + longest] = (column_L[None] >= pads_B[:, None]).long()
    return _Padded(ids_BL, position_BL, lengths_B, mask_BT)


def decoder_of(model: Any) -> Any:
    """The decoder of a causal LM, without its head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.model


def _unit(state_BD: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(state_BD.float(), dim=-1).cpu().numpy()


def _renumbered(on_token: Callable[[int, int], None], chosen: list[int], samples: int) -> Callable[[int, int], None]:
    """`on_token` for samples that are numbered within a batch of the rows `chosen`."""
    return lambda sample, token: on_token(chosen[sample // samples] * samples + sample % samples, token)


def batches_by_length(rows: list[list[int]], batch_size: int, tokens: int | None = None) -> Iterator[list[int]]:
    """Indices of `rows` in batches of similar length, longest first, so that memory runs out immediately or never.

    A batch has at most `batch_size` rows and `tokens` tokens, including padding; a longer row gets a batch to itself.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    start = 0
    while start < len(order):
        size = batch_size if tokens is None else min(batch_size, max(1, tokens // max(1, len(rows[order[start]]))))
        yield order[start : start + size]
        start += size

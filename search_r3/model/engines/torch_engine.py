"""The reference engine: a transformers causal LM driven token by token, one pass for the reasoning and the embedding.

Letters in shapes: B rows of a batch, L tokens, V vocabulary, D dimension, P tokens of the shared prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from search_r3.model.engines.base import Generation

COMPACT_BELOW = 0.75
"""Finished rows leave the key-value cache once fewer than this share of its rows still write."""


class TorchEngine:
    """Drives `model` (a causal LM with a backbone and a head) on its own device.

    Args:
        model: a transformers causal LM whose vocabulary holds the embed token.
        embed_id: the token whose state is the embedding.
        stop_ids: end-of-turn tokens; a row that ends its turn without the embed token has missed it.
        vocabulary: ids from here on are padding rows, never sampled.
    """

    def __init__(self, model: Any, *, embed_id: int, stop_ids: Sequence[int], vocabulary: int) -> None:
        self.model = model
        self.backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        self.head = model.get_output_embeddings()
        self.embed_id = embed_id
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=model.device)
        self.vocabulary = vocabulary
        self.dimension = model.config.get_text_config().hidden_size
        self._prefixes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}

    def embed(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """See `Engine.embed`. One prefill a batch; rows are padded on the right, where causality ignores them."""
        out = np.empty((len(rows), self.dimension), dtype=np.float32)
        for chosen in _by_length(rows, batch_size):
            longest = max(len(rows[i]) for i in chosen)
            ids_BL = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in chosen], device=self.model.device)
            last_B = torch.tensor([len(rows[i]) - 1 for i in chosen], device=self.model.device)
            with torch.inference_mode():
                hidden_BLD, _ = self._forward(ids_BL, self._start(prefix, len(chosen)), len(prefix))
                state_BD = hidden_BLD[torch.arange(len(chosen)), last_B]
                out[chosen] = _unit(state_BD)
            if progress:
                progress(len(chosen))
        return out

    def generate(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """See `Engine.generate`. Greedy at temperature 0; else plain sampling (no top-p or top-k: they bias ratios)."""
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        out: list[Generation | None] = [None] * len(rows)
        for chosen in _by_length(rows, batch_size):
            batch = [rows[i] for i in chosen]
            with torch.inference_mode():
                for i, generation in zip(chosen, self._continue(prefix, batch, max_new_tokens, temperature, generator)):
                    out[i] = generation
            if progress:
                progress(len(chosen))
        return [generation for generation in out if generation is not None]

    def _continue(
        self, prefix: Sequence[int], rows: list[list[int]], budget: int, temperature: float, generator: torch.Generator
    ) -> list[Generation]:
        device, size = self.model.device, len(rows)
        longest = max(len(row) for row in rows)
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        # Padding stands between the prefix and the row, so that every row's next token is in the same column.
        ids_BL = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        pads_B = longest - lengths_B
        mask_BL = torch.ones(size, len(prefix) + longest, dtype=torch.long, device=device)
        column_L = torch.arange(longest, device=device)
        mask_BL[:, len(prefix) :] = (column_L[None] >= pads_B[:, None]).long()
        position_BL = (len(prefix) + column_L[None] - pads_B[:, None]).clamp_min(0)
        padded = bool(pads_B.any())

        cache = self._start(prefix, size)
        hidden_BLD, cache = self._forward(ids_BL, cache, len(prefix), mask_BL if padded else None, position_BL)
        position_B = len(prefix) + lengths_B
        alive = torch.arange(size, device=device)  # which row each line of the cache is
        running = torch.ones(size, dtype=torch.bool, device=device)  # lines of the cache that still write
        written: list[list[int]] = [[] for _ in rows]
        done: list[Generation | None] = [None] * size
        state_BD = hidden_BLD[:, -1]
        for step in range(budget + 1):
            next_B = self._choose(state_BD, temperature, generator)
            emitted = next_B == self.embed_id
            ended = torch.isin(next_B, self.stop_ids) | (step == budget)
            forced = ended & ~emitted
            next_B = torch.where(forced, self.embed_id, next_B)
            if padded:
                mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], 1)
            state_B1D, cache = self._forward(next_B[:, None], cache, None, mask_BL if padded else None, position_B[:, None])
            state_BD = state_B1D[:, -1]
            position_B = position_B + 1
            finished = (emitted | forced) & running
            for line, (row, token, end, live) in enumerate(
                zip(alive.tolist(), next_B.tolist(), finished.tolist(), running.tolist())
            ):
                if end:
                    done[row] = Generation(written[row], _unit(state_BD[line : line + 1])[0], bool(forced[line]))
                elif live:
                    written[row].append(token)
            running = running & ~finished
            if not running.any():
                break
            if running.sum() < COMPACT_BELOW * len(running):
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, position_B, state_BD, mask_BL = alive[keep], position_B[keep], state_BD[keep], mask_BL[keep]
                running = running[keep]
        return [generation for generation in done if generation is not None]

    def _choose(self, state_BD: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        logits_BV = self.head(state_BD)[:, : self.vocabulary].float()
        if temperature == 0:
            return logits_BV.argmax(-1)
        probabilities_BV = torch.softmax(logits_BV / temperature, -1)
        return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]

    def _start(self, prefix: Sequence[int], size: int) -> Any:
        """A cache that holds the prefix's keys and values for `size` rows; they are computed once per prefix."""
        key = tuple(prefix)
        cache = DynamicCache()
        if not key:
            return cache
        if key not in self._prefixes:
            first = DynamicCache()
            ids_1P = torch.tensor([key], device=self.model.device)
            self.backbone(input_ids=ids_1P, past_key_values=first, use_cache=True)
            self._prefixes[key] = [(layer.keys, layer.values) for layer in first.layers]
        for index, (keys, values) in enumerate(self._prefixes[key]):
            cache.update(keys.expand(size, -1, -1, -1), values.expand(size, -1, -1, -1), index)
        return cache

    def _forward(
        self,
        ids_BL: Tensor,
        cache: Any,
        start: int | None,
        mask_BL: Tensor | None = None,
        position_BL: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        if position_BL is None:
            position_BL = (start or 0) + torch.arange(ids_BL.shape[1], device=ids_BL.device)[None].expand_as(ids_BL)
        out = self.backbone(
            input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_BL, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state, out.past_key_values


def _unit(state_BD: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(state_BD.float(), dim=-1).cpu().numpy()


def _by_length(rows: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of `rows` in batches of similar length, longest first (so that memory runs out at once or never)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]

"""Self-generated reasoning: every few steps, the model writes reasoning traces for the queries of the next steps.

At search time an embedding follows the reasoning that the model itself writes, not the traces of the training data. A
model trained on those alone relies on words that its own traces lack. (This is the generation step of expert iteration,
without a reward.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from search_r3.model.tokenization import Text
from search_r3.training.distributed import collectives


class SelfReasoning:
    """Reasoning traces by pair id, regenerated for each block of steps.

    Args:
        start: the first step that uses them.
        every: steps per block.
        max_tokens: the maximum number of reasoning tokens.
        temperature: sampling temperature; 0 is greedy.
        seed: sampling seed. A trace depends only on the seed, the block and the pair, so the traces do not depend on
            the number of processes that share the work.
    """

    def __init__(self, start: int, every: int, max_tokens: int, temperature: float, seed: int) -> None:
        self.start, self.every = start, every
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self.block = -1
        self.texts: dict[str, str] = {}
        self.cut: set[str] = set()
        """Ids of pairs whose reasoning was cut off at `max_tokens`."""

    def refresh(
        self, step: int, wanted: Callable[[int], Sequence[tuple[str, Text]]], encoder: Callable[[], Any]
    ) -> None:
        """Generate the reasoning for the block of steps that contains `step`, unless it exists. A collective.

        Args:
            wanted: maps a step to the (name, query) of each reasoning that it needs; the name is the pair's id, with a
                mark if passages follow the query.
            encoder: returns a SearchR3 with the current weights.
        """
        block = (step - self.start) // self.every
        if step < self.start or block == self.block:
            return
        end = self.start + (block + 1) * self.every
        queries = dict(pair for later in range(step, end) for pair in wanted(later))
        self.texts, self.cut = {}, set()
        if queries:
            names, model = list(queries), encoder()
            mine = [names[i] for i in collectives.strided_indices(len(names))]
            reasoned = model.reason(
                [queries[name] for name in mine],
                max_reasoning_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=[self._seed_of(name, block) for name in mine],
                batch_size=64,
                show_progress_bar=False,
            )
            local = [(name, trace.text, trace.forced) for name, trace in zip(mine, reasoned, strict=True)]
            for traces in collectives.all_gather_object(local):
                self.texts |= {name: text for name, text, _ in traces}
                self.cut |= {name for name, _, forced in traces if forced}
        self.block = block

    def _seed_of(self, name: str, block: int) -> int:
        words = f"{self.seed}/{block}/{name}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big")

    def state_dict(self) -> dict[str, Any]:
        """The block and its reasoning traces, as JSON values."""
        return {"block": self.block, "texts": self.texts, "cut": sorted(self.cut)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.block, self.texts, self.cut = int(state["block"]), dict(state["texts"]), set(state.get("cut", ()))

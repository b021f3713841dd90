"""The model's own analyses, to be trained behind: written anew every so many steps for the queries that come next.

An embedding must stand behind what the model really says, not only behind the analyses it is taught: trained behind
targets alone it trusts words that it will not find there. (The expert-iteration half of stage 2, at no reward.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from search_r3.training.distributed import collectives


class OwnSamples:
    """Analyses by pair id, good for one block of steps.

    Args:
        start: the first step that uses them.
        every: steps of a block.
        max_tokens: an analysis's budget.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling. An analysis depends on it, on the block and on the pair, and on nothing beside it: so
            each process writes a part of them, and all have what one alone would have written.
    """

    def __init__(self, start: int, every: int, max_tokens: int, temperature: float, seed: int) -> None:
        self.start, self.every = start, every
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self.block = -1
        self.texts: dict[str, str] = {}
        self.cut: set[str] = set()
        """Pairs whose analysis did not end by itself within the budget."""

    def refresh(
        self, step: int, wanted: Callable[[int], Sequence[tuple[str, str]]], encoder: Callable[[], Any]
    ) -> None:
        """Write the analyses of the block that `step` lies in, unless they are there. A collective.

        Args:
            wanted: a step -> the (pair id, query) whose analyses it will need.
            encoder: gives a SearchR3 with the weights of now.
        """
        block = (step - self.start) // self.every
        if step < self.start or block == self.block:
            return
        end = self.start + (block + 1) * self.every
        asked = dict(pair for later in range(step, end) for pair in wanted(later))
        self.texts, self.cut = {}, set()
        if asked:
            names, model = list(asked), encoder()
            mine = [names[i] for i in collectives.strided_indices(len(names))]
            reasoned = model.reason(
                [asked[name] for name in mine],
                max_reasoning_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=[self._seed_of(name, block) for name in mine],
                batch_size=64,
                show_progress_bar=False,
            )
            found = [(name, sample.text, sample.forced) for name, sample in zip(mine, reasoned, strict=True)]
            for written in collectives.all_gather_object(found):
                self.texts |= {name: text for name, text, _ in written}
                self.cut |= {name for name, _, forced in written if forced}
        self.block = block

    def _seed_of(self, name: str, block: int) -> int:
        words = f"{self.seed}/{block}/{name}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big")

    def state_dict(self) -> dict[str, Any]:
        """The block and its analyses: JSON values."""
        return {"block": self.block, "texts": self.texts, "cut": sorted(self.cut)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self.block, self.texts, self.cut = int(state["block"]), dict(state["texts"]), set(state.get("cut", ()))

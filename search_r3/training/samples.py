"""The model's own analyses, to be trained behind: written anew every so many steps for the queries that come next.

An embedding must stand behind what the model really says, not only behind the analyses it is taught: trained behind
targets alone it trusts words that it will not find there. (The expert-iteration half of stage 2, at no reward.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class OwnSamples:
    """Analyses by pair id, good for one block of steps.

    Args:
        start: the first step that uses them.
        every: steps of a block.
        max_tokens: an analysis's budget.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.
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
        """Write the analyses of the block that `step` lies in, unless they are there.

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
            reasoned = encoder().reason(
                list(asked.values()),
                max_reasoning_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=self.seed + block,
                batch_size=64,
                show_progress_bar=False,
            )
            self.texts = {identity: sample.text for identity, sample in zip(asked, reasoned, strict=True)}
            self.cut = {identity for identity, sample in zip(asked, reasoned, strict=True) if sample.forced}
        self.block = block

    def state_dict(self) -> dict[str, Any]:
        """The block and its analyses: JSON values."""
        return {"block": self.block, "texts": self.texts, "cut": sorted(self.cut)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self.block, self.texts, self.cut = int(state["block"]), dict(state["texts"]), set(state.get("cut", ()))

"""The engines that sample rollouts: for each query a group of reasoning traces, each with its embedding.

Sampling is by temperature alone: no top-p or top-k (they would bias the ratio), and no padding ids. Source: arXiv
2510.07048, stage 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from search_r3.model.engines.base import Generation
from search_r3.model.engines.registry import training_engine
from search_r3.model.searchr3 import SearchR3, encode_as_text
from search_r3.model.tokenization import fold_texts
from search_r3.training.grpo.rollout import Rollout


class RolloutEngine(Protocol):
    """Samples rollouts."""

    def sync(self, encoder: SearchR3) -> None:
        """Sample with these weights from now on. `encoder` may be the same object each time, with other weights."""
        ...

    def sample(
        self,
        queries: Sequence[str],
        group: int,
        *,
        max_tokens: int,
        max_query_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
    ) -> list[Rollout]:
        """`group` rollouts for each query, those of a query one after another: len(queries) * group of them.

        Args:
            max_tokens: reasoning tokens at most; the embed token may still follow them.
            max_query_tokens: tokens kept of a query.
            temperature: above 0; 0 is greedy.
            seed: one for all, or one for each query. With the torch engine, the same seed, weights and query give the
                same rollouts, whatever else is in the batch.
        """
        ...


class EngineRollouts:
    """Samples with an engine: a query is prefilled once for its group, the conversation's prefix once for all.

    The encoder's own engine samples if it is the one that is asked for; another one is opened on its weights at the
    first `sync`, and given the new ones at each later one.

    Args:
        engine: the engine's name (`search_r3.model.engines.registry`).
        batch_size: rollouts that are generated at once.
        folder: for the files of an engine that is opened here, such as the merged model that vLLM is started from.

    Raises:
        InputError: the engine is unknown, cannot sample while a model is trained, or does not run here.
    """

    def __init__(self, engine: str = "torch", batch_size: int = 64, folder: Path | None = None) -> None:
        self.spec, self.batch_size, self.folder = training_engine(engine), batch_size, folder
        self.spec.check()
        self.encoder: SearchR3 | None = None
        self._engine: Any = None

    def sync(self, encoder: SearchR3) -> None:
        """See `RolloutEngine.sync`.

        Raises:
            InputError: the engine does not run on the model's device, or does not start on the model.
        """
        self.encoder = encoder
        if encoder.engine_spec is self.spec:
            self._engine = encoder.engine
        elif self._engine is None:
            self._engine = encoder.open_engine(self.spec, self.folder)
        else:
            self._engine.load_weights(encoder.checkpoint.model)

    def sample(
        self,
        queries: Sequence[str],
        group: int,
        *,
        max_tokens: int,
        max_query_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
    ) -> list[Rollout]:
        """See `RolloutEngine.sample`."""
        if self.encoder is None:
            raise RuntimeError("sync first: there are no weights to sample with")
        encoder = self.encoder
        prompts = query_rows(encoder, queries, max_query_tokens)
        generations: list[Generation] = self._engine.generate(
            encoder.templates["reasoning"].prefix,
            prompts,
            max_new_tokens=max_tokens,
            temperature=temperature,
            seed=seeds_of(seed, len(queries), group),
            batch_size=self.batch_size,
            samples=group,
        )
        return [
            Rollout(
                prompt_ids=prompts[i // group],
                token_ids=generation.token_ids,
                text=encoder.tokenizer.decode(generation.token_ids).strip(),
                embedding=generation.embedding,
                forced=generation.forced,
                ended=generation.ended,
            )
            for i, generation in enumerate(generations)
        ]


def seeds_of(seed: int | Sequence[int], queries: int, group: int) -> list[int]:
    """A seed for each of `group` rollouts of each query, from one for all or one for each query."""
    entropy = [(seed, i) for i in range(queries)] if isinstance(seed, int) else [(one,) for one in seed]
    return [int(np.random.SeedSequence([*words, i]).generate_state(1)[0]) for words in entropy for i in range(group)]


def query_rows(encoder: SearchR3, queries: Sequence[str], max_query_tokens: int) -> list[list[int]]:
    """Token ids of the reasoning conversation between its shared prefix and the assistant's turn, for each query."""
    suffix = encoder.templates["reasoning"].suffix
    texts = fold_texts(queries, encoder.contract.fold_capitals)
    return [[*ids[:max_query_tokens], *suffix] for ids in encode_as_text(encoder.tokenizer, texts)]

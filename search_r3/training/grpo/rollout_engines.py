"""Sampling rollouts with an inference engine: for each query, a group of reasoning traces with their embeddings.

Sampling uses the temperature alone: no top-p or top-k, which would bias the ratio, and no padding ids. Source: arXiv
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
from search_r3.model.tokenization import Text, normalized
from search_r3.training.grpo.rollout import Rollout


class RolloutEngine(Protocol):
    """Samples rollouts."""

    def sync(self, encoder: SearchR3) -> None:
        """Use the encoder's current weights from now on. It may be the same object each time, with new weights."""
        ...

    def sample(
        self,
        queries: Sequence[Text],
        group: int,
        *,
        max_tokens: int,
        max_query_tokens: int,
        temperature: float,
        seed: int | Sequence[int],
    ) -> list[Rollout]:
        """`group` rollouts per query: len(queries) * group in total, query by query.

        Args:
            max_tokens: the maximum number of reasoning tokens, without the embed token.
            max_query_tokens: queries are truncated to this many tokens, except those with passages (`ReadingTurn`).
            temperature: the sampling temperature; 0 is greedy.
            seed: one for all queries, or one per query. With the torch engine, the same seed, weights and query give
                the same rollouts, whatever else is in the batch.
        """
        ...


class EngineRollouts:
    """Samples with an engine, which prefills a query once for its group and the conversation's prefix once for all.

    If the encoder already runs on the requested engine, that one samples. Otherwise the first `sync` opens the engine
    on the encoder's weights, and later ones load the new weights into it.

    Args:
        engine: the engine's name (`search_r3.model.engines.registry`).
        batch_size: number of rollouts generated at once.
        folder: for files of the opened engine, such as the merged model that vLLM starts from.

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
        queries: Sequence[Text],
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
    """One seed per rollout, `group` for each query, derived from one seed for all queries or one per query."""
    entropy = [(seed, i) for i in range(queries)] if isinstance(seed, int) else [(one,) for one in seed]
    return [int(np.random.SeedSequence([*words, i]).generate_state(1)[0]) for words in entropy for i in range(group)]


def query_rows(encoder: SearchR3, queries: Sequence[Text], max_query_tokens: int) -> list[list[int]]:
    """For each query, the token ids between the reasoning conversation's shared prefix and the assistant's turn."""
    suffix = encoder.templates["reasoning"].suffix
    texts = normalized(
        [query for query in queries if isinstance(query, str)], encoder.checkpoint.normalizer(queries=True)
    )
    plain = iter(encode_as_text(encoder.tokenizer, texts))
    return [[*(next(plain)[:max_query_tokens] if isinstance(query, str) else query.ids), *suffix] for query in queries]

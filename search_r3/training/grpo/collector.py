"""Sampled and scored rollouts, group by group, in the order in which `step.grpo_step` asks for them.

The processes share the queries of a batch. Which queries those are and what is sampled for them does not depend on the
number of processes; every process makes the same calls in the same order.

Shape suffixes: R rollouts, B queries, D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.model.searchr3 import SearchR3
from search_r3.training.distributed import collectives
from search_r3.training.grpo.dataset import TrainingQueries
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.rollout import Group, ScoredGroups
from search_r3.training.grpo.rollout_engines import RolloutEngine
from search_r3.training.lora.live_encoder import encode_rows


class RolloutCollector:
    """The parts of a step that make its rollouts.

    Args:
        training_queries: which queries there are, and which make which batch.
        documents: the texts of the corpus.
    """

    def __init__(self, config: GRPOConfig, training_queries: TrainingQueries, documents: Sequence[str]) -> None:
        self.config, self.training_queries, self.documents = config, training_queries, documents
        self._seconds_sample = 0.0

    def next_queries(self, generation_index: int, rounds: Sequence[ScoredGroups]) -> list[int]:
        """Numbers of the training queries to sample next, those of all processes; [] when there are enough.

        First the batch's own. If zero_variance is "resample", then others, until enough groups have variance or
        `max_resample_rounds` are made (DAPO's dynamic sampling, arXiv 2503.14476).

        Args:
            rounds: what was sampled for this batch so far.
        """
        config, order = self.config, self.training_queries.order
        if not rounds:
            return order.batch(generation_index)
        if config.zero_variance != "resample" or len(rounds) > config.max_resample_rounds:
            return []
        found = sum(group.has_variance for scored in rounds for group in scored.groups)
        missing = config.queries_per_step - sum(collectives.all_gather_object(found))
        return order.others(generation_index, len(rounds), missing) if missing > 0 else []

    def sample(
        self,
        engine: RolloutEngine,
        encoder: SearchR3,
        queries: Sequence[int],
        generation_index: int,
        round_index: int,
    ) -> list[Group]:
        """`num_generations` rollouts for each of this process's share of the queries.

        Args:
            engine: samples the rollouts, with the weights of its last `sync`.
            encoder: embeds the queries without reasoning, for comparison.
            queries: numbers of training queries, of all processes.
            round_index: 0, then the rounds of resampling.
        """
        config = self.config
        mine = collectives.contiguous_shard(len(queries))  # so that by rank all queries are in one process's order
        chosen = [self.training_queries.queries[queries[i]] for i in mine]
        texts = [query.text for query in chosen]
        begun = time.perf_counter()
        rollouts = engine.sample(
            texts,
            config.num_generations,
            max_tokens=config.max_reasoning_tokens,
            max_query_tokens=config.max_query_tokens,
            temperature=config.temperature,
            seed=[_seed(config.loop.seed, generation_index, round_index, i) for i in mine],
        )
        direct_BD = encoder.encode_query(texts, reasoning=False, show_progress_bar=False)
        self._seconds_sample = time.perf_counter() - begun
        size = config.num_generations
        return [
            Group(query, rollouts[line * size : (line + 1) * size], direct_BD[line], (round_index, i))
            for line, (query, i) in enumerate(zip(chosen, mine, strict=True))
        ]

    def score(
        self, groups: list[Group], encoder: SearchR3, environment: RetrievalEnvironment, step: int
    ) -> ScoredGroups:
        """Refresh the documents that the rollouts touch, rank the corpus for each, and set their rewards."""
        config = self.config
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        embeddings = np.array([rollout.embedding for rollout in rollouts], dtype=np.float32)
        direct = np.array([group.direct_embedding for group in groups], dtype=np.float32)
        reasoned = [rollout.reasoned(config.min_reasoning_tokens) for rollout in rollouts]
        rewards = environment.score(
            embeddings.reshape(-1, encoder.dimension),
            torch.arange(len(groups)).repeat_interleave(config.num_generations),
            [group.query.grades for group in groups],
            encode_rows(encoder, self.documents, config.max_document_tokens),
            step,
            emitted_R=torch.tensor(reasoned, dtype=torch.bool),
            queries=[group.query.text for group in groups],
            texts=[rollout.text for rollout in rollouts],
            token_ids=[rollout.token_ids for rollout in rollouts],
            token_budget=config.max_reasoning_tokens,
            direct_BD=direct.reshape(-1, encoder.dimension),
        )
        for rollout, reward in zip(rollouts, rewards.rewards_R.tolist(), strict=True):
            rollout.reward = reward
        return ScoredGroups(groups, rewards, self._seconds_sample)


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])

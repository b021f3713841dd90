"""Samples and scores the rollouts of a step, group by group; called by `step.grpo_step`.

The processes share the queries of a batch. Neither the choice of queries nor what is sampled for them depends on the
number of processes; every process makes the same calls in the same order.

Shape suffixes: R rollouts, B queries, D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from search_r3.environment.live_corpus import Corpus
from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.model.reading import check_reading, reading_turns
from search_r3.model.searchr3 import SearchR3
from search_r3.model.tokenization import Text, Tokens
from search_r3.training.distributed import collectives
from search_r3.training.grpo.dataset import TrainingQueries
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.rollout import Group, ScoredGroups
from search_r3.training.grpo.rollout_engines import RolloutEngine
from search_r3.training.lora.live_encoder import encode_rows

READING_STREAM = 41
"""The random stream that chooses which queries read."""


class RolloutCollector:
    """Chooses a batch's queries, samples their rollouts and scores them.

    Args:
        training_queries: the queries, and their order.
        documents: the texts of the corpus.
    """

    def __init__(self, config: GRPOConfig, training_queries: TrainingQueries, documents: Sequence[str]) -> None:
        self.config, self.training_queries, self.documents = config, training_queries, documents
        self._seconds_sample = 0.0

    def next_queries(self, generation_index: int, rounds: Sequence[ScoredGroups]) -> list[int]:
        """Numbers of the training queries to sample next, over all processes; [] when there are enough.

        First the batch's own queries. If zero_variance is "resample", others follow until enough groups have variance
        or `max_resample_rounds` is reached (DAPO's dynamic sampling, arXiv 2503.14476).

        Args:
            rounds: what has been sampled for this batch so far.
        """
        config, order = self.config, self.training_queries.order
        if not rounds:
            return order.batch(generation_index)
        if config.zero_variance != "resample" or len(rounds) > config.max_resample_rounds:
            return []
        usable = sum(group.has_variance for scored in rounds for group in scored.groups)
        missing = config.queries_per_step - sum(collectives.all_gather_object(usable))
        return order.others(generation_index, len(rounds), missing) if missing > 0 else []

    def sample(
        self,
        engine: RolloutEngine,
        encoder: SearchR3,
        corpus: Corpus,
        queries: Sequence[int],
        generation_index: int,
        round_index: int,
    ) -> list[Group]:
        """`num_generations` rollouts for each query of this process's share.

        Args:
            engine: samples the rollouts, with the weights of its last `sync`.
            encoder: embeds the queries without reasoning, for comparison.
            corpus: the live corpus, from which some queries are given their first hits to read.
            queries: numbers of the training queries of all processes.
            round_index: 0 for the batch's own queries, then 1, 2, ... for the resampling rounds.
        """
        config = self.config
        mine = collectives.contiguous_shard(len(queries))  # by rank, the shares give the order of one process
        chosen = [self.training_queries.queries[queries[i]] for i in mine]
        texts = [query.text for query in chosen]
        begun = time.perf_counter()
        direct_BD = encoder.encode_query(texts, reasoning=False, show_progress_bar=False)
        draws = [_draw(config.loop.seed, generation_index, round_index, i) for i in mine]
        reads = [draw < config.reading_ratio for draw in draws]
        rollouts = engine.sample(
            self._turns(encoder, corpus, texts, direct_BD, reads) if config.reading_ratio else texts,
            config.num_generations,
            max_tokens=config.max_reasoning_tokens,
            max_query_tokens=config.max_query_tokens,
            temperature=config.temperature,
            seed=[_seed(config.loop.seed, generation_index, round_index, i) for i in mine],
        )
        self._seconds_sample = time.perf_counter() - begun
        size = config.num_generations
        return [
            Group(query, rollouts[row * size : (row + 1) * size], direct_BD[row], (round_index, i), reads=reads[row])
            for row, (query, i) in enumerate(zip(chosen, mine, strict=True))
        ]

    def _turns(
        self, encoder: SearchR3, corpus: Corpus, texts: Sequence[str], direct_BD: np.ndarray, reads: Sequence[bool]
    ) -> list[Text]:
        """The queries, those that read followed by the first hits of their direct embedding. A collective."""
        hits_BK = corpus.search(direct_BD, check_reading(encoder).passages)[1].tolist()  # every process takes part
        turns: list[Text] = list(texts)
        chosen = [b for b, does in enumerate(reads) if does]
        short = [
            Tokens(tuple(row))
            for row in encoder.token_rows([texts[b] for b in chosen], self.config.max_query_tokens, queries=True)
        ]
        passages = [[self.documents[row] for row in hits_BK[b]] for b in chosen]
        for b, turn in zip(chosen, reading_turns(encoder, short, passages), strict=True):
            turns[b] = turn
        return turns

    def score(
        self, groups: list[Group], encoder: SearchR3, environment: RetrievalEnvironment, step: int
    ) -> ScoredGroups:
        """Refresh documents for these rollouts, rank the corpus for each rollout, and set the rewards."""
        config = self.config
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        embeddings = np.array([rollout.embedding for rollout in rollouts], dtype=np.float32)
        direct = np.array([group.direct_embedding for group in groups], dtype=np.float32)
        reasoned = [rollout.reasoned(config.min_reasoning_tokens) for rollout in rollouts]
        rewards = environment.score(
            embeddings.reshape(-1, encoder.dimension),
            torch.arange(len(groups)).repeat_interleave(config.num_generations),
            [group.query.grades for group in groups],
            encode_rows(encoder, self.documents, config.max_document_tokens, environment.corpus),
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


def _draw(*words: int) -> float:
    """A number from 0 to 1 that is independent of `_seed` of the same words."""
    return float(np.random.default_rng([*words, READING_STREAM]).random())


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])

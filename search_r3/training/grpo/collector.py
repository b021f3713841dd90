"""A batch of rollouts: sampled and scored group by group, and the candidates of the contrastive term.

The processes share the queries of a batch. Which queries those are, what is sampled for them and which groups are kept
does not depend on the number of processes; every process makes the same calls in the same order.

Shape suffixes: R rollouts, B queries, C candidates of the contrastive term, D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from search_r3.environment.retrieval import RetrievalEnvironment, RewardBatch
from search_r3.model.searchr3 import SearchR3
from search_r3.ranking import rank_of_best_positive
from search_r3.training.distributed import collectives
from search_r3.training.grpo.dataset import Query, QueryOrder
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.policy_gradient import ZERO_STD, advantages, group_std
from search_r3.training.grpo.rollout import IGNORE_INDEX, NO_ROW, Rollout, RolloutBatch
from search_r3.training.grpo.rollout_engines import RolloutEngine
from search_r3.training.grpo.rollout_metrics import completions_to_log, rollout_figures

MAX_CANDIDATES = 1024
"""The most documents of the contrastive term: policy "full" refreshes everything."""


@dataclass
class Group:
    """A query's rollouts.

    Attributes:
        direct_embedding: float32 (dim,), of the query without reasoning.
        drawn: in which round of sampling, and in which place of that round's queries.
        reward_std: of its rewards, with ddof 1; 0 until they are scored.
    """

    query: Query
    rollouts: list[Rollout]
    direct_embedding: np.ndarray
    drawn: tuple[int, int]
    reward_std: float = 0.0

    @property
    def has_variance(self) -> bool:
        """Whether its rewards differ, so that its advantages are not all 0."""
        return self.reward_std > ZERO_STD

    @property
    def order(self) -> tuple[bool, int, int]:
        """Groups without variance come last."""
        return (not self.has_variance, *self.drawn)


@dataclass
class ScoredGroups:
    """This process's groups of one round of sampling, and the environment's answer."""

    groups: list[Group]
    scores: RewardBatch


class RolloutCollector:
    """The parts of a step that make its rollouts, in the order in which `step.grpo_step` calls them.

    Args:
        queries: the training queries.
        documents: the texts of the corpus.
        order: which queries make which batch.
        engine: samples.
    """

    def __init__(
        self,
        config: GRPOConfig,
        queries: Sequence[Query],
        documents: Sequence[str],
        order: QueryOrder,
        engine: RolloutEngine,
    ) -> None:
        self.config, self.queries, self.documents, self.order = config, queries, documents, order
        self.engine = engine
        self._seconds = 0.0

    def sample(self, encoder: SearchR3, chosen: Sequence[int], number: int, attempt: int) -> list[Group]:
        """`num_generations` rollouts for each of this process's share of the chosen queries.

        Args:
            chosen: numbers of training queries, of all processes.
            number: of the batch.
            attempt: 0, then the rounds of resampling.
        """
        config = self.config
        mine = collectives.contiguous_shard(len(chosen))  # so that by rank all queries are in one process's order
        queries = [self.queries[chosen[i]] for i in mine]
        begun = time.perf_counter()
        rollouts = self.engine.sample(
            [query.text for query in queries],
            config.num_generations,
            max_tokens=config.max_reasoning_tokens,
            max_query_tokens=config.max_query_tokens,
            temperature=config.temperature,
            seed=[_seed(config.loop.seed, number, attempt, i) for i in mine],
        )
        direct_BD = encoder.encode_query([q.text for q in queries], reasoning=False, show_progress_bar=False)
        self._seconds = time.perf_counter() - begun
        size = config.num_generations
        return [
            Group(query, rollouts[line * size : (line + 1) * size], direct_BD[line], (attempt, i))
            for line, (query, i) in enumerate(zip(queries, mine, strict=True))
        ]

    def score(
        self, groups: list[Group], encoder: SearchR3, environment: RetrievalEnvironment, step: int
    ) -> ScoredGroups:
        """Refresh the documents that the rollouts touch, rank the corpus for each, and set their rewards."""
        config = self.config
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        embeddings = np.array([rollout.embedding for rollout in rollouts], dtype=np.float32)
        direct = np.array([group.direct_embedding for group in groups], dtype=np.float32)
        scores = environment.score(
            embeddings.reshape(-1, encoder.dimension),
            torch.arange(len(groups)).repeat_interleave(config.num_generations),
            [group.query.grades for group in groups],
            encode_rows(encoder, self.documents, config.max_document_tokens),
            step,
            emitted_R=torch.tensor([self._reasoned(rollout) for rollout in rollouts], dtype=torch.bool),
            queries=[group.query.text for group in groups],
            texts=[rollout.text for rollout in rollouts],
            token_ids=[rollout.token_ids for rollout in rollouts],
            token_budget=config.max_reasoning_tokens,
            direct_BD=direct.reshape(-1, encoder.dimension),
        )
        for rollout, reward in zip(rollouts, scores.rewards_R.tolist(), strict=True):
            rollout.reward = reward
        return ScoredGroups(groups, scores)

    def set_advantages(self, scored: ScoredGroups) -> None:
        """Compare each rollout's reward with those of its group."""
        config, size = self.config, self.config.num_generations
        reward_R = scored.scores.rewards_R.cpu()
        group_R = torch.arange(len(scored.groups)).repeat_interleave(size)
        advantage_R = advantages(reward_R, group_R, config.advantage_estimator, config.scale_rewards)
        std_R = group_std(reward_R, group_R)
        for line, group in enumerate(scored.groups):
            group.reward_std = float(std_R[line * size])
            ours_R = advantage_R[line * size : (line + 1) * size]
            for rollout, advantage in zip(group.rollouts, ours_R.tolist(), strict=True):
                rollout.advantage = advantage

    def figures(self, scored: ScoredGroups) -> dict[str, float]:
        """What a round of sampling looks like, over all processes. A collective."""
        std_B = torch.tensor([group.reward_std for group in scored.groups])
        rollouts = [rollout for group in scored.groups for rollout in group.rollouts]
        figures = rollout_figures(rollouts, scored.scores, std_B)
        figures |= {f"seconds_{part}": seconds for part, seconds in scored.scores.seconds.items()}
        return figures | {"seconds_sample": self._seconds}

    def completions(self, scored: ScoredGroups, environment: RetrievalEnvironment, step: int) -> list[dict[str, Any]]:
        """Rollouts to log at this step, if any are due."""
        config = self.config
        if not is_due(step, config.log_completions_every, config.steps_per_generation):
            return []
        shown = completions_to_log(
            [group.rollouts for group in scored.groups], scored.scores.scaled_R, config.num_completions_to_log
        )
        embeddings = np.array([rollout.embedding for _, rollout, _ in shown], dtype=np.float32)
        queries = [scored.groups[number].query for number, _, _ in shown]
        ranks = rank_of_positive(environment, embeddings, queries)
        return [
            {"query": query.text, **record, "rank": rank, "forced": rollout.forced}
            for (_, rollout, record), query, rank in zip(shown, queries, ranks, strict=True)
        ]

    def resample(
        self, scored: ScoredGroups, generate: Callable[[Sequence[int], int], ScoredGroups], number: int
    ) -> list[ScoredGroups]:
        """Further rounds for other queries, until enough groups have variance (DAPO's dynamic sampling).

        Args:
            scored: the first round.
            generate: samples, scores and compares the rollouts of the chosen queries at an attempt.
        """
        config, rounds = self.config, []
        found = sum(group.has_variance for group in scored.groups)
        for attempt in range(1, config.max_resample_rounds + 1):
            missing = config.queries_per_step - sum(collectives.all_gather_object(found))
            if missing <= 0:
                break
            rounds.append(generate(self.order.others(number, attempt, missing), attempt))
            found += sum(group.has_variance for group in rounds[-1].groups)
        return rounds

    def assemble(
        self,
        number: int,
        rounds: Sequence[ScoredGroups],
        environment: RetrievalEnvironment,
        figures: dict[str, float],
        step: int,
    ) -> RolloutBatch:
        """The batch of `queries_per_step` groups to train on; figures gain those of the refreshed corpus."""
        config, size = self.config, self.config.num_generations
        groups, kept = self._kept([group for scored in rounds for group in scored.groups])
        refreshed = np.concatenate([scored.scores.refreshed for scored in rounds])
        positives = [row for group, _ in groups for row, grade in group.query.grades.items() if grade > 0]
        all_positives = [row for found in collectives.all_gather_object(positives) for row in found]
        candidates = self._candidates(all_positives, refreshed, number)
        column = {row: place for place, row in enumerate(candidates.tolist())}
        for group, place in groups:
            positive = column[group.query.positive]
            answers = [column[row] for row, grade in group.query.grades.items() if grade > 0]
            for line, rollout in enumerate(group.rollouts):
                rollout.index = NO_ROW if place == NO_ROW else place * size + line
                rollout.in_policy_loss = place != NO_ROW and (group.has_variance or config.zero_variance == "keep")
                contrasted = place != NO_ROW and self._reasoned(rollout) and config.contrastive_weight
                rollout.target = positive if contrasted else IGNORE_INDEX
                rollout.false_negatives = [answer for answer in answers if answer != positive]
        figures["refreshed"] = float(len(refreshed))
        figures["mean_age"] = float(environment.corpus.ages(step).float().mean())
        return RolloutBatch(
            number,
            [rollout for group, _ in groups for rollout in group.rollouts],
            environment.corpus.vectors(candidates).cpu(),
            kept * size,
            figures,
        )

    def _kept(self, groups: list[Group]) -> tuple[list[tuple[Group, int]], int]:
        """This process's groups among the first `queries_per_step` of all, with their places; and how many those are.

        Groups with variance come first if others were resampled in place of those without; else all are as drawn.
        """
        resampled = self.config.zero_variance == "resample"
        gathered = collectives.all_gather_object([group.order for group in groups])
        orders = sorted(order for found in gathered for order in found)
        if not resampled:
            orders.sort(key=lambda order: order[1:])
        place_of = {order: place for place, order in enumerate(orders[: self.config.queries_per_step])}
        if resampled:
            groups = sorted(groups, key=lambda group: not group.has_variance)
        mine = [(group, place_of[group.order]) for group in groups if group.order in place_of]
        # A process whose groups were all replaced by other processes' keeps one, to take part in the collectives.
        return mine or [(group, NO_ROW) for group in groups[:1]], len(place_of)

    def _reasoned(self, rollout: Rollout) -> bool:
        """Whether it emitted the embed token, after at least as many tokens as the recipe asks for."""
        return not rollout.forced and len(rollout.token_ids) >= self.config.min_reasoning_tokens

    def _candidates(self, positives: list[int], refreshed: np.ndarray, number: int) -> np.ndarray:
        """Rows of the contrastive term: the positives, and those refreshed at this step."""
        others = np.setdiff1d(refreshed, positives)
        room = max(0, MAX_CANDIDATES - len(set(positives)))
        if len(others) > room:
            others = np.random.default_rng([self.config.loop.seed, number]).choice(others, room, replace=False)
        return np.union1d(positives, others).astype(np.int64)


def encode_rows(encoder: SearchR3, documents: Sequence[str], max_tokens: int) -> Callable[[np.ndarray], np.ndarray]:
    """Row numbers -> embeddings of these documents by the encoder's current weights."""

    def encode(rows: np.ndarray) -> np.ndarray:
        return encoder.encode_document(
            [documents[row] for row in rows], max_length=max_tokens, show_progress_bar=False, batch_size=64
        )

    return encode


def rank_of_positive(environment: RetrievalEnvironment, embeddings: np.ndarray, queries: Sequence[Query]) -> list[int]:
    """The rank of each query's best positive in the live corpus, from 1.

    A collective if the corpus is sharded; a process may pass no query.
    """
    embeddings = embeddings.reshape(-1, environment.corpus.dimension)
    cosine_QN = environment.corpus.scores(embeddings, torch.arange(len(environment.corpus))).cpu().numpy()
    positive_QN = np.zeros(cosine_QN.shape, dtype=bool)
    for line, query in enumerate(queries):
        positive_QN[line, [row for row, grade in query.grades.items() if grade > 0]] = True
    return rank_of_best_positive(cosine_QN, positive_QN).tolist()


def is_due(step: int, every: int, stride: int) -> bool:
    """Whether something that happens every `every` steps is due in the `stride` steps from `step`; 0 is never."""
    return every > 0 and step % every < stride


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])

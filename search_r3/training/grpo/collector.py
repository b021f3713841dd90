"""A round of stage 2: sample groups of rollouts, judge them in the environment, and keep what their steps need.

Its queries are dealt to the processes; which they are, what is sampled for them and which groups are kept is the same
whatever the number of processes. A round serves `steps_per_generation` optimizer steps, so it is part of a run's
state: the weights that sampled it are gone after the first of them.

Shape suffixes: R rollouts, B queries, C candidates of the contrastive term, D dimensions, N tokens of all rollouts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.retrieval import RetrievalEnvironment, RewardBatch
from search_r3.model.searchr3 import SearchR3
from search_r3.ranking import rank_of_best_positive
from search_r3.training.distributed import collectives
from search_r3.training.grpo.dataset import Query, QueryOrder
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.policy_gradient import ZERO_STD, advantages, group_std
from search_r3.training.grpo.rollout import Rollout, Rollouts

MOST_CANDIDATES = 1024
"""Documents of the contrastive term, at most: policy "full" refreshes everything."""
HIGH_REWARD = 0.5
"""The paper reports the share of outputs that are rewarded above this."""
IGNORE_INDEX = -1
"""In the place of a token or a candidate: there is none."""


@dataclass
class RolloutBatch:
    """What the optimizer steps of a round need, in the order of rollouts.

    Attributes:
        number: of the round.
        rows: ids after the reasoning conversation's prefix: the query, what was written, the embed token.
        answers: how many of them the assistant said, the embed token included.
        last: what was sampled at the last position: the embed token, an end of turn, or `IGNORE_INDEX` (out of budget:
            the embed token in the row was forced).
        advantage_R: float32.
        policy_R: boolean, which rollouts the policy loss and the KL are about.
        target_R: int64, the candidate that answers the query; `IGNORE_INDEX` leaves it out of that term.
        candidate_CD: float32 rows of documents, detached.
        masked_RC: boolean, candidates that answer the query too and so are no negatives.
        figures: of all processes' rollouts as they were sampled, before any were replaced.
        places: which of all processes' rollouts these are; -1 is none of them. None: there is one process.
        total: all processes' rollouts.
        old_N, reference_N: log-probabilities by the policy that sampled, and by the reference; None until needed.
        samples: some rollouts to show; not part of the state.
    """

    number: int
    rows: list[list[int]]
    answers: list[int]
    last: list[int]
    advantage_R: Tensor
    policy_R: Tensor
    target_R: Tensor
    candidate_CD: Tensor
    masked_RC: Tensor
    figures: dict[str, float]
    places: list[int] | None = None
    total: int | None = None
    old_N: Tensor | None = None
    reference_N: Tensor | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("rows", "samples")}
        state["rows"] = torch.tensor([token for row in self.rows for token in row])
        return state | {"lengths": [len(row) for row in self.rows]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RolloutBatch:
        """The round that gave this state."""
        rows = [part.tolist() for part in state["rows"].split(state["lengths"])]
        return cls(**{name: value for name, value in state.items() if name != "lengths"} | {"rows": rows})


@dataclass
class _Group:
    """A query's rollouts and what they earned."""

    query: Query
    rollouts: list[Rollout]
    rewards: Tensor
    advantage: Tensor
    varied: bool
    drawn: tuple[int, int]
    """At which attempt, and in which place of that attempt's queries."""

    @property
    def order(self) -> tuple[bool, int, int]:
        """Groups without variance come last."""
        return (not self.varied, *self.drawn)


class RolloutCollector:
    """Makes rounds.

    Args:
        queries: to train on.
        documents: of the corpus.

    Every process must make the same rounds at the same steps.
    """

    def __init__(
        self,
        config: GRPOConfig,
        queries: Sequence[Query],
        documents: Sequence[str],
        order: QueryOrder,
        engine: Rollouts,
    ) -> None:
        self.config, self.queries, self.documents, self.order = config, queries, documents, order
        self.engine = engine

    def collect(self, number: int, step: int, encoder: SearchR3, environment: RetrievalEnvironment) -> RolloutBatch:
        """Sample and judge round `number` with the weights of `step`, which `encoder` has."""
        config = self.config
        self.engine.sync(encoder)
        groups, judged, figures = self._sample_and_score(
            self.order.batch(number), number, 0, step, encoder, environment
        )
        refreshed = [judged.refreshed]
        samples = self._samples(groups, judged, step, environment)
        if config.zero_variance == "resample":
            good = [group for group in groups if group.varied]
            for attempt in range(1, config.max_resample_rounds + 1):
                missing = config.queries_per_step - sum(collectives.all_gather_object(len(good)))
                if missing <= 0:
                    break
                others = self.order.others(number, attempt, missing)
                more, judged, _ = self._sample_and_score(others, number, attempt, step, encoder, environment)
                refreshed.append(judged.refreshed)
                good += [group for group in more if group.varied]
            figures["resampled"] = float(len(refreshed) - 1)
            groups = good + [group for group in groups if not group.varied]
        orders = sorted(order for found in collectives.all_gather_object([group.order for group in groups]) for order in found)
        if config.zero_variance != "resample":  # as they were drawn
            orders.sort(key=lambda order: order[1:])
        kept = {order: place for place, order in enumerate(orders[: config.queries_per_step])}
        # A process whose groups were all replaced by other processes' keeps one: it needs something to join in with.
        mine = [group for group in groups if group.order in kept] or groups[:1]
        places = [kept.get(group.order, IGNORE_INDEX) for group in mine]
        return self._round(
            number, mine, places, len(kept), np.concatenate(refreshed), figures, samples, step, encoder, environment
        )

    def _sample_and_score(
        self,
        chosen: Sequence[int],
        number: int,
        attempt: int,
        step: int,
        encoder: SearchR3,
        environment: RetrievalEnvironment,
    ) -> tuple[list[_Group], RewardBatch, dict[str, float]]:
        """This process's part of the chosen queries, and figures of all."""
        config, size = self.config, self.config.num_generations
        mine = collectives.contiguous_shard(len(chosen))  # the environment hears of all queries in the order that one process has
        queries = [self.queries[chosen[i]] for i in mine]
        begun = time.perf_counter()
        rollouts = self.engine.sample(
            [query.text for query in queries],
            size,
            max_tokens=config.max_reasoning_tokens,
            max_query_tokens=config.max_query_tokens,
            temperature=config.temperature,
            seed=[_seed(config.loop.seed, number, attempt, i) for i in mine],
        )
        direct_BD = encoder.encode_query([q.text for q in queries], reasoning=False, show_progress_bar=False)
        sampled = time.perf_counter()
        query_R = torch.arange(len(queries)).repeat_interleave(size)
        embedding_RD = np.array([r.embedding for r in rollouts], dtype=np.float32).reshape(-1, encoder.dimension)
        judged = environment.score(
            embedding_RD,
            query_R,
            [query.grades for query in queries],
            encode_rows(encoder, self.documents, config.max_document_tokens),
            step,
            emitted_R=torch.tensor([self._analysed(r) for r in rollouts], dtype=torch.bool),
            tokens_R=torch.tensor([float(len(r.token_ids)) for r in rollouts]),
            token_budget=config.max_reasoning_tokens,
            direct_BD=direct_BD,
        )
        reward_R = judged.rewards_R.cpu()
        advantage_R = advantages(reward_R, query_R, config.advantage_estimator, config.scale_rewards)
        std_R = group_std(reward_R, query_R)
        parts = [slice(i * size, (i + 1) * size) for i in range(len(queries))]
        groups = [
            _Group(query, rollouts[part], reward_R[part], advantage_R[part], bool(std_R[part][0] > ZERO_STD), drawn)
            for query, part, drawn in zip(queries, parts, [(attempt, i) for i in mine], strict=True)
        ]
        figures = _figures(rollouts, judged, std_R[::size])
        figures |= {f"seconds_{part}": seconds for part, seconds in judged.seconds.items()}
        figures["seconds_sample"] = sampled - begun
        return groups, judged, figures

    def _round(
        self,
        number: int,
        groups: list[_Group],
        places: list[int],
        kept: int,
        refreshed: np.ndarray,
        figures: dict[str, float],
        samples: list[dict[str, Any]],
        step: int,
        encoder: SearchR3,
        environment: RetrievalEnvironment,
    ) -> RolloutBatch:
        config, embed = self.config, encoder.contract.embed_token_id
        positives = [row for group in groups for row, grade in group.query.grades.items() if grade > 0]
        all_gather_rows = [row for found in collectives.all_gather_object(positives) for row in found]
        candidates = self._candidates(all_gather_rows, refreshed, number)
        place = {row: column for column, row in enumerate(candidates.tolist())}
        rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
        size = config.num_generations
        counts = [place != IGNORE_INDEX for place in places for _ in range(size)]
        target_R = torch.full((len(rollouts),), IGNORE_INDEX)
        masked_RC = torch.zeros(len(rollouts), len(candidates), dtype=torch.bool)
        for line, (group, rollout) in enumerate(rollouts):
            answers = [place[row] for row, grade in group.query.grades.items() if grade > 0]
            masked_RC[line, answers] = True
            masked_RC[line, place[group.query.positive]] = False
            if counts[line] and self._analysed(rollout) and config.contrastive_weight:
                target_R[line] = place[group.query.positive]
        figures["refreshed"] = float(len(refreshed))
        figures["mean_age"] = float(environment.corpus.ages(step).float().mean())
        return RolloutBatch(
            number,
            rows=[[*rollout.row, *rollout.token_ids, embed] for _, rollout in rollouts],
            answers=[len(rollout.token_ids) + 1 for _, rollout in rollouts],
            last=[_last(rollout, embed) for _, rollout in rollouts],
            advantage_R=torch.cat([group.advantage for group in groups]),
            policy_R=torch.tensor(
                [
                    counted and (group.varied or config.zero_variance == "keep")
                    for (group, _), counted in zip(rollouts, counts, strict=True)
                ]
            ),
            target_R=target_R,
            candidate_CD=environment.corpus.vectors(candidates).cpu(),
            masked_RC=masked_RC,
            figures=figures,
            places=[
                IGNORE_INDEX if place == IGNORE_INDEX else place * size + i for place in places for i in range(size)
            ],
            total=kept * size,
            samples=samples,
        )

    def _analysed(self, rollout: Rollout) -> bool:
        """Whether it ends with the token by itself, after at least as many tokens as are asked for."""
        return not rollout.forced and len(rollout.token_ids) >= self.config.min_reasoning_tokens

    def _candidates(self, positives: list[int], refreshed: np.ndarray, number: int) -> np.ndarray:
        """Rows that the contrastive term looks at: the positives, and those refreshed at this step."""
        others = np.setdiff1d(refreshed, positives)
        room = max(0, MOST_CANDIDATES - len(set(positives)))
        if len(others) > room:
            others = np.random.default_rng([self.config.loop.seed, number]).choice(others, room, replace=False)
        return np.union1d(positives, others).astype(np.int64)

    def _samples(
        self, groups: list[_Group], judged: RewardBatch, step: int, environment: RetrievalEnvironment
    ) -> list[dict[str, Any]]:
        """The best and the worst rollout of some of this process's queries, if it is time to show any."""
        config = self.config
        if not is_due(step, config.log_completions_every, config.steps_per_generation):
            return []
        shown = []
        for number, group in enumerate(groups[: (config.num_completions_to_log + 1) // 2]):
            best, worst = int(group.rewards.argmax()), int(group.rewards.argmin())
            shown += [(group, number * config.num_generations + i, i) for i in dict.fromkeys((best, worst))]
        shown = shown[: config.num_completions_to_log]
        embeddings = np.array([group.rollouts[i].embedding for group, _, i in shown], dtype=np.float32)
        ranks = rank_of_positive(environment, embeddings, [group.query for group, _, _ in shown])
        return [
            {
                "query": group.query.text,
                "text": group.rollouts[i].text,
                "reward": round(float(group.rewards[i]), 4),
                "dcg_scaled": round(float(judged.scaled_R[row]), 4),
                "rank": rank,
                "forced": group.rollouts[i].forced,
            }
            for (group, row, i), rank in zip(shown, ranks, strict=True)
        ]


def encode_rows(encoder: SearchR3, documents: Sequence[str], max_tokens: int) -> Callable[[np.ndarray], np.ndarray]:
    """Row numbers -> embeddings of these documents by the encoder's present weights."""

    def encode(rows: np.ndarray) -> np.ndarray:
        return encoder.encode_document(
            [documents[row] for row in rows], max_length=max_tokens, show_progress_bar=False, batch_size=64
        )

    return encode


def rank_of_positive(environment: RetrievalEnvironment, embeddings: np.ndarray, queries: Sequence[Query]) -> list[int]:
    """At which rank of the live corpus each query's best document stands, from 1.

    A collective if the corpus is sharded; a process may bring no query.
    """
    embeddings = embeddings.reshape(-1, environment.corpus.dimension)
    cosine_QN = environment.corpus.scores(embeddings, torch.arange(len(environment.corpus))).cpu().numpy()
    positive_QN = np.zeros(cosine_QN.shape, dtype=bool)
    for line, query in enumerate(queries):
        positive_QN[line, [row for row, grade in query.grades.items() if grade > 0]] = True
    return rank_of_best_positive(cosine_QN, positive_QN).tolist()


def is_due(step: int, every: int, stride: int) -> bool:
    """Whether to do at `step`, the first of `stride` steps, what is done every so many steps; 0 is never."""
    return every > 0 and step % every < stride


def _figures(rollouts: list[Rollout], judged: RewardBatch, std_B: Tensor) -> dict[str, float]:
    """What a batch of rollouts looks like, as it was sampled by all processes. A collective."""
    assert judged.direct_B is not None  # always given
    mine = {
        "reward": judged.rewards_R, "scaled": judged.scaled_R, "dcg": judged.ndcg_R, "ranking": judged.ranking_R,
        "direct": judged.direct_B, "std": std_B,
    }  # fmt: skip
    parts = collectives.all_gather_object({name: value.cpu() for name, value in mine.items()})
    every = {name: torch.cat([part[name] for part in parts]) for name in mine}
    said = [
        (len(rollout.token_ids), not rollout.forced, rollout.ended is not None, rollout.text) for rollout in rollouts
    ]
    said = [one for part in collectives.all_gather_object(said) for one in part]
    low, middle, high = torch.quantile(every["reward"], torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {
        "reward": float(every["reward"].mean()),
        "reward_q10": low,
        "reward_q50": middle,
        "reward_q90": high,
        "dcg_scaled": float(every["scaled"].mean()),
        "dcg_scaled_high": float((every["scaled"] > HIGH_REWARD).float().mean()),
        "dcg": float(every["dcg"].mean()),
        "dcg_high": float((every["dcg"] > HIGH_REWARD).float().mean()),
        "direct": float(every["direct"].mean()),
        "gain": float(every["ranking"].mean() - every["direct"].mean()),
        "group_std": float(every["std"].mean()),
        "zero_variance": float((every["std"] <= ZERO_STD).float().mean()),
        "length": float(np.mean([length for length, *_ in said])),
        "emission": float(np.mean([emitted for _, emitted, _, _ in said])),
        "ended": float(np.mean([ended for _, _, ended, _ in said])),
        "distinct": len({text for *_, text in said}) / len(said),
    }


def _last(rollout: Rollout, embed: int) -> int:
    if not rollout.forced:
        return embed
    return IGNORE_INDEX if rollout.ended is None else rollout.ended


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])

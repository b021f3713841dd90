"""Turns scored groups into the batch that is trained on: which groups are kept, and the contrastive candidates.

The choice of groups does not depend on the number of processes; every process makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.training.distributed import collectives
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.replay import ReplayBuffer
from search_r3.training.grpo.rollout import IGNORE_INDEX, NO_ROW, Group, RolloutBatch, ScoredGroups
from search_r3.training.grpo.rollout_metrics import round_metrics

MAX_CANDIDATES = 1024
"""Maximum number of documents in the contrastive term, for refresh policies such as "full" that refresh everything."""


def build_training_batch(
    rounds: Sequence[ScoredGroups],
    generation_index: int,
    environment: RetrievalEnvironment,
    step: int,
    config: GRPOConfig,
    replay: ReplayBuffer | None = None,
) -> RolloutBatch:
    """The batch of `queries_per_step` groups to train on. A collective.

    With `replay`, groups without variance are replaced by earlier ones.

    Its metrics describe the corpus and the first sampling round, before groups without variance were replaced.
    """
    size = config.num_generations
    groups, kept = _kept([group for scored in rounds for group in scored.groups], config)
    replayed = 0
    if replay is not None:
        groups, replayed = replay.replace(groups, generation_index)
    refreshed = np.concatenate([scored.rewards.refreshed for scored in rounds])
    positives = [row for group, at in groups if at != NO_ROW for row, grade in group.query.grades.items() if grade > 0]
    all_positives = [row for part in collectives.all_gather_object(positives) for row in part]
    candidates = _candidates(all_positives, refreshed, [config.loop.seed, generation_index])
    column = {row: i for i, row in enumerate(candidates.tolist())}
    for group, position in groups:
        if position == NO_ROW:
            for rollout in group.rollouts:
                rollout.index, rollout.in_policy_loss, rollout.target = NO_ROW, False, IGNORE_INDEX
            continue
        positive = column[group.query.positive]
        answers = [column[row] for row, grade in group.query.grades.items() if grade > 0]
        for i, rollout in enumerate(group.rollouts):
            rollout.index = position * size + i
            rollout.in_policy_loss = group.has_variance or config.zero_variance == "keep"
            contrasted = rollout.reasoned(config.min_reasoning_tokens) and config.contrastive_weight
            rollout.target = positive if contrasted else IGNORE_INDEX
            rollout.false_negatives = [answer for answer in answers if answer != positive]
    metrics = round_metrics(rounds[0])
    if config.zero_variance == "resample":
        metrics["resampled"] = float(len(rounds) - 1)
    if replay is not None:
        metrics["replayed"] = float(sum(collectives.all_gather_object(replayed)))
    metrics["refreshed"] = float(len(refreshed))
    metrics["mean_age"] = float(environment.corpus.ages(step).float().mean())
    return RolloutBatch(
        generation_index,
        [rollout for group, _ in groups for rollout in group.rollouts],
        environment.corpus.vectors(candidates).cpu(),
        kept * size,
        metrics,
    )


def _kept(groups: list[Group], config: GRPOConfig) -> tuple[list[tuple[Group, int]], int]:
    """This process's groups among the first `queries_per_step`, with their positions; and the number of groups in all.

    With resampling, groups with variance come first; otherwise groups keep the order in which they were drawn.
    """
    resampled = config.zero_variance == "resample"
    gathered = collectives.all_gather_object([group.order for group in groups])
    orders = sorted(order for part in gathered for order in part)
    if not resampled:
        orders.sort(key=lambda order: order[1:])
    position_of = {order: position for position, order in enumerate(orders[: config.queries_per_step])}
    if resampled:
        groups = sorted(groups, key=lambda group: not group.has_variance)
    mine = [(group, position_of[group.order]) for group in groups if group.order in position_of]
    # A process whose groups were all replaced by those of others keeps one, to take part in the collectives.
    return mine or [(group, NO_ROW) for group in groups[:1]], len(position_of)


def _candidates(positives: list[int], refreshed: np.ndarray, seed: list[int]) -> np.ndarray:
    """The candidates of the contrastive term: the positives, and rows refreshed at this step."""
    others = np.setdiff1d(refreshed, positives)
    room = max(0, MAX_CANDIDATES - len(set(positives)))
    if len(others) > room:
        others = np.random.default_rng(seed).choice(others, room, replace=False)
    return np.union1d(positives, others).astype(np.int64)

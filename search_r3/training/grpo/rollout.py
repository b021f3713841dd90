"""A rollout (one sampled reasoning trace with everything computed for it), groups of rollouts, and the training batch.

Shape suffixes: C candidates of the contrastive term, D dimensions, T tokens of a rollout's assistant turn, including
the final embed token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.retrieval import RewardBatch
from search_r3.training.distributed.collectives import contiguous_share
from search_r3.training.grpo.dataset import Query
from search_r3.training.grpo.policy_gradient import ZERO_STD

IGNORE_INDEX = -1
"""Target of a rollout that is left out of the contrastive term."""
NO_ROW = -1
"""Index of a rollout that the step does not train on."""


@dataclass
class Rollout:
    """One reasoning trace of one query.

    The fields are filled in by the stages of a step, in this order.

    Attributes:
        prompt_ids: (sampling) token ids between the conversation's shared prefix and the assistant's turn.
        token_ids: (sampling) the reasoning without the embed token, at most `max_reasoning_tokens`.
        text: (sampling) `token_ids` as text.
        embedding: (sampling) float32 (D,) of length 1: the hidden state at the embed token.
        forced: (sampling) whether the embed token was appended rather than sampled, because the budget was used up or
            the model ended its turn.
        ended: (sampling) the end-of-turn token, if the model sampled one; else None.
        reward: (scoring, `collector`) the reward that the policy gradient uses, including shaping.
        advantage: (advantages, `step.set_advantages`) the reward relative to its group's.
        in_policy_loss: (batch, `training_batch`) whether the policy loss and the KL include the rollout.
        target: (batch) column of the candidate that answers the query, or `IGNORE_INDEX`.
        false_negatives: (batch) columns of the other candidates that answer the query, which are not negatives.
        index: (batch) position among the rollouts of all processes, or `NO_ROW`.
        replayed: (batch, `replay`) whether the rollout was sampled for an earlier batch.
        old_log_probs: (log-probabilities, `log_probs.store_log_probs`) float32 (T,) under the policy that sampled;
            None if a batch serves only one step and groups are not replayed.
        reference_log_probs: (log-probabilities) float32 (T,) under the reference; None likewise, and without a KL term.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    embedding: np.ndarray
    forced: bool
    ended: int | None = None
    reward: float = 0.0
    advantage: float = 0.0
    in_policy_loss: bool = True
    target: int = IGNORE_INDEX
    false_negatives: list[int] = field(default_factory=list)
    index: int = NO_ROW
    replayed: bool = False
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None

    @property
    def length(self) -> int:
        """T: tokens of the assistant's turn, including the embed token."""
        return len(self.token_ids) + 1

    @property
    def has_signal(self) -> bool:
        """Whether any term of the loss depends on this rollout."""
        return self.in_policy_loss or self.target != IGNORE_INDEX

    def reasoned(self, min_tokens: int) -> bool:
        """Whether the model sampled the embed token itself, after at least `min_tokens` tokens."""
        return not self.forced and len(self.token_ids) >= min_tokens

    def input_ids(self, embed_id: int) -> list[int]:
        """What the model reads after the shared prefix: the query, the reasoning, and the embed token."""
        return [*self.prompt_ids, *self.token_ids, embed_id]

    def sampled_ids(self, embed_id: int) -> tuple[list[int], list[bool]]:
        """The T tokens, and whether each was sampled: the last one was not if the token budget was used up."""
        last = embed_id if not self.forced or self.ended is None else self.ended
        return [*self.token_ids, last], [True] * len(self.token_ids) + [not self.forced or self.ended is not None]


@dataclass
class Group:
    """One query and its rollouts.

    Attributes:
        direct_embedding: float32 (D,): the query's embedding without reasoning.
        drawn: the sampling round, and the query's position in that round.
        reads: whether the rollouts read the first hits of the direct embedding before they reason.
        reward_std: standard deviation of the rewards (ddof 1); 0 until they are scored.
    """

    query: Query
    rollouts: list[Rollout]
    direct_embedding: np.ndarray
    drawn: tuple[int, int]
    reward_std: float = 0.0
    reads: bool = False

    @property
    def has_variance(self) -> bool:
        """Whether the rewards differ, so that the advantages are not all 0."""
        return self.reward_std > ZERO_STD

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sort key: groups without variance come last, otherwise in the order in which they were drawn."""
        return (not self.has_variance, *self.drawn)


@dataclass
class ScoredGroups:
    """This process's groups of one sampling round, their rewards, and the seconds that sampling took."""

    groups: list[Group]
    rewards: RewardBatch
    seconds_sample: float


_LISTS = ("prompt_ids", "token_ids", "false_negatives")
_SCALARS = ("forced", "ended", "reward", "advantage", "in_policy_loss", "target", "index")
_LOG_PROBS = ("old_log_probs", "reference_log_probs")


@dataclass
class RolloutBatch:
    """The rollouts that this process trains on for `steps_per_generation` steps, and what they have in common.

    It is part of a run's state, because the weights that sampled it are gone after the first of those steps.

    Attributes:
        generation_index: the number of the batch, from 0.
        rollouts: this process's rollouts, group by group.
        candidate_CD: float32 embeddings of the documents of the contrastive term, detached.
        total: number of rollouts on all processes.
        metrics: metrics of all processes' first sampling round, before any groups were replaced.
    """

    generation_index: int
    rollouts: list[Rollout]
    candidate_CD: Tensor
    total: int
    metrics: dict[str, float]

    def mini_batch(
        self, step_in_generation: int, num_mini_batches: int, seed: int, dropped: bool = False
    ) -> tuple[list[Rollout], bool]:
        """This process's rollouts of one optimizer step that have a signal, and True; or any one rollout and False.

        With `dropped`, also those of dropped groups, from which the entropy term learns.

        The assignment of rollouts to steps does not depend on the number of processes.
        """
        iteration, part = divmod(step_in_generation, num_mini_batches)
        mine = self.rollouts
        if num_mini_batches > 1:
            rng = np.random.default_rng([seed, self.generation_index, 0, iteration])
            chosen = np.array_split(rng.permutation(np.arange(self.total)), num_mini_batches)[part]
            mine = [rollout for rollout in mine if rollout.index in chosen]
        useful = [rollout for rollout in mine if rollout.has_signal or (dropped and rollout.index != NO_ROW)]
        return useful or (mine or self.rollouts)[:1], bool(useful)

    def state_dict(self) -> dict[str, Any]:
        """The batch as tensors and JSON values."""
        state: dict[str, Any] = {"number": self.generation_index, "total": self.total, "figures": self.metrics}
        state["candidates"] = self.candidate_CD
        for name in _SCALARS:
            state[name] = [getattr(rollout, name) for rollout in self.rollouts]
        state["replayed"] = [rollout.replayed for rollout in self.rollouts]
        for name in _LISTS:
            values = [getattr(rollout, name) for rollout in self.rollouts]
            state[name] = torch.tensor([item for value in values for item in value], dtype=torch.int64)
            state[f"{name}_lengths"] = [len(value) for value in values]
        for name in _LOG_PROBS:
            values = [getattr(rollout, name) for rollout in self.rollouts]
            state[name] = None if values[0] is None else torch.cat(values)
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RolloutBatch:
        """The batch from its `state_dict`; texts and embeddings are no longer needed and stay empty."""
        columns = {name: state[name] for name in _SCALARS}
        columns["replayed"] = state.get("replayed") or [False] * len(state["forced"])  # older runs have none
        for name in _LISTS:
            columns[name] = [part.tolist() for part in state[name].split(state[f"{name}_lengths"])]
        lengths = [len(ids) + 1 for ids in columns["token_ids"]]
        for name in _LOG_PROBS:
            columns[name] = [None] * len(lengths) if state[name] is None else state[name].split(lengths)
        rollouts = [
            Rollout(text="", embedding=np.zeros(0, dtype=np.float32), **dict(zip(columns, values, strict=True)))
            for values in zip(*columns.values(), strict=True)
        ]
        # A copy, because what safetensors loads may lie at any address, and a product's last bit depends on that.
        candidate_CD = state["candidates"].clone()
        return cls(state["number"], rollouts, candidate_CD, state["total"], state["figures"])

    @classmethod
    def share(cls, states: Sequence[dict[str, Any]], rank: int, processes: int) -> RolloutBatch:
        """A process's batch from the `state_dict` of every process that saved them, however many these were."""
        if len(states) == processes:
            return cls.from_state(states[rank])
        batches = [cls.from_state(state) for state in states]
        trained = [rollout for batch in batches for rollout in batch.rollouts if rollout.index != NO_ROW]
        trained.sort(key=lambda rollout: rollout.index)
        mine = [trained[i] for i in contiguous_share(len(trained), rank, processes)]
        if not mine:  # it takes part in the collectives with one that no term depends on
            mine = [replace(batches[0].rollouts[0], index=NO_ROW, in_policy_loss=False, target=IGNORE_INDEX)]
        return replace(batches[0], rollouts=mine)

"""A rollout: one sampled reasoning trace, and everything that a step learns about it; groups of them, and the batch.

Shape suffixes: C candidates of the contrastive term, D dimensions, T tokens that the assistant writes in a rollout (the
last one, the embed token, included).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.retrieval import RewardBatch
from search_r3.training.grpo.dataset import Query
from search_r3.training.grpo.policy_gradient import ZERO_STD

IGNORE_INDEX = -1
"""As a rollout's target: it takes no part in the contrastive term."""
NO_ROW = -1
"""As a rollout's index: it is not among those that the step trains on."""


@dataclass
class Rollout:
    """One reasoning trace of one query. Each part of the step fills in what it computes.

    Attributes:
        prompt_ids: sampling: token ids between the conversation's shared prefix and the assistant's turn.
        token_ids: sampling: the reasoning, without the embed token; at most the budget.
        text: sampling: `token_ids` as text.
        embedding: sampling: float32 (dim,), unit: the hidden state at the embed token.
        forced: sampling: the embed token was appended and not sampled (out of budget, or the turn was ended).
        ended: sampling: the end-of-turn token that was sampled instead, if that is why.
        reward: scoring: what the policy gradient uses, shaping included.
        advantage: the reward compared with its group's.
        in_policy_loss: whether the policy loss and the KL include it.
        target: column of the candidate that answers its query, or `IGNORE_INDEX`.
        false_negatives: columns of candidates that answer the query too, so are no negatives.
        index: its place among the rollouts of all processes, or `NO_ROW`.
        old_log_probs: float32 (T,), by the policy that sampled; None until a batch serves several steps.
        reference_log_probs: float32 (T,), by the reference; None as well, or without a KL term.
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
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None

    @property
    def length(self) -> int:
        """T: tokens of the assistant's turn, the embed token included."""
        return len(self.token_ids) + 1

    @property
    def has_signal(self) -> bool:
        """Whether some term of the loss depends on it."""
        return self.in_policy_loss or self.target != IGNORE_INDEX

    def reasoned(self, min_tokens: int) -> bool:
        """Whether it emitted the embed token, after `min_tokens` tokens or more."""
        return not self.forced and len(self.token_ids) >= min_tokens

    def input_ids(self, embed_id: int) -> list[int]:
        """What the model reads after the shared prefix: the query, the reasoning, and the embed token."""
        return [*self.prompt_ids, *self.token_ids, embed_id]

    def sampled_ids(self, embed_id: int) -> tuple[list[int], list[bool]]:
        """The T tokens that were sampled, and whether each one was: out of budget, no token was sampled at the end."""
        last = embed_id if not self.forced or self.ended is None else self.ended
        return [*self.token_ids, last], [True] * len(self.token_ids) + [not self.forced or self.ended is not None]


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
    """This process's groups of one round of sampling, what the environment said of them, and how long sampling took."""

    groups: list[Group]
    rewards: RewardBatch
    seconds_sample: float


_LISTS = ("prompt_ids", "token_ids", "false_negatives")
_SCALARS = ("forced", "ended", "reward", "advantage", "in_policy_loss", "target", "index")
_LOG_PROBS = ("old_log_probs", "reference_log_probs")


@dataclass
class RolloutBatch:
    """The rollouts that this process trains on for `steps_per_generation` steps, and what they share.

    It is part of a run's state: the weights that sampled it are gone after the first of those steps.

    Attributes:
        generation_index: from 0.
        rollouts: this process's, groups one after another.
        candidate_CD: float32 embeddings of the documents of the contrastive term, detached.
        total: rollouts of all processes.
        figures: of all processes' rollouts as first sampled, before any were replaced.
    """

    generation_index: int
    rollouts: list[Rollout]
    candidate_CD: Tensor
    total: int
    figures: dict[str, float]

    def mini_batch(self, step_in_generation: int, num_mini_batches: int, seed: int) -> tuple[list[Rollout], bool]:
        """This process's rollouts of a step that have some signal, and True; one of them and False if none has any.

        Which rollouts of all processes make a step does not depend on the number of processes.
        """
        iteration, part = divmod(step_in_generation, num_mini_batches)
        mine = self.rollouts
        if num_mini_batches > 1:
            rng = np.random.default_rng([seed, self.generation_index, 0, iteration])
            chosen = np.array_split(rng.permutation(np.arange(self.total)), num_mini_batches)[part]
            mine = [rollout for rollout in mine if rollout.index in chosen]
        useful = [rollout for rollout in mine if rollout.has_signal]
        return useful or (mine or self.rollouts)[:1], bool(useful)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values."""
        state: dict[str, Any] = {"number": self.generation_index, "total": self.total, "figures": self.figures}
        state["candidates"] = self.candidate_CD
        for name in _SCALARS:
            state[name] = [getattr(rollout, name) for rollout in self.rollouts]
        for name in _LISTS:
            values = [getattr(rollout, name) for rollout in self.rollouts]
            state[name] = torch.tensor([item for value in values for item in value], dtype=torch.int64)
            state[f"{name}_lengths"] = [len(value) for value in values]
        for name in _LOG_PROBS:
            found = [getattr(rollout, name) for rollout in self.rollouts]
            state[name] = None if found[0] is None else torch.cat(found)
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RolloutBatch:
        """The batch that gave this state; texts and embeddings are not needed again and stay empty."""
        columns = {name: state[name] for name in _SCALARS}
        for name in _LISTS:
            columns[name] = [part.tolist() for part in state[name].split(state[f"{name}_lengths"])]
        lengths = [len(ids) + 1 for ids in columns["token_ids"]]
        for name in _LOG_PROBS:
            columns[name] = [None] * len(lengths) if state[name] is None else state[name].split(lengths)
        rollouts = [
            Rollout(text="", embedding=np.zeros(0, dtype=np.float32), **dict(zip(columns, values, strict=True)))
            for values in zip(*columns.values(), strict=True)
        ]
        return cls(state["number"], rollouts, state["candidates"], state["total"], state["figures"])

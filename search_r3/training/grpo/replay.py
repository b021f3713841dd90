"""Replay of earlier groups in the place of groups without variance, which the policy cannot learn from.

A replayed group keeps its rollouts, rewards and advantages, and the log-probabilities under the policy that sampled it;
the clipped ratio corrects for what the policy has changed since. After TRL's experimental GRPO with replay buffer; here
only the newest groups are kept and each is replayed at most once, so that none is far from the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from search_r3.training.grpo.dataset import Query
from search_r3.training.grpo.rollout import NO_ROW, Group, RolloutBatch

REPLAY_STREAM = 7
"""Distinguishes this module's random numbers from others with the same seed."""


class ReplayBuffer:
    """The newest groups with variance of this process.

    Args:
        size: maximum number of groups.
        seed: seed of the choice.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.groups: list[Group] = []
        self._trained: list[Group] = []

    def replace(self, groups: list[tuple[Group, int]], generation_index: int) -> tuple[list[tuple[Group, int]], int]:
        """Replace groups without variance by kept ones, as long as there are any.

        Args:
            groups: groups with their positions in the batch; those at `NO_ROW` are not trained on.
            generation_index: the batch's number.

        Returns:
            The groups to train on, with the same positions, and how many were replaced.
        """
        self._trained = [group for group, position in groups if group.has_variance and position != NO_ROW]
        flat = [number for number, (group, at) in enumerate(groups) if not group.has_variance and at != NO_ROW]
        replayed = self._draw(len(flat), generation_index)
        replaced = list(groups)
        for number, group in zip(flat, replayed, strict=False):
            for rollout in group.rollouts:
                rollout.replayed = True
            replaced[number] = (group, groups[number][1])
        return replaced, len(replayed)

    def remember(self) -> None:
        """Keep the groups of the batch that `replace` has seen; their log-probabilities must be stored by now."""
        self.groups = (self.groups + self._trained)[-self.size :]
        self._trained = []

    def _draw(self, count: int, generation_index: int) -> list[Group]:
        """Take out up to `count` groups, drawn in proportion to the spread of their rewards."""
        count = min(count, len(self.groups))
        if not count:
            return []
        spread = np.array([group.reward_std for group in self.groups], dtype=np.float64)
        rng = np.random.default_rng([self.seed, REPLAY_STREAM, generation_index])
        chosen = rng.choice(len(self.groups), count, replace=False, p=spread / spread.sum()).tolist()
        drawn = [self.groups[number] for number in chosen]
        self.groups = [group for number, group in enumerate(self.groups) if number not in chosen]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The groups as tensors and JSON values, without what is no longer needed (texts and embeddings)."""
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        state: dict[str, Any] = {
            "queries": [
                [group.query.id, group.query.text, [[row, grade] for row, grade in group.query.grades.items()]]
                for group in self.groups
            ],
            "sizes": [len(group.rollouts) for group in self.groups],
            "spread": [group.reward_std for group in self.groups],
        }
        if rollouts:
            state["rollouts"] = RolloutBatch(0, rollouts, torch.zeros(0), 0, {}).state_dict()
        return state

    def load_share(self, states: Sequence[dict[str, Any]], rank: int, processes: int) -> None:
        """Restore a process's groups from the `state_dict` of every process that saved them.

        With another number of processes than these, the groups are distributed anew, and each process keeps its newest.
        """
        if len(states) == processes:
            self.load_state_dict(states[rank])
            return
        parts: list[list[Group]] = []
        for state in states:
            self.load_state_dict(state)
            parts.append(self.groups)
        by_age = [group for groups in zip_longest(*map(reversed, parts)) for group in groups if group is not None]
        self.groups = by_age[rank::processes][: self.size][::-1]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.groups, first = [], 0
        rollouts = RolloutBatch.from_state(state["rollouts"]).rollouts if state["queries"] else []
        for (identity, text, grades), size, spread in zip(
            state["queries"], state["sizes"], state["spread"], strict=True
        ):
            query = Query(identity, text, {int(row): float(grade) for row, grade in grades})
            none = np.zeros(0, dtype=np.float32)
            self.groups.append(Group(query, rollouts[first : first + size], none, (0, 0), float(spread)))
            first += size

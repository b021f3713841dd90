"""Replay: groups without variance give way to earlier ones, whose ratio is to the policy that sampled them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_grpo import no_backward, optimizer_of, task_of

from search_r3.environment.reward_terms import WeightedRewards
from search_r3.training.grpo.dataset import Query
from search_r3.training.grpo.grpo_task import GRPOTask
from search_r3.training.grpo.replay import ReplayBuffer
from search_r3.training.grpo.rollout import NO_ROW, Group, Rollout
from search_r3.training.grpo.rollout_engines import EngineRollouts


def group(number: int, std: float) -> Group:
    none = np.zeros(0, dtype=np.float32)
    rollouts = [
        Rollout([1, 2], [3] * (number + 1), "", none, False, advantage=float(i), old_log_probs=torch.rand(number + 2))
        for i in range(2)
    ]
    return Group(Query(f"q{number}", "text", {number: 1.0, 9: 0.5}), rollouts, none, (0, number), std)


def names(groups: list[tuple[Group, int]]) -> list[str]:
    return [one.query.id for one, _ in groups]


def test_groups_without_variance_give_way_to_earlier_ones_each_once() -> None:
    buffer = ReplayBuffer(size=3, seed=0)
    first = [(group(n, 1.0), n) for n in range(4)]
    assert buffer.replace(first, 0) == (first, 0)
    buffer.remember()
    assert [one.query.id for one in buffer.groups] == ["q1", "q2", "q3"], "only the newest are kept"
    batch = [(group(4, 0.0), 0), (group(5, 2.0), 1), (group(6, 0.0), 2), (group(7, 0.0), NO_ROW)]
    replaced, count = buffer.replace(batch, 1)
    assert count == 2
    assert [position for _, position in replaced] == [0, 1, 2, NO_ROW]
    assert replaced[1:4:2] == batch[1:4:2]
    assert {names(replaced)[0], names(replaced)[2]} < {"q1", "q2", "q3"}
    assert all(rollout.replayed for rollout in replaced[0][0].rollouts)
    buffer.remember()
    assert len(buffer.groups) == 2
    assert buffer.groups[-1].query.id == "q5"
    assert buffer.replace([(group(8, 0.0), 0), (group(8, 0.0), 1), (group(8, 0.0), 2)], 2)[1] == 2, "no more are there"


def test_groups_with_more_spread_are_replayed_more_often() -> None:
    drawn = []
    for seed in range(60):
        buffer = ReplayBuffer(size=4, seed=seed)
        buffer.groups = [group(0, 0.1), group(1, 0.9)]
        drawn += names(buffer.replace([(group(2, 0.0), 0)], 0)[0])
    assert drawn.count("q1") > 45


def test_its_state_is_what_a_resumed_run_needs() -> None:
    buffer, resumed = ReplayBuffer(size=4, seed=1), ReplayBuffer(size=4, seed=1)
    resumed.load_state_dict(buffer.state_dict())
    assert resumed.groups == []
    buffer.groups = [group(0, 0.3), group(1, 0.2), group(2, 0.5)]
    resumed.load_state_dict(buffer.state_dict())
    flat: list[tuple[Group, int]] = [(group(5, 0.0), 0), (group(6, 0.0), 1)]
    for (ours, _), (theirs, _) in zip(buffer.replace(flat, 3)[0], resumed.replace(flat, 3)[0], strict=True):
        assert (ours.query, ours.reward_std) == (theirs.query, theirs.reward_std)
        for one, other in zip(ours.rollouts, theirs.rollouts, strict=True):
            assert (one.prompt_ids, one.token_ids, one.advantage) == (
                other.prompt_ids,
                other.token_ids,
                other.advantage,
            )
            assert torch.equal(one.old_log_probs, other.old_log_probs)


class AlwaysEmitting(EngineRollouts):
    """No rollout is punished for a missing token, so that rewards are those of the test."""

    def sample(self, *args: Any, **more: Any) -> list[Rollout]:
        found = super().sample(*args, **more)
        for rollout in found:
            rollout.forced, rollout.ended = False, None
        return found


def flat_after_the_first(task: GRPOTask) -> None:
    """Rollouts differ in their rewards at the first batch only."""
    calls: list[int] = []

    def reward(rollouts: Any) -> list[float]:
        calls.append(1)
        return [float(i % 2) if len(calls) == 1 else 0.5 for i in range(len(rollouts.texts))]

    task.live.open(task.live.encoder.sync()).reward = WeightedRewards([("of the test", 1.0, reward)])


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_replayed_group_is_compared_with_the_policy_that_sampled_it(
    stage_one: Path, tmp_path: Path, mini_batches: int
) -> None:
    engine = AlwaysEmitting("torch", 64, tmp_path / "merged")
    task = task_of(
        stage_one,
        tmp_path,
        engine,
        zero_variance="replay",
        num_mini_batches=mini_batches,
        contrastive_weight=0.0,
        staleness_eval_every=0,
    )
    flat_after_the_first(task)
    optimizer = optimizer_of(task, 0.05)
    for step in range(mini_batches):
        _, metrics = task.training_step(task.module, step, torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["replayed"] == 0
    assert len(task.replay.groups) > 0
    kept = len(task.replay.groups)
    _, metrics = task.training_step(task.module, mini_batches, no_backward)
    assert metrics["replayed"] == min(kept, 3) > 0
    assert metrics["trained_rollouts"] > 0, "there is something to learn although all new groups are equal"
    assert metrics["ratio"] != 1.0, "the policy has changed since"
    replayed = [rollout for rollout in task.rollouts.rollouts if rollout.replayed]
    assert all(rollout.in_policy_loss and rollout.old_log_probs is not None for rollout in replayed)
    state = task.state_dict()["replay"]
    assert len(state[0]["queries"]) == len(task.replay.groups)

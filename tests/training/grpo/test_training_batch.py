"""The batch that stage 2 trains on: nothing that no process trains on, and any number of processes share it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.training.grpo import training_batch
from search_r3.training.grpo.dataset import Query
from search_r3.training.grpo.replay import ReplayBuffer
from search_r3.training.grpo.rollout import IGNORE_INDEX, NO_ROW, Group, Rollout, RolloutBatch, ScoredGroups

NONE = np.zeros(0, dtype=np.float32)


def rollout(index: int, tokens: int = 2) -> Rollout:
    return Rollout([1], [7] * tokens, "", NONE, False, index=index, target=0, old_log_probs=torch.rand(tokens + 1))


def group(positive: int, std: float, drawn: tuple[int, int]) -> Group:
    rollouts = [Rollout([1], [7, 8], "", NONE, False) for _ in range(2)]
    return Group(Query(f"q{positive}", "text", {positive: 1.0}), rollouts, NONE, drawn, std)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a batch of groups, of which the recipe keeps two, as the second of two processes sees it."""
    monkeypatch.setattr(training_batch, "round_metrics", lambda scored: {})
    config = SimpleNamespace(
        num_generations=2, zero_variance="resample", queries_per_step=2, min_reasoning_tokens=1,
        contrastive_weight=0.5, loop=SimpleNamespace(seed=0),
    )  # fmt: skip
    corpus = SimpleNamespace(vectors=lambda rows: torch.eye(9)[rows], ages=lambda step: torch.zeros(9))

    def build(mine: list[Group], of_others: list[Group]) -> RolloutBatch:
        def gathered(value: Any) -> list[Any]:
            is_order = bool(value) and isinstance(value[0], tuple)
            return [value, [one.order for one in of_others] if is_order else []]

        monkeypatch.setattr(training_batch.collectives, "all_gather_object", gathered)
        rewards = SimpleNamespace(refreshed=np.array([8]))
        scored: Any = ScoredGroups(mine, rewards, 0.0)  # type: ignore[arg-type]
        environment: Any = SimpleNamespace(corpus=corpus)
        return training_batch.build_training_batch([scored], 0, environment, 0, config)  # type: ignore[arg-type]

    return build


def test_a_process_whose_groups_were_replaced_adds_nothing_to_the_candidates(built: Any) -> None:
    others = [group(3, 1.0, (1, 0)), group(4, 1.0, (1, 1))]
    batch = built([group(5, 0.0, (0, 0))], others)
    assert batch.candidate_CD.argmax(1).tolist() == [8]  # row 5 answers a query that nobody trains on
    assert all((one.index, one.target, one.in_policy_loss) == (NO_ROW, IGNORE_INDEX, False) for one in batch.rollouts)
    ours = built([group(5, 1.0, (0, 0))], others)
    assert ours.candidate_CD.argmax(1).tolist() == [5, 8]
    assert [one.index for one in ours.rollouts] == [0, 1]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_any_number_of_processes_share_a_batch_that_two_have_saved(processes: int) -> None:
    first = RolloutBatch(3, [rollout(i) for i in (0, 1, 2)], torch.rand(4, 2), 4, {"reward": 0.5})
    second = RolloutBatch(3, [rollout(3, tokens=5), rollout(NO_ROW)], torch.rand(4, 2), 4, {"reward": 0.5})
    states = [first.state_dict(), second.state_dict()]
    shares = [RolloutBatch.share(states, rank, processes) for rank in range(processes)]
    indices = [one.index for share in shares for one in share.rollouts if one.index != NO_ROW]
    assert indices == [0, 1, 2, 3]
    assert all(share.rollouts for share in shares)  # each takes part in the collectives
    assert (
        all(not one.has_signal for share in shares for one in share.rollouts if one.index == NO_ROW) or processes == 2
    )
    assert {(share.generation_index, share.total) for share in shares} == {(3, 4)}
    by_index = {one.index: one for share in shares for one in share.rollouts}
    assert torch.equal(by_index[3].old_log_probs, second.rollouts[0].old_log_probs)


def test_the_groups_of_a_replay_buffer_are_distributed_anew() -> None:
    states = []
    for names in ((0, 1, 2), (10, 11)):
        buffer = ReplayBuffer(size=3, seed=0)
        buffer.groups = [group(name, 1.0, (0, 0)) for name in names]
        for one in buffer.groups:
            for each in one.rollouts:
                each.old_log_probs = torch.rand(3)
        states.append(buffer.state_dict())

    def share(rank: int, processes: int) -> list[str]:
        buffer = ReplayBuffer(size=3, seed=0)
        buffer.load_share(states, rank, processes)
        return [one.query.id for one in buffer.groups]

    assert [share(rank, 2) for rank in range(2)] == [["q0", "q1", "q2"], ["q10", "q11"]]
    assert share(0, 1) == ["q1", "q11", "q2"], "the newest, in their order"
    assert sorted(name for rank in range(3) for name in share(rank, 3)) == ["q0", "q1", "q10", "q11", "q2"]

"""Metrics of a round of sampled rollouts, and the choice of rollouts to log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.training.distributed import collectives
from search_r3.training.grpo.policy_gradient import ZERO_STD
from search_r3.training.grpo.rollout import Rollout, ScoredGroups

HIGH_REWARD = 0.5
"""The paper reports the share of outputs with a reward above this."""


def round_metrics(scored: ScoredGroups) -> dict[str, float]:
    """Means, quantiles and fractions over all processes' rollouts of a sampling round, and timings. A collective."""
    rollouts, scores = [rollout for group in scored.groups for rollout in group.rollouts], scored.rewards
    std_B = torch.tensor([group.reward_std for group in scored.groups])
    assert scores.direct_B is not None  # the collector always passes direct embeddings
    mine = {
        "reward": scores.rewards_R, "scaled": scores.scaled_R, "dcg": scores.ndcg_R, "unshaped": scores.unshaped_R,
        "direct": scores.direct_B, "std": std_B,
    }  # fmt: skip
    parts = collectives.all_gather_object({name: value.cpu() for name, value in mine.items()})
    values = {name: torch.cat([part[name] for part in parts]) for name in mine}
    traces = [
        (len(rollout.token_ids), not rollout.forced, rollout.ended is not None, rollout.text) for rollout in rollouts
    ]
    traces = [trace for part in collectives.all_gather_object(traces) for trace in part]
    low, middle, high = torch.quantile(values["reward"], torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {
        "reward": float(values["reward"].mean()),
        "reward_q10": low,
        "reward_q50": middle,
        "reward_q90": high,
        "dcg_scaled": float(values["scaled"].mean()),
        "dcg_scaled_high": float((values["scaled"] > HIGH_REWARD).float().mean()),
        "dcg": float(values["dcg"].mean()),
        "dcg_high": float((values["dcg"] > HIGH_REWARD).float().mean()),
        "direct": float(values["direct"].mean()),
        "gain": float(values["unshaped"].mean() - values["direct"].mean()),
        "group_std": float(values["std"].mean()),
        "zero_variance": float((values["std"] <= ZERO_STD).float().mean()),
        "length": float(np.mean([length for length, *_ in traces])),
        "emission": float(np.mean([emitted for _, emitted, _, _ in traces])),
        "ended": float(np.mean([ended for _, _, ended, _ in traces])),
        "distinct": len({text for *_, text in traces}) / len(traces),
        **{f"seconds_{part}": seconds for part, seconds in scores.seconds.items()},
        "seconds_sample": scored.seconds_sample,
    }


def completions_to_log(
    groups: Sequence[Sequence[Rollout]], scaled_R: Tensor, count: int
) -> list[tuple[int, Rollout, dict[str, Any]]]:
    """The best and the worst rollout of the first groups, at most `count`: (group number, rollout, record to log).

    Args:
        scaled_R: `dcg_scaled` of all rollouts, group by group.
    """
    shown = []
    for number, rollouts in enumerate(groups[: (count + 1) // 2]):
        reward_R = torch.tensor([rollout.reward for rollout in rollouts])
        for index in dict.fromkeys((int(reward_R.argmax()), int(reward_R.argmin()))):
            rollout, scaled = rollouts[index], float(scaled_R[number * len(rollouts) + index])
            record = {"text": rollout.text, "reward": round(rollout.reward, 4), "dcg_scaled": round(scaled, 4)}
            shown.append((number, rollout, record))
    return shown[:count]

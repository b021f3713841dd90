"""GRPO's mathematics as pure functions on tensors: advantages within a group, and the clipped policy loss with its KL.

Sources: GRPO, DeepSeekMath (arXiv 2402.03300); DAPO (2503.14476): two clip bounds, the mean over all tokens; Dr. GRPO
(2503.20783): no division by the standard deviation or the length; leave-one-out, RLOO (2402.14740). On the same
tensors the loss equals that of TRL's GRPOTrainer for the same options (tested).

Shape suffixes: R rollouts, T positions of a rollout with padding. A scalar has none.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

LossType = Literal["grpo", "dapo", "dr_grpo"]
AdvantageEstimator = Literal["grpo", "rloo"]
ScaleRewards = Literal["group", "none"]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)
STD_FLOOR = 1e-4
"""Added to a group's standard deviation, so that equal rewards give 0 and not NaN (TRL's value)."""
ZERO_STD = 1e-6
"""A group whose rewards deviate by no more than this has no variance; above rounding, as rewards are float32 near 1."""


def advantages(
    rewards_R: Any, groups_R: Any, estimator: AdvantageEstimator = "grpo", scale_rewards: ScaleRewards = "group"
) -> Tensor:
    """How much better each rollout's reward is than its group's baseline.

        grpo    r - mean                                                           (DeepSeekMath, equation 3)
        rloo    r - mean of the group's others = n / (n - 1) (r - mean)            (RLOO)

    divided by std + 1e-4 (ddof 1, as in TRL) if `scale_rewards` is "group"; "none" follows Dr. GRPO, section 3.2.

    Args:
        rewards_R: (R,) finite numbers.
        groups_R: (R,) integers; rollouts with the same number form a group, in any order.

    Returns:
        (R,) float32; each group sums to 0 up to rounding. A group of one has an advantage of 0.

    Raises:
        ValueError: shapes differ, an unknown estimator or scale, or a reward that is not finite.
    """
    for what, value, known in (
        ("advantage estimator", estimator, get_args(AdvantageEstimator)),
        ("scale_rewards", scale_rewards, get_args(ScaleRewards)),
    ):
        if value not in known:
            raise ValueError(f"there is no {what} {value!r} (there are {', '.join(known)})")
    rewards_R, index_R, count_G = _grouped(rewards_R, groups_R)
    mean_G = _sum_by_group(rewards_R, index_R, len(count_G)) / count_G
    advantage_R = rewards_R - mean_G[index_R]
    if estimator == "rloo":
        advantage_R = advantage_R * (count_G / (count_G - 1).clamp(min=1))[index_R]
    if scale_rewards == "group":
        advantage_R = advantage_R / (_std(rewards_R, index_R, count_G)[index_R] + STD_FLOOR)
    return advantage_R.to(torch.float32)


def group_std(rewards_R: Any, groups_R: Any) -> Tensor:
    """The standard deviation (ddof 1) of each rollout's group, (R,) float32; 0 for a group of one.

    A group at or below `ZERO_STD` counts as without variance. Raises the same errors as `advantages`.
    """
    rewards_R, index_R, count_G = _grouped(rewards_R, groups_R)
    return _std(rewards_R, index_R, count_G)[index_R].to(torch.float32)


def grpo_loss(
    new_RT: Tensor,
    old_RT: Tensor,
    reference_RT: Tensor | None,
    advantages_R: Tensor,
    mask_RT: Tensor,
    *,
    loss_type: LossType = "dapo",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    beta: float = 0.0,
    max_tokens: int | None = None,
    unbiased_kl: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate loss averaged over tokens, plus `beta` times the KL to the reference.

        ratio = exp(new - old)
        l     = -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A) + beta k3
        k3    = exp(reference - new) - (reference - new) - 1           (an unbiased estimate of KL(new || reference))

        grpo      mean over rollouts of the mean of l over a rollout's tokens           (DeepSeekMath, equation 3)
        dapo      sum of l / number of tokens of all rollouts                           (DAPO, equation 8)
        dr_grpo   sum of l / (R max_tokens)                                             (Dr. GRPO, appendix)

    Args:
        new_RT: log-probabilities of the sampled tokens under the policy; only this argument receives gradients.
        old_RT: under the policy that sampled them; `new_RT.detach()` at the first step of a batch, where the ratio is
            1.
        reference_RT: under the reference; may be None if beta is 0 (the reported KL is then 0).
        advantages_R: see `advantages`.
        mask_RT: boolean; False on padding and on tokens that the policy did not sample. Values there are ignored, NaN
            and infinity included. A rollout without any token counts as a rollout in grpo and dr_grpo.
        max_tokens: the maximum length of a rollout; required for dr_grpo.
        unbiased_kl: multiply k3 by the ratio, which makes its *gradient* unbiased too (DeepSeek-V3.2, 2512.02556; TRL's
            `use_bias_correction_kl`). False is DeepSeekMath's estimate.

    Returns:
        The loss, a scalar (float32, or float64 for float64 inputs), 0 and still part of the graph if nothing is
        unmasked; and metrics, which are means over unmasked tokens: "clip_low" (share of tokens whose ratio is below
        the bound while the advantage is negative, where the gradient is cut), "clip_high" (above it, positive), "ratio"
        (1 if nothing is unmasked), and "kl" (k3 as above; 0 without a reference).

    Raises:
        ValueError: shapes or dtypes do not match, the clip bounds are outside 0 < low <= 1 and 0 < high, beta is
            negative or has no reference, there are no rollouts, the loss type is unknown, or dr_grpo lacks
            `max_tokens`.
    """
    _check(new_RT, old_RT, reference_RT, advantages_R, mask_RT)
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"there is no loss type {loss_type!r} (there are {', '.join(LOSS_TYPES)})")
    if not (0 < epsilon_low <= 1 and epsilon_high > 0):
        raise ValueError(f"clip bounds must be above 0 and the lower at most 1, got {epsilon_low} and {epsilon_high}")
    if not beta >= 0:
        raise ValueError(f"beta must be 0 or more, got {beta}")
    if beta and reference_RT is None:
        raise ValueError(f"beta is {beta}, so the reference's log-probabilities are needed: give reference_RT")
    if loss_type == "dr_grpo" and (max_tokens is None or max_tokens < 1):
        raise ValueError(
            f"dr_grpo divides by the longest possible rollout: give max_tokens, 1 or more, not {max_tokens}"
        )
    # Masked positions are set to 0 *before* anything is computed: 0 * inf would be NaN, in the gradient too.
    new_RT, old_RT = _clean(new_RT, mask_RT), _clean(old_RT, mask_RT).detach()
    advantage_R1 = advantages_R.detach().to(new_RT)[:, None]
    ratio_RT = torch.exp(new_RT - old_RT)
    clipped_RT = ratio_RT.clamp(1 - epsilon_low, 1 + epsilon_high)
    token_RT = -torch.minimum(ratio_RT * advantage_R1, clipped_RT * advantage_R1)
    kl_RT = torch.zeros_like(new_RT)
    if reference_RT is not None:
        away_RT = _clean(reference_RT, mask_RT).detach() - new_RT
        kl_RT = torch.exp(away_RT) - away_RT - 1
    if beta:
        token_RT = token_RT + beta * (kl_RT * ratio_RT if unbiased_kl else kl_RT)
    weight_RT = mask_RT.to(new_RT)
    tokens = weight_RT.sum().clamp(min=1)
    if loss_type == "grpo":
        loss = ((token_RT * weight_RT).sum(1) / weight_RT.sum(1).clamp(min=1)).mean()
    elif loss_type == "dapo":
        loss = (token_RT * weight_RT).sum() / tokens
    else:
        assert max_tokens is not None
        loss = (token_RT * weight_RT).sum() / (len(token_RT) * max_tokens)

    def mean(values_RT: Tensor) -> float:
        return float((values_RT.detach().to(new_RT) * weight_RT).sum() / tokens)

    return loss, {
        "clip_low": mean((ratio_RT < 1 - epsilon_low) & (advantage_R1 < 0)),
        "clip_high": mean((ratio_RT > 1 + epsilon_high) & (advantage_R1 > 0)),
        "ratio": mean(ratio_RT) if bool(mask_RT.any()) else 1.0,
        "kl": mean(kl_RT),
    }


def entropy_floor_loss(entropy_RT: Tensor, mask_RT: Tensor, floor: float) -> Tensor:
    """How far the policy's mean entropy lies below a floor: max(0, floor - mean over unmasked tokens), in nats.

    Above the floor it has no gradient, so it does not make a policy more random that is random enough; a bonus for
    entropy would (compare Skywork-OR1, arXiv 2505.22312, which turns a bonus on and off around a target).

    Args:
        entropy_RT: entropies in nats, with gradient.
        mask_RT: boolean; False on padding and on tokens that the policy did not sample.
        floor: nats per token, above 0.

    Returns:
        A scalar, 0 and still part of the graph if nothing is unmasked.
    """
    weight_RT = mask_RT.to(entropy_RT)
    tokens = weight_RT.sum()
    if not tokens:
        return 0.0 * _clean(entropy_RT, mask_RT).sum()
    return (floor - (_clean(entropy_RT, mask_RT) * weight_RT).sum() / tokens).clamp(min=0.0)


def _grouped(rewards_R: Any, groups_R: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards in float64, each rollout's group as an index from 0, and the groups' sizes in float64."""
    rewards_R = torch.as_tensor(rewards_R).detach().to(torch.float64)
    groups_R = torch.as_tensor(groups_R).to(rewards_R.device)
    if rewards_R.dim() != 1 or groups_R.shape != rewards_R.shape or groups_R.is_floating_point():
        raise ValueError(
            f"rewards and whole group numbers must be two equal vectors, got {tuple(rewards_R.shape)} and "
            f"{groups_R.dtype} {tuple(groups_R.shape)}"
        )
    if not bool(torch.isfinite(rewards_R).all()):
        raise ValueError("a reward is NaN or infinite")
    _, index_R, count_G = groups_R.unique(return_inverse=True, return_counts=True)
    return rewards_R, index_R, count_G.to(torch.float64)


def _sum_by_group(values_R: Tensor, index_R: Tensor, groups: int) -> Tensor:
    return values_R.new_zeros(groups).index_add(0, index_R, values_R)


def _std(rewards_R: Tensor, index_R: Tensor, count_G: Tensor) -> Tensor:
    mean_G = _sum_by_group(rewards_R, index_R, len(count_G)) / count_G
    squares_G = _sum_by_group((rewards_R - mean_G[index_R]).square(), index_R, len(count_G))
    return (squares_G / (count_G - 1).clamp(min=1)).sqrt()


def _clean(values_RT: Tensor, mask_RT: Tensor) -> Tensor:
    wide = values_RT.to(torch.promote_types(values_RT.dtype, torch.float32))
    return torch.where(mask_RT, wide, torch.zeros_like(wide))


def _check(new_RT: Tensor, old_RT: Tensor, reference_RT: Tensor | None, advantages_R: Tensor, mask_RT: Tensor) -> None:
    if new_RT.dim() != 2 or not new_RT.is_floating_point() or len(new_RT) == 0:
        raise ValueError(f"new_RT must be a float matrix with a rollout, got {new_RT.dtype} {tuple(new_RT.shape)}")
    for name, other in (("old_RT", old_RT), ("reference_RT", reference_RT), ("mask_RT", mask_RT)):
        if other is not None and other.shape != new_RT.shape:
            raise ValueError(f"{name} has the shape {tuple(other.shape)}, expected new_RT's, {tuple(new_RT.shape)}")
    if mask_RT.dtype != torch.bool:
        raise ValueError(f"mask_RT must be boolean, got {mask_RT.dtype}")
    if advantages_R.shape != new_RT.shape[:1]:
        raise ValueError(f"advantages_R has the shape {tuple(advantages_R.shape)}, expected ({len(new_RT)},)")

"""The training step of stage 2, from top to bottom: GRPO with the reward of a retrieval environment.

Source: Search-R3 (arXiv 2510.07048), stage 2, after DeepSeekMath (2402.03300). It does without a value network (the
group's mean is the baseline) and without a second model as the reference (see `log_probs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from search_r3.training.distributed import collectives
from search_r3.training.grpo.collector import RolloutCollector
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.live_environment import LiveEnvironment
from search_r3.training.grpo.log_probs import LogProbs, compute_log_probs, keep_log_probs, store_log_probs
from search_r3.training.grpo.policy_gradient import advantages, entropy_floor_loss, group_std, grpo_loss
from search_r3.training.grpo.replay import ReplayBuffer
from search_r3.training.grpo.rollout import IGNORE_INDEX, Rollout, RolloutBatch, ScoredGroups
from search_r3.training.grpo.rollout_engines import RolloutEngine
from search_r3.training.grpo.training_batch import build_training_batch
from search_r3.training.lora.policy import Policy
from search_r3.training.losses import info_nce


class StepState(Protocol):
    """What a step reads and changes; implemented by `GRPOTask`.

    Attributes:
        prefix: token ids at the start of the reasoning conversation, shared by all rollouts.
        live: the encoder with the policy's weights, and the environment.
        engine: samples the rollouts.
        rollouts: the batch that the current steps train on.
        rollouts_of_all: the state of every process's batch, for a checkpoint between two of those steps.
        replay: earlier groups, if zero_variance is "replay".
    """

    config: GRPOConfig
    policy: Policy
    prefix: Sequence[int]
    embed_id: int
    live: LiveEnvironment
    engine: RolloutEngine
    collector: RolloutCollector
    rollouts: RolloutBatch | None
    rollouts_of_all: list[dict[str, Any]]
    replay: ReplayBuffer | None


def grpo_step(
    state: StepState, module: nn.Module, step: int, backward: Callable[[Tensor], None]
) -> tuple[Tensor, dict[str, float]]:
    """One training step of stage 2: sample rollouts, score them in the live corpus, and compute the gradients.

    A batch of rollouts (a "generation" in the names below, as in TRL) serves `steps_per_generation` steps; only the
    first of them samples. Every process calls this at every step.

    Args:
        module: the policy, wrapped if there are several processes.
        step: the step's number, from 0.
        backward: computes the gradients of a loss and adds them to the module's.

    Returns:
        The loss, and metrics to log.

    Raises:
        RuntimeError: the step belongs to a generation that was never sampled.
    """
    config, live, collector = state.config, state.live, state.collector
    generation_index, step_in_generation = divmod(step, config.steps_per_generation)
    if step_in_generation == 0 and (state.rollouts is None or state.rollouts.generation_index != generation_index):
        with _full_precision(module):
            # Synchronize: the encoder, the corpus and the sampling engine get the policy's current weights.
            encoder = live.encoder.sync()
            environment = live.open(encoder)  # encodes the whole corpus the first time
            live.evaluate_staleness(encoder, step)  # if due
            state.engine.sync(encoder)

            # First the batch's own queries; then, if zero_variance is "resample", replacements for groups without
            # variance.
            rounds: list[ScoredGroups] = []
            while queries := collector.next_queries(generation_index, rounds):
                # 1. Sample a group of reasoning traces for each query, each with the embedding at its embed token.
                corpus = environment.corpus
                groups = collector.sample(state.engine, encoder, corpus, queries, generation_index, len(rounds))
                # 2. Score: re-encode the documents that the policy selects, rank the corpus, reward the ranking.
                scored = collector.score(groups, encoder, environment, step)
                # 3. Advantages: compare each reward with the rewards of its group.
                set_advantages(scored, config)
                rounds.append(scored)
                live.log_completions(rounds, step)  # if due
            state.rollouts = build_training_batch(rounds, generation_index, environment, step, config, state.replay)
        if config.steps_per_generation > 1:
            store_log_probs(state.policy, state.prefix, state.embed_id, state.rollouts, config)
            state.rollouts_of_all = collectives.all_gather_object(state.rollouts.state_dict())
    batch = state.rollouts
    if batch is None or batch.generation_index != generation_index:
        raise RuntimeError(f"step {step} belongs to generation {generation_index}, which was never sampled")

    # 4. Log-probabilities of the sampled tokens under the policy, the policy that sampled, and the reference; the same
    #    forward pass gives the embeddings. At the first step of a generation the policy is still the one that sampled,
    #    so the old log-probabilities equal the new ones. A process without a rollout to learn from has no signal: it
    #    takes part with one rollout of weight 0, because the others wait for it in the collectives.
    rollouts, has_signal = batch.mini_batch(
        step_in_generation, config.num_mini_batches, config.loop.seed, dropped=config.entropy_floor > 0
    )
    first = step_in_generation == 0
    log_probs = compute_log_probs(module, state.prefix, state.embed_id, rollouts, config, first)
    if first and state.replay is not None:
        if config.steps_per_generation == 1:
            keep_log_probs(log_probs, rollouts)
        state.replay.remember()

    # 5. Loss: the clipped policy gradient with its KL, InfoNCE of the embeddings against the refreshed documents, and
    #    the policy's lack of entropy, if the recipe has a floor.
    policy_loss = policy_loss_term(log_probs, rollouts, has_signal, config)
    contrastive_loss = contrastive_loss_term(log_probs, rollouts, has_signal, batch.candidate_CD, config)
    entropy_loss = entropy_loss_term(log_probs, has_signal, config)
    loss, metrics = total_loss(policy_loss, contrastive_loss, entropy_loss, log_probs, config)

    # 6. Backward. The training loop clips the gradients and takes the optimizer step.
    backward(loss)
    return loss, metrics | batch.metrics | live.staleness


def set_advantages(scored: ScoredGroups, config: GRPOConfig) -> None:
    """Compare each rollout's reward with those of its group."""
    size = config.num_generations
    reward_R = scored.rewards.rewards_R.cpu()
    group_R = torch.arange(len(scored.groups)).repeat_interleave(size)
    advantage_R = advantages(reward_R, group_R, config.advantage_estimator, config.scale_rewards)
    std_R = group_std(reward_R, group_R)
    for index, group in enumerate(scored.groups):
        group.reward_std = float(std_R[index * size])
        ours_R = advantage_R[index * size : (index + 1) * size]
        for rollout, advantage in zip(group.rollouts, ours_R.tolist(), strict=True):
            rollout.advantage = advantage


@dataclass
class LossTerm:
    """One term of the loss over this process's rollouts.

    Attributes:
        loss: scalar, a mean over `count` items.
        count: number of rollouts, tokens or pairs: the weight of this process's mean relative to the others'.
        tokens: number of tokens that `metrics` are means over.
        metrics: means over this process's tokens.
    """

    loss: Tensor
    count: int
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def policy_loss_term(log_probs: LogProbs, rollouts: list[Rollout], has_signal: bool, config: GRPOConfig) -> LossTerm:
    """The clipped policy loss with its KL (`policy_gradient.grpo_loss`); groups without variance may be left out."""
    device = log_probs.new_RT.device
    trained_R = torch.tensor([rollout.in_policy_loss and has_signal for rollout in rollouts], device=device)
    mask_RT = log_probs.sampled_RT & trained_R[:, None]
    # Rollouts of dropped groups do not count in the mean; if all are dropped, their mean is 0.
    keep = trained_R.nonzero()[:, 0] if bool(trained_R.any()) else torch.arange(len(rollouts), device=device)
    loss, metrics = grpo_loss(
        log_probs.new_RT[keep],
        log_probs.old_RT[keep],
        None if log_probs.reference_RT is None else log_probs.reference_RT[keep],
        torch.tensor([rollout.advantage for rollout in rollouts], device=device)[keep],
        mask_RT[keep],
        loss_type=config.loss_type,
        epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high,
        beta=config.beta,
        max_tokens=config.max_reasoning_tokens + 1,
        unbiased_kl=config.unbiased_kl,
    )
    tokens, trained = int(mask_RT.sum()), int(trained_R.sum())
    entropy = float(log_probs.entropy_RT.detach()[mask_RT].mean()) if tokens else 0.0
    metrics |= {"entropy": entropy, "trained_rollouts": float(trained)}
    return LossTerm(loss, tokens if config.loss_type == "dapo" else trained, tokens, metrics)


def contrastive_loss_term(
    log_probs: LogProbs, rollouts: list[Rollout], has_signal: bool, candidate_CD: Tensor, config: GRPOConfig
) -> LossTerm:
    """InfoNCE of the rollouts that have a target, against the candidates."""
    rows = [row for row, rollout in enumerate(rollouts) if rollout.target != IGNORE_INDEX and has_signal]
    if not rows:
        return LossTerm(log_probs.embedding_RD.new_zeros(()), 0)
    device = log_probs.embedding_RD.device
    masked_RC = torch.zeros(len(rows), len(candidate_CD), dtype=torch.bool)
    for query, row in enumerate(rows):
        masked_RC[query, rollouts[row].false_negatives] = True
    loss = info_nce(
        log_probs.embedding_RD[torch.tensor(rows, device=device)],
        candidate_CD.to(device),
        torch.tensor([rollouts[row].target for row in rows], device=device),
        config.contrastive_temperature,
        masked_RC.to(device),
    )
    return LossTerm(loss, len(rows))


def entropy_loss_term(log_probs: LogProbs, has_signal: bool, config: GRPOConfig) -> LossTerm:
    """The policy's lack of entropy over all sampled tokens, those of dropped groups included; 0 without a floor."""
    if not config.entropy_floor:
        return LossTerm(log_probs.embedding_RD.new_zeros(()), 0)
    mask_RT = log_probs.sampled_RT & has_signal
    return LossTerm(entropy_floor_loss(log_probs.entropy_RT, mask_RT, config.entropy_floor), int(mask_RT.sum()))


def total_loss(
    policy_term: LossTerm,
    contrastive_term: LossTerm,
    entropy_term: LossTerm,
    log_probs: LogProbs,
    config: GRPOConfig,
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of the terms, scaled so that the mean over processes is the mean over all rollouts."""
    policy_weight, pair_weight, token_weight, entropy_weight = collectives.rank_weights(
        policy_term.count, contrastive_term.count, policy_term.tokens, entropy_term.count,
        device=log_probs.new_RT.device,
    )  # fmt: skip
    policy_loss, contrastive_loss = policy_weight * policy_term.loss, pair_weight * contrastive_term.loss
    loss = policy_loss + config.contrastive_weight * contrastive_loss
    further: dict[str, float] = {}
    if config.entropy_floor:
        lack = entropy_weight * entropy_term.loss
        loss, further = loss + config.entropy_weight * lack, {"entropy_lack": lack.item()}
    # DDP waits for a gradient of every trained weight at every step, so each weight takes part with 0 even if no
    # rollout is trained on. In an untied model, for example, the embed token's row has no gradient without the
    # contrastive term, because no later token depends on it.
    loss = loss + 0.0 * (log_probs.embedding_RD.sum() + log_probs.new_RT.sum())
    metrics = policy_term.metrics
    return loss, {
        "tokens": float(log_probs.tokens),
        "policy": policy_loss.item(),
        "contrastive": contrastive_loss.item(),
        "entropy": token_weight * metrics["entropy"],
        "kl_reference": token_weight * metrics["kl"],
        "clip_low": token_weight * metrics["clip_low"],
        "clip_high": token_weight * metrics["clip_high"],
        "ratio": token_weight * metrics["ratio"],
        # a sum over processes: the loop averages metrics over them, which this factor undoes
        "trained_rollouts": metrics["trained_rollouts"] * collectives.world_size(),
        **further,
    }


def _full_precision(module: nn.Module) -> torch.autocast:
    """Turns autocast off for sampling and scoring: cosines and the neighbor graph are float32."""
    return torch.autocast(next(module.parameters()).device.type, enabled=False)

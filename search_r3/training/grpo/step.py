"""The step of stage 2, from top to bottom: GRPO with the reward of a retrieval environment.

Source: Search-R3 (arXiv 2510.07048), stage 2, after DeepSeekMath (2402.03300). What it leaves out: a value network (the
group's mean is the baseline) and a second model as reference (see `log_probs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.model.searchr3 import SearchR3
from search_r3.training.distributed import collectives
from search_r3.training.grpo.collector import RolloutCollector, ScoredGroups
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.log_probs import LogProbs, compute_log_probs, store_log_probs
from search_r3.training.grpo.policy_gradient import grpo_loss
from search_r3.training.grpo.rollout import IGNORE_INDEX, Rollout, RolloutBatch
from search_r3.training.lora.policy import Policy
from search_r3.training.losses import info_nce


class StepState(Protocol):
    """What a step reads and changes; `GRPOTask` is one.

    Attributes:
        prefix: token ids of the reasoning conversation that all rollouts share.
        rollouts: the batch that the current steps train on.
        rollouts_of_all: its state on every process, for a checkpoint between two of those steps.
    """

    config: GRPOConfig
    policy: Policy
    prefix: Sequence[int]
    embed_id: int
    collector: RolloutCollector
    rollouts: RolloutBatch | None
    rollouts_of_all: list[dict[str, Any]]

    def synchronize(self, step: int) -> tuple[SearchR3, RetrievalEnvironment]:
        """The encoder and the sampling engine with the policy's current weights; the environment."""
        ...

    def log_completions(self, step: int, records: list[dict[str, Any]]) -> None:
        """Write some rollouts to the run's folder."""
        ...


def grpo_step(state: StepState, module: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
    """One optimizer step, `step` from 0: its loss, whose backward pass the training loop runs, and its figures.

    One batch of rollouts serves `steps_per_generation` steps. Every process calls this at every step.

    Args:
        module: the policy, wrapped for training over several processes if there are.

    Raises:
        RuntimeError: the step belongs to a batch that was never sampled.
    """
    config, collector = state.config, state.collector
    number, position = divmod(step, config.steps_per_generation)
    if position == 0 and (state.rollouts is None or state.rollouts.number != number):
        with _full_precision(module):
            encoder, environment = state.synchronize(step)

            def generate(queries: Sequence[int], attempt: int) -> ScoredGroups:
                # 1. Sample a group of reasoning traces for each query, each with the embedding at its embed token.
                groups = collector.sample(encoder, queries, number, attempt)
                # 2. Score: re-encode the documents that they touch, rank the corpus for each, reward the ranking.
                scored = collector.score(groups, encoder, environment, step)
                # 3. Advantages: compare each reward with the rewards of its group.
                collector.set_advantages(scored)
                return scored

            rounds = [generate(collector.order.batch(number), 0)]
            figures = collector.figures(rounds[0])
            completions = collector.completions(rounds[0], environment, step)
            if config.zero_variance == "resample":
                rounds += collector.resample(rounds[0], generate, number)
                figures["resampled"] = float(len(rounds) - 1)
            state.rollouts = collector.assemble(number, rounds, environment, figures, step)
            state.log_completions(step, completions)
        if config.steps_per_generation > 1:
            store_log_probs(state.policy, state.prefix, state.embed_id, state.rollouts, config)
            state.rollouts_of_all = collectives.all_gather_object(state.rollouts.state_dict())
    batch = state.rollouts
    if batch is None or batch.number != number:
        raise RuntimeError(f"step {step} belongs to batch {number} of rollouts, which was never sampled")

    # 4. Log-probabilities of what was sampled, by the policy, the policy that sampled it, and the reference; the same
    #    forward pass gives the embeddings. A process without anything to learn from takes part with a weight of 0.
    rollouts, has_signal = batch.mini_batch(position, config.num_mini_batches, config.loop.seed)
    log_probs = compute_log_probs(module, state.prefix, state.embed_id, rollouts, config, first=position == 0)

    # 5. Loss: the clipped policy gradient with its KL, and InfoNCE of the embeddings against the refreshed documents.
    policy = policy_term(log_probs, rollouts, has_signal, config)
    contrastive = contrastive_term(log_probs, rollouts, has_signal, batch.candidate_CD, config)
    loss, loss_figures = total_loss(policy, contrastive, log_probs, config)

    # 6. Backward: `training.loop` calls it on this loss, clips the gradients and updates the weights.
    return loss, loss_figures | batch.figures


@dataclass
class Term:
    """A term of the loss over this process's rollouts.

    Attributes:
        loss: scalar, the mean over `count`.
        count: of rollouts, tokens or pairs: how much this process's mean counts beside the others'.
        tokens: that its figures are means over.
    """

    loss: Tensor
    count: int
    tokens: int = 0
    figures: dict[str, float] = field(default_factory=dict)


def policy_term(log_probs: LogProbs, rollouts: list[Rollout], has_signal: bool, config: GRPOConfig) -> Term:
    """The clipped policy loss with its KL (`policy_gradient.grpo_loss`); groups without variance may be left out."""
    device = log_probs.new_N.device
    trained_R = torch.tensor([rollout.in_policy_loss and has_signal for rollout in rollouts], device=device)
    mask_RT = log_probs.matrix(log_probs.sampled_N.float()).bool() & trained_R[:, None]
    # Rollouts of dropped groups do not count in the mean; if all are dropped, their mean is 0.
    keep = trained_R.nonzero()[:, 0] if bool(trained_R.any()) else torch.arange(len(rollouts), device=device)
    reference_N = log_probs.reference_N
    loss, figures = grpo_loss(
        log_probs.matrix(log_probs.new_N)[keep],
        log_probs.matrix(log_probs.old_N)[keep],
        None if reference_N is None else log_probs.matrix(reference_N)[keep],
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
    mask_N = torch.cat([mask_RT[line, :length] for line, length in enumerate(log_probs.lengths)])
    entropy = float(log_probs.entropy_N[mask_N].mean()) if tokens else 0.0
    figures |= {"entropy": entropy, "trained_rollouts": float(trained)}
    return Term(loss, tokens if config.loss_type == "dapo" else trained, tokens, figures)


def contrastive_term(
    log_probs: LogProbs, rollouts: list[Rollout], has_signal: bool, candidate_CD: Tensor, config: GRPOConfig
) -> Term:
    """InfoNCE of the rollouts that have a target against the candidates."""
    lines = [line for line, rollout in enumerate(rollouts) if rollout.target != IGNORE_INDEX and has_signal]
    if not lines:
        return Term(log_probs.embedding_RD.new_zeros(()), 0)
    device = log_probs.embedding_RD.device
    masked_RC = torch.zeros(len(lines), len(candidate_CD), dtype=torch.bool)
    for line, place in enumerate(lines):
        masked_RC[line, rollouts[place].false_negatives] = True
    loss = info_nce(
        log_probs.embedding_RD[torch.tensor(lines, device=device)],
        candidate_CD.to(device),
        torch.tensor([rollouts[line].target for line in lines], device=device),
        config.contrastive_temperature,
        masked_RC.to(device),
    )
    return Term(loss, len(lines))


def total_loss(
    policy: Term, contrastive: Term, log_probs: LogProbs, config: GRPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of the terms, such that the mean of all processes' losses is the mean over all rollouts."""
    policy_weight, pair_weight, token_weight = collectives.rank_weights(
        policy.count, contrastive.count, policy.tokens, device=log_probs.new_N.device
    )
    policy_loss, contrastive_loss = policy_weight * policy.loss, pair_weight * contrastive.loss
    loss = policy_loss + config.contrastive_weight * contrastive_loss
    # Every weight takes part in every step. Of an untied model, the embed token's own row would not if nothing is
    # contrasted, as no later token depends on it.
    loss = loss + 0.0 * (log_probs.embedding_RD.sum() + log_probs.new_N.sum())
    figures = policy.figures
    return loss, {
        "tokens": float(log_probs.tokens),
        "policy": policy_loss.item(),
        "contrastive": contrastive_loss.item(),
        "entropy": token_weight * figures["entropy"],
        "kl_reference": token_weight * figures["kl"],
        "clip_low": token_weight * figures["clip_low"],
        "clip_high": token_weight * figures["clip_high"],
        "ratio": token_weight * figures["ratio"],
        "trained_rollouts": figures["trained_rollouts"] * collectives.world_size(),
    }


def _full_precision(module: nn.Module) -> torch.autocast:
    """Sampling and scoring run as if there was no autocast: cosines and the graph are float32."""
    return torch.autocast(next(module.parameters()).device.type, enabled=False)

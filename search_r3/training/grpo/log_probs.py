"""Log-probabilities of what was sampled: by the policy now, by the policy that sampled it, and by the reference.

The reference is the stage 1 policy: stage 1 is merged into the base, so it is the model with its new adapter off.

Shape suffixes: N tokens of all rollouts together, R rollouts, T positions of a rollout with padding, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search_r3.training.distributed import collectives
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.policy_gradient import padded, token_log_probs
from search_r3.training.grpo.rollout import Rollout, RolloutBatch
from search_r3.training.lora.policy import Policy, Rows

PART = "rollouts"


@dataclass
class LogProbs:
    """One forward pass over some rollouts, their tokens one after another.

    Attributes:
        new_N: by the policy, with gradient; old_N: by the policy that sampled; reference_N: None without a KL term.
        entropy_N: of the policy's distributions, in nats, without gradient.
        sampled_N: boolean, False on embed tokens that were appended and not sampled.
        lengths: tokens of each rollout.
        embedding_RD: float32, unit rows, with gradient: the states at the embed tokens.
        tokens: tokens of the forward pass, without padding; the shared prefix counts once.
    """

    new_N: Tensor
    old_N: Tensor
    reference_N: Tensor | None
    entropy_N: Tensor
    sampled_N: Tensor
    lengths: list[int]
    embedding_RD: Tensor
    tokens: int

    def matrix(self, values_N: Tensor) -> Tensor:
        """The values as (R, T), padded on the right."""
        return padded(values_N, self.lengths)


def compute_log_probs(
    module: nn.Module, prefix: Sequence[int], embed_id: int, rollouts: list[Rollout], config: GRPOConfig, first: bool
) -> LogProbs:
    """One forward pass of the trained model: log-probabilities, and the differentiable embedding at the embed token.

    Args:
        module: the policy, wrapped for training over several processes if there are.
        prefix: of the reasoning conversation.
        first: whether the policy is still the one that sampled: then the old log-probabilities are the new ones.
    """
    single = config.steps_per_generation == 1
    rows = _rows(prefix, embed_id, rollouts)
    encoded = module({PART: rows}, with_base=(PART,) if config.beta and single else ())[PART]
    device = encoded.embedding_BD.device
    ids_N, sampled_N = _sampled(rollouts, embed_id, device)
    new_N, entropy_N = token_log_probs(encoded.logits_TV, ids_N, config.temperature)
    old_N, reference_N = new_N.detach(), None
    if encoded.base_logits_TV is not None:
        with torch.no_grad():
            reference_N = token_log_probs(encoded.base_logits_TV, ids_N, config.temperature)[0]
    if not single:
        stored_N = _stored(rollouts, "old_log_probs", device)
        assert stored_N is not None  # by `store_log_probs`, or in the checkpoint
        old_N = old_N if first else stored_N
        reference_N = _stored(rollouts, "reference_log_probs", device)
    return LogProbs(new_N, old_N, reference_N, entropy_N, sampled_N, rows.answers, encoded.embedding_BD, rows.tokens)


@torch.no_grad()
def store_log_probs(
    policy: Policy, prefix: Sequence[int], embed_id: int, batch: RolloutBatch, config: GRPOConfig
) -> None:
    """Set every rollout's old and reference log-probabilities, before the first of several steps changes the policy."""
    size, rollouts = config.mini_batch_size, batch.rollouts
    calls = collectives.all_reduce_max(-(-len(rollouts) // size), next(policy.parameters()).device)
    for start in range(0, calls * size, size):  # every process makes as many calls
        some = rollouts[start : start + size] or rollouts[-1:]
        rows = _rows(prefix, embed_id, some)
        encoded = policy({PART: rows}, with_base=(PART,) if config.beta else ())[PART]
        if start >= len(rollouts):
            continue
        ids_N, _ = _sampled(some, embed_id, encoded.embedding_BD.device)
        for name, logits in (("old_log_probs", encoded.logits_TV), ("reference_log_probs", encoded.base_logits_TV)):
            if logits is not None:
                values_N = token_log_probs(logits, ids_N, config.temperature)[0].cpu()
                for rollout, values_T in zip(some, values_N.split(rows.answers), strict=True):
                    setattr(rollout, name, values_T)


def _rows(prefix: Sequence[int], embed_id: int, rollouts: list[Rollout]) -> Rows:
    return Rows(prefix, [rollout.input_ids(embed_id) for rollout in rollouts], [r.length for r in rollouts])


def _sampled(rollouts: list[Rollout], embed_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens that were sampled at each position, and whether the policy sampled them: (N,) both."""
    ids, sampled = [], []
    for rollout in rollouts:
        some_ids, some_sampled = rollout.sampled_ids(embed_id)
        ids += some_ids
        sampled += some_sampled
    return torch.tensor(ids, device=device), torch.tensor(sampled, device=device)


def _stored(rollouts: list[Rollout], name: str, device: torch.device) -> Tensor | None:
    values = [getattr(rollout, name) for rollout in rollouts]
    return None if values[0] is None else torch.cat(values).to(device)

"""Log-probabilities of the sampled tokens under the current policy, the policy that sampled them, and the reference.

The reference is the stage 1 policy. Stage 1 is merged into the base, so the model with its new adapter off is that
policy.

Shape suffixes: N tokens of all rollouts together, R rollouts, T positions of a rollout with padding, V vocabulary ids,
D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search_r3.training.distributed import collectives
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.rollout import Rollout, RolloutBatch
from search_r3.training.lora.policy import Policy, Rows

PART = "rollouts"


@dataclass
class LogProbs:
    """The result of one forward pass: one row per rollout, padded on the right with 0 or False.

    Attributes:
        new_RT: log-probabilities under the policy, with gradient.
        old_RT: under the policy that sampled the rollouts.
        reference_RT: under the reference; None without a KL term.
        entropy_RT: entropy of the policy's distributions in nats; with gradient if the recipe has an `entropy_floor`.
        sampled_RT: boolean; False on padding, and on embed tokens that were appended instead of sampled.
        embedding_RD: float32 unit rows, with gradient: the states at the embed tokens.
        tokens: number of tokens in the forward pass without padding; the shared prefix counts once.
    """

    new_RT: Tensor
    old_RT: Tensor
    reference_RT: Tensor | None
    entropy_RT: Tensor
    sampled_RT: Tensor
    embedding_RD: Tensor
    tokens: int


def compute_log_probs(
    module: nn.Module, prefix: Sequence[int], embed_id: int, rollouts: list[Rollout], config: GRPOConfig, first: bool
) -> LogProbs:
    """One forward pass of the trained model: log-probabilities, and the differentiable embedding at the embed token.

    Args:
        module: the policy, wrapped if there are several processes.
        prefix: token ids of the reasoning conversation's shared prefix.
        first: whether the policy is still the one that sampled; then the old log-probabilities equal the new ones,
            except for replayed rollouts.
    """
    one_step = config.steps_per_generation == 1
    rows = _rows(prefix, embed_id, rollouts)
    encoded = module({PART: rows}, return_base_logits=(PART,) if config.beta and one_step else ())[PART]
    device = encoded.embedding_BD.device
    ids_N, sampled_N = _sampled(rollouts, embed_id, device)
    new_N, entropy_N = token_log_probs(encoded.logits_TV, ids_N, config.temperature, config.entropy_floor > 0)
    old_N, reference_N = new_N.detach(), None
    if encoded.base_logits_TV is not None:
        with torch.no_grad():
            reference_N = token_log_probs(encoded.base_logits_TV, ids_N, config.temperature)[0]
    if not one_step:
        stored_N = _joined([rollout.old_log_probs for rollout in rollouts], device)
        assert stored_N is not None  # set by `store_log_probs`, or read from the checkpoint
        old_N = old_N if first else stored_N
        reference_N = _joined([rollout.reference_log_probs for rollout in rollouts], device)
    lengths = rows.num_target_tokens
    if any(rollout.replayed for rollout in rollouts):
        olds = zip(rollouts, old_N.split(lengths), strict=True)
        old_N = torch.cat([old_T if not r.replayed else _stored(r).to(device) for r, old_T in olds])
    return LogProbs(
        new_RT=padded(new_N, lengths),
        old_RT=padded(old_N, lengths),
        reference_RT=None if reference_N is None else padded(reference_N, lengths),
        entropy_RT=padded(entropy_N, lengths),
        sampled_RT=padded(sampled_N, lengths, False),
        embedding_RD=encoded.embedding_BD,
        tokens=rows.tokens,
    )


@torch.no_grad()
def store_log_probs(
    policy: Policy, prefix: Sequence[int], embed_id: int, batch: RolloutBatch, config: GRPOConfig
) -> None:
    """Set every rollout's old and reference log-probabilities, before the first of several steps changes the policy."""
    size, rollouts = config.mini_batch_size, batch.rollouts
    calls = collectives.all_reduce_max(-(-len(rollouts) // size), next(policy.parameters()).device)
    for start in range(0, calls * size, size):  # every process makes the same number of calls
        some = rollouts[start : start + size] or rollouts[-1:]
        rows = _rows(prefix, embed_id, some)
        encoded = policy({PART: rows}, return_base_logits=(PART,) if config.beta else ())[PART]
        if start >= len(rollouts):
            continue
        ids_N, _ = _sampled(some, embed_id, encoded.embedding_BD.device)
        old_N = token_log_probs(encoded.logits_TV, ids_N, config.temperature)[0].cpu()
        for rollout, old_T in zip(some, old_N.split(rows.num_target_tokens), strict=True):
            if not rollout.replayed:
                rollout.old_log_probs = old_T
        if encoded.base_logits_TV is not None:
            reference_N = token_log_probs(encoded.base_logits_TV, ids_N, config.temperature)[0].cpu()
            for rollout, reference_T in zip(some, reference_N.split(rows.num_target_tokens), strict=True):
                rollout.reference_log_probs = reference_T


def keep_log_probs(log_probs: LogProbs, rollouts: list[Rollout]) -> None:
    """Set the old log-probabilities of rollouts that the policy has just sampled, so that they can be replayed."""
    for new_T, rollout in zip(log_probs.new_RT.detach().cpu(), rollouts, strict=True):
        if not rollout.replayed:
            rollout.old_log_probs = new_T[: rollout.length].clone()


def token_log_probs(
    logits_NV: Tensor, ids_N: Tensor, temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of sampled tokens, and the entropies of the distributions that they were sampled from.

    Args:
        logits_NV: logits without the padding ids, which are never sampled and so must stay out of the softmax.
        ids_N: the sampled tokens, integers in [0, V).
        temperature: the sampling temperature; the policy is softmax(logits / temperature).
        entropy_gradient: whether the entropies have a gradient, which keeps another softmax over all logits in memory.

    Returns:
        (N,) log-probabilities, float32 or wider, with gradient; and (N,) entropies in nats.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    with torch.autocast(device_type=logits_NV.device.type, enabled=False):
        scaled_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        if temperature != 1.0:
            scaled_NV = scaled_NV / temperature
        total_N = torch.logsumexp(scaled_NV, dim=1)
        chosen_N = scaled_NV.gather(1, ids_N[:, None])[:, 0] - total_N
        with torch.set_grad_enabled(
            entropy_gradient and torch.is_grad_enabled()
        ):  # block by block: a softmax over all logits at once would double the memory
            blocks = zip(scaled_NV.split(128), total_N.split(128), strict=True)
            entropy = [total - (torch.softmax(block, 1) * block).sum(1) for block, total in blocks]
    return chosen_N, torch.cat(entropy) if entropy else chosen_N.detach()


def padded(values_N: Tensor, lengths: list[int], fill: float = 0.0) -> Tensor:
    """Reshape the rollouts' concatenated values, (N,), to (R, longest), padded on the right; gradients flow through.

    Raises:
        ValueError: the lengths do not add up to N.
    """
    if sum(lengths) != len(values_N):
        raise ValueError(f"{len(values_N)} values do not fit rollouts of {sum(lengths)} tokens in total")
    return torch.nn.utils.rnn.pad_sequence(list(values_N.split(lengths)), batch_first=True, padding_value=fill)


def _rows(prefix: Sequence[int], embed_id: int, rollouts: list[Rollout]) -> Rows:
    return Rows(prefix, [rollout.input_ids(embed_id) for rollout in rollouts], [r.length for r in rollouts])


def _sampled(rollouts: list[Rollout], embed_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The token at each position, and whether the policy sampled it: both (N,)."""
    ids, sampled = [], []
    for rollout in rollouts:
        some_ids, some_sampled = rollout.sampled_ids(embed_id)
        ids += some_ids
        sampled += some_sampled
    return torch.tensor(ids, device=device), torch.tensor(sampled, device=device)


def _stored(rollout: Rollout) -> Tensor:
    assert rollout.old_log_probs is not None  # a group is kept for replay with them
    return rollout.old_log_probs


def _joined(values: list[Tensor | None], device: torch.device) -> Tensor | None:
    """Log-probabilities stored in the rollouts, concatenated; None if none were stored."""
    stored = [value for value in values if value is not None]
    return torch.cat(stored).to(device) if stored else None

"""Log-probabilities of what was sampled: by the policy now, by the policy that sampled it, and by the reference.

The reference is the stage 1 policy: stage 1 is merged into the base, so it is the model with its new adapter off.

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
    """One forward pass over some rollouts: a row for each, padded on the right with 0 or False.

    Attributes:
        new_RT: by the policy, with gradient; old_RT: by the policy that sampled; reference_RT: None without a KL term.
        entropy_RT: of the policy's distributions, in nats, without gradient.
        sampled_RT: boolean, False on padding, and on embed tokens that were appended and not sampled.
        embedding_RD: float32, unit rows, with gradient: the states at the embed tokens.
        tokens: tokens of the forward pass, without padding; the shared prefix counts once.
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
        module: the policy, wrapped for training over several processes if there are.
        prefix: of the reasoning conversation.
        first: whether the policy is still the one that sampled: then the old log-probabilities are the new ones.
    """
    single = config.steps_per_generation == 1
    rows = _rows(prefix, embed_id, rollouts)
    encoded = module({PART: rows}, return_base_logits=(PART,) if config.beta and single else ())[PART]
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
    lengths = rows.num_target_tokens
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
    for start in range(0, calls * size, size):  # every process makes as many calls
        some = rollouts[start : start + size] or rollouts[-1:]
        rows = _rows(prefix, embed_id, some)
        encoded = policy({PART: rows}, return_base_logits=(PART,) if config.beta else ())[PART]
        if start >= len(rollouts):
            continue
        ids_N, _ = _sampled(some, embed_id, encoded.embedding_BD.device)
        for name, logits in (("old_log_probs", encoded.logits_TV), ("reference_log_probs", encoded.base_logits_TV)):
            if logits is not None:
                values_N = token_log_probs(logits, ids_N, config.temperature)[0].cpu()
                for rollout, values_T in zip(some, values_N.split(rows.num_target_tokens), strict=True):
                    setattr(rollout, name, values_T)


def token_log_probs(logits_NV: Tensor, ids_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of sampled tokens, and the entropies of the distributions that they were sampled from.

    Args:
        logits_NV: without padding ids: they are never sampled, so they take no part in the softmax either.
        ids_N: the sampled tokens, integers in [0, V).
        temperature: that of the sampling: the policy is softmax(logits / temperature).

    Returns:
        (N,) float32 at least, with gradient; and (N,) entropies in nats, without.

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
        with torch.no_grad():  # a block at a time: a whole softmax beside the logits would double the memory
            blocks = zip(scaled_NV.split(128), total_N.split(128), strict=True)
            entropy = [total - (torch.softmax(block, 1) * block).sum(1) for block, total in blocks]
    return chosen_N, torch.cat(entropy) if entropy else chosen_N.detach()


def padded(values_N: Tensor, lengths: list[int], fill: float = 0.0) -> Tensor:
    """Concatenated values of rollouts, (N,), as a matrix (R, longest) padded on the right; keeps gradients.

    Raises:
        ValueError: the lengths do not add up to N.
    """
    if sum(lengths) != len(values_N):
        raise ValueError(f"{len(values_N)} values cannot be rollouts of {sum(lengths)} tokens together")
    return torch.nn.utils.rnn.pad_sequence(list(values_N.split(lengths)), batch_first=True, padding_value=fill)


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

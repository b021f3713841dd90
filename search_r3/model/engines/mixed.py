"""One pass over the new tokens of several `LlamaSession`s: a token of each row under way, whole prompts beside them.

Reading the weights is much of what a pass of few tokens costs, so a prompt that joins others costs less in their step
than before it (Sarathi, arXiv 2308.16369). All but attention sees only tokens; attention is each session's own.

Letters in shapes: B rows, L new tokens, T tokens in the cache, N tokens of all sessions, D dimension, H heads of
queries, K key-value heads, G = H / K, E dimension of a head, F width of the MLP, Q queries of a key-value head (G * L).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from search_r3.model.engines.sessions import LlamaSession


@dataclass
class Part:
    """What one session is fed: the arguments of `Session.feed`."""

    session: LlamaSession
    ids_BL: Tensor
    position_BL: Tensor
    mask_BT: Tensor | None = None
    last_B: Tensor | None = None


def feed_together(parts: Sequence[Part]) -> list[Tensor]:
    """For each part the states (B, D) that its session's `feed` would return; the sessions' caches grow as by `feed`.

    All sessions are of one model.
    """
    first = parts[0].session
    backbone, head_dim = first.backbone, first.head_dim
    half, heads = head_dim // 2, first.heads * (first.groups + 1)
    sizes = [part.ids_BL.numel() for part in parts]
    hidden_ND = backbone.embed_tokens(torch.cat([part.ids_BL.flatten() for part in parts]))
    position_1N = torch.cat([part.position_BL.flatten() for part in parts])[None]
    cos_NE, sin_NE = (turn_1NE[0] for turn_1NE in backbone.rotary_emb(hidden_ND[None], position_1N))
    # rotate_half(x) * sin is x with its halves swapped, times sin with the first half negated.
    cos_N1E, sin_N1E = cos_NE[:, None], torch.cat([-sin_NE[:, :half], sin_NE[:, half:]], -1)[:, None]
    masks = [part.session._mask(part.ids_BL.shape[1], part.mask_BT, hidden_ND.device) for part in parts]
    for index, layer in enumerate(first.layers):
        normed_ND = first._norm(hidden_ND, layer.norm_attention)
        qkv_NHE = functional.linear(normed_ND, layer.qkv, layer.qkv_bias).unflatten(1, (-1, head_dim))
        qk_NHE, value_NKE = qkv_NHE.split([heads, first.heads], 1)
        swapped_NHE = torch.cat([qk_NHE[..., half:], qk_NHE[..., :half]], -1)
        qk_NHE = (qk_NHE * cos_N1E).addcmul_(swapped_NHE, sin_N1E)
        attended = [
            _attend(part, index, qk, value, mask)
            for part, qk, value, mask in zip(parts, qk_NHE.split(sizes), value_NKE.split(sizes), masks, strict=True)
        ]
        hidden_ND = hidden_ND + functional.linear(torch.cat(attended), layer.out, layer.out_bias)
        gate_NF, up_NF = functional.linear(first._norm(hidden_ND, layer.norm_mlp), layer.gate_up).chunk(2, -1)
        hidden_ND = hidden_ND + functional.linear(functional.silu(gate_NF).mul_(up_NF), layer.down)
    states = []
    for part, hidden in zip(parts, hidden_ND.split(sizes), strict=True):
        size, new = part.ids_BL.shape
        part.session.length += new
        hidden_BLD = hidden.unflatten(0, (size, new))
        last_B = new - 1 if part.last_B is None else part.last_B
        states.append(first._norm(hidden_BLD[torch.arange(size, device=hidden.device), last_B], backbone.norm.weight))
    return states


def _attend(part: Part, index: int, qk_NHE: Tensor, value_NKE: Tensor, mask_BLT: Tensor | None) -> Tensor:
    """Put one part's new keys and values into its cache and attend: (B * L, H * E)."""
    session, (size, new) = part.session, part.ids_BL.shape
    query_NHE, key_NKE = qk_NHE.split([session.heads * session.groups, session.heads], 1)
    end = session.length + new
    session.keys[index][:, :, session.length : end] = key_NKE.unflatten(0, (size, new)).transpose(1, 2)
    session.values[index][:, :, session.length : end] = value_NKE.unflatten(0, (size, new)).transpose(1, 2)
    # The G heads that share keys become G * L queries of one head: nothing is repeated.
    query_BLKGE = query_NHE.reshape(size, new, session.heads, session.groups, session.head_dim)
    attended_BKQE = functional.scaled_dot_product_attention(
        query_BLKGE.permute(0, 2, 3, 1, 4).flatten(2, 3),
        session.keys[index][:, :, :end],
        session.values[index][:, :, :end],
        attn_mask=None if mask_BLT is None else mask_BLT.repeat(1, session.groups, 1)[:, None],
    )
    attended_BKGLE = attended_BKQE.unflatten(2, (session.groups, new))
    return attended_BKGLE.permute(0, 3, 1, 2, 4).reshape(size * new, -1)

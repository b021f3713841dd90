"""One pass over the new tokens of several sessions: a token of each row under way, whole prompts beside them.

Reading the weights is much of what a pass of few tokens costs, so a prompt that joins others costs less in their step
than before it (Sarathi, arXiv 2308.16369). All but attention sees only tokens; attention is each session's own.

Letters in shapes: B rows, L new tokens, T tokens in the cache, N tokens of all sessions, D dimension, H heads (of
queries, then of keys where both are together), K key-value heads, E dimension of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Part:
    """What one session is fed, a `LlamaSession` or one like it: the arguments of `Session.feed`."""

    session: Any
    ids_BL: Tensor
    position_BL: Tensor
    mask_BT: Tensor | None = None
    last_B: Tensor | None = None


def feed_together(parts: Sequence[Part]) -> list[Tensor]:
    """For each part the states (B, D) that its session's `feed` would return; the sessions' caches grow as by `feed`.

    All are `LlamaSession`s of one model.
    """
    first = parts[0].session
    backbone = first.backbone
    sizes = [part.ids_BL.numel() for part in parts]
    hidden_ND = backbone.embed_tokens(torch.cat([part.ids_BL.flatten() for part in parts]))
    position_1N = torch.cat([part.position_BL.flatten() for part in parts])[None]
    cos_1N1E, sin_1N1E = first.turn(hidden_ND[None], position_1N)
    turn = cos_1N1E[0], sin_1N1E[0]
    masks = [part.session._mask(part.ids_BL.shape[1], part.mask_BT, hidden_ND.device) for part in parts]
    for index in range(len(first.layers)):
        qk_NHE, value_NKE = first.project(index, hidden_ND, turn)
        attended = [
            _attend(part, index, qk, value, mask)
            for part, qk, value, mask in zip(parts, qk_NHE.split(sizes), value_NKE.split(sizes), masks, strict=True)
        ]
        hidden_ND = first.finish(index, hidden_ND, torch.cat(attended))
    states = []
    for part, hidden in zip(parts, hidden_ND.split(sizes), strict=True):
        size, new = part.ids_BL.shape
        part.session.length += new
        hidden_BLD = hidden.unflatten(0, (size, new))
        last_B = new - 1 if part.last_B is None else part.last_B
        states.append(first._norm(hidden_BLD[torch.arange(size, device=hidden.device), last_B], backbone.norm.weight))
    return states


def _attend(part: Part, index: int, qk_NHE: Tensor, value_NKE: Tensor, mask_BLT: Tensor | None) -> Tensor:
    """One part's `LlamaSession.attend`: (B * L, H * E)."""
    qk_BLHE, value_BLKE = (x.view(*part.ids_BL.shape, *x.shape[1:]) for x in (qk_NHE, value_NKE))
    return part.session.attend(index, qk_BLHE, value_BLKE, mask_BLT).flatten(0, 1)

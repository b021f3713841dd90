"""Prefill and decode in one pass: whole prompts along with one token of each row in progress (Sarathi, 2308.16369).

Reading the weights dominates the cost of a pass over few tokens, so a prompt is cheaper in the others' step than in a
separate pass. Only attention uses the caches; everything else processes the tokens of all sessions together.

Shape suffixes: B rows, L new tokens, T tokens in the cache, N tokens of all sessions, D dimension, H heads (those of
queries, followed by those of keys where both are in one tensor), K key-value heads, E dimension of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class SessionInput:
    """A session (a `LlamaSession` or a similar one) and the arguments of its `feed`."""

    session: Any
    ids_BL: Tensor
    position_BL: Tensor
    mask_BT: Tensor | None = None
    last_B: Tensor | None = None


def feed_together(parts: Sequence[SessionInput]) -> list[Tensor]:
    """The states (B, D) of each part, as the `feed` of its session would return them; the caches grow as in `feed`.

    All sessions must be `LlamaSession`s of one model.
    """
    first = parts[0].session
    backbone = first.backbone
    sizes = [part.ids_BL.numel() for part in parts]
    hidden_ND = backbone.embed_tokens(torch.cat([part.ids_BL.flatten() for part in parts]))
    position_1N = torch.cat([part.position_BL.flatten() for part in parts])[None]
    cos_1N1E, sin_1N1E = first.rotation(hidden_ND[None], position_1N)
    rotation = cos_1N1E[0], sin_1N1E[0]
    masks = [part.session.attention_mask(part.ids_BL.shape[1], part.mask_BT, hidden_ND.device) for part in parts]
    for index in range(len(first.layers)):
        qk_NHE, value_NKE = first.project(index, hidden_ND, rotation)
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
        states.append(first.norm(hidden_BLD[torch.arange(size, device=hidden.device), last_B], backbone.norm.weight))
    return states


def _attend(part: SessionInput, index: int, qk_NHE: Tensor, value_NKE: Tensor, mask_BLT: Tensor | None) -> Tensor:
    """`LlamaSession.attend` for one part: (B * L, H * E)."""
    qk_BLHE, value_BLKE = (x.view(*part.ids_BL.shape, *x.shape[1:]) for x in (qk_NHE, value_NKE))
    return part.session.attend(index, qk_BLHE, value_BLKE, mask_BLT).flatten(0, 1)

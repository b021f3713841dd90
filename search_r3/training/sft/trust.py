"""Rows of stage 1 with words that are not true: another query's reasoning, or none.

A model that is only trained with true reasoning follows any words, also those of its own that are wrong. So some rows
get false ones, and learn to rank the candidates as the query's direct embedding does: words count as far as they are
true. What a row gets is a function of the seed, the step and the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from search_r3.data.pairs import TrainingPair
from search_r3.training.sft.sft_config import SFTConfig

TRUST_STREAM = 43
"""Seed offset, so that false words do not affect a batch's pairs and other rows."""


def false_reasoning(config: SFTConfig, step: int, pairs: Sequence[TrainingPair]) -> dict[int, str]:
    """The pairs of a batch that read false words if they are trained with reasoning: index -> the words.

    "" is empty reasoning. Another query's reasoning is that of a pair of the batch with another query and another
    positive; where there is none, the pair keeps its own.
    """
    shuffled, empty = config.shuffled_reasoning_ratio, config.empty_reasoning_ratio
    if not (shuffled or empty):
        return {}
    rng = np.random.default_rng([config.loop.seed, step, TRUST_STREAM])
    kind_B, draw_B = rng.random(len(pairs)), rng.random(len(pairs))
    words: dict[int, str] = {}
    for i, pair in enumerate(pairs):
        if kind_B[i] < shuffled:
            others = [p.reasoning for p in pairs if p.reasoning and _unrelated(p, pair)]
            if others:
                words[i] = others[int(draw_B[i] * len(others))]
        elif kind_B[i] < shuffled + empty:
            words[i] = ""
    return words


def _unrelated(one: TrainingPair, other: TrainingPair) -> bool:
    return one.query != other.query and one.positive not in other.relevant and one.reasoning != other.reasoning


def direct_and_false(
    embedding: Mapping[str, Tensor], with_reasoning: Sequence[int], false_words: Mapping[int, str]
) -> tuple[list[int], Tensor, Tensor]:
    """The pairs whose reasoning is false, their embeddings with it, (B, D), and their direct embeddings, (B, D)."""
    rows = [row for row, pair in enumerate(with_reasoning) if pair in false_words]
    pairs = [with_reasoning[row] for row in rows]
    direct_BD = embedding["query"][torch.tensor(pairs, dtype=torch.int64, device=embedding["query"].device)]
    if not rows:
        return [], direct_BD, direct_BD
    return pairs, embedding["reasoning"][rows], direct_BD

"""Perturbed queries and documents of a batch: as augmentation, or for self-teaching.

As augmentation the changed text replaces the original. With self-teaching (Zhuang and Zuccon, arXiv 2204.00716,
equation 4) the original stays, and the changed query is embedded in addition: its distribution over the candidates is
trained to match the original's, which is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from search_r3.data.query_variants import draw_variants
from search_r3.training.losses import score_distillation
from search_r3.training.sft.sft_config import SFTConfig

QUERY_STREAM, DOCUMENT_STREAM = 31, 32
"""Seed offsets, so that what is changed does not affect a batch's pairs and reasoning rows."""


@dataclass
class Variants:
    """The texts of a step as they are embedded; a function of the seed, the step and the batch.

    Attributes:
        queries: in the order of the batch's pairs.
        documents: in the order of the batch's documents.
        changed: for self-teaching, queries that are embedded in addition to their originals.
        changed_of: the pair of each of `changed`.
    """

    queries: list[str]
    documents: list[str]
    changed: list[str]
    changed_of: list[int]


def draw_texts(config: SFTConfig, step: int, queries: Sequence[str], documents: Sequence[str]) -> Variants:
    """Change the texts of a batch as the recipe's `query_variants` and `document_variants` say."""
    drawn = _draw(queries, config.query_variants, [config.loop.seed, step, QUERY_STREAM])
    written = _draw(documents, config.document_variants, [config.loop.seed, step, DOCUMENT_STREAM])
    shown = [text if new is None else new for text, new in zip(documents, written, strict=True)]
    if not config.weights.self_teaching:
        return Variants([text if new is None else new for text, new in zip(queries, drawn, strict=True)], shown, [], [])
    places = [place for place, new in enumerate(drawn) if new is not None]
    return Variants(list(queries), shown, [new for new in drawn if new is not None], places)


def self_teaching(changed_KD: Tensor, original_KD: Tensor, document_MD: Tensor, temperature: float) -> Tensor:
    """KL from the changed queries' distributions over the candidates to those of their originals, in nats per query.

        mean_k  sum_m p_k(m) (log p_k(m) - log s_k(m)),   p = softmax(cos(original, d) / tau), s the same of `changed`

    Args:
        changed_KD, original_KD: unit rows, one row per query; no gradient flows into `original_KD` or its scores.
        document_MD: unit rows of all candidates, false negatives too: what the original says of them is to be learned.
        temperature: tau of both.

    Returns:
        Scalar; 0, still attached to the graph, if there is no query or only one candidate.

    Source: arXiv 2204.00716, equation 4; the temperature is InfoNCE's.
    """
    student_KM = changed_KD.float() @ document_MD.float().T
    teacher_KM = original_KD.detach().float() @ document_MD.detach().float().T
    return score_distillation(student_KM, teacher_KM, temperature, temperature)


def _draw(texts: Sequence[str], shares: dict[str, float], seed: list[int]) -> list[str | None]:
    return draw_variants(texts, shares, np.random.default_rng(seed)) if shares else [None] * len(texts)

"""Fits a query projection to an index: a linear map of query embeddings, by judged queries and a hybrid search.

Each query has a soft target over the documents: its judgments, and the order in which vectors and words together find
them, as a teacher; what judgments alone would make the map forget. Embeddings are made once, so a fit takes seconds.

Shape suffixes: Q queries, R rows to train on (a query has one for each mode), M documents, D dimension, C columns of a
target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from search_r3.config import at_least, require
from search_r3.data.judged_queries import JudgedQuery
from search_r3.model.query_projection import QueryProjection
from search_r3.rank_fusion import fuse
from search_r3.ranking import top_k

MOST_DOCUMENTS = 100_000
"""Documents that are compared in a step. Of a larger index these are all that any target has, and others at random."""
DEPTH = 100
"""Length of the lists by meaning and by words that the teacher fuses."""
EVALUATIONS = 6
"""How often the held-out queries are measured in a fit."""

WordScores = Callable[[Sequence[str]], Sequence[Mapping[str, float]]]
"""For each text, the best documents of a search by words: document -> score."""


@dataclass(frozen=True)
class ModeSettings:
    """In which modes of the model queries are adapted; what a query projection and LoRA have in common."""

    mode_ratio: float = 0.25
    """Fraction of the queries that are also trained in each further mode of the model: with the reasoning that it wrote
    before, in latent steps, and with the first hits that it found before. 0: only directly; of the other modes, a LoRA
    query adapter then has reasoning alone, untrained."""
    max_reasoning_tokens: int = 32
    """Reasoning is cut at this many tokens."""
    seed: int = 0
    """Decides the order of the queries, and which are trained in other modes."""

    def __post_init__(self) -> None:
        at_least(self, max_reasoning_tokens=1, seed=0)
        require(0 <= self.mode_ratio <= 1, "mode_ratio", self.mode_ratio, "from 0 to 1")


@dataclass(frozen=True)
class LinearSettings(ModeSettings):
    """How a query projection is fitted."""

    steps: int = 150
    """Optimizer steps."""
    batch_size: int = 256
    """Rows per step."""
    learning_rate: float = 5e-4
    """AdamW's peak learning rate; it falls to 0 linearly."""
    temperatures: tuple[float, ...] = (0.02, 0.03)
    """Temperatures of the softmax over the index; that which is best on the held-out queries is kept."""
    teacher: float = 1.0
    """Weight of the teacher, where the judgments have 1; 0: only judgments."""
    teacher_temperature: float = 0.1
    """Temperature of the teacher's softmax over fused scores, which are from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, steps=1, batch_size=2)
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0 and finite")
        require(bool(self.temperatures), "temperatures", self.temperatures, "one or more")
        require(0 < min(self.temperatures) < math.inf, "temperatures", self.temperatures, "above 0 and finite")
        require(0 <= self.teacher < math.inf, "teacher", self.teacher, "0 or more and finite")
        require(
            0 < self.teacher_temperature < math.inf,
            "teacher_temperature",
            self.teacher_temperature,
            "above 0 and finite",
        )


@dataclass(frozen=True)
class Target:
    """What a query should find: documents by their numbers, and their weights, which need not sum to 1."""

    columns: np.ndarray
    weights: np.ndarray


def targets(
    score_QM: np.ndarray,
    queries: Sequence[JudgedQuery],
    column_of: Mapping[str, int],
    words: Sequence[Mapping[str, float]] | None,
    settings: LinearSettings,
) -> list[Target]:
    """The target of each query.

    Args:
        score_QM: its cosines with the documents.
        column_of: the column of each document, in the order of the columns.
        words: its documents by words, with their scores; None leaves the teacher out.
    """
    found, names = [], list(column_of)
    for line, query in enumerate(queries):
        grades = sum(query.relevant.values())
        weights = {name: grade / grades for name, grade in query.relevant.items()}
        if words is not None and settings.teacher:
            by_words = {name: score for name, score in words[line].items() if name in column_of}
            for name, share in _teacher(names, score_QM[line], by_words, settings.teacher_temperature).items():
                weights[name] = weights.get(name, 0.0) + settings.teacher * share
        columns = np.array([column_of[name] for name in weights], dtype=np.int64)
        found.append(Target(columns, np.array(list(weights.values()), np.float32)))
    return found


def _teacher(
    names: Sequence[str], score_M: np.ndarray, by_words: Mapping[str, float], temperature: float
) -> dict[str, float]:
    """Document -> share: the softmax of the scores of relative score fusion, both lists alike."""
    scores, columns = (found[0] for found in top_k(score_M[None], min(DEPTH, len(score_M))))
    by_meaning = {names[column]: score for column, score in zip(columns.tolist(), scores.tolist(), strict=True)}
    fused = dict(fuse("rsf", by_meaning, by_words, weight=0.5, depth=DEPTH))
    value = np.array(list(fused.values())) / temperature
    share = np.exp(value - value.max())
    return dict(zip(fused, (share / share.sum()).tolist(), strict=True))


@dataclass(frozen=True)
class Fitted:
    """A projection, and what it gives.

    Attributes:
        temperature, step: with which, and when, it was best.
        ndcg: nDCG@10 of the held-out queries then; of the first embeddings if no step was better.
    """

    projection: QueryProjection
    temperature: float
    step: int
    ndcg: float


def fit_projection(
    row_RD: np.ndarray,
    target_of: Sequence[Target],
    documents: Documents,
    measure: Callable[[QueryProjection], float],
    settings: LinearSettings,
) -> Fitted:
    """The best projection of those that were measured: each temperature, at several steps.

    Args:
        row_RD: embeddings to train on, unit rows.
        target_of: the target of each row.
        documents: what the rows are compared with.
        measure: nDCG@10 of the held-out queries with a projection.
    """
    unchanged = QueryProjection(np.zeros((row_RD.shape[1],) * 2, dtype=np.float32))
    best = Fitted(unchanged, settings.temperatures[0], 0, measure(unchanged))
    for temperature in settings.temperatures:
        for step, projection in _fits(torch.from_numpy(row_RD), target_of, documents, temperature, settings):
            if (value := measure(projection)) > best.ndcg:
                best = Fitted(projection, temperature, step, value)
    return best


class Documents:
    """The documents that rows are compared with: all, or of a large index a part (`MOST_DOCUMENTS`).

    Args:
        vector_ND: the index's chunks, those of a document adjacent.
        starts: the first chunk of each document.
        needed: numbers of documents that must be among them.
    """

    def __init__(self, vector_ND: np.ndarray, starts: np.ndarray, needed: np.ndarray, seed: int = 0) -> None:
        chosen = np.arange(len(starts))
        if len(chosen) > MOST_DOCUMENTS:
            others = np.setdiff1d(chosen, needed)
            room = max(0, MOST_DOCUMENTS - len(np.unique(needed)))
            picked = np.random.default_rng(seed).choice(others, min(room, len(others)), replace=False)
            chosen = np.union1d(needed, picked)
        ends = np.append(starts[1:], len(vector_ND))
        sizes = (ends - starts)[chosen]
        rows = np.concatenate([np.arange(starts[one], ends[one]) for one in chosen])
        self.place_of = {int(column): place for place, column in enumerate(chosen)}
        self._vector_ND = torch.from_numpy(vector_ND[rows] if len(rows) < len(vector_ND) else vector_ND)
        self._owner_N = torch.from_numpy(np.repeat(np.arange(len(chosen)), sizes))
        self._several = len(rows) > len(chosen)

    def cosines(self, query_BD: Tensor) -> Tensor:
        """Each query's cosine with each document's nearest chunk, (B, documents)."""
        cosine_BN = query_BD @ self._vector_ND.T
        if not self._several:
            return cosine_BN
        owner_BN = self._owner_N.expand(len(cosine_BN), -1)
        out_BM = cosine_BN.new_full((len(cosine_BN), len(self.place_of)), -2.0)
        return out_BM.scatter_reduce(1, owner_BN, cosine_BN, "amax")


def _fits(
    row_RD: Tensor, target_of: Sequence[Target], documents: Documents, temperature: float, settings: LinearSettings
) -> list[tuple[int, QueryProjection]]:
    """(step, projection) at `EVALUATIONS` steps of one fit."""
    column_RC, weight_RC = _padded(target_of, documents.place_of)
    order = np.random.default_rng(settings.seed)
    weight_DD = torch.zeros(row_RD.shape[1], row_RD.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight_DD], lr=settings.learning_rate, weight_decay=0.0)
    every = max(1, settings.steps // EVALUATIONS)
    found = []
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / settings.steps)
        chosen = torch.from_numpy(order.permutation(len(row_RD))[: settings.batch_size])
        query_BD = functional.normalize(row_RD[chosen] + row_RD[chosen] @ weight_DD, dim=-1)
        log_share_BM = functional.log_softmax(documents.cosines(query_BD) / temperature, dim=-1)
        loss = -(weight_RC[chosen] * log_share_BM.gather(1, column_RC[chosen])).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            found.append((step + 1, QueryProjection(weight_DD.detach().numpy().copy())))
    return found


def _padded(target_of: Sequence[Target], place_of: Mapping[int, int]) -> tuple[Tensor, Tensor]:
    """Columns, as places among the documents, and weights, (R, C) each; padding has weight 0."""
    longest = max(len(target.columns) for target in target_of)
    column_RC = torch.zeros(len(target_of), longest, dtype=torch.long)
    weight_RC = torch.zeros(len(target_of), longest)
    for line, target in enumerate(target_of):
        size = len(target.columns)
        column_RC[line, :size] = torch.tensor([place_of[int(column)] for column in target.columns])
        weight_RC[line, :size] = torch.from_numpy(target.weights)
    return column_RC, weight_RC

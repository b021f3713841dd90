"""The contrastive terms of a step, and the documents that each query is compared with.

Candidates are the documents of the batch, followed by those of earlier steps (cross-batch memory, arXiv 1912.06798).
Each has a key, so that a document that answers a query is never used as its negative.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.data.mining.teacher import key_of
from search_r3.data.pairs import TrainingPair
from search_r3.training.losses import info_nce, matryoshka, score_distillation, triplet_margin
from search_r3.training.ranking_losses import RANKING_LOSSES, cosines

POSITIVES_STREAM = 1
"""The random stream that draws a step's further positives."""


def batch_documents(pairs: Sequence[TrainingPair], positives: int, negatives: int, seed: int, step: int) -> list[str]:
    """The documents of a batch: each pair's positive, in order, then further positives, then explicit negatives.

    Args:
        positives: documents of a pair that answer its query, `positive` among them; the others are drawn at random from
            its `positives` by seed and step. A text that is in the batch already is not repeated.
        negatives: explicit negatives of a pair.
    """
    documents = [pair.positive for pair in pairs]
    if positives > 1:
        rng = np.random.default_rng([seed, step, POSITIVES_STREAM])
        present = set(documents)
        for pair in pairs:
            for i in rng.permutation(len(pair.positives))[: positives - 1]:
                text, _ = pair.positives[i]
                if text not in present:
                    present.add(text)
                    documents.append(text)
    for pair in pairs:
        documents.extend(pair.negatives[:negatives])
    return documents


def known_answers(pairs: Sequence[TrainingPair]) -> dict[str, dict[int, float]]:
    """Query -> the keys of all documents known to answer it -> grade, the highest where pairs differ."""
    answers: dict[str, dict[int, float]] = defaultdict(dict)
    keys: dict[str, int] = {}
    for pair in pairs:
        known = answers[pair.query]
        for text, grade in pair.relevant.items():
            if text not in keys:
                keys[text] = document_key(text)
            known[keys[text]] = max(grade, known.get(keys[text], grade))
    return answers


@dataclass
class Candidates:
    """The M documents that the queries of a step are compared with.

    Attributes:
        embedding_MD: unit rows; gradients flow into the rows of the batch, on the process that computed them.
        key_M: each document's key (int64, on the CPU); equal keys mean the same text.
        teacher_MD: the teacher's embeddings of the same documents, float32 unit rows; None without a teacher.
    """

    embedding_MD: Tensor
    key_M: np.ndarray
    teacher_MD: Tensor | None = None

    def false_negatives(self, answers: Sequence[Iterable[int]], target_B: Sequence[int]) -> Tensor:
        """True where a document answers the query but is not its target: (B, M) bool.

        Args:
            answers: for each query, the keys of all documents known to answer it.
            target_B: for each query, the index of its target.
        """
        mask = np.zeros((len(target_B), len(self.key_M)), dtype=bool)
        for row, (keys, target) in enumerate(zip(answers, target_B, strict=True)):
            mask[row] = np.isin(self.key_M, np.fromiter(keys, dtype=np.int64))
            mask[row, target] = False
        return torch.from_numpy(mask)

    def grades(self, answers: Sequence[Mapping[int, float]]) -> Tensor:
        """The grade of every document for every query, 0 where it is not known to answer it: (B, M) float32.

        Args:
            answers: for each query, the keys of all documents known to answer it, with their grades.
        """
        grade_BM = np.zeros((len(answers), len(self.key_M)), dtype=np.float32)
        for line, graded in enumerate(answers):
            places = np.flatnonzero(np.isin(self.key_M, np.fromiter(graded, dtype=np.int64)))
            grade_BM[line, places] = [graded[int(key)] for key in self.key_M[places]]
        return torch.from_numpy(grade_BM)


@dataclass
class ContrastiveSettings:
    """Settings of the terms; see the fields of the same names in `SFTConfig`."""

    temperature: float
    symmetric: bool = True
    margin: float = 0.15
    teacher_temperature: float = 0.05
    matryoshka: Sequence[int] = ()
    terms: frozenset[str] = frozenset({"infonce"})
    ranking_loss: str = "infonce"
    guide_margin: float | None = None


def contrastive_terms(
    query_BD: Tensor,
    target_B: Sequence[int],
    candidates: Candidates,
    mask_BM: Tensor,
    settings: ContrastiveSettings,
    teacher_query_BD: Tensor | None = None,
    grade_BM: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms named in `settings.terms` ("infonce", "triplet", "distillation"), each the mean over the queries.

    Args:
        query_BD: the queries' embeddings in one conversation, unit rows.
        target_B: for each query, the index of its document among the candidates.
        mask_BM: false negatives, see `Candidates.false_negatives`. For a `ranking_loss` other than "infonce" the grades
            say which documents are relevant; of the others, those masked are no negatives.
        teacher_query_BD: the teacher's embeddings of the same queries, for "distillation" and `guide_margin`.
        grade_BM: every candidate's grade for every query, see `Candidates.grades`; needed by each `ranking_loss` but
            "infonce", which then takes the place of InfoNCE under its name.
    """
    device = query_BD.device
    own_B = torch.tensor(list(target_B), dtype=torch.long, device=device)
    mask_BM = mask_BM.to(device)
    every = torch.arange(len(own_B), device=device)
    teacher_BM = None
    if teacher_query_BD is not None and candidates.teacher_MD is not None:
        teacher_BM = teacher_query_BD @ candidates.teacher_MD.T
    doubtful_BM = torch.zeros_like(mask_BM)
    if settings.guide_margin is not None:
        assert teacher_BM is not None
        doubtful_BM = doubtful_negatives(teacher_BM, own_B, mask_BM, settings.guide_margin)
    not_negative_BM = mask_BM | doubtful_BM

    def infonce(query_BD: Tensor, document_MD: Tensor) -> Tensor:
        forward = info_nce(query_BD, document_MD, own_B, settings.temperature, not_negative_BM)
        if not settings.symmetric:
            return forward
        # From documents to queries: the square part of the same matrix, transposed.
        mask_BB = not_negative_BM[:, own_B].T
        backward = info_nce(document_MD[own_B], query_BD, every, settings.temperature, mask_BB)
        return (forward + backward) / 2

    def ranking(query_BD: Tensor, document_MD: Tensor) -> Tensor:
        assert grade_BM is not None
        loss = RANKING_LOSSES[settings.ranking_loss]
        graded_BM = grade_BM.to(device)
        # A document that is neither positive nor negative is moved to where no negative counts.
        cos_BM = cosines(query_BD, document_MD).masked_fill(not_negative_BM & (graded_BM <= 0), -1)
        forward = loss(cos_BM, graded_BM, settings.temperature)
        if not settings.symmetric:
            return forward
        return (forward + loss(cos_BM[:, own_B].T, graded_BM[:, own_B].T, settings.temperature)) / 2

    terms: dict[str, Tensor] = {}
    if "infonce" in settings.terms:
        loss = infonce if settings.ranking_loss == "infonce" else ranking
        loss = loss if not settings.matryoshka else matryoshka(loss, list(settings.matryoshka))
        terms["infonce"] = loss(query_BD, candidates.embedding_MD)
    if "triplet" in settings.terms:
        near_BM = (query_BD.detach() @ candidates.embedding_MD.detach().T).masked_fill(not_negative_BM, -2)
        near_BM[every, own_B] = -2
        hardest_BD = candidates.embedding_MD[near_BM.argmax(1)]
        terms["triplet"] = triplet_margin(query_BD, candidates.embedding_MD[own_B], hardest_BD, settings.margin)
    if "distillation" in settings.terms:
        assert teacher_BM is not None
        student_BM = query_BD.float() @ candidates.embedding_MD.float().T
        terms["distillation"] = score_distillation(
            student_BM, teacher_BM, settings.temperature, settings.teacher_temperature, mask_BM
        )
    return terms


def doubtful_negatives(teacher_BM: Tensor, target_B: Tensor, mask_BM: Tensor, margin: float) -> Tensor:
    """True where the teacher finds a document nearly as close to the query as its target: (B, M) bool.

    Args:
        teacher_BM: the teacher's cosines of the queries with the candidates.
        target_B: for each query, the index of its target, which is never doubtful.
        mask_BM: documents known to answer a query, which are not doubtful either.
        margin: how much lower than the target's a doubtful document's cosine may be.

    Source: GISTEmbed (arXiv 2402.16829), section 3, whose margin is 0.
    """
    own_B1 = teacher_BM.gather(1, target_B[:, None])
    doubtful_BM = teacher_BM > own_B1 - margin
    return doubtful_BM.scatter(1, target_B[:, None], False) & ~mask_BM


class CrossBatchMemory:
    """A queue of recently encoded documents, used as additional negatives without a forward pass.

    Their embeddings come from slightly older weights, which change slowly after the first steps (arXiv 1912.06798).

    Args:
        size: number of documents to keep; the documents of a step are dropped together, once later ones suffice.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.steps: deque[Candidates] = deque()

    def extend(self, candidates: Candidates) -> Candidates:
        """`candidates`, followed by the documents in memory."""
        together = [candidates, *self.steps]
        embedding, teacher = candidates.embedding_MD, candidates.teacher_MD
        return Candidates(
            torch.cat([part.embedding_MD.to(embedding) for part in together]),
            np.concatenate([part.key_M for part in together]),
            None
            if teacher is None
            else torch.cat([part.teacher_MD.to(teacher) for part in together if part.teacher_MD is not None]),
        )

    def add(self, candidates: Candidates) -> None:
        """Add these documents, detached from the graph."""
        if not self.size:
            return
        teacher = candidates.teacher_MD
        self.steps.append(
            Candidates(
                candidates.embedding_MD.detach(), candidates.key_M, None if teacher is None else teacher.detach()
            )
        )
        while sum(len(step.key_M) for step in self.steps) - len(self.steps[0].key_M) >= self.size:
            self.steps.popleft()

    def fill(self, candidates: Candidates, batch_size: int) -> None:
        """Add many documents, as if by steps of `batch_size` documents each, so that they are dropped as gradually."""
        for start in range(0, len(candidates.key_M), batch_size):
            part = slice(start, start + batch_size)
            teacher = None if candidates.teacher_MD is None else candidates.teacher_MD[part]
            self.add(Candidates(candidates.embedding_MD[part], candidates.key_M[part], teacher))

    def state_dict(self) -> dict[str, Any]:
        """The documents in memory; {} if there are none."""
        if not self.steps:
            return {}
        state: dict[str, Any] = {
            "sizes": [len(step.key_M) for step in self.steps],
            "embedding": torch.cat([step.embedding_MD for step in self.steps]).cpu(),
            "key": torch.from_numpy(np.concatenate([step.key_M for step in self.steps])),
        }
        teachers = [step.teacher_MD for step in self.steps if step.teacher_MD is not None]
        return state | ({"teacher": torch.cat(teachers).cpu()} if teachers else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steps = deque()
        if not state:
            return
        sizes = [int(size) for size in state["sizes"]]
        teachers = state["teacher"].split(sizes) if "teacher" in state else [None] * len(sizes)
        for embedding, key, teacher in zip(
            state["embedding"].split(sizes), state["key"].split(sizes), teachers, strict=True
        ):
            self.steps.append(Candidates(embedding, key.numpy(), teacher))


def document_key(text: str) -> int:
    """The key of a document's text: 63 bits of SHA-256."""
    return key_of("document", text)

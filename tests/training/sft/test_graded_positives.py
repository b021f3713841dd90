"""Several graded positives of a query in stage 1: which documents enter a batch, and what each loss makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.training.config import LoopConfig, LoraSettings
from search_r3.training.losses import info_nce
from search_r3.training.ranking_losses import RANKING_LOSSES
from search_r3.training.sft.contrastive import (
    Candidates,
    ContrastiveSettings,
    batch_documents,
    contrastive_terms,
    document_key,
)
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask, known_answers

LETTERS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
PAIRS = [
    TrainingPair(
        f"p{i}", f"what is {name}", f"{name} is the letter number {i}", (f"{name} is no letter",),
        positives=tuple((f"{name} in sentence {n}", float(1 + n % 2)) for n in range(i % 4)), grade=2.0,
    )
    for i, name in enumerate(LETTERS)
]  # fmt: skip


def task_of(tiny_model: Path, pairs: list[TrainingPair] = PAIRS, **changes: Any) -> SFTTask:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "pairs": ["-"], "output": "-", "global_batch_size": 4, "dev": [], "reasoning_ratio": 0.0,
        "weights": LossWeights(sft=0, kl=0), "lora": LoraSettings(rank=4), "loop": LoopConfig(mixed_precision="no"),
    }  # fmt: skip
    return SFTTask(SFTConfig(**given | changes), checkpoints.load_base(tiny_model, dtype=torch.float32), pairs)


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# --- the documents of a batch


def test_a_batch_begins_with_the_positives_and_further_ones_come_before_the_negatives() -> None:
    documents = batch_documents(PAIRS, 3, 1, seed=0, step=5)
    assert documents[:8] == [pair.positive for pair in PAIRS]
    assert documents[-8:] == [pair.negatives[0] for pair in PAIRS]
    further = documents[8:-8]
    assert len(further) == sum(min(2, len(pair.positives)) for pair in PAIRS)
    assert set(further) <= {text for pair in PAIRS for text, _ in pair.positives}


def test_the_draw_is_a_function_of_seed_and_step() -> None:
    draws = [tuple(batch_documents(PAIRS, 2, 0, seed, step)) for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_every_further_positive_is_drawn_in_time() -> None:
    drawn = {text for step in range(60) for text in batch_documents(PAIRS[:4], 2, 0, 0, step)}
    assert drawn == {text for pair in PAIRS[:4] for text in pair.relevant}


def test_a_text_that_is_in_the_batch_already_is_not_repeated() -> None:
    shared = TrainingPair("a", "q", "one", positives=(("two", 1.0), ("three", 1.0)))
    other = TrainingPair("b", "r", "two", positives=(("three", 1.0),))
    assert batch_documents([shared, other], 3, 0, 0, 0) == ["one", "two", "three"]


def test_one_positive_a_pair_gives_the_documents_of_pairs_without_further_ones(tiny_model: Path) -> None:
    batch = task_of(tiny_model, negatives_per_pair=1).batch(0)
    positives, negatives = [pair.positive for pair in batch.pairs], [pair.negatives[0] for pair in batch.pairs]
    assert batch.documents == positives + negatives


# --- what is known of them


def test_the_highest_grade_counts_where_pairs_of_a_query_differ() -> None:
    pairs = [
        TrainingPair("a", "q", "one", positives=(("two", 3.0),)),
        TrainingPair("b", "q", "two", grade=1.0),
        TrainingPair("c", "r", "one", grade=0.5),
    ]
    one, two = document_key("one"), document_key("two")
    assert known_answers(pairs) == {"q": {one: 1.0, two: 3.0}, "r": {one: 0.5}}
    candidates = Candidates(torch.zeros(4, 2), np.array([two, 7, one, two], dtype=np.int64))
    grade_BM = candidates.grades([known_answers(pairs)[query] for query in ("q", "r")])
    assert grade_BM.tolist() == [[3.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.5, 0.0]]


def test_a_further_positive_is_no_negative_whether_it_is_drawn_or_not(tiny_model: Path) -> None:
    """Another pair's document that answers the query is masked, as other pairs' positives of the query are."""
    first = TrainingPair("a", "q", "one", positives=(("two", 1.0),))
    pairs = [first, TrainingPair("b", "r", "two"), TrainingPair("c", "s", "three")]
    task = task_of(tiny_model, pairs, global_batch_size=3)
    candidates = Candidates(torch.zeros(3, 2), np.array([document_key(text) for text in ("one", "two", "three")]))
    mask = candidates.false_negatives([task.answers[pair.query] for pair in pairs], [0, 1, 2])
    assert mask.int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


# --- the losses


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_default_is_info_nce_to_the_bit(symmetric: bool) -> None:
    query_BD, document_MD = unit(4, 8, seed=0), unit(7, 8, seed=1)
    mask_BM = torch.zeros(4, 7, dtype=torch.bool)
    mask_BM[0, 2] = mask_BM[1, 5] = True
    candidates = Candidates(document_MD, np.arange(7))
    found = contrastive_terms(query_BD, range(4), candidates, mask_BM, ContrastiveSettings(0.03, symmetric))
    own = torch.arange(4)
    expected = info_nce(query_BD, document_MD, own, 0.03, mask_BM)
    if symmetric:
        expected = (expected + info_nce(document_MD[own], query_BD, own, 0.03, mask_BM[:, own].T)) / 2
    assert torch.equal(found["infonce"], expected)


def test_further_positives_in_the_file_leave_a_default_step_as_it_is(tiny_model: Path) -> None:
    """A step's loss and gradient are those of the same pairs without grades and further positives, to the bit."""
    plain = [TrainingPair(p.id, p.query, p.positive, p.negatives) for p in PAIRS]
    found = []
    for pairs in (plain, PAIRS):
        task = task_of(tiny_model, pairs, negatives_per_pair=1)
        loss, _ = task.compute_loss(task.module, task.batch(2))
        loss.backward()
        found.append([loss, *(p.grad for p in task.module.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_a_ranking_loss_takes_infonces_place_in_both_directions(name: str) -> None:
    query_BD, document_MD = unit(3, 8, seed=0), unit(6, 8, seed=1)
    grade_BM = torch.tensor([[2.0, 0, 0, 1, 0, 0], [0, 1.0, 1.0, 0, 0, 0], [0, 0, 1.0, 0, 0, 0]])
    mask_BM = grade_BM > 0
    mask_BM[range(3), range(3)] = False
    candidates = Candidates(document_MD, np.arange(6))
    settings = ContrastiveSettings(0.1, ranking_loss=name)
    found = contrastive_terms(query_BD, range(3), candidates, mask_BM, settings, None, grade_BM)
    loss, cos_BM = RANKING_LOSSES[name], query_BD @ document_MD.T
    there, back = loss(cos_BM, grade_BM, 0.1), loss(cos_BM[:, :3].T, grade_BM[:, :3].T, 0.1)
    assert found["infonce"].item() == pytest.approx(((there + back) / 2).item(), rel=1e-6)
    settings = ContrastiveSettings(0.1, symmetric=False, ranking_loss=name)
    found = contrastive_terms(query_BD, range(3), candidates, mask_BM, settings, None, grade_BM)
    assert found["infonce"].item() == pytest.approx(there.item(), rel=1e-6)


def test_with_one_positive_each_multi_positive_is_info_nce(tiny_model: Path) -> None:
    plain = [TrainingPair(p.id, p.query, p.positive, p.negatives, grade=3.0) for p in PAIRS]
    values = []
    for name in ("infonce", "multi_positive"):
        task = task_of(tiny_model, plain, negatives_per_pair=1, ranking_loss=name)
        values.append(task.compute_loss(task.module, task.batch(0))[0].item())
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_a_few_steps_lower_a_ranking_loss(name: str, tiny_model: Path) -> None:
    task = task_of(
        tiny_model, PAIRS, ranking_loss=name, positives_per_pair=3, global_batch_size=8, matryoshka=[32, 16],
        temperature=0.1,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    values = []
    for _ in range(8):
        loss, figures = task.compute_loss(task.module, task.batch(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(figures["infonce"])
    assert values[-1] < values[0]


def test_a_remembered_positive_keeps_its_grade(tiny_model: Path) -> None:
    task = task_of(tiny_model, ranking_loss="multi_positive", positives_per_pair=3, cross_batch_memory_size=64)
    batch = task.batch(1)
    task.compute_loss(task.module, batch)
    query = next(pair for pair in batch.pairs if pair.positives)
    keys = np.array([document_key(text) for text in batch.documents])
    extended = task.memory.extend(Candidates(torch.zeros(1, task.checkpoint.contract.dimension), np.zeros(1, np.int64)))
    assert extended.key_M.tolist() == [0, *keys.tolist()]
    grades = extended.grades([task.answers[query.query]])[0, 1:]
    assert {text: grade for text, grade in zip(batch.documents, grades.tolist(), strict=True) if grade} == {
        text: grade for text, grade in query.relevant.items() if text in batch.documents
    }


@pytest.mark.parametrize("changes", [{"positives_per_pair": 0}, {"positives_per_pair": -1}])
def test_a_pair_has_one_positive_at_least(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="positives_per_pair must be 1 or more"):
        SFTConfig(pairs=["-"], output="-", **changes)


# --- documents that the teacher takes for answers


def test_a_document_that_the_teacher_ranks_above_the_positive_is_no_negative() -> None:
    query_BD, document_MD = unit(2, 8, seed=0), unit(5, 8, seed=1)
    teacher_query_BD, teacher_MD = (
        torch.eye(2),
        torch.tensor([[0.5, 0], [0, 0.9], [0.7, 0.3], [0.45, 0.5], [0.1, 0.85]]),
    )
    candidates = Candidates(document_MD, np.arange(5), teacher_MD)
    mask_BM = torch.zeros(2, 5, dtype=torch.bool)
    for margin, doubtful in ((0.0, [[2], []]), (0.1, [[2, 3], [4]]), (-0.3, [[], []])):
        expected_BM = torch.zeros(2, 5, dtype=torch.bool)
        for line, places in enumerate(doubtful):
            expected_BM[line, places] = True
        settings = ContrastiveSettings(0.1, symmetric=False, guide_margin=margin)
        found = contrastive_terms(query_BD, range(2), candidates, mask_BM, settings, teacher_query_BD)
        expected = info_nce(query_BD, document_MD, torch.arange(2), 0.1, expected_BM)
        assert torch.equal(found["infonce"], expected), margin


def test_a_doubtful_document_gets_no_gradient_from_a_ranking_loss_unless_it_is_a_positive() -> None:
    query_BD = unit(1, 8, seed=0)
    teacher_MD = torch.tensor([[0.5], [0.6], [0.7], [0.1]])
    grade_BM = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    for name in RANKING_LOSSES:
        document_MD = torch.nn.Parameter(unit(4, 8, seed=1))
        candidates = Candidates(document_MD, np.arange(4), teacher_MD)
        settings = ContrastiveSettings(0.1, symmetric=False, ranking_loss=name, guide_margin=0.0)
        mask_BM = torch.tensor([[False, False, True, False]])
        contrastive_terms(query_BD, [0], candidates, mask_BM, settings, torch.ones(1, 1), grade_BM)[
            "infonce"
        ].backward()
        assert document_MD.grad is not None
        moved = document_MD.grad.abs().sum(1) > 0
        assert moved.tolist() == [True, False, True, True], name

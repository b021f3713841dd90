"""A query with reasoning teaches its direct embedding: against an independent formula, and within a task."""

from __future__ import annotations

from dataclasses import replace
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
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask
from search_r3.training.sft.view_distillation import taught_rows, view_distillation

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
ONLY = LossWeights(sft=0, kl=0, infonce=0, view_distillation=1.0)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def some_pairs() -> list[TrainingPair]:
    return [
        TrainingPair(
            id=word,
            query=f"what is {word}",
            positive=f"{word} is letter number {i}",
            reasoning=f"letter {word}" if i % 2 else None,
            source="greek",
        )
        for i, word in enumerate(WORDS)
    ]


def task_of(tiny_model: Path, **changes: Any) -> SFTTask:
    settings: dict[str, Any] = {
        "pairs": ["-"], "output": "-", "global_batch_size": 8, "dev": [], "reasoning_ratio": 1.0, "temperature": 0.1,
        "view_temperature": 0.2, "lora": LoraSettings(rank=4), "loop": LoopConfig(seed=3), "weights": ONLY,
    }  # fmt: skip
    torch.manual_seed(0)
    checkpoint = checkpoints.load_base(tiny_model, dtype=torch.float32)
    return SFTTask(SFTConfig(**settings | changes), checkpoint, some_pairs())


def test_it_is_the_mean_kl_from_the_reading_view_s_distribution_over_the_candidates_that_are_left():
    student, teacher, documents = unit(2, 6), unit(2, 6, seed=1), unit(4, 6, seed=2)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 3] = True
    expected = []
    for b, left in enumerate(([0, 1, 2, 3], [0, 1, 2])):
        p, s = (np.exp((x[b] @ documents[left].T).numpy() / 0.2) for x in (teacher, student))
        p, s = p / p.sum(), s / s.sum()
        expected.append(np.sum(p * np.log(p / s)))
    assert view_distillation(student, teacher, documents, 0.2, mask).item() == pytest.approx(np.mean(expected))
    assert view_distillation(student, student, documents, 0.2, mask).item() == pytest.approx(0, abs=1e-12)


def test_its_gradient_is_that_of_finite_differences_with_the_teacher_s_scores_held():
    student, documents = unit(2, 5).requires_grad_(), unit(3, 5, seed=2).requires_grad_()
    teacher = unit(2, 5, seed=1).requires_grad_()
    mask = torch.zeros(2, 3, dtype=torch.bool)
    view_distillation(student, teacher, documents, 0.3, mask).backward()
    assert teacher.grad is None
    p = ((teacher @ documents.T) / 0.3).softmax(-1).detach()

    def held(student: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return (p * (p.log() - ((student @ documents.T) / 0.3).log_softmax(-1))).sum(-1).mean()

    assert torch.autograd.gradcheck(held, (student, documents))
    expected = torch.autograd.grad(held(student, documents), (student, documents))
    for ours, theirs in zip((student.grad, documents.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_computed_in_float32_inside_autocast():
    student, teacher, documents = (unit(3, 8, seed=seed).float() for seed in range(3))
    mask = torch.zeros(3, 3, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = view_distillation(student, teacher, documents, 0.02, mask)
    assert inside.item() == pytest.approx(view_distillation(student, teacher, documents, 0.02, mask).item(), rel=1e-6)


def test_only_given_reasoning_teaches():
    assert taught_rows([0, 1, 2, 3], [1, 3], [False, False]) == [(1, 0), (3, 1)]
    assert taught_rows([0, 1, 2, 3], [1, 3], [True, False]) == [(3, 1)]
    assert taught_rows([2, 3], [1, 3], [False, False]) == [(1, 1)]
    assert taught_rows([0, 1], [], []) == []


def test_a_task_computes_it_over_the_pairs_that_have_reasoning(tiny_model: Path):
    task = task_of(tiny_model)
    batch = task.batch(0)
    assert len(batch.with_reasoning) == 4
    loss, figures = task.compute_loss(task.module, batch)
    assert loss.item() == pytest.approx(figures["view_distillation"])
    with torch.no_grad():
        encoded = task.policy(batch.parts)
    documents = encoded["document"].embedding_BD
    found = F.kl_div(
        (encoded["query"].embedding_BD[batch.with_reasoning] @ documents.T / 0.2).log_softmax(-1),
        (encoded["reasoning"].embedding_BD @ documents.T / 0.2).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    assert figures["view_distillation"] == pytest.approx(found.item(), rel=1e-4)
    assert found > 0


def test_without_its_weight_there_is_no_such_term_and_without_a_teacher_it_is_0(tiny_model: Path):
    task = task_of(tiny_model, weights=LossWeights(sft=0, kl=0))
    loss, figures = task.compute_loss(task.module, task.batch(0))
    assert "view_distillation" not in figures
    assert loss.item() == figures["infonce"]
    task = task_of(tiny_model, weights=replace(ONLY, infonce=1.0))
    batch = task.batch(0)
    batch.self_generated = [True] * len(batch.with_reasoning)
    with_term, figures = task.compute_loss(task.module, batch)
    assert figures["view_distillation"] == 0
    assert with_term.item() == loss.item()


def test_training_brings_the_direct_ranking_to_that_of_the_reading_view(tiny_model: Path):
    task = task_of(tiny_model)
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    curve = []
    for step in range(20):
        loss, figures = task.compute_loss(task.module, task.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(figures["view_distillation"])
    assert np.mean(curve[-3:]) < 0.5 * np.mean(curve[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reasoning_ratio": 0.0}, "weights.view_distillation learns from pairs' given reasoning"),
        ({"self_reasoning_ratio": 1.0}, "self_reasoning_ratio below 1"),
        ({"view_temperature": 0.0}, "view_temperature must be above 0"),
        ({"weights": LossWeights(view_distillation=0), "view_temperature": -1}, "view_temperature must be above 0"),
    ],
)
def test_a_recipe_in_which_nothing_could_teach_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        SFTConfig(**{"pairs": ["-"], "output": "-", "weights": ONLY} | changes)

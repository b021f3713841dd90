"""Queries predicted from the batch's documents: against an independent formula, and within a task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_view_distillation import task_of

from search_r3.errors import InputError
from search_r3.training.sft.in_batch_lm import choose_query_documents, in_batch_lm_loss, mean_log_probs
from search_r3.training.sft.sft_config import LossWeights, SFTConfig

ONLY = LossWeights(sft=0, kl=0, infonce=0, in_batch_lm=1.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_that_of_the_mixture_of_the_documents_predictions():
    cosine, log_prob = random(3, 4), -random(3, 4, seed=1).abs()
    expected = 0.0
    for q in range(3):
        weights = np.exp(cosine[q].numpy() / 0.5)
        expected -= math.log(sum(weights / weights.sum() * np.exp(log_prob[q].numpy()))) / 3
    assert in_batch_lm_loss(cosine, log_prob, 0.5).item() == pytest.approx(expected)


def test_its_gradient_is_that_of_finite_differences_and_favors_the_document_that_explains_the_query():
    cosine, log_prob = random(2, 3).requires_grad_(), (-random(2, 3, seed=1).abs()).requires_grad_()
    assert torch.autograd.gradcheck(lambda c, p: in_batch_lm_loss(c, p, 0.3), (cosine, log_prob))
    cosine = torch.zeros(1, 2, requires_grad=True)
    in_batch_lm_loss(cosine, torch.tensor([[-1.0, -5.0]]), 0.1).backward()
    assert cosine.grad is not None
    assert cosine.grad[0, 0] < 0 < cosine.grad[0, 1]  # the step is against the gradient


def test_a_row_s_log_probability_is_the_mean_over_its_tokens():
    logits, target = random(5, 7), torch.tensor([0, 3, 6, 2, 2])
    expected = logits.log_softmax(1)[torch.arange(5), target]
    found = mean_log_probs(logits, target, [2, 3])
    torch.testing.assert_close(found, torch.stack([expected[:2].mean(), expected[2:].mean()]))


def test_each_query_is_read_with_its_own_document_first_and_different_others():
    query_documents = choose_query_documents(np.random.default_rng(0), pairs=6, documents=12, queries=4, per_query=3)
    assert len(set(query_documents.queries)) == 4
    for pair, documents in zip(query_documents.queries, query_documents.documents, strict=True):
        assert documents[0] == pair
        assert len(set(documents)) == 3
    assert query_documents.rows[:3] == [
        (document, query_documents.queries[0]) for document in query_documents.documents[0]
    ]
    few = choose_query_documents(np.random.default_rng(0), pairs=2, documents=2, queries=4, per_query=4)
    assert [len(documents) for documents in few.documents] == [2, 2]


def test_rows_are_a_document_with_the_query_behind_it(tiny_model: Path):
    task = task_of(tiny_model, weights=ONLY, in_batch_lm_queries=2, in_batch_lm_documents=3)
    batch = task.batch(0)
    part, query_documents = batch.parts["in_batch_lm"], batch.query_documents
    assert query_documents is not None
    assert len(part.rows) == 6
    for row, n, (document, pair) in zip(part.rows, part.num_target_tokens, query_documents.rows, strict=True):
        assert task.collator.tokenizer.decode(row).startswith(batch.documents[document] + "<|im_end|>")
        assert task.collator.tokenizer.decode(row[-n:]) == batch.pairs[pair].query
    assert batch == task_of(tiny_model, weights=ONLY, in_batch_lm_queries=2, in_batch_lm_documents=3).batch(0)
    assert task.batch(1).query_documents != query_documents


def test_the_term_is_that_of_plain_forward_passes(tiny_model: Path):
    task = task_of(tiny_model, weights=ONLY, in_batch_lm_queries=2, in_batch_lm_documents=3)
    batch = task.batch(0)
    loss, figures = task.compute_loss(task.module, batch)
    part, query_documents = batch.parts["in_batch_lm"], batch.query_documents
    assert query_documents is not None
    found = []
    with torch.no_grad():
        encoded = task.policy(batch.parts)
        for row, n in zip(part.rows, part.num_target_tokens, strict=True):
            logits = task.policy.model(torch.tensor([[*part.prefix, *row]])).logits[0, -1 - n : -1]
            log_probs = logits[:, : task.policy.vocab_size].log_softmax(-1)
            found.append(log_probs[torch.arange(n), torch.tensor(row[-n:])].mean())
        cosine = encoded["query"].embedding_BD @ encoded["document"].embedding_BD.T
    cosine_QJ = torch.stack(
        [cosine[pair, read] for pair, read in zip(query_documents.queries, query_documents.documents, strict=True)]
    )
    expected = in_batch_lm_loss(cosine_QJ, torch.stack(found).view(2, 3), task.config.temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert figures["in_batch_lm"] == pytest.approx(loss.item())


def test_without_its_weight_nothing_changes_and_with_it_training_lowers_it(tiny_model: Path):
    plain = task_of(tiny_model, weights=LossWeights())
    assert "in_batch_lm" not in plain.batch(0).parts
    assert "in_batch_lm" not in plain.compute_loss(plain.module, plain.batch(0))[1]
    task = task_of(tiny_model, weights=ONLY)
    parts = {name: part for name, part in task.batch(0).parts.items() if name != "in_batch_lm"}
    assert parts == task_of(tiny_model, weights=LossWeights(sft=0, kl=0)).batch(0).parts
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    curve = []
    for step in range(15):
        loss, figures = task.compute_loss(task.module, task.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(figures["in_batch_lm"])
    assert np.mean(curve[-3:]) < 0.8 * np.mean(curve[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_batch_lm_queries": 0}, "in_batch_lm_queries must be 1 or more"),
        ({"in_batch_lm_documents": 1}, "in_batch_lm_documents must be 2 or more"),
    ],
)
def test_a_recipe_with_too_few_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        SFTConfig(**{"pairs": ["-"], "output": "-"} | changes)

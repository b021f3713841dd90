"""False words: which rows get them, that their tokens are no targets, that they are fitted to the direct ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_view_distillation import some_pairs, task_of

from search_r3.data.beir import BeirDataset, Document
from search_r3.errors import InputError
from search_r3.training import dev_evaluation
from search_r3.training.config import LoopConfig
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.trust import direct_and_false, false_reasoning
from search_r3.training.sft.view_distillation import view_distillation

ONLY_TRUST = LossWeights(sft=0, kl=0, infonce=0, trust=1.0)


def config(**changes) -> SFTConfig:
    return SFTConfig(pairs=["-"], output="-", dev=[], loop=LoopConfig(seed=3), **changes)


def test_rows_get_another_querys_words_or_none_in_their_shares() -> None:
    pairs = [replace(pair, reasoning=f"letter {pair.id}") for pair in some_pairs()]
    shares = config(shuffled_reasoning_ratio=0.4, empty_reasoning_ratio=0.2)
    drawn = [false_reasoning(shares, step, pairs) for step in range(100)]
    assert drawn[7] == false_reasoning(shares, 7, pairs)
    words = [(i, text) for one in drawn for i, text in one.items()]
    known = {pair.reasoning for pair in pairs}
    assert all(text == "" or (text in known and text != pairs[i].reasoning) for i, text in words)
    assert np.mean([text != "" for _, text in words]) == pytest.approx(2 / 3, abs=0.07)
    assert len(words) / 800 == pytest.approx(0.6, abs=0.05)
    assert false_reasoning(config(), 7, pairs) == {}


def test_words_of_the_same_answer_are_not_false() -> None:
    one = some_pairs()[1]
    same = [replace(one, id="b", query="another wording"), replace(one, id="c", positive="another document")]
    every = config(shuffled_reasoning_ratio=1.0)
    assert false_reasoning(every, 0, [one, *same]) == {}, "one has the same positive, the other the same query"


def test_shares_do_not_change_which_rows_are_trained_with_reasoning(tiny_model: Path) -> None:
    plain = task_of(tiny_model).batch(0)
    task = task_of(tiny_model, shuffled_reasoning_ratio=0.5, empty_reasoning_ratio=0.2, weights=LossWeights())
    batch = task.batch(0)
    assert [pair.id for pair in batch.pairs] == [pair.id for pair in plain.pairs]
    assert set(plain.with_reasoning) <= set(batch.with_reasoning), "pairs without reasoning may read false words"
    rows, false = batch.parts["reasoning"], batch.false_words
    assert any(false.values())
    for row, targets, i in zip(rows.rows, rows.num_target_tokens, batch.with_reasoning, strict=True):
        words = false.get(i, batch.pairs[i].reasoning)
        ids = task.collator.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        assert row[-len(ids) - 1 : -1] == ids[: task.config.max_reasoning_tokens]
        assert targets == (0 if i in false else len(ids) + 1)
    assert not any(own for own, i in zip(batch.self_generated, batch.with_reasoning, strict=True) if i in false)


def test_false_words_are_fitted_to_the_direct_ranking_which_gets_no_gradient(tiny_model: Path) -> None:
    task = task_of(tiny_model, shuffled_reasoning_ratio=0.5, empty_reasoning_ratio=0.3, weights=ONLY_TRUST)
    task.module.eval()
    batch = task.batch(0)
    loss, metrics = task.compute_loss(task.module, batch)
    embedding = {name: one.embedding_BD for name, one in task.module(batch.parts).items()}
    pairs, student, teacher = direct_and_false(embedding, batch.with_reasoning, batch.false_words)
    assert pairs == [i for i in batch.with_reasoning if i in batch.false_words]
    mask = torch.zeros(len(pairs), len(batch.documents), dtype=torch.bool)
    expected = view_distillation(student, teacher, embedding["document"], 0.2, mask)
    assert metrics["rows_false"] == len(pairs) > 0
    assert loss.item() == pytest.approx(metrics["trust"]) == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() > 0
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    for _ in range(8):
        loss, _ = task.compute_loss(task.module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * expected.item()


def test_shares_above_one_are_refused() -> None:
    with pytest.raises(InputError, match="from 0 to 1 together with empty_reasoning_ratio"):
        config(shuffled_reasoning_ratio=0.7, empty_reasoning_ratio=0.5)
    with pytest.raises(InputError, match="empty_reasoning_ratio"):
        config(empty_reasoning_ratio=-0.1)


def test_dev_metrics_tell_given_words_from_another_querys(tiny_model: Path) -> None:
    from search_r3 import SearchR3

    model = SearchR3.from_pretrained(tiny_model, device="cpu")
    pairs = some_pairs()
    pool = BeirDataset(
        "greek.dev",
        {pair.id: Document(pair.id, "", pair.positive) for pair in pairs},
        {pair.id: pair.query for pair in pairs},
        {pair.id: {pair.id: 1} for pair in pairs},
    )
    assert not {"given", "shuffled"} & set(dev_evaluation.pool_metrics(model, pool, 32, 4))
    pool.reasoning = {pair.id: pair.positive for pair in pairs}
    found = dev_evaluation.dev_metrics(model, [pool], 32, 4)
    words = list(pool.reasoning.values())
    documents = model.encode_document([pair.positive for pair in pairs], max_length=32)
    rows = model.encode_query(list(pool.queries.values()), reasoning_text=words)
    expected = dev_evaluation.metrics.ndcg(rows @ documents.T, np.eye(len(pairs)), 10).mean()
    assert found["greek.dev.given"] == pytest.approx(expected, abs=1e-5)
    assert found["greek.dev.shuffled"] != found["greek.dev.given"]

"""Noisy queries in stage 1: what changes, what stays, and the term that trains them to match their originals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from search_r3 import SearchR3
from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.capitals import fold_capitals
from search_r3.model.tokenization import encode_as_text
from search_r3.training.config import LoopConfig, LoraSettings
from search_r3.training.sft.contrastive import document_key
from search_r3.training.sft.query_augmentation import self_teaching
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
PAIRS = [
    TrainingPair(
        id=f"p{i}",
        query=f"what is the letter {word} in Greek",
        positive=f"{word} is the letter number {i}",
        negatives=(f"{WORDS[(i + 1) % 8]} is another letter",),
        reasoning=f"letter {word}" if i % 2 else None,
        source="greek",
    )
    for i, word in enumerate(WORDS)
]


def task_of(tiny_model: Path, **changes: Any) -> SFTTask:
    settings: dict[str, Any] = {
        "pairs": ["-"],
        "output": "-",
        "global_batch_size": 4,
        "negatives_per_pair": 1,
        "dev": [],
        "reasoning_ratio": 1.0,
    }
    config = SFTConfig(**settings | {"lora": LoraSettings(rank=4), "loop": LoopConfig(seed=3)} | changes)
    return SFTTask(config, checkpoints.load_base(tiny_model, dtype=torch.float32), PAIRS)


def texts_of(task: SFTTask, rows: Any, suffix: int) -> list[str]:
    return [task.collator.tokenizer.decode(row[: len(row) - suffix]) for row in rows.rows]


def test_a_recipe_of_today_changes_nothing(tiny_model: Path) -> None:
    plain, off = task_of(tiny_model), task_of(tiny_model, query_variants={"upper": 0.0}, document_variants={})
    for step in range(3):
        one, other = plain.batch(step), off.batch(step)
        assert one == other
        assert set(one.parts) == {"document", "query", "reasoning"}
        (query,) = {tuple(row) for row in encode_as_text(plain.collator.tokenizer, [one.pairs[0].query])}
        assert one.parts["query"].rows[0] == [*query, *plain.collator.query.suffix]
    assert "self_teaching" not in plain.compute_loss(plain.module, plain.batch(0))[1]


def test_changed_texts_take_the_originals_places_and_answers_are_known_by_the_originals(tiny_model: Path) -> None:
    task = task_of(tiny_model, query_variants={"upper": 1.0}, document_variants={"upper": 1.0})
    plain = task_of(tiny_model).batch(0)
    batch = task.batch(0)
    assert (batch.pairs, batch.documents, batch.with_reasoning) == (
        plain.pairs, plain.documents, plain.with_reasoning
    )  # fmt: skip
    suffix = len(task.collator.query.suffix)
    assert texts_of(task, batch.parts["query"], suffix) == [pair.query.upper() for pair in plain.pairs]
    assert texts_of(task, batch.parts["document"], suffix) == [text.upper() for text in plain.documents]
    assert all("WHAT IS" in text for text in texts_of(task, batch.parts["reasoning"], 0))
    assert all("letter " in text for text in texts_of(task, batch.parts["reasoning"], 0))  # the trace stays
    assert "changed" not in batch.parts
    candidates = task._candidates(batch.documents, torch.zeros(len(batch.documents), 32))
    assert candidates.key_M.tolist() == [document_key(text) for text in plain.documents]


def test_a_share_is_changed_by_seed_and_step_alone(tiny_model: Path) -> None:
    task, again = (task_of(tiny_model, query_variants={"typos": 0.3, "lower": 0.2}) for _ in range(2))
    plain = task_of(tiny_model)
    changed = 0
    for step in range(40):
        rows = task.batch(step).parts["query"].rows
        assert rows == again.batch(step).parts["query"].rows
        changed += sum(row != old for row, old in zip(rows, plain.batch(step).parts["query"].rows, strict=True))
    assert 0.35 < changed / 160 < 0.65
    assert len({tuple(map(tuple, task.batch(2 * epoch).parts["query"].rows)) for epoch in range(6)}) == 6


def test_with_self_teaching_the_originals_stay_and_the_changed_are_beside_them(tiny_model: Path) -> None:
    weights = LossWeights(self_teaching=1.0)
    task = task_of(tiny_model, query_variants={"upper": 0.5}, weights=weights)
    plain = task_of(tiny_model).batch(1)
    batch = task.batch(1)
    assert batch.parts["query"].rows == plain.parts["query"].rows
    assert batch.parts["reasoning"].rows == plain.parts["reasoning"].rows
    assert 0 < len(batch.changed_of) < 4
    shown = texts_of(task, batch.parts["changed"], len(task.collator.query.suffix))
    assert shown == [batch.pairs[i].query.upper() for i in batch.changed_of]
    loss, figures = task.compute_loss(task.module, batch)
    expected = sum(getattr(weights, name) * figures[name] for name in ("sft", "kl", "infonce", "self_teaching"))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    encoded = task.module(batch.parts)
    query, changed, documents = (encoded[name].embedding_BD.detach() for name in ("query", "changed", "document"))
    p = F.softmax(query[batch.changed_of] @ documents.T / 0.03, dim=-1)
    s = F.softmax(changed @ documents.T / 0.03, dim=-1)
    assert figures["self_teaching"] == pytest.approx((p * (p / s).log()).sum(1).mean().item(), rel=1e-4)
    assert figures["self_teaching"] > 1e-3


def test_a_step_without_a_changed_query_has_the_term_at_zero(tiny_model: Path) -> None:
    task = task_of(tiny_model, query_variants={"upper": 1e-9}, weights=LossWeights(self_teaching=1.0))
    loss, figures = task.compute_loss(task.module, task.batch(0))
    assert figures["self_teaching"] == 0
    loss.backward()


def test_self_teaching_draws_the_changed_queries_to_their_originals(tiny_model: Path) -> None:
    weights = LossWeights(sft=0, kl=0, infonce=0, self_teaching=1.0)
    task = task_of(tiny_model, query_variants={"upper": 1.0}, weights=weights, reasoning_ratio=0.0)
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    curve = []
    for step in range(30):
        loss, figures = task.compute_loss(task.module, task.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(figures["self_teaching"])
    assert np.mean(curve[-5:]) < 0.5 * np.mean(curve[:5])


def test_the_term_is_kl_and_only_the_changed_queries_and_the_documents_get_a_gradient() -> None:
    def unit(*shape: int, seed: int) -> torch.Tensor:
        rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return F.normalize(rows, dim=-1).requires_grad_()

    changed, original, documents = unit(3, 8, seed=0), unit(3, 8, seed=1), unit(5, 8, seed=2)
    loss = self_teaching(changed, original, documents, 0.1)
    p, s = (F.softmax(rows @ documents.T / 0.1, dim=-1) for rows in (original, changed))
    assert loss.item() == pytest.approx(F.kl_div(s.log(), p, reduction="batchmean").item(), rel=1e-5)
    loss.backward()
    assert original.grad is None
    assert changed.grad is not None
    assert changed.grad.abs().sum() > 0
    assert self_teaching(original, original, documents, 0.1).item() == pytest.approx(0, abs=1e-6)
    step = 1e-3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        above, below = (self_teaching(changed + sign * step, original, documents, 0.1) for sign in (1, -1))
    assert (changed.grad * step).sum().item() == pytest.approx((above - below).item() / 2, rel=0.05, abs=1e-4)


def test_an_adapter_that_folds_capitals_trains_on_folded_texts_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    task = task_of(tiny_model, query_variants={"upper": 1.0}, document_variants={"upper": 1.0}, fold_capitals=True)
    batch = task.batch(0)
    suffix = len(task.collator.query.suffix)
    wanted = [fold_capitals(pair.query.upper()) for pair in batch.pairs]
    assert wanted[0].startswith("What is the letter")
    assert texts_of(task, batch.parts["query"], suffix) == wanted
    assert texts_of(task, batch.parts["document"], suffix) == [fold_capitals(d.upper()) for d in batch.documents]
    assert "WHAT" not in "".join(texts_of(task, batch.parts["reasoning"], 0))
    assert task._encoder().contract.fold_capitals
    task.save(tmp_path / "adapter")
    model = SearchR3.from_pretrained(tmp_path / "adapter", device="cpu")
    assert model.contract.fold_capitals
    shouted, ordinary = "WHAT IS THE LETTER BETA", "What is the letter beta"
    assert np.array_equal(model.encode_document([shouted]), model.encode_document([ordinary]))


def test_an_adapter_keeps_what_it_did_with_capitals_unless_the_recipe_says_otherwise(tiny_model: Path) -> None:
    assert not task_of(tiny_model).checkpoint.contract.fold_capitals
    for said, expected in ((None, True), (False, False)):
        base = checkpoints.load_base(tiny_model, dtype=torch.float32)
        folding = replace(base, contract=replace(base.contract, fold_capitals=True))
        config = SFTConfig(pairs=["-"], output="-", global_batch_size=4, dev=[], fold_capitals=said)
        assert SFTTask(config, folding, PAIRS).checkpoint.contract.fold_capitals is expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_variants": {"typo": 0.1}}, r'query_variants: unknown kind "typo"; did you mean "typos"\?'),
        ({"query_variants": {"typos": 1.5}}, "query_variants: the shares are 1.5 together"),
        ({"document_variants": {"typos": 0.1}}, 'document_variants: unknown kind "typos"'),
        ({"weights": LossWeights(self_teaching=0.1)}, "weights.self_teaching needs changed queries"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SFTConfig(pairs=["-"], output="-", **changes)

"""Stage 1 in latent steps: a third conversation of some queries, in the loss, the contract and the dev figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_view_distillation import task_of

from search_r3 import SearchR3
from search_r3.data.beir import BeirDataset, Document
from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import CONTRACT_FILE
from search_r3.prompts import LatentConversation, Prompts, latent_conversation, with_latent_steps
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask, train_sft

WEIGHTS = LossWeights(sft=0.1, kl=0.1, view_distillation=0.5)
LATENT: dict[str, Any] = {"latent_steps": 2, "latent_ratio": 0.9, "weights": WEIGHTS}


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    pairs = [
        TrainingPair(f"p{i}", f"what is letter {i}", f"number {i} is a letter", reasoning=f"letter {i}", source="greek")
        for i in range(8)
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs)

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({
            "pairs": [str(tmp_path / "pairs.jsonl")], "output": str(tmp_path / name), "base": str(tiny_model),
            "global_batch_size": 4, "reasoning_ratio": 0.9, "latent_steps": 2, "latent_ratio": 0.7, "dev": [],
            "lora": {"rank": 4}, "weights": {"sft": 0.1, "kl": 0.1, "view_distillation": 0.5},
            "loop": {"steps": 4, "learning_rate": 0.01, "warmup_steps": 1, "checkpoint_every": 1,
                     "evaluate_every": 0, "mixed_precision": "no"},
        }))  # fmt: skip
        return path

    return write


def test_latent_rows_are_those_queries_behind_their_own_conversation(tiny_model: Path) -> None:
    task = task_of(tiny_model, **LATENT)
    batch = task.batch(0)
    part = batch.parts["latent"]
    assert part.latent_steps == 2
    assert part.num_target_tokens == [0] * len(part.rows)
    for i, row in zip(batch.with_latent, part.rows, strict=True):
        assert task.collator.tokenizer.decode(row).startswith(batch.pairs[i].query + "<|im_end|>")
        assert task.collator.tokenizer.decode(row).endswith("The embedding is")
    assert set(batch.with_reasoning) <= set(task_of(tiny_model, **LATENT | {"latent_ratio": 1.0}).batch(0).with_latent)
    few = task_of(tiny_model, **LATENT | {"latent_ratio": 0.4}).batch(0)
    assert len(few.with_latent) < len(batch.with_latent)
    assert set(few.with_latent) <= set(batch.with_latent)


def test_latent_rows_change_no_other_row_and_without_them_all_is_as_before(tiny_model: Path) -> None:
    batch, plain = task_of(tiny_model, **LATENT).batch(1), task_of(tiny_model, weights=WEIGHTS).batch(1)
    assert "latent" not in plain.parts
    assert plain.with_latent == []
    assert {name: part for name, part in batch.parts.items() if name != "latent"} == plain.parts
    task = task_of(tiny_model, weights=WEIGHTS)
    assert not any("latent" in name for name in task.compute_loss(task.module, plain)[1])
    assert task.checkpoint.contract.prompts == Prompts()


def test_the_loss_is_the_weighted_sum_and_latent_rows_count_as_the_others(tiny_model: Path) -> None:
    task = task_of(tiny_model, **LATENT)
    batch = task.batch(0)
    loss, figures = task.compute_loss(task.module, batch)
    names = ("sft", "kl", "infonce", "view_distillation")
    assert loss.item() == pytest.approx(sum(getattr(WEIGHTS, name) * figures[name] for name in names), rel=1e-5)
    rows = {"query": 8, "reasoning": len(batch.with_reasoning), "latent": len(batch.with_latent)}
    mean = sum(n * figures[f"infonce_{part}"] for part, n in rows.items()) / sum(rows.values())
    assert figures["infonce"] == pytest.approx(mean, rel=1e-5)
    assert figures["rows_latent"] == len(batch.with_latent) > 0
    spoken = task_of(tiny_model, weights=WEIGHTS)
    before = spoken.compute_loss(spoken.module, spoken.batch(0))[1]
    for name in ("sft", "kl", "infonce_query", "infonce_reasoning"):  # the terms of words are averaged as without
        assert figures[name] == pytest.approx(before[name], rel=1e-5, abs=1e-6)


def test_training_lowers_the_latent_terms(tiny_model: Path) -> None:
    task = task_of(tiny_model, **LATENT | {"weights": LossWeights(sft=0, kl=0, view_distillation=1.0)})
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    curve = []
    for step in range(25):
        loss, figures = task.compute_loss(task.module, task.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(figures["infonce_latent"])
    assert np.mean(curve[-3:]) < 0.7 * np.mean(curve[:3])


def test_a_killed_run_goes_on_with_the_same_weights_and_the_adapter_has_the_mode(
    recipe: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_sft(recipe("whole"))
    original = SFTTask.batch

    def dying(self: SFTTask, step: int) -> Any:
        if step == 2:
            raise RuntimeError("killed")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTask, "batch", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train_sft(recipe("killed"))
    again = train_sft(recipe("killed"))
    files = [(run / checkpoints.ADAPTER_FILE).read_bytes() for run in (folder, again)]
    assert files[0] == files[1]
    model = SearchR3.from_pretrained(folder, device="cpu")
    assert model.latent_steps == 2
    assert model.encode_query(["what is letter 3"], reasoning="latent").shape == (1, model.dimension)
    written = json.loads((folder / CONTRACT_FILE).read_text())["contract"]["prompts"]["latent"]
    assert written == {**latent_conversation(2).__dict__}


def test_dev_evaluation_reports_it_where_it_is_trained(tiny_model: Path) -> None:
    documents = {f"d{i}": Document(f"d{i}", "", f"number {i} is a letter") for i in range(4)}
    queries = {f"q{i}": f"what is letter {i}" for i in range(4)}
    pool = BeirDataset("greek", documents, queries, {f"q{i}": {f"d{i}": 1} for i in range(4)})
    for changes, named in ((LATENT, True), ({"weights": WEIGHTS}, False)):
        task = task_of(tiny_model, **changes)
        task.pools = [pool]
        figures = task.evaluate(task.module, 0)
        assert ("greek.latent" in figures) == ("ndcg@10.latent" in figures) == named
    assert 0 <= figures["ndcg@10.off"] <= 1


def test_an_adapter_s_own_conversation_is_kept_if_it_has_as_many_steps() -> None:
    own = Prompts(latent=LatentConversation("Think.", "So", 2))
    assert with_latent_steps(own, 2) == own
    assert with_latent_steps(own, 3).latent == latent_conversation(3)
    assert with_latent_steps(own, 0) == Prompts()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_steps": -1}, "latent_steps must be 0 or more"),
        ({"latent_ratio": 1.5}, "latent_ratio must be from 0 to 1"),
        ({"latent_steps": 3, "latent_ratio": 0.0}, "no pair would be trained in latent mode"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SFTConfig(**{"pairs": ["-"], "output": "-"} | changes)

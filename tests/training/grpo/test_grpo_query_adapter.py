"""Stage 2 from a query adapter: queries are trained, documents are encoded once by their own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_grpo import some_pairs, task_of, write_recipe

from search_r3 import SearchR3
from search_r3.training.grpo.grpo_task import train_grpo
from search_r3.training.sft.sft_task import train_sft

TEXTS = [pair.positive for pair in some_pairs()]


@pytest.fixture(scope="module")
def query_adapter(stage_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs, folder = stage_one.parents[1] / "pairs.jsonl", tmp_path_factory.mktemp("query-adapter")
    loop = {"steps": 3, "learning_rate": 0.01, "warmup_steps": 1, "evaluate_every": 0, "mixed_precision": "no"}
    recipe = {"pairs": [str(pairs)], "output": str(folder / "run"), "init_adapter": str(stage_one), "dev": [],
              "documents": "fixed", "symmetric": False, "global_batch_size": 8, "loop": loop}  # fmt: skip
    (folder / "sft.yaml").write_text(json.dumps(recipe))
    adapter = train_sft(folder / "sft.yaml")
    # Beside the pairs, where the recipes of these tests look for them.
    (folder / "pairs.jsonl").write_bytes(pairs.read_bytes())
    return adapter


def test_a_query_adapter_becomes_a_query_adapter_of_the_same_space(query_adapter: Path, tmp_path: Path) -> None:
    before = SearchR3.from_pretrained(query_adapter, device="cpu")
    after = SearchR3.from_pretrained(train_grpo(write_recipe(query_adapter, tmp_path / "recipe.yaml")), device="cpu")
    assert after.contract.document_space == before.contract.document_space
    assert after.contract.query_weights not in ("", before.contract.query_weights)
    assert np.array_equal(after.encode_document(TEXTS), before.encode_document(TEXTS))
    moved = after.encode_query(["what is beta 0"], reasoning=False) - before.encode_query(
        ["what is beta 0"], reasoning=False
    )
    assert np.abs(moved).max() > 1e-3
    assert (after.check_golden() or 0) < 1e-5


def test_documents_are_encoded_once_and_never_stale(
    query_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(query_adapter, tmp_path)
    calls: list[int] = []
    encode = SearchR3.encode_document

    def counted(self: SearchR3, texts: Any, **options: Any) -> np.ndarray:
        calls.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(SearchR3, "encode_document", counted)
    task.training_step(task.module, 0, lambda loss: None)
    size = len(task.dataset.documents)
    assert calls == [size]
    figures = task.training_step(task.module, 1, lambda loss: None)[1]
    assert calls == [size]
    assert figures["refreshed"] > 0  # still chosen, as negatives of the contrastive term
    assert figures["staleness_recall"] == 1
    assert figures["staleness_error"] == 0

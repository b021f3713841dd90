"""Stage 1 with fixed documents: embedded once, all of them negatives, and a query adapter for their index."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.model import checkpoint as checkpoints
from search_r3.training.losses import info_nce
from search_r3.training.ranking_losses import multi_positive
from search_r3.training.sft import fixed_documents
from search_r3.training.sft.contrastive import document_key
from search_r3.training.sft.fixed_documents import FixedDocuments, embed_in_blocks
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask, train_sft

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
PAIRS = [
    TrainingPair(
        f"p{i}",
        f"what is {word}",
        f"{word} is a letter",
        negatives=(f"{word} is no number",),
        reasoning=f"letter {word}" if i % 2 else None,
        positives=((f"{word} comes at {i}", 2.0),),
        source="greek",
    )
    for i, word in enumerate(WORDS)
]
TEXTS = [text for pair in PAIRS for text in (*pair.relevant, *pair.negatives)]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "stage-one")


@pytest.fixture(scope="module")
def model(adapter: Path) -> SearchR3:
    return SearchR3.from_pretrained(adapter, device="cpu")


@pytest.fixture
def recipe(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        write_pairs(tmp_path / "pairs.jsonl", PAIRS)
        loop = {"steps": 4, "learning_rate": 0.01, "warmup_steps": 1, "checkpoint_every": 1, "evaluate_every": 0,
                "mixed_precision": "no"}  # fmt: skip
        values = {
            "pairs": [str(tmp_path / "pairs.jsonl")], "output": str(tmp_path / "run"), "init_adapter": str(adapter),
            "documents": "fixed", "global_batch_size": 4, "reasoning_ratio": 0.9, "dev": [],
            "ranking_loss": "multi_positive", "symmetric": False, "loop": loop,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(values | changes))
        return path

    return write


def task_of(adapter: Path, model: SearchR3, **changes: Any) -> SFTTask:
    settings = {"pairs": ["-"], "output": "-", "init_adapter": str(adapter), "documents": "fixed", "dev": [],
                "global_batch_size": 4, "symmetric": False}  # fmt: skip
    keys = np.array([document_key(text) for text in TEXTS])
    fixed = FixedDocuments(model.encode_document(TEXTS), keys, ("stage-one", str(adapter)))
    checkpoint = checkpoints.load(adapter, dtype=torch.float32, merge=False)
    return SFTTask(SFTConfig(**settings | changes), checkpoint, PAIRS, fixed)


class TestLoss:
    def test_no_document_goes_through_the_model_that_is_trained(self, adapter: Path, model: SearchR3) -> None:
        batch = task_of(adapter, model).batch(0)
        assert batch.documents == []
        assert set(batch.parts) <= {"query", "reasoning"}

    def test_every_document_is_a_negative_and_further_positives_are_none(self, adapter: Path, model: SearchR3) -> None:
        task = task_of(adapter, model, reasoning_ratio=0.0)
        batch = task.batch(0)
        figures = task.compute_loss(task.module, batch)[1]
        query_BD = torch.from_numpy(model.encode_query([pair.query for pair in batch.pairs], reasoning=False))
        document_ND = torch.from_numpy(model.encode_document(TEXTS))
        target_B = torch.tensor([TEXTS.index(pair.positive) for pair in batch.pairs])
        mask_BN = torch.zeros(len(batch.pairs), len(TEXTS), dtype=torch.bool)
        for row, pair in enumerate(batch.pairs):
            mask_BN[row, [TEXTS.index(text) for text, _ in pair.positives]] = True
        expected = info_nce(query_BD, document_ND, target_B, task.config.temperature, mask_BN)
        assert figures["infonce"] == pytest.approx(expected.item(), rel=1e-4)

    def test_with_multi_positive_each_has_its_grade(self, adapter: Path, model: SearchR3) -> None:
        task = task_of(adapter, model, reasoning_ratio=0.0, ranking_loss="multi_positive")
        batch = task.batch(1)
        figures = task.compute_loss(task.module, batch)[1]
        query_BD = torch.from_numpy(model.encode_query([pair.query for pair in batch.pairs], reasoning=False))
        grade_BN = torch.tensor([[pair.relevant.get(text, 0.0) for text in TEXTS] for pair in batch.pairs])
        cosine_BN = query_BD @ torch.from_numpy(model.encode_document(TEXTS)).T
        expected = multi_positive(cosine_BN, grade_BN, task.config.temperature)
        assert figures["infonce"] == pytest.approx(expected.item(), rel=1e-4)

    def test_behind_reasoning_the_rows_have_the_same_targets(self, adapter: Path, model: SearchR3) -> None:
        weights = LossWeights(sft=0, kl=0, view_distillation=1)
        task = task_of(adapter, model, reasoning_ratio=1.0, weights=weights)
        batch = task.batch(0)
        loss, figures = task.compute_loss(task.module, batch)
        assert 0 < len(batch.with_reasoning) < len(batch.pairs)
        assert torch.isfinite(loss)
        assert figures["view_distillation"] >= 0


class TestRun:
    def test_the_result_is_a_query_adapter_of_the_same_space(
        self, recipe: Callable[..., Path], model: SearchR3, adapter: Path
    ) -> None:
        trained = SearchR3.from_pretrained(train_sft(recipe()), device="cpu")
        assert trained.contract.query_weights
        assert trained.contract.document_space == model.contract.document_space
        assert trained.documents.name == "stage-one"
        assert np.array_equal(trained.encode_document(TEXTS), model.encode_document(TEXTS))
        moved = trained.encode_query(["what is beta"], reasoning=False) - model.encode_query(
            ["what is beta"], reasoning=False
        )
        assert np.abs(moved).max() > 1e-3
        assert (trained.check_golden() or 0) < 1e-5

    def test_a_query_adapter_learns_to_read_the_index_of_its_documents(
        self, recipe: Callable[..., Path], model: SearchR3, tmp_path: Path
    ) -> None:
        path = recipe(reading_ratio=0.9, reading_passages=2, reading_passage_tokens=6)
        write_pairs(tmp_path / "pairs.jsonl", [replace(p, passages=(p.negatives[0], p.positive)) for p in PAIRS])
        build_index(tmp_path / "index", [SourceDocument(text, "", text) for text in TEXTS], model, progress=False)
        trained = SearchR3.from_pretrained(train_sft(path), device="cpu")
        found = SearchIndex.open(tmp_path / "index").search("what is beta", trained, mode="vector", read=2, hops=2)
        assert [passage.hop for passage in found.read] == [1, 1, 2, 2]
        assert trained.contract.document_space == model.contract.document_space
        assert (trained.check_golden() or 0) < 1e-5

    def test_a_query_adapter_is_trained_on(self, recipe: Callable[..., Path], model: SearchR3, tmp_path: Path) -> None:
        first = train_sft(recipe())
        second = train_sft(recipe(init_adapter=str(first), output=str(tmp_path / "second")))
        trained = SearchR3.from_pretrained(second, device="cpu")
        assert trained.contract.document_space == model.contract.document_space
        assert trained.documents.name == "stage-one"
        with pytest.raises(InputError, match="is a query adapter, which is trained with documents: fixed"):
            train_sft(recipe(init_adapter=str(first), documents="trained", output=str(tmp_path / "third")))

    def test_a_killed_run_goes_on_with_the_same_curve_and_embeds_nothing_again(
        self, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train_sft(recipe(output=str(tmp_path / "whole")))
        with monkeypatch.context() as dying:
            original = SFTTask.batch

            def batch(self: SFTTask, step: int) -> Any:
                if step == 2:
                    raise RuntimeError("killed")
                return original(self, step)

            dying.setattr(SFTTask, "batch", batch)
            with pytest.raises(RuntimeError, match="killed"):
                train_sft(recipe())
        with monkeypatch.context() as watched:
            watched.setattr(SearchR3, "encode_document", lambda *_, **__: pytest.fail("embedded again"))
            watched.setattr("search_r3.training.stage.SearchR3.write_golden", lambda *_: None)
            train_sft(recipe())
        assert _curve(tmp_path / "run") == _curve(tmp_path / "whole")

    def test_corpora_are_negatives_too_and_dev_pools_are_only_looked_up(
        self, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        corpus = {f"d{i}": Document(f"d{i}", "", f"a corpus has text {i}") for i in range(5)}
        pooled = {f"d{i}": Document(f"d{i}", "", f"only in pool {i}") for i in range(2)}
        pool = BeirDataset("pool", pooled, {"q": "which pool"}, {"q": {"d1": 1}})
        write_beir(tmp_path / "set", BeirDataset("set", corpus, {"q": "x"}, {"q": {"d0": 1}}), "train")
        for place in ("fixed_documents", "sft_task"):
            monkeypatch.setattr(f"search_r3.training.sft.{place}.load_dev_pools", lambda config: [pool])
        seen: list[FixedDocuments] = []
        monkeypatch.setattr(SFTTask, "state_dict", lambda self: seen.append(self.fixed) or {})
        monkeypatch.setattr(SFTTask, "load_state_dict", lambda self, state: None)
        train_sft(recipe(corpora=[str(tmp_path / "set")], loop={"steps": 1, "mixed_precision": "no"}))
        assert len(seen[0].candidates(torch.device("cpu")).key_M) == len(set(TEXTS)) + 5
        assert seen[0].embeddings(["only in pool 1"]).shape == (1, 32)
        evaluations = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert any("pool.off" in str(record) for record in evaluations)

    def test_another_engine_embeds_the_documents_once(
        self, recipe: Callable[..., Path], model: SearchR3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engines: list[str] = []
        embed = SearchR3.encode_document

        def seen(self: SearchR3, *args: Any, **options: Any) -> np.ndarray:
            engines.append(self.engine_spec.name)
            return embed(self, *args, **options)

        monkeypatch.setattr(SearchR3, "encode_document", seen)
        run = train_sft(recipe(documents_engine="int8")).parent
        assert engines[0] == "int8"
        quantized_ND = np.load(run / "documents" / "0.npy")
        order = sorted(TEXTS, key=lambda text: -len(text))
        assert (quantized_ND * model.encode_document(order)).sum(1).mean() > 0.98

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"init_adapter": None}, "documents: fixed needs init_adapter"),
            ({"cross_batch_memory_size": 8}, "without cross_batch_memory_size"),
            ({"document_variants": {"upper": 0.5}}, "without document_variants"),
            ({"weights": {"in_batch_lm": 0.1}}, r"without weights\.in_batch_lm"),
            ({"fold_capitals": True}, "fold_capitals changes documents, which are fixed"),
            ({"documents": "trained", "corpora": ["scifact"]}, "corpora are the negatives of documents: fixed"),
            ({"documents": "trained", "documents_engine": "int8"}, "documents_engine embeds documents: fixed"),
            ({"documents_engine": "int4"}, "int4"),
            ({"documents": "frozen"}, "documents"),
        ],
    )
    def test_what_does_not_go_with_it_is_refused_in_a_line(
        self, recipe: Callable[..., Path], changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            train_sft(recipe(**changes))


class TestBlocks:
    def test_blocks_give_what_one_call_gives_and_only_missing_ones_are_embedded(
        self, model: SearchR3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fixed_documents, "BLOCK", 10)
        loads: list[int] = []

        def load() -> SearchR3:
            loads.append(1)
            return model

        def embed(texts: list[str]) -> np.ndarray:
            return embed_in_blocks(texts, load, 128, tmp_path / "documents", {"contract": "c"})

        expected = model.encode_document(TEXTS)
        assert np.allclose(embed(TEXTS), expected, atol=1e-6)
        assert np.allclose(embed(TEXTS), expected, atol=1e-6)
        assert len(loads) == 1
        (tmp_path / "documents" / "10.npy").write_bytes(b"broken")
        assert np.allclose(embed(TEXTS), expected, atol=1e-6)
        assert np.allclose(embed(TEXTS[:5]), expected[:5], atol=1e-6)
        assert len(loads) == 3


def _curve(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]

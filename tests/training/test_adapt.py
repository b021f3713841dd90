"""A query adapter for an index as it stands: what is compared, what is kept, and that the index is not touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.data.judged_queries import JudgedQuery
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.metrics import run_ndcg, run_recall
from search_r3.model import checkpoint as checkpoints
from search_r3.prompts import Prompts, with_latent_steps, with_reading
from search_r3.training.adapt import AdaptTask, IndexedVectors
from search_r3.training.config import LoraSettings
from search_r3.training.lora.policy import add_lora
from search_r3.training.ranking_losses import multi_positive
from search_r3.training.sft.contrastive import document_key
from search_r3.training.sft.fixed_documents import FixedDocuments

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
QUESTIONS = (
    "what is {}",
    "{} please",
    "tell me of {}",
    "where is {}",
    "is {} here",
    "{} or not",
    "who has {}",
    "my {}",
)


@pytest.fixture(scope="module")
def index(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexes") / "letters"
    documents = [SourceDocument(word, "", f"{word} is a letter") for word in WORDS]
    build_index(folder, documents, tiny)
    return folder


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    rows = [{"query": question.format(word), "clicked": [word]} for word in WORDS for question in QUESTIONS]
    file = tmp_path / "clicks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(index: Path, clicks: Path, into: Path, *more: str) -> list[str]:
    return ["adapt", str(index), str(clicks), "--into", str(into), "--steps", "40", "--learning-rate", "0.01",
            "--hold-out", "4", "--json", "--method", "lora", *more]  # fmt: skip


def index_of_a_reader(base: Path, folder: Path) -> Prompts:
    """An adapter that reads and has latent steps, `folder / "reader"`, and an index by it; returns its prompts."""
    loaded = checkpoints.load_base(base, dtype=torch.float32)
    prompts = with_latent_steps(with_reading(loaded.contract.prompts, 2, 8), 2)
    lora = add_lora(loaded, LoraSettings())
    checkpoints.save_adapter(lora, replace(loaded.contract, prompts=prompts), folder / "reader")
    documents = [SourceDocument(word, "", f"{word} is a letter") for word in WORDS]
    build_index(folder / "index", documents, SearchR3.from_pretrained(folder / "reader", device="cpu"))
    return prompts


def bytes_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


class TestMeasures:
    def test_they_are_those_of_a_run_over_documents_by_their_nearest_chunk(self) -> None:
        rng = np.random.default_rng(0)
        names = [f"d{i % 30}" for i in range(70)]
        index = IndexedVectors(names, rng.normal(size=(70, 8)))
        assert len(index.column_of) == 30
        queries = [JudgedQuery(str(i), f"q{i}", {f"d{i}": 2.0, f"d{(i + 3) % 30}": 1.0}) for i in range(70) if i < 30]
        query_QD = rng.normal(size=(30, 8)).astype(np.float32)
        found = index.measure(query_QD, queries)
        run: dict[str, dict[str, float]] = {}
        for query, vector_D in zip(queries, query_QD, strict=True):
            scores = run.setdefault(query.id, {})
            for name, row_D in zip(index.row_documents, index.vector_ND, strict=True):
                scores[name] = max(scores.get(name, -9.0), float(row_D @ vector_D))
        qrels = {query.id: {name: int(grade) for name, grade in query.relevant.items()} for query in queries}
        assert found["ndcg@10"] == pytest.approx(list(run_ndcg(run, qrels, 10).values()))
        assert found["recall@10"] == pytest.approx(list(run_recall(run, qrels, 10).values()))

    def test_the_first_hits_are_the_nearest_chunks_of_the_first_documents(self) -> None:
        vector_ND = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.6, 0.8], [-1, 0]], dtype=np.float32)
        index = IndexedVectors(["b", "a", "b", "c", "a"], vector_ND, ["b one", "a one", "b two", "c one", "a two"])
        hits = index.first_hits(np.array([[1, 0], [0, 1]], dtype=np.float32), 2)
        assert hits == [["b one", "c one"], ["a one", "c one"]]

    def test_an_empty_index_is_refused(self) -> None:
        with pytest.raises(InputError, match="the index is empty"):
            IndexedVectors([], np.empty((0, 4)))


def test_of_a_documents_chunks_the_nearest_is_the_positive_and_the_others_are_no_negatives() -> None:
    keys = np.array([document_key(name) for name in ("a", "a", "b", "c", "c")])
    vector_ND = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    fixed = FixedDocuments(vector_ND.numpy(), keys, ("x", "x"))
    query_BD = vector_ND[[1, 3]]
    grade_BN = torch.tensor([[2.0, 2.0, 1.0, 0, 0], [0, 0, 0, 1.0, 1.0]])
    kept_BN, others_BN = fixed.nearest_chunks(grade_BN, query_BD)
    assert kept_BN.tolist() == [[0, 2, 1, 0, 0], [0, 0, 0, 1, 0]]
    with torch.autocast("cpu", torch.bfloat16):  # as a step in bfloat16
        assert torch.equal(fixed.nearest_chunks(grade_BN, query_BD.bfloat16())[0], kept_BN)
    assert others_BN.tolist() == [[True, False, False, False, False], [False, False, False, False, True]]
    loss = multi_positive((query_BD @ vector_ND.T).masked_fill(others_BN, -1), kept_BN, 0.05)
    first = multi_positive(query_BD[:1] @ vector_ND[1:].T, torch.tensor([[2.0, 1, 0, 0]]), 0.05)
    second = multi_positive(query_BD[1:] @ vector_ND[:4].T, torch.tensor([[0.0, 0, 0, 1]]), 0.05)
    assert loss.item() == pytest.approx((first.item() + second.item()) / 2, rel=1e-3)


class TestCommand:
    def test_it_is_better_on_held_out_queries_and_the_index_is_the_same_to_the_byte(
        self, index: Path, clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = bytes_of(index)
        assert main(arguments(index, clicks, tmp_path / "queries")) == 0
        assert bytes_of(index) == before
        said = json.loads(capsys.readouterr().out)
        assert said["after"]["off"]["ndcg@10"] > said["before"]["off"]["ndcg@10"] + 0.1
        assert said["queries"]["train"] + said["queries"]["held_out"] + said["queries"]["near_copies"] == 64
        assert json.loads((tmp_path / "queries" / "adapt.json").read_text())["after"] == said["after"]
        model = SearchR3.from_pretrained(tmp_path / "queries", device="cpu")
        assert model.documents.name == "tiny-llama-base"
        assert (model.check_golden() or 0) < 1e-5
        assert SearchIndex.open(index).search("what is beta", model, mode="vector", reasoning=False).hits
        assert "| ndcg@10 without reasoning |" in (tmp_path / "queries" / "README.md").read_text()

    def test_a_killed_run_goes_on_and_gives_the_same_adapter(
        self, index: Path, clicks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main(arguments(index, clicks, tmp_path / "whole")) == 0
        with monkeypatch.context() as dying:
            original = AdaptTask.batch

            def batch(self: AdaptTask, step: int) -> Any:
                if step == 30:
                    raise RuntimeError("killed")
                return original(self, step)

            dying.setattr(AdaptTask, "batch", batch)
            with pytest.raises(RuntimeError, match="killed"):
                main(arguments(index, clicks, tmp_path / "queries"))
        assert not (tmp_path / "queries").exists()
        with monkeypatch.context() as watched:
            watched.setattr("search_r3.training.adapt.write_pairs", lambda *_: pytest.fail("reasoned again"))
            assert main(arguments(index, clicks, tmp_path / "queries")) == 0
        names = ("adapter_model.safetensors", "search_r3.json")
        assert all((tmp_path / "queries" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)

    def test_the_models_other_modes_are_trained_measured_and_kept(
        self, tiny_model: Path, clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompts = index_of_a_reader(tiny_model, tmp_path)
        assert main(arguments(tmp_path / "index", clicks, tmp_path / "queries", "--mode-ratio", "0.5")) == 0
        said = json.loads(capsys.readouterr().out)
        assert set(said["before"]) == set(said["after"]) == {"off", "on", "latent", "read"}
        rows = [json.loads(line) for line in (tmp_path / "queries.run" / "queries.jsonl").read_text().splitlines()]
        shown = [row["passages"] for row in rows if "passages" in row]
        assert 0 < len(shown) < len(rows)
        assert all(text.endswith("is a letter") for passages in shown for text in passages)
        model = SearchR3.from_pretrained(tmp_path / "queries", device="cpu")
        assert model.contract.prompts == prompts

    def test_what_is_not_better_is_not_saved(
        self, index: Path, clicks: Path, tiny: SearchR3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bad = tmp_path / "bad.jsonl"
        rows = [json.loads(line) for line in clicks.read_text().splitlines()]
        opened = SearchIndex.open(index)
        for row in rows:  # what the model finds first: it cannot become better
            hits = opened.search(row["query"], tiny, mode="vector", reasoning=False).hits
            row["clicked"] = [hits[0].document]
        bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(arguments(index, bad, tmp_path / "queries")) == 2
        assert "no step was better on the" in capsys.readouterr().err
        assert not (tmp_path / "queries").exists()

    def test_queries_of_a_test_set_are_excluded_and_a_model_of_another_space_is_refused(
        self, index: Path, clicks: Path, other_tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        test = tmp_path / "test.jsonl"
        test.write_text(json.dumps({"query": "what is alpha"}) + "\n" + json.dumps({"query": "what is beta"}) + "\n")
        command = arguments(index, clicks, tmp_path / "queries", "--exclude", str(test))
        assert main([*command, "--model", str(other_tiny_model)]) == 2
        errors = capsys.readouterr().err
        assert "left out as near copies of held-out or excluded queries" in errors
        assert "their embeddings cannot be compared" in errors


class TestLinear:
    @pytest.fixture
    def place(self, tiny_model: Path, tmp_path: Path) -> Path:
        index_of_a_reader(tiny_model, tmp_path)
        return tmp_path

    def arguments(self, place: Path, clicks: Path, *more: str) -> list[str]:
        return ["adapt", str(place / "index"), str(clicks), "--into", str(place / "queries"), "--hold-out", "4",
                "--learning-rate", "0.05", "--steps", "300", "--json", *more]  # fmt: skip

    def test_every_mode_is_better_and_the_index_is_the_same_to_the_byte(
        self, place: Path, clicks: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = bytes_of(place / "index")
        assert main(self.arguments(place, clicks, "--mode-ratio", "0.5", "--teacher", "0")) == 0
        assert bytes_of(place / "index") == before
        said = json.loads(capsys.readouterr().out)
        assert set(said["after"]) == {"off", "on", "latent", "read"}
        assert said["method"] == "linear"
        assert said["after"]["off"]["ndcg@10"] > said["before"]["off"]["ndcg@10"] + 0.1
        assert said["after"]["latent"]["ndcg@10"] > said["before"]["latent"]["ndcg@10"]
        model = SearchR3.from_pretrained(place / "queries", device="cpu")
        assert model.documents.name == "reader"
        assert (model.check_golden() or 0) < 1e-5
        assert SearchIndex.open(place / "index").search("what is beta", model, reasoning=False).hits

    def test_it_goes_on_from_what_was_adapted_before_and_with_the_reasoning_that_was_written(
        self, place: Path, clicks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main(self.arguments(place, clicks, "--steps", "60", "--teacher", "0")) == 0
        first = json.loads(capsys.readouterr().out)
        command = ["adapt", str(place / "index"), str(clicks), "--into", str(place / "again"), "--json"]
        command += [
            "--hold-out",
            "4",
            "--learning-rate",
            "0.05",
            "--steps",
            "300",
            "--model",
            str(place / "queries"),
            "--teacher",
            "0",
        ]
        assert main(command) == 0
        second = json.loads(capsys.readouterr().out)
        assert second["before"]["off"] == pytest.approx(first["after"]["off"])
        assert second["after"]["off"]["ndcg@10"] > second["before"]["off"]["ndcg@10"]
        shutil.rmtree(place / "again")
        monkeypatch.setattr("search_r3.training.adapt.write_pairs", lambda *_: pytest.fail("reasoned again"))
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["after"] == second["after"]

    def test_a_base_model_and_an_index_without_words(
        self, index: Path, clicks: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["adapt", str(index), str(clicks), "--into", str(tmp_path / "queries")]
        assert main(command) == 2
        assert "is a base model; train an adapter, or use --method lora" in capsys.readouterr().err
        documents = [SourceDocument(word, "", f"{word} is a letter") for word in WORDS]
        reader = SearchR3.from_pretrained(place / "reader", device="cpu")
        build_index(tmp_path / "plain.index", documents, reader, backend="numpy")
        command[1] = str(tmp_path / "plain.index")
        assert main([*command, "--hold-out", "4", "--learning-rate", "0.01"]) == 0

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--teacher", "inf"], "teacher must be 0 or more and finite, got inf"),
            (["--learning-rate", "inf"], "learning_rate must be above 0 and finite, got inf"),
            (["--learning-rate", "nan"], "learning_rate must be above 0 and finite, got nan"),
            (["--method", "lora", "--teacher", "1"], "--teacher is for --method linear"),
            (["--method", "lora", "--learning-rate", "inf"], "learning_rate must be above 0 and finite, got inf"),
        ],
    )
    def test_an_option_that_cannot_be_is_refused_before_anything_is_read(
        self, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["adapt", "no-index", "no-queries", "--into", str(tmp_path / "queries"), *options]) == 2
        assert said in capsys.readouterr().err

    def test_starting_over_writes_the_reasoning_again(
        self, place: Path, clicks: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = self.arguments(place, clicks)
        assert main(command) == 0
        shutil.rmtree(place / "queries")
        written: list[int] = []
        monkeypatch.setattr("search_r3.training.adapt.write_pairs", lambda _, pairs: written.append(len(pairs)))
        assert main([*command, "--no-resume"]) == 0
        assert written

    def test_what_is_not_better_is_not_saved(
        self, place: Path, clicks: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(self.arguments(place, clicks, "--steps", "1", "--learning-rate", "1e-12", "--teacher", "0")) == 2
        assert "no step was better on the" in capsys.readouterr().err
        assert not (place / "queries").exists()

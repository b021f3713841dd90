"""A linear map of query embeddings: part of a query adapter's contract, applied to every query and to no document."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.export.hub import plan_push
from search_r3.export.merged_export import export_model
from search_r3.model import checkpoint as checkpoints
from search_r3.model.concurrent_reasoning import ConcurrentReasoning
from search_r3.model.query_projection import QUERY_PROJECTION_FILE, QueryProjection
from search_r3.training.lora.average import average_adapters

TEXTS = ["How do I read a file?", "x", "Aspirin lowers the risk of heart attack. " * 5]


@pytest.fixture(scope="module")
def projection(query_adapter: Path) -> QueryProjection:
    dimension = SearchR3.from_pretrained(query_adapter, device="cpu").dimension
    return QueryProjection(np.random.default_rng(0).normal(0, 0.1, (dimension, dimension)).astype(np.float32))


@pytest.fixture(scope="module")
def folder(query_adapter: Path, projection: QueryProjection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted") / "adapted"
    checkpoints.save_projected(query_adapter, projection, folder)
    SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
    return folder


@pytest.fixture(scope="module")
def before(query_adapter: Path) -> SearchR3:
    return SearchR3.from_pretrained(query_adapter, device="cpu")


@pytest.fixture(scope="module")
def model(folder: Path) -> SearchR3:
    return SearchR3.from_pretrained(folder, device="cpu")


class TestMap:
    def test_it_gives_unit_rows_of_q_plus_q_times_m(self, projection: QueryProjection) -> None:
        query_QD = np.random.default_rng(1).normal(size=(3, len(projection.weight_DD))).astype(np.float32)
        expected = query_QD @ (np.eye(len(projection.weight_DD)) + projection.weight_DD)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(projection(query_QD), expected, atol=1e-5)
        np.testing.assert_allclose(projection(query_QD[0]), expected[0], atol=1e-5)

    def test_one_after_another_is_one(self, projection: QueryProjection) -> None:
        query_QD = np.random.default_rng(1).normal(size=(3, len(projection.weight_DD))).astype(np.float32)
        second = QueryProjection(projection.weight_DD.T.copy())
        np.testing.assert_allclose(second.after(projection)(query_QD), second(projection(query_QD)), atol=1e-5)
        assert second.after(None) is second


class TestModel:
    def test_every_way_to_embed_a_query_goes_through_it(
        self, model: SearchR3, before: SearchR3, projection: QueryProjection
    ) -> None:
        def close(found: Any, plain: Any) -> None:
            np.testing.assert_allclose(found, projection(plain), atol=1e-5)

        close(model.encode_query(TEXTS, reasoning=False), before.encode_query(TEXTS, reasoning=False))
        close(model.encode_query(TEXTS), before.encode_query(TEXTS))
        given = ["about files", "", "a drug"]
        close(model.encode_with_reasoning(TEXTS, given), before.encode_with_reasoning(TEXTS, given))
        joined = []
        for one in (model, before):
            running = ConcurrentReasoning(one)
            running.join(TEXTS[:1], [4])
            while len(running):
                done = [step.reasoned for step in running.step() if step.reasoned is not None]
            joined.append(done[0].embedding)
        close(*joined)

    def test_documents_do_not_and_the_space_is_the_same(self, model: SearchR3, before: SearchR3) -> None:
        assert np.array_equal(model.encode_document(TEXTS), before.encode_document(TEXTS))
        assert model.contract.document_space == before.contract.document_space
        assert model.contract_hash != before.contract_hash
        assert model.contract.to_dict()["format"] == 5
        assert model.contract.states_hash == before.contract_hash  # its int8 matrices are those of the model before

    def test_golden_vectors_come_out_again(self, model: SearchR3) -> None:
        assert (model.check_golden() or 0) < 1e-6

    def test_an_adapter_of_documents_and_queries_becomes_a_query_adapter(
        self, tiny_adapter: Path, projection: QueryProjection, tmp_path: Path
    ) -> None:
        checkpoints.save_projected(tiny_adapter, projection, tmp_path / "adapted")
        plain = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        model = SearchR3.from_pretrained(tmp_path / "adapted", device="cpu")
        assert model.documents.name == plain.name
        assert np.array_equal(model.encode_document(TEXTS), plain.encode_document(TEXTS))
        expected = projection(plain.encode_query(TEXTS, reasoning=False))
        np.testing.assert_allclose(model.encode_query(TEXTS, reasoning=False), expected, atol=1e-5)

    def test_a_base_model_is_refused(self, tiny_model: Path, projection: QueryProjection, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a base model; give an adapter"):
            checkpoints.save_projected(tiny_model, projection, tmp_path / "adapted")


class TestFile:
    @pytest.mark.parametrize("content", [None, b"", b"nothing of the kind"])
    def test_a_missing_or_damaged_file_is_refused(self, folder: Path, tmp_path: Path, content: bytes | None) -> None:
        broken = copied(folder, tmp_path)
        (broken / QUERY_PROJECTION_FILE).unlink()
        if content is not None:
            (broken / QUERY_PROJECTION_FILE).write_bytes(content)
        with pytest.raises(InputError, match="is not a query projection"):
            SearchR3.from_pretrained(broken, device="cpu")

    def test_another_matrix_is_refused(self, folder: Path, projection: QueryProjection, tmp_path: Path) -> None:
        broken = copied(folder, tmp_path)
        QueryProjection(projection.weight_DD * 2).save(broken)
        with pytest.raises(InputError, match=f"{QUERY_PROJECTION_FILE} does not match the contract"):
            SearchR3.from_pretrained(broken, device="cpu")
        QueryProjection(projection.weight_DD[:, :3].copy()).save(broken)
        with pytest.raises(InputError, match="is not a square float32 matrix"):
            SearchR3.from_pretrained(broken, device="cpu")


class TestWhatElseIsDoneWithIt:
    def test_a_merged_export_keeps_it_and_it_is_pushed(self, model: SearchR3, tmp_path: Path) -> None:
        export_model(model, tmp_path / "merged")
        merged = SearchR3.from_pretrained(tmp_path / "merged", device="cpu")
        assert merged.contract.query_projection == model.contract.query_projection
        query, document = merged.encode_query(TEXTS, reasoning=False), merged.encode_document(TEXTS)
        np.testing.assert_allclose(query, model.encode_query(TEXTS, reasoning=False), atol=1e-5)
        np.testing.assert_allclose(document, model.encode_document(TEXTS), atol=1e-5)
        assert QUERY_PROJECTION_FILE in plan_push(tmp_path / "merged", "me/it").files

    def test_it_is_neither_trained_further_nor_averaged_nor_exported_for_other_runtimes(
        self, folder: Path, query_adapter: Path, model: SearchR3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(InputError, match=f"cannot be trained further; give the .* from \\({query_adapter.name}\\)"):
            checkpoints.load(folder, dtype=torch.float32, merge=False)
        with pytest.raises(InputError, match="cannot be averaged"):
            average_adapters([folder, copied(folder, tmp_path)], tmp_path / "average")
        assert main(["export", str(folder), str(tmp_path / "gguf"), "--format", "gguf"]) == 2
        assert "cannot be exported as GGUF; give the model" in capsys.readouterr().err
        assert not (tmp_path / "gguf").exists()

    def test_contracts_without_one_keep_their_format_and_hash(self, before: SearchR3) -> None:
        assert before.contract.to_dict()["format"] == 3
        assert "query_projection" not in before.contract.to_dict()
        assert replace(before.contract, query_projection="").hash == before.contract_hash


def copied(folder: Path, into: Path) -> Path:
    out = into / folder.name
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    record = json.loads((out / checkpoints.CONTRACT_FILE).read_text())
    assert record["contract"]["query_projection"]
    return out

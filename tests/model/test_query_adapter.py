"""A query adapter: queries through its own weights, documents through those that an index was built with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.export.hub import plan_push
from search_r3.export.merged_export import export_model
from search_r3.model import checkpoint
from search_r3.model.engines.registry import ENGINES, TORCH

TEXTS = ["How do I read a file?", "x", "Aspirin lowers the risk of heart attack. " * 5]


@pytest.fixture(scope="module")
def plain(tiny_adapter: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_adapter, device="cpu")


@pytest.fixture(scope="module")
def model(query_adapter: Path) -> SearchR3:
    return SearchR3.from_pretrained(query_adapter, device="cpu")


class TestTwoSides:
    def test_documents_are_embedded_as_by_the_adapter_of_the_documents_bit_for_bit(
        self, model: SearchR3, plain: SearchR3
    ) -> None:
        assert np.array_equal(model.encode_document(TEXTS), plain.encode_document(TEXTS))

    def test_queries_direct_and_reasoned_are_not(self, model: SearchR3, plain: SearchR3) -> None:
        assert (
            np.abs(model.encode_query(TEXTS, reasoning=False) - plain.encode_query(TEXTS, reasoning=False)).max() > 0.01
        )
        assert np.abs(model.encode_query(TEXTS) - plain.encode_query(TEXTS)).max() > 0.01

    def test_queries_are_embedded_as_by_the_same_weights_alone(
        self, model: SearchR3, query_adapter: Path, tmp_path: Path
    ) -> None:
        loaded = checkpoint.load(query_adapter, dtype=torch.float32, merge=False)
        checkpoint.save_adapter(loaded.model, replace(loaded.contract, query_weights=""), tmp_path / "alone")
        alone = SearchR3.from_pretrained(tmp_path / "alone", device="cpu")
        assert np.array_equal(model.encode_query(TEXTS, reasoning=False), alone.encode_query(TEXTS, reasoning=False))
        assert [r.text for r in model.reason(TEXTS)] == [r.text for r in alone.reason(TEXTS)]

    def test_it_shares_the_document_space_and_has_a_contract_of_its_own(self, model: SearchR3, plain: SearchR3) -> None:
        assert model.contract.document_space == plain.contract.document_space
        assert model.contract_hash != plain.contract_hash
        assert model.document_spaces == (plain.contract.document_space, plain.contract_hash)

    def test_what_embeds_documents_is_loaded_when_it_is_needed_and_once(
        self, query_adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = SearchR3.from_pretrained(query_adapter, device="cpu")
        loaded, load = [], checkpoint.load
        monkeypatch.setattr(checkpoint, "load", lambda name, **more: loaded.append(name) or load(name, **more))
        model.encode_query(TEXTS)
        assert model.document_spaces
        assert model.documents_contract.document_space == model.contract.document_space
        assert loaded == []
        with ThreadPoolExecutor(4) as pool:
            rows = list(pool.map(lambda _: model.encode_document(TEXTS[:1]), range(4)))
        assert len(loaded) == 1
        assert all(np.array_equal(row, rows[0]) for row in rows)

    def test_golden_vectors_come_out_again(self, model: SearchR3) -> None:
        distance = model.check_golden()
        assert distance is not None
        assert distance < 1e-6

    def test_an_engine_that_cannot_run_two_models_refuses_it_in_a_line(
        self, query_adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(ENGINES, "one", replace(TORCH, name="one", query_adapters=False))
        monkeypatch.setattr("search_r3.model.searchr3.engine_spec", ENGINES.get)
        with pytest.raises(InputError, match=r"tiny-queries is a query adapter, which engine one cannot run.*int8 or"):
            SearchR3.from_pretrained(query_adapter, device="cpu", engine="one")


class TestFindingTheDocuments:
    def test_the_record_names_their_model_its_place_and_their_space(self, query_adapter: Path, plain: SearchR3) -> None:
        record = checkpoint.read_record(query_adapter)
        assert record is not None
        assert record["kind"] == "query_adapter"
        assert record["documents"] == {"name": "tiny-adapter", "source": str(plain.checkpoint.path)}
        assert record["document_space"] == plain.contract.document_space

    def test_a_folder_beside_it_is_found_when_both_have_moved(
        self, query_adapter: Path, tiny_adapter: Path, tmp_path: Path, model: SearchR3
    ) -> None:
        moved = shutil.copytree(query_adapter, tmp_path / "tiny-queries")
        shutil.copytree(tiny_adapter, tmp_path / "tiny-adapter")
        _edit(moved, source="/nowhere/tiny-adapter")
        again = SearchR3.from_pretrained(moved, device="cpu")
        assert np.array_equal(again.encode_document(TEXTS), model.encode_document(TEXTS))

    def test_without_them_the_line_says_what_to_do(self, query_adapter: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(query_adapter, tmp_path / "tiny-queries")
        _edit(moved, source="/nowhere/tiny-adapter")
        with pytest.raises(InputError, match=r"tiny-adapter, which embeds its documents, is not found.*beside it"):
            SearchR3.from_pretrained(moved, device="cpu")

    def test_another_space_is_refused(
        self, query_adapter: Path, tiny_model: Path, save_adapter: Callable[..., Path], tmp_path: Path
    ) -> None:
        moved = shutil.copytree(query_adapter, tmp_path / "tiny-queries")
        other = save_adapter(tiny_model, tmp_path / "tiny-adapter", seed=5)
        _edit(moved, source=str(other))
        with pytest.raises(InputError, match=r"embeds queries for the document space \w{12}, but .* has \w{12}"):
            SearchR3.from_pretrained(moved, device="cpu")

    def test_one_that_names_itself_is_refused(self, query_adapter: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(query_adapter, tmp_path / "tiny-queries")
        _edit(moved, source=".")
        with pytest.raises(InputError, match="itself a query adapter"):
            SearchR3.from_pretrained(moved, device="cpu")

    def test_altered_weights_are_refused(self, query_adapter: Path, tiny_adapter: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(query_adapter, tmp_path / "tiny-queries")
        shutil.copy(tiny_adapter / checkpoint.ADAPTER_FILE, moved / checkpoint.ADAPTER_FILE)
        with pytest.raises(InputError, match="the adapter's weights do not match the contract"):
            SearchR3.from_pretrained(moved, device="cpu")


class TestExport:
    def test_merged_both_sides_are_in_one_folder_that_loads_anywhere(self, model: SearchR3, tmp_path: Path) -> None:
        export_model(model, tmp_path / "merged")
        again = SearchR3.from_pretrained(tmp_path / "merged", device="cpu")
        assert again.contract_hash == model.contract_hash
        assert np.array_equal(again.encode_document(TEXTS), model.encode_document(TEXTS))
        assert np.array_equal(again.encode_query(TEXTS, reasoning=False), model.encode_query(TEXTS, reasoning=False))
        assert (again.check_golden() or 0) < 1e-6
        files = plan_push(tmp_path / "merged", "me/it").files
        assert {"model.safetensors", "documents/model.safetensors"} <= set(files)

    @pytest.mark.parametrize("format", ["sentence-transformers", "onnx"])
    def test_a_format_with_one_model_refuses_it(self, model: SearchR3, tmp_path: Path, format: str) -> None:
        with pytest.raises(InputError, match=f"{format} has one model for both; export safetensors"):
            export_model(model, tmp_path / "out", format)  # type: ignore[arg-type]

    def test_it_is_not_pushed_if_its_documents_are_on_this_machine_only(
        self, query_adapter: Path, tmp_path: Path
    ) -> None:
        moved = shutil.copytree(query_adapter, tmp_path / "tiny-queries")
        record = json.loads((moved / checkpoint.CONTRACT_FILE).read_text())
        record["contract"]["base"] = "smollm2-135m"
        (moved / checkpoint.CONTRACT_FILE).write_text(json.dumps(record))
        with pytest.raises(
            InputError, match=r"the documents' model of tiny-queries is .*which only this machine knows"
        ):
            plan_push(moved, "me/it")


def _edit(folder: Path, **changes: str) -> None:
    file = folder / checkpoint.CONTRACT_FILE
    record = json.loads(file.read_text())
    record["documents"] |= changes
    file.write_text(json.dumps(record))

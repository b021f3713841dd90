"""An adapter stays small and fits only its base, golden vectors catch the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.model import checkpoint

TEXTS = ["How do I read a file?", "x", "Aspirin lowers the risk of heart attack. " * 5]


class TestBase:
    def test_the_vocabulary_is_padded_and_the_heads_stay_tied(self, tiny_model: Path) -> None:
        loaded = checkpoint.load_base(tiny_model, dtype=torch.float32)
        embeddings = loaded.model.get_input_embeddings().weight
        assert embeddings.shape[0] % checkpoint.VOCABULARY_MULTIPLE == 0
        assert loaded.model.get_output_embeddings().weight is embeddings
        assert loaded.contract.embed_token_id == len(loaded.tokenizer) - 1
        before = embeddings[: loaded.contract.embed_token_id]
        assert torch.allclose(embeddings[loaded.contract.embed_token_id], before.mean(0), atol=1e-6)
        assert not embeddings[len(loaded.tokenizer) :].any()

    def test_a_folder_that_is_no_model_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InputError, match="not a causal language model"):
            checkpoint.load(tmp_path, dtype=torch.float32)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "adapter"}'])
    def test_a_broken_contract_file_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / checkpoint.CONTRACT_FILE).write_text(text)
        with pytest.raises(InputError, match=r"search_r3\.json cannot be read"):
            checkpoint.load(tmp_path, dtype=torch.float32)


class TestAdapter:
    def test_the_file_holds_the_tokens_row_and_no_embedding_matrix(self, tiny_adapter: Path) -> None:
        tensors = load_file(tiny_adapter / checkpoint.ADAPTER_FILE)
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
        rows = [t for name, t in tensors.items() if "lora" not in name]
        assert [tuple(t.shape) for t in rows] == [(1, 32)]
        assert (tiny_adapter / checkpoint.ADAPTER_FILE).stat().st_size < 20_000

    def test_merged_the_head_stays_tied_and_only_the_tokens_row_has_moved(
        self, tiny_model: Path, tiny_adapter: Path
    ) -> None:
        base = checkpoint.load_base(tiny_model, dtype=torch.float32).model.get_input_embeddings().weight
        loaded = checkpoint.load(tiny_adapter, dtype=torch.float32)
        merged = loaded.model.get_input_embeddings().weight
        assert loaded.model.get_output_embeddings().weight.data_ptr() == merged.data_ptr()
        moved = (merged != base).any(1).nonzero()[:, 0].tolist()
        assert moved == [loaded.contract.embed_token_id]

    def test_merging_does_not_change_the_embeddings(self, tiny_adapter: Path) -> None:
        apart = SearchR3(checkpoint.load(tiny_adapter, dtype=torch.float32, merge=False))
        merged = SearchR3(checkpoint.load(tiny_adapter, dtype=torch.float32))
        assert np.abs(apart.encode_document(TEXTS) - merged.encode_document(TEXTS)).max() < 1e-5

    def test_it_moves_the_embeddings_and_the_hash(self, tiny: SearchR3, tiny_adapter: Path) -> None:
        adapted = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        assert adapted.contract_hash != tiny.contract_hash
        assert np.abs(adapted.encode_document(TEXTS) - tiny.encode_document(TEXTS)).max() > 0.01
        assert adapted.name == "tiny-adapter"

    def test_a_base_with_other_weights_is_refused(
        self, tiny_model: Path, other_tiny_model: Path, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
        _edit_contract(folder, base=str(other_tiny_model))
        with pytest.raises(InputError, match=r"trained on .* with weights .* but the base here has weights"):
            SearchR3.from_pretrained(folder, device="cpu")

    def test_a_base_that_is_gone_is_named(self, tiny_adapter: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
        _edit_contract(folder, base="nowhere")
        with pytest.raises(InputError, match="the base of adapter adapter: no model 'nowhere'"):
            SearchR3.from_pretrained(folder, device="cpu")

    def test_a_base_with_another_chat_template_is_refused(
        self, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        base = shutil.copytree(tiny_model, tmp_path / "base")
        template = base / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
        folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
        _edit_contract(folder, base=str(base))
        with pytest.raises(InputError, match="trained with chat_template"):
            SearchR3.from_pretrained(folder, device="cpu")

    def test_altered_weights_are_refused(self, tiny_adapter: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
        _alter(folder / checkpoint.ADAPTER_FILE)
        with pytest.raises(InputError, match="the adapter's weights do not match the contract"):
            SearchR3.from_pretrained(folder, device="cpu")

    def test_saving_an_adapter_that_is_bfloat16_already(
        self, tiny_model: Path, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        loaded = checkpoint.load(tiny_adapter, dtype=torch.bfloat16, merge=False)
        written = checkpoint.save_adapter(loaded.model, loaded.contract, tmp_path / "again")
        assert written.hash == loaded.contract.hash


class TestGolden:
    def test_they_come_out_again(self, tiny_adapter: Path) -> None:
        distance = SearchR3.from_pretrained(tiny_adapter, device="cpu").check_golden()
        assert distance is not None
        assert distance < 1e-6

    def test_altered_weights_are_noticed(self, tiny_adapter: Path) -> None:
        model = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        with torch.no_grad():
            model.checkpoint.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        distance = model.check_golden()
        assert distance is not None
        assert distance > 1e-4

    def test_a_plain_base_has_none(self, tiny: SearchR3) -> None:
        assert tiny.check_golden() is None


class TestMerged:
    def test_saved_and_loaded_it_is_the_same_model(self, tiny_adapter: Path, tmp_path: Path) -> None:
        before = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        before.save_pretrained(tmp_path / "merged")
        after = SearchR3.from_pretrained(tmp_path / "merged", device="cpu")
        assert after.contract_hash == before.contract_hash
        assert after.name == before.name
        assert np.array_equal(after.encode_document(TEXTS), before.encode_document(TEXTS))
        assert [r.text for r in after.reason(TEXTS)] == [r.text for r in before.reason(TEXTS)]
        distance = after.check_golden()
        assert distance is not None
        assert distance < 1e-6

    def test_altered_weights_are_refused(self, tiny: SearchR3, tmp_path: Path) -> None:
        tiny.save_pretrained(tmp_path / "merged")
        _alter(tmp_path / "merged" / "model.safetensors")
        with pytest.raises(InputError, match="the weights do not match its contract"):
            SearchR3.from_pretrained(tmp_path / "merged", device="cpu")

    def test_an_adapter_apart_from_its_base_is_not_saved_as_merged(self, tiny_adapter: Path, tmp_path: Path) -> None:
        apart = SearchR3(checkpoint.load(tiny_adapter, dtype=torch.float32, merge=False))
        with pytest.raises(InputError, match="load the model merged"):
            apart.save_pretrained(tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_adapters_of_two_seeds_have_two_hashes(
    tiny_model: Path, save_adapter: Callable[..., Path], tiny_adapter: Path, tmp_path: Path
) -> None:
    other = save_adapter(tiny_model, tmp_path / "other", seed=1)
    first = checkpoint.load(tiny_adapter, dtype=torch.float32).contract
    assert checkpoint.load(other, dtype=torch.float32).contract.hash != first.hash


def _edit_contract(folder: Path, **changes: Any) -> None:
    file = folder / checkpoint.CONTRACT_FILE
    record = json.loads(file.read_text())
    record["contract"] |= changes
    file.write_text(json.dumps(record))


def _alter(file: Path) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({k: v.clone() + (1 if k == name else 0) for k, v in tensors.items()}, file, {"format": "pt"})


def test_an_adapter_s_files_name_no_place_of_this_machine(tiny_adapter: Path, tiny_model: Path) -> None:
    settings = json.loads((tiny_adapter / "adapter_config.json").read_text())
    contract = json.loads((tiny_adapter / "search_r3.json").read_text())["contract"]
    assert settings["base_model_name_or_path"] == contract["base"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the mapped files of a process are read from Linux")
def test_no_weight_of_a_merged_adapter_is_part_of_the_mapped_file(tiny_adapter: Path) -> None:
    """Or all pages that merging has changed would stay in memory (findings/safetensors-mapped-weights.sh)."""
    loaded = checkpoint.load(tiny_adapter, dtype=torch.float32)
    lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    mapped = [line[0].split("-") for line in lines if line[-1].endswith(".safetensors")]
    for name, weight in loaded.model.named_parameters():
        inside = [first for first, end in mapped if int(first, 16) <= weight.data_ptr() < int(end, 16)]
        assert not inside, name


def test_loading_runs_in_one_thread_and_leaves_the_number_of_threads_as_it_was(tiny_model: Path, monkeypatch) -> None:
    seen: list[int] = []
    read = checkpoint._read_model
    monkeypatch.setattr(checkpoint, "_read_model", lambda *a: seen.append(torch.get_num_threads()) or read(*a))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        checkpoint.load(tiny_model, dtype=torch.float32)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)

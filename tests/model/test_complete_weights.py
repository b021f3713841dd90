"""A model whose files lack weights, or hold others, is refused: transformers would make random ones at each load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.model import checkpoint
from search_r3.model.resolve import weights_sha256

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def changed(folder: Path, change: Callable[[Tensors], object], name: str = "model.safetensors") -> Path:
    """The folder, whose tensors `change` has changed in place."""
    tensors = {key: value.clone() for key, value in load_file(folder / name).items()}
    change(tensors)
    save_file(tensors, folder / name, {"format": "pt"})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as found:
        SearchR3.from_pretrained(folder, device="cpu")
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "base")


def test_weights_that_the_files_lack_are_named(base: Path) -> None:
    changed(base, lambda tensors: tensors.pop(UP))
    assert refusal(base) == f"{base} is incomplete: its files lack weights of the model ({UP}); download it again"


def test_of_many_the_first_are_named(base: Path) -> None:
    changed(base, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name])
    line = refusal(base)
    assert "lack weights of the model (model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj" in line
    assert line.endswith(", ...); download it again")


def test_embeddings_may_be_missing_only_where_they_are_tied(base: Path) -> None:
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    SearchR3.from_pretrained(base, device="cpu")
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    assert "(lm_head.weight)" in refusal(base)


def test_tied_embeddings_that_are_missing_as_a_whole_are_named(base: Path) -> None:
    changed(base, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight" in refusal(base)


def test_a_weight_of_another_shape_is_named(base: Path) -> None:
    changed(base, lambda tensors: tensors.update({UP: torch.zeros(60, 32)}))
    assert f"{UP} has the shape (60, 32), but config.json implies (64, 32)" in refusal(base)


def test_a_merged_model_is_held_to_it_too(tiny: SearchR3, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    tiny.save_pretrained(folder)
    changed(folder, lambda tensors: tensors.pop(UP))
    record = json.loads((folder / checkpoint.CONTRACT_FILE).read_text()) | {"weights": weights_sha256(folder)}
    (folder / checkpoint.CONTRACT_FILE).write_text(json.dumps(record))
    assert f"({UP})" in refusal(folder)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT warns
@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_too(tiny_adapter: Path, tmp_path: Path, merge: bool) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    name = next(name for name in load_file(folder / checkpoint.ADAPTER_FILE) if "layers.1.mlp.up_proj.lora_A" in name)
    changed(folder, lambda tensors: tensors.pop(name), checkpoint.ADAPTER_FILE)
    record = json.loads((folder / checkpoint.CONTRACT_FILE).read_text())
    record["contract"]["adapter_weights"] = weights_sha256(folder, checkpoint.ADAPTER_FILE)
    (folder / checkpoint.CONTRACT_FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"lack weights of the model \(\S*layers.1.mlp.up_proj.lora_A"):
        checkpoint.load(folder, dtype=torch.float32, merge=merge)

"""A GGUF file has the weights, tokenizer and conversations of the checkpoint; what it cannot hold is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from llama_family import make_model
from tokenizers import Regex, pre_tokenizers

from search_r3 import InputError, SearchR3
from search_r3.model.gguf_file import _adjacent_pairs, write_gguf
from search_r3.model.gguf_tokenizer import QWEN_2_SPLIT, gguf_vocabulary
from search_r3.model.tokenization import special_ids


@pytest.fixture(scope="module")
def written(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUFReader]:
    """The tiny model in every type."""
    folder = tmp_path_factory.mktemp("gguf")
    for outtype in ("q8_0", "f16", "f32"):
        write_gguf(folder / outtype, tiny.checkpoint, tiny.templates, outtype, stop_ids=(1,))
    return {outtype: GGUFReader(folder / outtype) for outtype in ("q8_0", "f16", "f32")}


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def tensors(reader: GGUFReader) -> dict[str, np.ndarray]:
    return {one.name: dequantize(one.data, one.tensor_type) for one in reader.tensors}


@pytest.mark.parametrize(("outtype", "error"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 1e-2)])
def test_the_tensors_are_the_weights(
    written: dict[str, GGUFReader], tiny: SearchR3, outtype: str, error: float
) -> None:
    found, weights = tensors(written[outtype]), tiny.checkpoint.model.state_dict()
    kinds = {one.tensor_type.name for one in written[outtype].tensors}
    assert kinds == {outtype.upper(), "F32"}
    plain = {
        "token_embd.weight": weights["model.embed_tokens.weight"][: len(tiny.tokenizer)],
        "blk.1.ffn_down.weight": weights["model.layers.1.mlp.down_proj.weight"],
        "blk.0.attn_v.weight": weights["model.layers.0.self_attn.v_proj.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for name, expected in plain.items():
        assert np.abs(found[name] - expected.numpy()).max() <= error, name
    assert "output.weight" not in found, "the head is tied, so llama.cpp takes the embeddings"
    assert len(found) == len(weights) - 1


def test_rows_of_padding_are_left_out_and_the_embed_token_is_not(
    written: dict[str, GGUFReader], tiny: SearchR3
) -> None:
    found, embed_id = tensors(written["f32"])["token_embd.weight"], tiny.contract.embed_token_id
    assert len(found) == len(tiny.tokenizer) == embed_id + 1 < tiny.checkpoint.model.config.vocab_size
    row = tiny.checkpoint.model.get_input_embeddings().weight[embed_id].detach().numpy()
    assert np.array_equal(found[embed_id], row)


def test_transformers_reads_the_same_model_from_it(tiny: SearchR3, tmp_path: Path) -> None:
    """It puts queries and keys back into its own order, and needs every size."""
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "model.gguf", tiny.checkpoint, tiny.templates, "f32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.tensor([[5, 60, 7, 80, 9, tiny.contract.embed_token_id]])
    with torch.inference_mode():
        states = [one(ids, output_hidden_states=True).hidden_states[-1] for one in (again, tiny.checkpoint.model)]
    assert torch.allclose(*states, atol=1e-5)


def test_adjacent_pairs_are_components_that_are_rotated_together() -> None:
    order = _adjacent_pairs(np.arange(16), heads=2)
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_it_names_pooling_tokens_conversations_and_contract(written: dict[str, GGUFReader], tiny: SearchR3) -> None:
    reader, tokenizer = written["q8_0"], tiny.tokenizer
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "llama.pooling_type") == 3, "the last token"
    assert value(reader, "llama.context_length") == 1024
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.eos_token_id") == 1
    assert value(reader, "tokenizer.ggml.eot_token_id") == tiny.contract.embed_token_id, "it ends a generation"
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.chat_template") == tokenizer.chat_template
    assert json.loads(value(reader, "search_r3.contract")) == json.loads(json.dumps(tiny.contract.to_dict()))
    assert value(reader, "search_r3.contract_hash") == tiny.contract_hash
    for side in ("document", "query", "reasoning"):
        for part in ("prefix", "suffix"):
            ids = list(getattr(tiny.templates[side], part))
            assert value(reader, f"search_r3.{side}.{part}_ids") == ids
            assert tokenizer.encode(value(reader, f"search_r3.{side}.{part}"), add_special_tokens=False) == ids
    assert value(reader, "search_r3.document.suffix").endswith("The embedding is<|embed_token|>"), "without a space"


def test_every_token_has_its_text_and_its_type(written: dict[str, GGUFReader], tiny: SearchR3) -> None:
    tokens, types = (value(written["f16"], f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    assert tokens == tiny.tokenizer.convert_ids_to_tokens(range(len(tiny.tokenizer)))
    special = {i for i, kind in enumerate(types) if kind == 3}
    assert special == special_ids(tiny.tokenizer)
    merges = value(written["f16"], "tokenizer.ggml.merges")
    assert merges
    assert all(len(merge.split(" ")) == 2 for merge in merges)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (
            [
                pre_tokenizers.Split(Regex(QWEN_2_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "qwen2",
        ),
        ([pre_tokenizers.Whitespace()], None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
    ],
)
def test_the_pre_tokenizer_is_named_by_what_it_does(tiny_model: Path, steps: list[Any], name: str | None) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if name is None:
        with pytest.raises(InputError, match=r"^this model's tokenizer cannot be written as GGUF: it splits texts by "):
            gguf_vocabulary(tokenizer)
    else:
        assert gguf_vocabulary(tokenizer).pre == name


@pytest.mark.parametrize(
    "name", ["llama with biases and scaled positions", "llama with wide heads", "qwen2", "mistral"]
)
def test_the_rest_of_the_family_is_written(name: str, tiny: SearchR3, tmp_path: Path) -> None:
    model = make_model(name)
    model.resize_token_embeddings(len(tiny.tokenizer), mean_resizing=False)
    write_gguf(tmp_path / "model.gguf", replace(tiny.checkpoint, model=model), tiny.templates, "q8_0")
    reader = GGUFReader(tmp_path / "model.gguf")
    found, weights = tensors(reader), model.state_dict()
    architecture = value(reader, "general.architecture")
    assert architecture == ("qwen2" if name == "qwen2" else "llama")
    assert value(reader, f"{architecture}.attention.key_length") == (16 if "wide" in name else 8)
    assert {one.tensor_type.name for one in reader.tensors} == {"Q8_0", "F16", "F32"}, "48 is no multiple of 32"
    key, bias = "model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"
    assert (bias in found) == (key in weights)
    if name == "qwen2":
        assert np.array_equal(found[bias], weights[key].numpy()), "only llama's order is another"
    elif bias in found:
        assert np.array_equal(found[bias], _adjacent_pairs(weights[key].numpy(), heads=2))
        factors = found["rope_freqs.weight"]
        plain = 1e4 ** -(np.arange(0, 8, 2) / 8)
        assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
        assert factors[0] < 1.01 < factors[-1]


def test_what_llama_cpp_would_compute_otherwise_is_one_line(
    tiny: SearchR3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def write(model: Any) -> None:
        write_gguf(tmp_path / "model.gguf", replace(tiny.checkpoint, model=model), tiny.templates)

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(InputError, match=r"^GGUF is written of LlamaForCausalLM, .*, not of GPT2LMHeadModel as loaded"):
        write(gpt2)
    windowed = make_model("mistral")
    windowed.config.sliding_window = 16
    with pytest.raises(InputError, match=r"^this MistralForCausalLM has a sliding window, "):
        write(windowed)
    scaled = make_model("llama")
    scaled.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    with pytest.raises(InputError, match=r"^GGUF is not written of models with yarn positions; "):
        write(scaled)
    with pytest.raises(InputError, match=r"^outtype is 'q4_0'; choose one of: q8_0, f16, f32$"):
        write_gguf(tmp_path / "model.gguf", tiny.checkpoint, tiny.templates, "q4_0")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []

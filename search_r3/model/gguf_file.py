"""Writes a checkpoint as one GGUF file, for llama.cpp and what is built on it: weights, tokenizer, conversations.

The layout is that of llama.cpp's own converter for the architectures `llama` and `qwen2`. The file names its pooling:
the state at the last token, after the final norm, which is the embedding (not yet of unit length) if the text ends with
the embed token. Keys that begin with `search_r3.` hold the contract and what goes around a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.gguf_tokenizer import GGUFVocabulary, gguf_vocabulary
from search_r3.prompts import PromptTemplate

OutType = Literal["q8_0", "f16", "f32"]
"""The type of the matrices, by the names of llama.cpp's converter; biases and norms are always float32."""
KEY = "search_r3"
SIDES = ("document", "query", "reasoning")
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
"""Class of the model -> architecture of the GGUF file."""
ROTATED_PAIRS = ("llama",)
"""Architectures whose rotary embedding llama.cpp applies to adjacent components, so that queries and keys are stored in
another order than in transformers, which rotates component i with component i + E/2."""


@dataclass(frozen=True)
class _Matrix:
    """A tensor of the file: `read` returns it, float32, when it is its turn to be written."""

    name: str
    source: Tensor
    heads: int | None = None

    def read(self) -> np.ndarray:
        value = self.source.detach().to("cpu", torch.float32).numpy()
        return value if self.heads is None else _adjacent_pairs(value, self.heads)


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    templates: Mapping[str, PromptTemplate],
    outtype: OutType = "q8_0",
    *,
    sides: tuple[str, ...] = SIDES,
    stop_ids: tuple[int, ...] = (),
) -> None:
    """Write `checkpoint` to `path`, atomically.

    Args:
        checkpoint: its adapter merged, if it has one.
        templates: the conversations as token ids, as in `SearchR3.templates`.
        outtype: the type of matrices. Those whose rows q8_0 cannot hold (no multiple of 32) are float16.
        sides: the conversations that these weights are for, some of `SIDES`: a query adapter's are not for documents.
        stop_ids: the end-of-turn tokens; the first one is named as the file's end of sequence.

    Raises:
        InputError: the architecture, its position encoding or its tokenizer is not supported, the adapter is not
            merged, or the disk is full.
    """
    import gguf

    if outtype not in get_args(OutType):
        raise InputError(f"outtype is {outtype!r}; choose one of: {', '.join(get_args(OutType))}")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    architecture = _architecture(model)
    vocabulary = gguf_vocabulary(tokenizer)
    matrices = list(_matrices(model, architecture, len(vocabulary.tokens)))
    with atomic_path(path) as scratch:
        writer = gguf.GGUFWriter(scratch, architecture)
        _add_sizes(writer, model, len(vocabulary.tokens))
        _add_tokenizer(writer, tokenizer, vocabulary, checkpoint.contract.embed_token_id, stop_ids)
        _add_search_r3(writer, checkpoint, templates, sides)
        writer.add_name(checkpoint.name)
        writer.add_type("model")
        writer.add_file_type({"q8_0": 7, "f16": 1, "f32": 0}[outtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        types = {matrix.name: _type_of(matrix.source.shape, outtype) for matrix in matrices}
        for matrix in matrices:
            shape, kind = tuple(matrix.source.shape), types[matrix.name]
            size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
            writer.add_tensor_info(matrix.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for matrix in matrices:
                writer.write_tensor_data(gguf.quantize(matrix.read(), types[matrix.name]))
        finally:
            writer.close()


def _architecture(model: Any) -> str:
    """The file's architecture. Raises InputError if llama.cpp would compute something else than this model."""
    name, config = type(model).__name__, model.config
    if name not in ARCHITECTURES or hasattr(model, "peft_config"):
        raise InputError(
            f"GGUF is written of {', '.join(ARCHITECTURES)}, with the adapter merged, not of {name} as loaded here; "
            "export with --format safetensors"
        )
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) is not None
    if windowed or config.hidden_act != "silu":
        what = "a sliding window" if windowed else f"the activation {config.hidden_act}"
        raise InputError(f"this {name} has {what}, which GGUF's llama lacks; export with --format safetensors")
    return ARCHITECTURES[name]


def _add_sizes(writer: Any, model: Any, vocabulary: int) -> None:
    import gguf

    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary)
    writer.add_pooling_type(gguf.PoolingType.LAST)


def _add_tokenizer(
    writer: Any, tokenizer: Any, vocabulary: GGUFVocabulary, embed_id: int, stop_ids: tuple[int, ...]
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, next(iter(stop_ids), tokenizer.eos_token_id)),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_eot_token_id, embed_id),  # llama.cpp then ends a generation at the embed token
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_search_r3(
    writer: Any, checkpoint: Checkpoint, templates: Mapping[str, PromptTemplate], sides: tuple[str, ...]
) -> None:
    """What goes around a text, and the contract that its embeddings have."""
    contract = checkpoint.contract
    writer.add_string(f"{KEY}.name", checkpoint.name)
    writer.add_string(f"{KEY}.contract", json.dumps(contract.to_dict(), sort_keys=True))
    writer.add_string(f"{KEY}.contract_hash", contract.hash)
    writer.add_string(f"{KEY}.document_space", contract.document_space)
    writer.add_string(f"{KEY}.pooling", contract.pooling)
    writer.add_uint32(f"{KEY}.embed_token_id", contract.embed_token_id)
    writer.add_bool(f"{KEY}.fold_capitals", contract.fold_capitals)
    writer.add_array(f"{KEY}.sides", list(sides))
    for side in sides:
        for part in ("prefix", "suffix"):
            ids = list(getattr(templates[side], part))
            spelt = checkpoint.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            writer.add_string(f"{KEY}.{side}.{part}", spelt)
            writer.add_array(f"{KEY}.{side}.{part}_ids", ids)


def _matrices(model: Any, architecture: str, vocabulary: int) -> Iterator[_Matrix]:
    """The file's tensors. The embeddings' rows for padding are left out, so that they can never be generated."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    input_embeddings, head = (get().weight for get in (model.get_input_embeddings, model.get_output_embeddings))
    if (factors := _rope_factors(model)) is not None:
        yield _Matrix("rope_freqs.weight", factors)
    for name, value in model.state_dict(keep_vars=True).items():
        if value is head and head is input_embeddings and name == "lm_head.weight":
            continue  # llama.cpp takes the input embeddings for a missing head
        if value is head or value is input_embeddings:
            value = value[:vocabulary]
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise InputError(f"GGUF's {architecture} has no tensor for {name}; export with --format safetensors")
        rotated = heads.get(name.split(".")[-2]) if architecture in ROTATED_PAIRS else None
        yield _Matrix(new, value, rotated)


def _adjacent_pairs(value: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the outputs of each head from (first halves, second halves) to adjacent pairs, (heads * E, ...)."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)


def _rope_factors(model: Any) -> Tensor | None:
    """By what llama.cpp divides each plain rotary frequency, (E / 2,) float32; None if the frequencies are plain.

    Raises:
        InputError: the frequencies depend on a text's length, or queries and keys are scaled as well.
    """
    config, rotary = model.config, model.model.rotary_emb
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rotary.attention_scaling != 1:
        raise InputError(f"GGUF is not written of models with {kind} positions; export with --format safetensors")
    width = _head_dim(config)
    exponent_H = torch.arange(0, width, 2, dtype=torch.float64) / width
    plain_H = float(config.rope_parameters["rope_theta"]) ** -exponent_H
    factors_H = (plain_H / rotary.inv_freq.double().cpu()).float()
    return None if torch.allclose(factors_H, torch.ones_like(factors_H), rtol=1e-5) else factors_H


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _type_of(shape: tuple[int, ...], outtype: OutType) -> Any:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or outtype == "f32":
        return GGMLQuantizationType.F32
    if outtype == "q8_0" and shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0][0] == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16

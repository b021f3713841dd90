"""A model's architecture without its weights, and randomly initialized models of it, with fewer layers or on "meta".

transformers reads a configuration from a folder, the hub's local cache, or the hub. A dry run must also work offline,
so
the configurations of a few models are kept here by name: the values in their published `config.json` files (Qwen2.5:
arXiv 2412.15115, SmolLM2: arXiv 2502.02737). Everything else, such as parameter counts, is taken from the model that
transformers builds on the meta device.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from search_r3.errors import InputError
from search_r3.files import expand_user
from search_r3.model.checkpoint import ADAPTER_KINDS, Checkpoint, Contract, add_embed_token, padded_rows, read_record
from search_r3.model.resolve import check_name
from search_r3.prompts import Prompts

_QWEN = {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
_SMOL = {"rope_theta": 100_000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "vocab_size": 49_152}


def _sizes(hidden: int, width: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


KNOWN: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen2.5-0.5b": ("qwen2", 151_665, _QWEN | {"vocab_size": 151_936} | _sizes(896, 4864, 24, 14, 2, True)),
    "qwen2.5-1.5b": ("qwen2", 151_665, _QWEN | {"vocab_size": 151_936} | _sizes(1536, 8960, 28, 12, 2, True)),
    "qwen2.5-7b": ("qwen2", 151_665, _QWEN | {"vocab_size": 152_064} | _sizes(3584, 18_944, 28, 28, 4, False)),
    "smollm2-135m": ("llama", 49_152, _SMOL | _sizes(576, 1536, 30, 9, 3, True)),
    "smollm2-360m": ("llama", 49_152, _SMOL | _sizes(960, 2560, 32, 15, 5, True)),
    "smollm2-1.7b": ("llama", 49_152, _SMOL | {"rope_theta": 130_000.0} | _sizes(2048, 8192, 24, 32, 32, True)),
}
"""Model name without "-Instruct" -> transformers' model type, the tokenizer's length, and the configuration."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of both families."""


@dataclass
class Architecture:
    """A model without weights.

    Attributes:
        name: the name of the base model.
        config: transformers' configuration.
        tokenizer: the model's own tokenizer if available, else a placeholder with the same number of tokens.
        stand_in: whether the tokenizer is such a placeholder.
    """

    name: str
    config: Any
    tokenizer: Any
    stand_in: bool


def architecture_of(name: str) -> Architecture:
    """The architecture of a base model, or of the base of an adapter's folder; weights are never read.

    Folders and hub ids in the hub's local cache are read; other names are looked up in `KNOWN`. For any other hub id,
    the configuration and the tokenizer are downloaded (a few megabytes at most).

    Raises:
        InputError: no model has that name, or transformers cannot read its configuration.
    """
    folder = expand_user(name)
    if folder.is_dir():
        record = read_record(folder)
        if record is not None and record["kind"] in ADAPTER_KINDS:
            return architecture_of(str(record["contract"]["base"]))
        return _read(name, folder)
    key = name.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
    if "/" in name and (cached := _read_cached(name)) is not None:
        return cached
    if key in KNOWN:
        kind, tokens, settings = KNOWN[key]
        from transformers import AutoConfig

        settings = dict(settings)
        theta = settings.pop("rope_theta")
        rope = {"rope_type": "default", "rope_theta": theta}
        config = AutoConfig.for_model(kind, **settings, rope_parameters=rope)
        return Architecture(name, config, stand_in_tokenizer(tokens), True)
    if check_name(name) != "hub":
        from search_r3.model.resolve import resolve

        return architecture_of(str(resolve(name)))
    return _read(name, name)


def _read_cached(name: str) -> Architecture | None:
    """The architecture of a hub id whose configuration and tokenizer are in the hub's local cache."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None
    return Architecture(name, config, tokenizer, stand_in=False)


def _read(name: str, source: str | Path) -> Architecture:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return Architecture(name, config, tokenizer, stand_in=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        known = ", ".join(KNOWN)
        raise InputError(f"{name}: no configuration found ({reason}); built-in names are {known}") from error


@functools.lru_cache
def stand_in_tokenizer(tokens: int) -> Any:
    """A ChatML tokenizer with `tokens` tokens: the words and punctuation of the prompts, then "t0", "t1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ours = [text for talk in Prompts().to_dict().values() for text in (talk["system"], talk["answer"])]
    words = [word for text in (*ours, "system user assistant") for word, _ in splitter.pre_tokenize_str(text)]
    names = list(dict.fromkeys([*special, *words]))
    names += [f"t{number}" for number in range(tokens - len(names))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = CHATML
    return tokenizer


def random_model(architecture: Architecture, layers: int | None, device: str | torch.device) -> Checkpoint:
    """A randomly initialized float32 model, otherwise as `checkpoint.load_base` would load it.

    Args:
        layers: the maximum number of layers; None keeps all.
        device: where the weights are; "meta" allocates none, for counting.

    Raises:
        InputError: transformers has no causal language model for the configuration.
    """
    from transformers import AutoModelForCausalLM

    config, tokenizer = copy.deepcopy(architecture.config), architecture.tokenizer
    text = config.get_text_config()
    if layers is not None and layers < text.num_hidden_layers:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise InputError(f"{architecture.name} is not a causal language model: {str(error).splitlines()[0]}") from error
    embed_id = add_embed_token(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    padded = padded_rows(rows, embed_id)
    if padded != rows:
        model.resize_token_embeddings(padded, mean_resizing=False)
    contract = Contract(architecture.name, "", "", embed_id, text.hidden_size)
    return Checkpoint("dry-run", model.eval(), tokenizer, contract, Path())

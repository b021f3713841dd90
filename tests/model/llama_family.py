"""Tiny random models of the Llama family, with all that its members differ in: biases, head widths, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases and scaled positions": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, rope_parameters=ROPE | {"original_max_position_embeddings": 64})
    ),
    "llama with wide heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
}


def make_model(name: str) -> Any:
    """The one of `MODELS`, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for parameter in model.parameters():  # biases and norms start as zeros and ones, which would hide a mistake
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=0.7, std=0.3)
    return model

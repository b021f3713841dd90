"""Resolves the "auto" settings of mixed precision and attention for this hardware; autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from search_r3.model.processor import has_fast_bfloat16


def resolve_mixed_precision(setting: str, device: torch.device) -> str:
    """Resolve "auto" to "bf16" where it is fast (a GPU with bf16, a CPU with AMX or AVX-512 BF16), else to "no"."""
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device.type == "cpu" and has_fast_bfloat16() else "no"


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager:
    """A context of bf16 autocast, or one that does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def resolve_attention(setting: str) -> str:
    """Resolve "auto" to "sdpa" if there is a GPU, else to "eager"."""
    return setting if setting != "auto" else ("sdpa" if torch.cuda.is_available() else "eager")

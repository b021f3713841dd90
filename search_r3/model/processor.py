"""What this machine's processor multiplies fast: bfloat16, and signed by signed bytes."""

from __future__ import annotations

import functools
from typing import Literal

import torch


@functools.cache
def has_amx() -> bool:
    """Whether torch can use Intel AMX tiles here (bfloat16, and int8 by int8)."""
    return _supports("_is_amx_tile_supported")


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: with AMX or with AVX-512 BF16.

    About twice as fast by AVX-512 BF16, five times by AMX.
    """
    return has_amx() or _supports("_is_avx512_bf16_supported")


def fastest_dtype(device: str | None = None) -> Literal["auto", "bfloat16"]:
    """The dtype in which this machine encodes fastest: "bfloat16" on a CPU that multiplies it fast, else "auto".

    Args:
        device: where the model will be; None is a GPU if there is one, for which "auto" is bfloat16 already.
    """
    on_cpu = not torch.cuda.is_available() if device is None else device == "cpu"
    return "bfloat16" if on_cpu and has_fast_bfloat16() else "auto"


def _supports(name: str) -> bool:
    check = getattr(torch.cpu, name, None)  # private in torch; without it, nothing is assumed
    return check is not None and bool(check())

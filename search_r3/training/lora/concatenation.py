"""Combines two LoRA adapters, of which the second was trained on the base with the first merged in, into one.

W + s1 B1 A1 + s2 B2 A2 = W + s1 [B1, (s2 / s1) B2] [A1; A2]: concatenating the ranks is exact (arXiv 2106.09685). Stage
2 can therefore use the merged stage 1 policy as its reference, and still be saved as an adapter of the original base.

PEFT's `add_weighted_adapter(combination_type="cat")` computes the same product, but is not used: it needs both adapters
loaded on the original base (here the first is merged into it), it drops the embed token's trained row, and it
multiplies the scales into A, which changes the saved numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text
from search_r3.model.checkpoint import ADAPTER_FILE

CONFIG_FILE = "adapter_config.json"
PLAIN = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {},
         "alpha_pattern": {}, "modules_to_save": None, "target_parameters": None}  # fmt: skip
"""The settings of plain LoRA (two factors and a scale); an adapter's configuration has these values or omits them."""
A, B = ".lora_A.weight", ".lora_B.weight"
"""The endings of the factors' names."""


class ConcatenatedAdapter:
    """Saves a PEFT model whose base has the adapter in `first` merged in, as an adapter of the original base.

    Its `save_pretrained` lets `model.checkpoint.save_adapter` take it in place of the PEFT model.
    """

    def __init__(self, first: Path, model: Any) -> None:
        """Raises InputError if the adapter in `first` is not plain LoRA."""
        self.first, self.model = Path(first), model
        self.settings = read_settings(self.first)

    def save_pretrained(self, folder: str, **options: Any) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` (options as PEFT's)."""
        from safetensors.torch import load_file, save_file

        self.model.save_pretrained(folder, **options)
        file, second = Path(folder) / ADAPTER_FILE, read_settings(Path(folder))
        tensors = concatenate(
            load_file(self.first / ADAPTER_FILE), load_file(file), scale_of(self.settings), scale_of(second)
        )
        with atomic_path(file) as scratch:
            save_file(tensors, scratch, {"format": "pt"})
        rank = self.settings["r"] + second["r"]
        combined = second | {
            "r": rank,
            "lora_alpha": scale_of(self.settings) * rank,
            "target_modules": _targets(self.settings, second, tensors),
        }
        atomic_write_text(Path(folder) / CONFIG_FILE, json.dumps(combined, indent=2, sort_keys=True) + "\n")


def concatenate(
    first: dict[str, Tensor], second: dict[str, Tensor], first_scale: float, second_scale: float
) -> dict[str, Tensor]:
    """The float32 tensors, under PEFT's names, of one adapter with the scale `first_scale` that equals both adapters.

    A layer adapted by only one of them gets zeros for the other, so that all layers have the same rank. Of all other
    tensors (the embed token's row, which each adapter has in full), the second adapter's are kept.

    Args:
        first, second: `*.lora_A.weight` (r, in), `*.lora_B.weight` (out, r), and others.
    """
    ranks = [next((len(value) for name, value in part.items() if name.endswith(A)), 0) for part in (first, second)]
    out = {name: value.float() for name, value in {**first, **second}.items() if not name.endswith((A, B))}
    layers = sorted({name.removesuffix(A) for part in (first, second) for name in part if name.endswith(A)})
    for layer in layers:
        known = first if layer + A in first else second
        inputs, outputs = known[layer + A].shape[1], known[layer + B].shape[0]
        a, b = [], []
        for part, rank, scale in ((first, ranks[0], 1.0), (second, ranks[1], second_scale / first_scale)):
            present = layer + A in part
            a.append(part[layer + A].float() if present else torch.zeros(rank, inputs))
            b.append(part[layer + B].float() * scale if present else torch.zeros(outputs, rank))
        out[layer + A], out[layer + B] = torch.cat(a).contiguous(), torch.cat(b, dim=1).contiguous()
    return {name: value.contiguous() for name, value in out.items()}


def read_settings(folder: Path, what: str = "continued") -> dict[str, Any]:
    """The `adapter_config.json` of an adapter that is plain LoRA.

    Raises:
        InputError: it cannot be read, or the adapter has more than two factors and a scale, and so cannot be `what`.
    """
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        for key, plain in PLAIN.items():
            if settings.get(key, plain) not in (plain, None):
                raise InputError(f"{folder}: its adapter has {key} = {settings[key]!r}; only plain LoRA can be {what}")
        settings["r"], settings["lora_alpha"], settings["target_modules"]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG_FILE} cannot be read as a LoRA's settings ({error})") from error
    return settings


def scale_of(settings: dict[str, Any]) -> float:
    """What the product B A is multiplied by."""
    return settings["lora_alpha"] / settings["r"]


def _targets(first: dict[str, Any], second: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    given = [settings["target_modules"] for settings in (first, second)]
    if all(isinstance(names, list) for names in given):
        return sorted({name for names in given for name in names})
    # A regular expression is replaced by the full names.
    layers = (name.removesuffix(A) for name in tensors if name.endswith(A))
    return sorted(layer.removeprefix("base_model.model.") for layer in layers)

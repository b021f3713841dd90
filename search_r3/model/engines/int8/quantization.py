"""Rounding matrices to int8 so that their products stay near, rather than their entries.

Entries are rounded input by input; what an input's rounding does wrong is made good by the inputs that are still to
be rounded, as far as the two go together in what the matrix sees (GPTQ, arXiv 2210.17323). What it sees is watched in
one pass of the float model over `calibration`'s texts, in which each matrix is rounded as soon as its inputs are there,
so that one matrix of second moments exists at a time.

Where inputs are rounded to int8 too, in steps of their largest, they are made more even first (SmoothQuant, arXiv
2211.10438): part of what some are larger than others goes into the matrix. The division costs nothing: it is put into
the norm before, or into the rows that make the inputs. That makes the matrix harder to round, so those who round no
inputs have matrices of their own. LOG.md has what all this gains.

Letters in shapes: I inputs, O outputs, B a block of inputs, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.model.engines.int8.calibration import Sample
from search_r3.model.engines.llama_forward import Layer

BLOCK = 32
"""Inputs that are rounded one by one before the rest is told: their rows stay in cache."""
DAMPING = 0.05
"""Added to the second moments, in units of their mean: texts are few, and not to be believed to the last digit."""
EVENING = 0.5
"""Inputs are divided by their usual size to this power: more makes activations finer and weights coarser."""
READERS = {"qkv": "self_attn.q_proj", "out": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}
"""For each matrix of `sessions.Layer` a module of the model that reads the same inputs."""


def round_to_nearest(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (O, I) and float32 (O,), whose product is `weight_OI` to half a step of its row's largest / 127."""
    weight_OI, scale_O = weight_OI.float(), steps(weight_OI)
    return (weight_OI / scale_O[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_O


def steps(weight_OI: Tensor) -> Tensor:
    """What a step of each output is worth: a 127th of its largest entry."""
    scale_O = weight_OI.float().abs().amax(1) / 127
    return torch.where(scale_O > 0, scale_O, 1.0)


def evening(moments_II: Tensor) -> Tensor:
    """What to divide each input by, float32 (I,): around 1, more where inputs are usually large."""
    size_I = moments_II.diag().float().sqrt()
    return (size_I / size_I.median().clamp_min(1e-12)).clamp(1e-3, 1e3) ** EVENING


def round_for(weight_OI: Tensor, moments_II: Tensor) -> tuple[Tensor, Tensor]:
    """As `round_to_nearest`, for inputs x of second moments sum(x xᵀ): float (I, I), on any scale."""
    size = len(moments_II)
    moments_II = moments_II.double()
    mean = moments_II.diag().mean()
    if not torch.isfinite(moments_II).all() or mean <= 0:
        return round_to_nearest(weight_OI)
    moments_II.diagonal().add_(DAMPING * mean)
    order_I = moments_II.diag().argsort(descending=True)  # what matters most is rounded while most can make it good
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(moments_II[order_I][:, order_I]))
    spread_II = torch.linalg.cholesky(inverse_II, upper=True).float()
    scale_O = steps(weight_OI)
    rest_IO = weight_OI.float().T[order_I].contiguous()
    rounded_IO = np.empty(rest_IO.shape, dtype=np.int8)
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        rounded_IO[start:end] = _round_block(rest_IO[start:end], scale_O, spread_II[start:end, start:end])
        rest_IO[end:].addmm_(spread_II[start:end, end:].T, rest_IO[start:end], alpha=-1)
    rounded_OI = np.empty(weight_OI.shape, dtype=np.int8)
    rounded_OI[:, order_I.numpy()] = rounded_IO.T
    return torch.from_numpy(rounded_OI), scale_O


def _round_block(rest_BO: Tensor, scale_O: Tensor, spread_BB: Tensor) -> np.ndarray:
    """The block's levels, float32 (B, O). In `rest` each input's error takes its place, in units of its spread."""
    rest, scale, spread = rest_BO.numpy(), scale_O.numpy(), spread_BB.numpy()  # torch's threads gain nothing here
    levels = np.empty_like(rest)
    for i in range(len(rest)):
        levels[i] = np.rint(rest[i] / scale).clip(-127, 127)
        rest[i] -= levels[i] * scale
        rest[i] /= spread[i, i]
        rest[i + 1 :] -= np.outer(spread[i, i + 1 :], rest[i])
    return levels


@torch.no_grad()
def round_layers(model: Any, layers: Sequence[Layer], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Every matrix of `layers` ("3.down", ...) for what it sees of the samples' rows, and its "... scale".

    Of "qkv" and "gate_up" also "... divisor" (I,): by what their inputs are to be divided, in the norm before them. For
    inputs that are neither divided nor rounded, "3.down fine" and "3.down fine scale"; "out" serves both.

    Args:
        model: the float causal LM that `layers` are of.
        samples: of prefixes nothing is counted: their keys and values are not computed by rounded matrices.
    """
    longest = max(len(prefix) + len(row) for prefix, row in samples)
    ids_BL = torch.tensor([[*prefix, *row] + [0] * (longest - len(prefix) - len(row)) for prefix, row in samples])
    own_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    for own_L, (prefix, row) in zip(own_BL, samples, strict=True):
        own_L[len(prefix) : len(prefix) + len(row)] = True
    tensors: dict[str, Tensor] = {}
    hooks = []
    for index, (layer, module) in enumerate(zip(layers, model.model.layers, strict=True)):
        for name, reader in READERS.items():

            def watch(_: Any, given: tuple[Tensor, ...], layer: Layer = layer, index: int = index, name: str = name):
                x_NI, key, weight_OI = given[0][own_BL].float(), f"{index}.{name}", getattr(layer, name)
                moments_II = x_NI.T @ x_NI
                if name == "out":
                    tensors[key], tensors[f"{key} scale"] = round_for(weight_OI, moments_II)
                    return
                tensors[f"{key} fine"], tensors[f"{key} fine scale"] = round_for(weight_OI, moments_II)
                divisor_I = evening(moments_II)
                moments_II /= divisor_I[:, None] * divisor_I
                tensors[key], tensors[f"{key} scale"] = round_for(weight_OI * divisor_I, moments_II)
                if name == "down":  # its inputs are products with the outputs of the upper half
                    tensors[f"{index}.gate_up scale"][len(divisor_I) :] /= divisor_I
                else:
                    tensors[f"{key} divisor"] = divisor_I

            hooks.append(module.get_submodule(reader).register_forward_pre_hook(watch))
    try:
        model.model(input_ids=ids_BL, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return tensors

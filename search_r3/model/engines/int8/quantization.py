"""GPTQ and SmoothQuant: rounds matrices to int8 such that their products, not their entries, stay close to float.

GPTQ (arXiv 2210.17323): entries are rounded input by input, and each input's rounding error is compensated by the
inputs that are not yet rounded, as far as the two are correlated in the matrix's inputs. The correlations are measured
in one pass of the float model over the texts of `calibration`; each matrix is rounded as soon as its inputs are known,
so that only one matrix of second moments exists at a time.

SmoothQuant (arXiv 2211.10438): where inputs are rounded to int8 too, in steps relative to their largest, they are
smoothed first, which moves part of the difference in their sizes into the matrix. The division costs nothing, as it is
merged into the preceding norm or into the rows that compute the inputs. It makes the matrix harder to round, so forward
passes whose inputs are not rounded use separate matrices. LOG.md reports the gains.

Letters in shapes: I inputs, O outputs, B a block of inputs, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.model.engines.int8.calibration import CalibrationRow
from search_r3.model.engines.llama_forward import Layer

BLOCK = 32
"""Number of inputs rounded one by one before the rest is updated, so that their rows stay in the CPU cache."""
DAMPING = 0.05
"""Added to the diagonal of the second moments, in units of its mean, because they are estimated from few texts."""
SMOOTHING = 0.5
"""SmoothQuant's migration strength: inputs are divided by their typical size to this power."""
CONSUMERS = {"qkv": "self_attn.q_proj", "out": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}
"""Matrix of `Layer` -> the first of the model's modules that use its inputs."""


def round_to_nearest(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int8 (O, I) with float32 scales (O,); their product differs from `weight_OI` by at most half a scale."""
    weight_OI, scale_O = weight_OI.float(), output_scales(weight_OI)
    return (weight_OI / scale_O[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_O


def output_scales(weight_OI: Tensor) -> Tensor:
    """The scale of each output, float32 (O,): 1/127 of its largest entry."""
    scale_O = weight_OI.float().abs().amax(1) / 127
    return torch.where(scale_O > 0, scale_O, 1.0)


def smoothing_divisor(moments_II: Tensor) -> Tensor:
    """SmoothQuant's divisor of each input, float32 (I,): around 1, and larger for inputs that are typically large."""
    size_I = moments_II.diag().float().sqrt()
    return (size_I / size_I.median().clamp_min(1e-12)).clamp(1e-3, 1e3) ** SMOOTHING


def gptq(weight_OI: Tensor, moments_II: Tensor) -> tuple[Tensor, Tensor]:
    """Round like `round_to_nearest`, but for inputs x with the second moments sum(x xᵀ): float (I, I), at any scale."""
    size = len(moments_II)
    moments_II = moments_II.double()
    mean = moments_II.diag().mean()
    if not torch.isfinite(moments_II).all() or mean <= 0:
        return round_to_nearest(weight_OI)
    moments_II.diagonal().add_(DAMPING * mean)
    order_I = moments_II.diag().argsort(descending=True)  # the largest first, while most others can compensate
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(moments_II[order_I][:, order_I]))
    spread_II = torch.linalg.cholesky(inverse_II, upper=True).float()
    scale_O = output_scales(weight_OI)
    rest_IO = weight_OI.float().T[order_I].contiguous()
    rounded_IO = np.empty(rest_IO.shape, dtype=np.int8)
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        rounded_IO[start:end] = _gptq_block(rest_IO[start:end], scale_O, spread_II[start:end, start:end])
        rest_IO[end:].addmm_(spread_II[start:end, end:].T, rest_IO[start:end], alpha=-1)
    rounded_OI = np.empty(weight_OI.shape, dtype=np.int8)
    rounded_OI[:, order_I.numpy()] = rounded_IO.T
    return torch.from_numpy(rounded_OI), scale_O


def _gptq_block(rest_BO: Tensor, scale_O: Tensor, spread_BB: Tensor) -> np.ndarray:
    """The levels of the block, float32 (B, O). `rest` is replaced by each input's error in units of its spread."""
    rest, scale, spread = rest_BO.numpy(), scale_O.numpy(), spread_BB.numpy()  # torch's threads do not help here
    levels = np.empty_like(rest)
    for i in range(len(rest)):
        levels[i] = np.rint(rest[i] / scale).clip(-127, 127)
        rest[i] -= levels[i] * scale
        rest[i] /= spread[i, i]
        rest[i + 1 :] -= np.outer(spread[i, i + 1 :], rest[i])
    return levels


@torch.no_grad()
def quantize_layers(model: Any, layers: Sequence[Layer], samples: Sequence[CalibrationRow]) -> dict[str, Tensor]:
    """Round the matrices of `layers` ("3.down", ...) to int8 for the calibration rows, each with its "... scale".

    "qkv" and "gate_up" also get a "... divisor" (I,), by which the preceding norm divides their inputs. For inputs that
    are neither divided nor rounded, there are "3.down fine" and "3.down fine scale"; "out" serves both cases.

    Args:
        model: the float causal LM to which `layers` belong.
        samples: the calibration rows; their prefixes are ignored, because a prefix is computed in float32.
    """
    longest = max(len(prefix) + len(row) for prefix, row in samples)
    ids_BL = torch.tensor([[*prefix, *row] + [0] * (longest - len(prefix) - len(row)) for prefix, row in samples])
    own_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
    for own_L, (prefix, row) in zip(own_BL, samples, strict=True):
        own_L[len(prefix) : len(prefix) + len(row)] = True
    tensors: dict[str, Tensor] = {}
    hooks = []
    for index, (layer, module) in enumerate(zip(layers, model.model.layers, strict=True)):
        for name, consumer in CONSUMERS.items():

            def watch(_: Any, given: tuple[Tensor, ...], layer: Layer = layer, index: int = index, name: str = name):
                x_NI, key, weight_OI = given[0][own_BL].float(), f"{index}.{name}", getattr(layer, name)
                moments_II = x_NI.T @ x_NI
                if name == "out":
                    tensors[key], tensors[f"{key} scale"] = gptq(weight_OI, moments_II)
                    return
                tensors[f"{key} fine"], tensors[f"{key} fine scale"] = gptq(weight_OI, moments_II)
                divisor_I = smoothing_divisor(moments_II)
                moments_II /= divisor_I[:, None] * divisor_I
                tensors[key], tensors[f"{key} scale"] = gptq(weight_OI * divisor_I, moments_II)
                if name == "down":  # its inputs are products with the second half of the outputs
                    tensors[f"{index}.gate_up scale"][len(divisor_I) :] /= divisor_I
                else:
                    tensors[f"{key} divisor"] = divisor_I

            hooks.append(module.get_submodule(consumer).register_forward_pre_hook(watch))
    try:
        model.model(input_ids=ids_BL, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return tensors

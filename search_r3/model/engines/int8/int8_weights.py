"""A Llama's matrices in int8: symmetric, with one scale per output, packed for torch's oneDNN product of int8 by int8.

`quantization` rounds them. They are stored in one safetensors file, which records the contract of the original weights
and its own SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.model.engines.int8.calibration import CalibrationRow
from search_r3.model.engines.int8.quantization import CONSUMERS, quantize_layers, round_to_nearest
from search_r3.model.engines.llama_forward import FAMILY, Layer, merge_projections
from search_r3.model.processor import has_amx

INT8_FILE = "int8.safetensors"
"""The file's name next to an export's weights; in the cache, its name is the contract's hash."""
FORMAT = "2"
"""Increased when the meaning of the file changes, so that older files are replaced."""
MATRICES = tuple(CONSUMERS)
UNSIGNED_ZERO = 128
"""The zero point of int8 values shifted to be unsigned; for the same bytes, `x + 128` is `x ^ 128`."""


@dataclass
class Int8Matrix:
    """A linear layer (O outputs, I inputs) in int8.

    Attributes:
        packed: the int8 matrix in oneDNN's layout.
        scale_O: float32, the scale of each output.
        zero_O: int64 zeros, because the quantization is symmetric.
        inputs: I.
    """

    packed: Tensor
    scale_O: Tensor
    zero_O: Tensor
    inputs: int

    @classmethod
    def of(cls, weight_OI: Tensor, scale_O: Tensor) -> Int8Matrix:
        """Pack an int8 matrix."""
        packed = torch.ops.onednn.qlinear_prepack(weight_OI, None)
        return cls(packed, scale_O, torch.zeros(len(scale_O), dtype=torch.long), weight_OI.shape[1])

    def __call__(self, x_NI: Tensor) -> Tensor:
        """int8 (N, I) -> float32 (N, O), which the caller multiplies by the scales of the input rows."""
        zero = 0
        # AVX-512 VNNI multiplies unsigned by signed bytes only; oneDNN computes signed by signed without AMX in its
        # reference code, a thousand times slower (findings/onednn-signed-inputs.sh).
        if not has_amx():
            x_NI, zero = x_NI.view(torch.uint8) ^ UNSIGNED_ZERO, UNSIGNED_ZERO
        return torch.ops.onednn.qlinear_pointwise(
            x_NI, 1.0, zero, self.packed, self.scale_O, self.zero_O, None, 1.0, 0, torch.float32, "none", [], ""
        )


def quantize_model(
    model: Any, layers: list[Layer], head_VD: Tensor, samples: Sequence[CalibrationRow] = ()
) -> dict[str, Tensor]:
    """Quantize the matrices of `layers` ("3.down", ...) and the head to int8, each with its "... scale".

    They are rounded for the activations of `samples` (`quantization`) or, without samples, to the nearest, which is
    fast.
    """
    named = {f"{index}.{name}": getattr(layer, name) for index, layer in enumerate(layers) for name in MATRICES}
    tensors = quantize_layers(model, layers, samples) if samples else {}
    for name, weight in (named | {"head": head_VD}).items():
        if name not in tensors:
            tensors[name], tensors[f"{name} scale"] = round_to_nearest(weight)
    return tensors


def quantize_causal_lm(model: Any, samples: Sequence[CalibrationRow]) -> dict[str, Tensor]:
    """`quantize_model` for a causal LM. Raises InputError if the int8 engine cannot run it."""
    return quantize_model(model, merged_layers(model), model.get_output_embeddings().weight.detach(), samples)


def merged_layers(model: Any) -> list[Layer]:
    """`merge_projections`; raises InputError, which names the supported architectures, if that is not possible."""
    if (layers := merge_projections(model)) is None:
        raise InputError(
            f"engine int8 runs {', '.join(FAMILY)} without a window and with the adapter merged, not "
            f"{type(model).__name__} as loaded here; use engine torch"
        )
    return layers


def save_int8(tensors: dict[str, Tensor], path: Path, contract_hash: str) -> None:
    """Write the result of `quantize_model` to `path`, atomically."""
    from safetensors.torch import save_file

    about = {"format": FORMAT, "contract_hash": contract_hash, "sha256": _digest(tensors)}
    with atomic_path(path) as scratch:
        save_file(tensors, scratch, about)


def load_int8(path: Path, contract_hash: str) -> dict[str, Tensor] | None:
    """Read the file of `save_int8`; None if it is missing, damaged, or has another contract or format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or about.get("contract_hash") != contract_hash:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    except (OSError, SafetensorError):
        return None
    return tensors if about.get("sha256") == _digest(tensors) else None


def load_or_make(
    make: Callable[[], dict[str, Tensor]], contract_hash: str, paths: Iterable[Path], cache: Path | None
) -> dict[str, Tensor]:
    """The int8 matrices from the first intact file of `paths` and `cache`, or else from `make`, saved to `cache`."""
    for path in (*paths, cache):
        if path is not None and (tensors := load_int8(path, contract_hash)) is not None:
            return tensors
    tensors = make()
    if cache is None:
        return tensors
    with contextlib.suppress(InputError):  # without a cache, they are made at every start
        save_int8(tensors, cache, contract_hash)
    return tensors


def check_processor() -> None:
    """Raise InputError if torch has no exact product of int8 by int8 on this processor.

    Processors without VNNI add pairs of products in 16 bits, which overflow.
    """
    sign_OI = torch.ones(16, 512, dtype=torch.int8)
    sign_OI[::2] = -1
    try:
        matrix = Int8Matrix.of(sign_OI * 127, torch.ones(16))
        exact = bool((matrix(sign_OI[:2] * 127) == (sign_OI[:2].float() @ sign_OI.float().T) * 127 * 127).all())
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"engine int8 needs torch's oneDNN product of int8 matrices, which torch {torch.__version__} does not have "
            f"here ({str(error).splitlines()[0]}); use engine torch"
        ) from error
    if not exact:
        raise InputError("engine int8 needs a processor with VNNI: products overflow on this one; use engine torch")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()

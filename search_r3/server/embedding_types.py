"""The number types in which embeddings are answered, with the values of sentence-transformers' `quantize_embeddings`.

A component of a unit vector lies between -1 and 1, and these are the ranges of int8 and uint8, for every component and
model: nothing is clipped, and the same text has the same integers in a query, a document and another server. Ranges
calibrated on an index would be finer, but would change with it.
"""

from __future__ import annotations

import base64
from typing import Any, Literal, get_args

import numpy as np

EmbeddingType = Literal["float", "base64", "float16", "int8", "uint8", "binary", "ubinary"]
EMBEDDING_TYPES: tuple[EmbeddingType, ...] = get_args(EmbeddingType)
RANGE = (-1.0, 1.0)
"""Of each component, for int8 and uint8."""
FLOAT16_DIGITS = 5
"""Significant decimal digits that read back to the same float16."""


def written(vector: np.ndarray, kind: EmbeddingType) -> Any:
    """A unit vector, little-endian float32 (dimensions,), as it is written into JSON.

    Returns:
        float: the vector; base64: text, of its bytes; float16: float64 numbers that read back to the nearest float16;
        int8, uint8: one number a component; binary (int8), ubinary (uint8): the signs, 8 in a number.
    """
    if kind == "base64":
        return base64.b64encode(vector.tobytes()).decode()
    if kind == "float16":
        return _shortest_float16(vector)
    if kind in ("int8", "uint8"):
        return quantize(vector, kind)
    if kind in ("binary", "ubinary"):
        bits = np.packbits(vector > 0)
        return bits if kind == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    return vector


def quantize(vector: np.ndarray, kind: Literal["int8", "uint8"]) -> np.ndarray:
    """Each component as one of 256 steps of RANGE; int8 is 128 less than uint8.

    `(int8 + 1) / 127.5` is the middle of a step, so the cosines of `int8 + 1` are those of the vectors, but for the
    rounding.
    """
    start, end = np.float32(RANGE[0]), np.float32(RANGE[1])
    step = (end - start) / np.float32(255)
    levels = np.clip(np.floor((vector - start) / step), 0, 255)
    return levels.astype(np.uint8) if kind == "uint8" else (levels - 128).astype(np.int8)


def _shortest_float16(vector: np.ndarray) -> np.ndarray:
    """The nearest float16 numbers, as decimals of FLOAT16_DIGITS digits."""
    value = vector.astype(np.float16).astype(np.float64)
    magnitude = np.floor(np.log10(np.abs(value), where=value != 0, out=np.zeros_like(value)))
    scale = 10.0 ** (FLOAT16_DIGITS - 1 - magnitude)
    return np.round(value * scale) / scale

"""A linear map of query embeddings, which `search-r3 adapt` fits to one index: q -> unit(q + q M).

A linear adapter of queries alone, as LlamaIndex's `LinearAdapterEmbeddingModel`. It is a file of a query adapter, which
its contract names by hash; documents do not go through it, so an index stays as it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from search_r3.errors import InputError, first_line
from search_r3.files import atomic_path

if TYPE_CHECKING:
    from search_r3.model.contract import Contract

QUERY_PROJECTION_FILE = "query_projection.safetensors"
"""The file of a checkpoint that holds its query projection."""
TENSOR = "weight"


@dataclass(frozen=True)
class QueryProjection:
    """The map.

    Attributes:
        weight_DD: M, float32; zeros change nothing.
    """

    weight_DD: np.ndarray

    def __call__(self, query_QD: np.ndarray) -> np.ndarray:
        """The projected embeddings, unit rows, float32 of the same shape: (Q, D) or (D,)."""
        moved = query_QD + query_QD @ self.weight_DD
        norm = np.linalg.norm(moved, axis=-1, keepdims=True)
        return (moved / np.maximum(norm, np.finfo(np.float32).tiny)).astype(np.float32)

    def after(self, first: QueryProjection | None) -> QueryProjection:
        """The map that does `first`, if any, and then this one."""
        if first is None:
            return self
        return QueryProjection(first.weight_DD + self.weight_DD + first.weight_DD @ self.weight_DD)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the matrix: its bytes, float32, little-endian, row by row."""
        return hashlib.sha256(np.ascontiguousarray(self.weight_DD, dtype="<f4").tobytes()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `QUERY_PROJECTION_FILE` into a folder, atomically."""
        from safetensors.numpy import save_file

        with atomic_path(folder / QUERY_PROJECTION_FILE) as scratch:
            save_file({TENSOR: np.ascontiguousarray(self.weight_DD, dtype=np.float32)}, scratch)

    @classmethod
    def load(cls, folder: Path) -> QueryProjection:
        """Read what `save` wrote.

        Raises:
            InputError: the file does not exist or is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        file = folder / QUERY_PROJECTION_FILE
        try:
            weight_DD = load_file(file)[TENSOR]
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(
                f"{file} is not a query projection ({first_line(error)}); make the adapter again"
            ) from error
        if weight_DD.ndim != 2 or weight_DD.shape[0] != weight_DD.shape[1] or weight_DD.dtype != np.float32:
            raise InputError(f"{file} is not a square float32 matrix; make the adapter again")
        return cls(weight_DD)


def refuse_query_projection(name: str, contract: Contract, what: str, adapted_from: str = "") -> None:
    """Raise InputError if the contract of the model `name` has a query projection, which would be lost.

    Args:
        what: what cannot be done to the model, as in "cannot be averaged".
        adapted_from: the model that it was adapted from, if that is known.
    """
    if contract.query_projection:
        raise InputError(
            f"{name} was adapted to an index by a linear map of its queries, and cannot be {what}; give the model that "
            f"it was adapted from ({adapted_from or 'its adapt.json names it'})"
        )

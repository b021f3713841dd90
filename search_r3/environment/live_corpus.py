"""LiveCorpus: the embeddings of a corpus whose model keeps changing, with exact search.

It is a plain matrix in memory, because an approximate index degrades under the updates that training makes: after heavy
updates, the recall@10 of HNSW (USearch) fell from 0.998 to 0.535, while a matrix stays at 1.0. Each row has a version
(how often it was written) and the step of the weights that encoded it.

Shape suffixes: Q queries, N rows of the corpus (documents), R selected rows, D dimensions, K results.

A *step* is the number of optimizer steps that the encoding weights had taken: the first encoding has step 0, and a row
is *fresh* at step s if the weights of step s encoded it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.topk import MAX_ROWS, best_keys, keys_of_best, unpack
from search_r3.errors import InputError

CHUNK_CELLS = 2**22
"""Number of scores computed at once in a search, and of values upcast at once: 16 MiB of float32, 32 MiB of keys."""
QUERY_BLOCK = 1024
"""Number of queries scored at once; with `CHUNK_CELLS`, chunks then have at least 4,096 rows."""
UNIT_TOLERANCE = 0.01
"""Accepted deviation of a row's norm from 1. Rounding a unit row to bf16 changes it by up to 0.004, a missing
normalization by far more."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMAT = 1


class Corpus(Protocol):
    """The interface that the graph, the refresh policies and the environment use; see `LiveCorpus` for the methods."""

    steps_N: Tensor
    versions_N: Tensor

    def __len__(self) -> int: ...
    @property
    def dimension(self) -> int: ...
    def search(self, q_QD: Any, k: int) -> tuple[Tensor, Tensor]: ...
    def scores(self, q_QD: Any, rows: Any) -> Tensor: ...
    def count_at_least(self, q_QD: Any, cosines_QM: Any, left_out_QX: Any) -> Tensor: ...
    def vectors(self, rows: Any) -> Tensor: ...
    def update(self, rows: Any, vectors: Any, step: int) -> None: ...
    def ages(self, step: int) -> Tensor: ...
    def all_gather_rows(self, mine: Tensor) -> Tensor: ...
    def local_rows(self, rows: np.ndarray) -> np.ndarray: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LiveCorpus:
    """N unit rows of D dimensions that can be rewritten row by row.

    Attributes:
        versions_N: int32 on the CPU: how often each row was written. A corpus with unwritten rows (0) cannot be
            searched.
        steps_N: int32 on the CPU: the step of the weights that encoded each row; -1 if never written.

    Memory: N x D values and 8 bytes per row, which is at most 10% more than the values from 20 float32 dimensions on. A
    search needs additional memory that is bounded by `chunk_cells` and independent of N.
    """

    def __init__(
        self,
        rows: int,
        dimension: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunk_cells: int = CHUNK_CELLS,
    ) -> None:
        """Create an empty matrix; `update` fills it, in blocks and in any order, so that no second copy is needed.

        Raises:
            ValueError: `rows`, `dimension` or `chunk_cells` is below 1, there are more than 2^31 - 1 rows, or the dtype
                is not float32, bfloat16 or float16.
        """
        if not (1 <= rows <= MAX_ROWS and dimension >= 1 and chunk_cells >= 1):
            raise ValueError(
                f"a corpus has 1 to {MAX_ROWS} rows, 1 dimension or more and chunks of 1 cell or more, "
                f"got {rows}, {dimension} and {chunk_cells}"
            )
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        self._matrix_ND = torch.zeros(rows, dimension, dtype=dtype, device=device)
        self.versions_N = torch.zeros(rows, dtype=torch.int32)
        self.steps_N = torch.full((rows,), -1, dtype=torch.int32)
        self.chunk_cells = chunk_cells

    @classmethod
    def from_vectors(
        cls,
        vectors: Any,
        *,
        step: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunk_cells: int = CHUNK_CELLS,
    ) -> LiveCorpus:
        """A corpus with copies of these unit rows, (N, D). Raises the errors of the constructor and of `update`."""
        vectors = torch.as_tensor(vectors)
        if vectors.dim() != 2:
            raise ValueError(f"vectors must be a (rows, dimensions) matrix, got the shape {tuple(vectors.shape)}")
        corpus = cls(vectors.shape[0], vectors.shape[1], dtype=dtype, device=device, chunk_cells=chunk_cells)
        for start, stop in corpus._blocks(len(corpus)):
            corpus.update(torch.arange(start, stop), vectors[start:stop], step)
        return corpus

    def __len__(self) -> int:
        return self._matrix_ND.shape[0]

    @property
    def dimension(self) -> int:
        return self._matrix_ND.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._matrix_ND.dtype

    @property
    def device(self) -> torch.device:
        return self._matrix_ND.device

    @torch.no_grad()
    def search(self, q_QD: Any, k: int) -> tuple[Tensor, Tensor]:
        """The exact k best rows for every query: (cosines (Q, K) float32, rows (Q, K) int64), K = min(k, N).

        Results are in order of descending cosine, ties by ascending row (see `topk`). Cosines are computed in float32,
        whatever the dtype of the matrix; the same query, matrix and chunk size give bit-identical results.

        Args:
            q_QD: unit rows.

        Raises:
            ValueError: the shape is wrong, a row does not have length 1 or is NaN, k is below 1, or the corpus has rows
                that were never written.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        self._check_written()
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        keys = [self._search(q_QD[start : start + QUERY_BLOCK], k) for start in range(0, len(q_QD), QUERY_BLOCK)]
        no_keys = torch.empty(0, min(k, len(self)), dtype=torch.int64, device=self.device)
        return unpack(torch.cat([*keys, no_keys]))

    def _search(self, q_QD: Tensor, k: int) -> Tensor:
        best_QK: Tensor | None = None
        for start, stop in self._blocks(len(self), queries=len(q_QD)):
            scores_QC = q_QD @ self._matrix_ND[start:stop].to(torch.float32).T
            keys_QK = keys_of_best(scores_QC, torch.arange(start, stop, device=self.device), k)
            best_QK = keys_QK if best_QK is None else best_keys(torch.cat([best_QK, keys_QK], dim=1), k)
        assert best_QK is not None  # a corpus has at least one row
        return best_QK

    @torch.no_grad()
    def scores(self, q_QD: Any, rows: Any) -> Tensor:
        """Cosines of every query with the given rows, (Q, R) float32, one column per row in the given order.

        Rows may repeat. Raises ValueError like `search`, and for rows outside the corpus.
        """
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        rows_R = self._checked_rows(rows)
        self._check_written(rows_R)
        parts = [
            q_QD @ self._matrix_ND[rows_R[start:stop].to(self.device)].to(torch.float32).T
            for start, stop in self._blocks(len(rows_R), queries=len(q_QD))
        ]
        return torch.cat(parts, dim=1) if parts else q_QD.new_zeros(len(q_QD), 0)

    @torch.no_grad()
    def count_at_least(self, q_QD: Any, cosines_QM: Any, left_out_QX: Any) -> Tensor:
        """For each query, how many rows have at least each of these cosines, (Q, M) int64.

        Args:
            q_QD: unit rows.
            cosines_QM: M thresholds for each query; infinity counts nothing.
            left_out_QX: row numbers that are not counted for a query, int64; -1 is padding.

        Raises:
            ValueError: as `search`, or the numbers of queries differ.
        """
        self._check_written()
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        cosines_QM = torch.as_tensor(cosines_QM).to(self.device, torch.float32)
        left_out_QX = torch.as_tensor(left_out_QX).to(self.device)
        if not len(q_QD) == len(cosines_QM) == len(left_out_QX):
            raise ValueError(f"{len(q_QD)} queries, {len(cosines_QM)} rows of cosines, {len(left_out_QX)} of left out")
        counts = torch.zeros(cosines_QM.shape, dtype=torch.int64, device=self.device)
        for first in range(0, len(q_QD), QUERY_BLOCK):
            part = slice(first, first + QUERY_BLOCK)
            for start, stop in self._blocks(len(self), queries=len(q_QD[part])):
                scores_QC = q_QD[part] @ self._matrix_ND[start:stop].to(torch.float32).T
                query, column = ((left_out_QX[part] >= start) & (left_out_QX[part] < stop)).nonzero(as_tuple=True)
                scores_QC[query, left_out_QX[part][query, column] - start] = -torch.inf
                for threshold in range(cosines_QM.shape[1]):
                    least_Q1 = cosines_QM[part, threshold : threshold + 1]
                    counts[part, threshold] += (scores_QC >= least_Q1).sum(dim=1)
        return counts

    def vectors(self, rows: Any) -> Tensor:
        """A copy of the given rows, (R, D) float32 on the device of the corpus, without gradient."""
        rows_R = self._checked_rows(rows)
        self._check_written(rows_R)
        return self._matrix_ND[rows_R.to(self.device)].to(torch.float32)

    @torch.no_grad()
    def update(self, rows: Any, vectors: Any, step: int) -> None:
        """Overwrite rows with vectors encoded by the weights of `step`: all of them or, on an error, none.

        Args:
            rows: (R,) distinct row numbers.
            vectors: (R, D) unit rows; stored in the dtype of the corpus.
            step: 0 or more, and not earlier than the last refresh of any of these rows.

        Raises:
            ValueError: a row is outside the corpus or repeated, a vector does not have length 1 or is NaN, the numbers
                of rows and vectors differ, or `step` is earlier than the last refresh.
        """
        rows_R = self._checked_rows(rows)
        vectors_RD = check_unit("vectors", vectors, self.dimension)
        if len(rows_R) != len(vectors_RD):
            raise ValueError(f"{len(rows_R)} rows but {len(vectors_RD)} vectors; each row needs one")
        check_distinct(rows_R)
        if step < 0 or (len(rows_R) and step < int(self.steps_N[rows_R].max())):
            latest = int(self.steps_N[rows_R].max()) if len(rows_R) else 0
            raise ValueError(f"step {step} is earlier than these rows' last refresh, at step {max(latest, 0)}")
        self._matrix_ND[rows_R.to(self.device)] = vectors_RD.to(self.device, self.dtype)
        self.versions_N[rows_R] += 1
        self.steps_N[rows_R] = step

    def ages(self, step: int) -> Tensor:
        """The age in steps of every row's vector at `step`, (N,) int64; 0 is fresh."""
        return step - self.steps_N.to(torch.int64)

    def all_gather_rows(self, mine: Tensor) -> Tensor:
        """All processes' rows of a tensor, by rank; with one process, `mine`."""
        return mine

    def local_rows(self, rows: np.ndarray) -> np.ndarray:
        """The part of `rows` that this process encodes; with one process, all."""
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors (not copied) and JSON values, for `training.run_checkpoint`."""
        return {
            "format": FORMAT,
            "dtype": _dtype_name(self.dtype),
            "vectors": self._matrix_ND,
            "versions": self.versions_N,
            "steps": self.steps_N,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the corpus from `state`, bit for bit; on an error, it is left unchanged.

        Raises:
            InputError: the state has another size, dtype or format, or is damaged.
        """
        shape = (len(self), self.dimension)
        if state.get("format") != FORMAT:
            raise InputError(f"the saved corpus has format {state.get('format')!r}, this version reads {FORMAT}")
        vectors, versions, steps = state["vectors"], state["versions"], state["steps"]
        if tuple(vectors.shape) != shape or vectors.dtype != self.dtype:
            raise InputError(
                f"the saved corpus has {tuple(vectors.shape)} values of {_dtype_name(vectors.dtype)}, this one {shape} "
                f"of {_dtype_name(self.dtype)}; use the corpus and the dtype of the run that saved it"
            )
        written_N = versions > 0
        if versions.shape != shape[:1] or steps.shape != shape[:1]:
            raise InputError("the saved corpus is damaged: versions and steps do not fit its rows")
        for start, stop in self._blocks(len(self)):
            norms = torch.linalg.vector_norm(vectors[start:stop].to(torch.float32), dim=1).cpu()
            if not bool((((norms - 1).abs() <= UNIT_TOLERANCE) | ~written_N[start:stop].cpu()).all()):
                raise InputError(f"the saved corpus is damaged: rows {start} to {stop - 1} are not all unit rows")
        self._matrix_ND.copy_(vectors)
        self.versions_N.copy_(versions)
        self.steps_N.copy_(steps)

    def _blocks(self, rows: int, queries: int = 1) -> list[tuple[int, int]]:
        """(start, stop) of blocks of `rows` in which neither scores nor upcast rows exceed `chunk_cells` values."""
        size = max(1, self.chunk_cells // max(queries, self.dimension))
        return [(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _checked_rows(self, rows: Any) -> Tensor:
        return check_rows(rows, len(self))

    def _check_written(self, rows_R: Tensor | None = None) -> None:
        unwritten = (self.versions_N if rows_R is None else self.versions_N[rows_R]) == 0
        if bool(unwritten.any()):
            first = int(unwritten.nonzero()[0]) if rows_R is None else int(rows_R[unwritten][0])
            raise ValueError(
                f"{int(unwritten.sum())} rows were never written (the first is {first}); update them first"
            )


def check_rows(rows: Any, count: int) -> Tensor:
    """Row numbers as (R,) int64 on the CPU.

    Raises:
        ValueError: `rows` is not a vector of integers, or a number is outside [0, count).
    """
    rows_R = torch.as_tensor(np.asarray(rows) if isinstance(rows, list | tuple) else rows).detach().cpu()
    if rows_R.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if rows_R.dim() != 1 or rows_R.is_floating_point() or rows_R.dtype == torch.bool:
        raise ValueError(f"rows must be a vector of integers, got {rows_R.dtype} {tuple(rows_R.shape)}")
    low, high = int(rows_R.min()), int(rows_R.max())
    if low < 0 or high >= count:
        raise ValueError(f"there is no row {low if low < 0 else high}; the corpus has rows 0 to {count - 1}")
    return rows_R.to(torch.int64)


def check_distinct(rows_R: Tensor) -> None:
    """Raise ValueError if a row number occurs twice."""
    if rows_R.numel() > 1:
        ordered = rows_R.sort().values
        repeated = ordered[1:] == ordered[:-1]
        if bool(repeated.any()):
            raise ValueError(f"row {int(ordered[1:][repeated][0])} is given twice; give each row once")


def check_unit(what: str, vectors: Any, dimension: int) -> Tensor:
    """`vectors` as a float tensor (rows, dimension) without gradient.

    Raises:
        ValueError: the shape is wrong, the dtype is not float, or a row's norm is NaN or differs from 1 by more than
            `UNIT_TOLERANCE`.
    """
    tensor = torch.as_tensor(vectors).detach()
    if tensor.dim() != 2 or tensor.shape[1] != dimension or not tensor.is_floating_point():
        raise ValueError(
            f"{what} must be a float matrix of {dimension} columns, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    norms = torch.linalg.vector_norm(tensor, dim=1, dtype=torch.float32)
    wrong = ~((norms - 1).abs() <= UNIT_TOLERANCE)  # written this way, NaN counts as wrong
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"row {row} of the {what} has the norm {float(norms[row]):g}; expected unit rows, finite")
    return tensor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""LiveCorpus: the embeddings of a corpus while the model that made them keeps changing, searched exactly.

A plain matrix in memory, because an approximate index decays under the updates that training makes: after heavy
updating, the recall@10 of HNSW (USearch) fell from 0.998 to 0.535; a matrix stays at 1.0. Each row has a version (how
often it was written) and the step of the weights that encoded it.

Shape suffixes: Q queries, N rows of the corpus (documents), R some rows of it, D dimensions, K results.

A *step* is the number of optimizer steps that the encoding weights had taken: the first encoding has step 0, and a row
is *fresh* at step s if its vector was made with the weights of step s.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.topk import MAX_ROWS, best_keys, keys_of_best, unpack
from search_r3.errors import InputError

CHUNK_CELLS = 2**22
"""Scores held at once while searching, and values upcast at once: 16 MiB of float32 and 32 MiB of keys."""
QUERY_BLOCK = 1024
"""Queries scored at once: with `CHUNK_CELLS`, chunks keep at least 4,096 rows."""
UNIT_TOLERANCE = 0.01
"""How far a row's norm may be from 1: rounding a unit row to bf16 moves it by up to 0.004, a missing normalization by
far more."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMAT = 1


class Corpus(Protocol):
    """What the graph, the refresh policies and the environment need; `LiveCorpus` and `ShardedCorpus` implement it."""

    steps_N: Tensor
    versions_N: Tensor

    def __len__(self) -> int: ...
    @property
    def dimension(self) -> int: ...
    def search(self, q_QD: Any, k: int) -> tuple[Tensor, Tensor]: ...
    def scores(self, q_QD: Any, rows: Any) -> Tensor: ...
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
        versions_N: int32 on the CPU, how often each row was written; 0 is never, and such a corpus cannot be searched.
        steps_N: int32 on the CPU, the step of the weights that made each row; -1 if never written.

    Memory: N x D values, and 8 bytes a row: within 1.1 x N x D x bytes from 80 bytes a row on (20 dimensions in
    float32). A search adds a bounded amount (`chunk_cells`), independent of N.
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
        """An empty matrix; `update` fills it, in any order and in blocks, so that no second copy is ever needed.

        Raises:
            ValueError: rows or dimension below 1, more than 2^31 - 1 rows, chunk_cells below 1, or a dtype other than
                float32, bfloat16 and float16.
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
        """A corpus of these unit rows (N, D), which are copied. Errors as the constructor and `update`."""
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

        Cosines descend; of equal ones the smaller row comes first (see `topk`). They are computed in float32 whatever
        the dtype of the matrix; the same query, matrix and chunk size give bit-identical results.

        Args:
            q_QD: unit rows.

        Raises:
            ValueError: a wrong shape, a row that is not a unit row (or NaN), k below 1, or rows never written.
        """
        if k < 1:
            raise ValueError(f"k is {k}; a cut-off is 1 or more")
        self._check_written()
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        found = [self._search(q_QD[start : start + QUERY_BLOCK], k) for start in range(0, len(q_QD), QUERY_BLOCK)]
        none = torch.empty(0, min(k, len(self)), dtype=torch.int64, device=self.device)
        return unpack(torch.cat([*found, none]))

    def _search(self, q_QD: Tensor, k: int) -> Tensor:
        best_QK: Tensor | None = None
        for start, stop in self._blocks(len(self), queries=len(q_QD)):
            scores_QC = q_QD @ self._matrix_ND[start:stop].to(torch.float32).T
            keys_QK = keys_of_best(scores_QC, torch.arange(start, stop, device=self.device), k)
            best_QK = keys_QK if best_QK is None else best_keys(torch.cat([best_QK, keys_QK], dim=1), k)
        assert best_QK is not None  # a corpus has a row
        return best_QK

    @torch.no_grad()
    def scores(self, q_QD: Any, rows: Any) -> Tensor:
        """Cosines of every query with the given rows, (Q, R) float32, one column a row in the order given.

        A row may be given twice. Raises ValueError as `search`, or for rows outside the corpus.
        """
        q_QD = check_unit("queries", q_QD, self.dimension).to(self.device, torch.float32)
        rows_R = self._checked_rows(rows)
        self._check_written(rows_R)
        parts = [
            q_QD @ self._matrix_ND[rows_R[start:stop].to(self.device)].to(torch.float32).T
            for start, stop in self._blocks(len(rows_R), queries=len(q_QD))
        ]
        return torch.cat(parts, dim=1) if parts else q_QD.new_zeros(len(q_QD), 0)

    def vectors(self, rows: Any) -> Tensor:
        """A copy of the given rows, (R, D) float32 on the corpus's device, without gradient."""
        rows_R = self._checked_rows(rows)
        self._check_written(rows_R)
        return self._matrix_ND[rows_R.to(self.device)].to(torch.float32)

    @torch.no_grad()
    def update(self, rows: Any, vectors: Any, step: int) -> None:
        """Overwrite rows with vectors made by the weights of `step`: all of them, or, on an error, none.

        Args:
            rows: (R,) distinct row numbers.
            vectors: (R, D) unit rows; stored in the corpus's dtype.
            step: 0 or more, and no earlier than any of these rows' last refresh.

        Raises:
            ValueError: a row outside the corpus or given twice, a vector that is not a unit row (or NaN), unequal
                numbers of rows and vectors, or a step that goes back.
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
        """How many steps old every row's vector is at `step`, (N,) int64; 0 is fresh."""
        return step - self.steps_N.to(torch.int64)

    def all_gather_rows(self, mine: Tensor) -> Tensor:
        """All processes' rows of a tensor, by rank: here those of the only process."""
        return mine

    def local_rows(self, rows: np.ndarray) -> np.ndarray:
        """The rows among these that this process encodes: here all."""
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Tensors (not copied) and JSON values: a task's state for `training.run_checkpoint`."""
        return {
            "format": FORMAT,
            "dtype": _dtype_name(self.dtype),
            "vectors": self._matrix_ND,
            "versions": self.versions_N,
            "steps": self.steps_N,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the corpus from `state`, bit for bit; on an error, stay as it was.

        Raises:
            InputError: the state is of a corpus of another size or dtype, damaged, or of a newer format.
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
        """(start, stop) over `rows`, so that neither the scores nor the upcast rows exceed `chunk_cells` values."""
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
        ValueError: not one dimension of integers, or a number outside [0, count).
    """
    rows_R = torch.as_tensor(np.asarray(rows) if isinstance(rows, list | tuple) else rows).detach().cpu()
    if rows_R.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if rows_R.dim() != 1 or rows_R.is_floating_point() or rows_R.dtype == torch.bool:
        raise ValueError(f"rows must be one dimension of integers, got {rows_R.dtype} {tuple(rows_R.shape)}")
    low, high = int(rows_R.min()), int(rows_R.max())
    if low < 0 or high >= count:
        raise ValueError(f"there is no row {low if low < 0 else high}; the corpus has rows 0 to {count - 1}")
    return rows_R.to(torch.int64)


def check_distinct(rows_R: Tensor) -> None:
    """Raise ValueError if a row number occurs twice."""
    if rows_R.numel() > 1:
        ordered = rows_R.sort().values
        twice = ordered[1:] == ordered[:-1]
        if bool(twice.any()):
            raise ValueError(f"row {int(ordered[1:][twice][0])} is given twice; a row has one vector")


def check_unit(what: str, vectors: Any, dimension: int) -> Tensor:
    """`vectors` as a float tensor (rows, dimension) without gradient.

    Raises:
        ValueError: another shape, integers, or a row whose norm is not 1 within `UNIT_TOLERANCE` (NaN included).
    """
    tensor = torch.as_tensor(vectors).detach()
    if tensor.dim() != 2 or tensor.shape[1] != dimension or not tensor.is_floating_point():
        raise ValueError(
            f"{what} must be a float matrix of {dimension} columns, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    norms = torch.linalg.vector_norm(tensor, dim=1, dtype=torch.float32)
    wrong = ~((norms - 1).abs() <= UNIT_TOLERANCE)  # so written, NaN is wrong too
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"row {row} of the {what} has the norm {float(norms[row]):g}; expected unit rows, finite")
    return tensor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

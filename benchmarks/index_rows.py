"""Rows on disk, exact search among them, and rows that lie as real ones do: real vectors and perturbed copies of them.

A copy is moved by the difference of two real neighbors, so it leaves its origin in a direction and by a distance that
real texts have among themselves. One factor on that move is found such that a row's nearest neighbor is as far, in the
median, as a real text's; the quantiles of both are measured and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import rounded, say

from search_r3.files import atomic_path

NEIGHBORS = 50  # a copy moves by the difference to one of so many neighbors
BLOCK = 16_384
PIECE = 1000  # texts encoded between two looks at the clock
PROBES = 300  # rows whose neighbors are measured
HALVINGS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def encoded(model: Any, texts: Sequence[str], side: str, folder: Path) -> np.ndarray:
    """(texts, dimension) float32 unit rows, kept in `folder` piece by piece."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for start in range(0, len(texts), PIECE):
        some = list(texts[start : start + PIECE])
        path = folder / f"{side}-{start:06d}.npy"
        if not path.exists():
            say(f"encoding {side} {start:,} to {start + len(some):,} of {len(texts):,}")
            found = model.encode_document(some) if side == "texts" else model.encode_query(some, reasoning=False)
            with atomic_path(path) as scratch:
                np.save(scratch, found.astype(np.float32))
        pieces.append(np.load(path))
        if len(pieces[-1]) != len(some):
            raise SystemExit(f"{path} holds {len(pieces[-1])} vectors instead of {len(some)}; remove {folder}")
    return np.concatenate(pieces)


def unit(matrix: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-12)).astype(np.float32)


def nearest(
    queries: np.ndarray,
    blocks: Iterator[tuple[int, np.ndarray]],
    k: int,
    kept: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact search: the `k` largest cosines, best first, and their rows, both (Q, k).

    Args:
        kept: from row numbers to whether a filter keeps them; None keeps all.
    """
    best = np.full((len(queries), k), -2.0, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    for start, block in blocks:
        cosines = queries @ block.T
        if kept is not None:
            cosines[:, ~kept(np.arange(start, start + len(block)))] = -2.0
        top = np.argpartition(-cosines, min(k, len(block)) - 1, axis=1)[:, :k]
        both = np.concatenate([best, np.take_along_axis(cosines, top, 1)], axis=1)
        names = np.concatenate([rows, top + start], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(both, order, 1), np.take_along_axis(names, order, 1)
    return best, rows


class Rows:
    """Row i of the made-up corpus: the real vectors first, then copies of them in turns."""

    def __init__(self, real: np.ndarray, count: int, seed: int) -> None:
        self.real, self.count, self.seed = real, count, seed
        k = min(NEIGHBORS, len(real) - 1)
        cosines, rows = nearest(real, in_memory(real), k + 1)
        self.neighbors = rows[:, 1:]
        self.real_distances = 1 - cosines[:, [1, min(10, k)]]
        self.factor = 1.0
        if count > len(real):
            self.factor = self._calibrated()

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), the same every time."""
        out = np.empty((stop - start, self.real.shape[1]), dtype=np.float32)
        for position in range(start - start % BLOCK, stop, BLOCK):
            rng = np.random.default_rng([self.seed, position // BLOCK])
            rows = np.arange(position, position + BLOCK)
            made = self.copies(rows % len(self.real), rng, self.factor)
            real = rows < len(self.real)
            made[real] = self.real[rows[real]]
            low, high = max(start, position), min(stop, position + BLOCK)
            out[low - start : high - start] = made[low - position : high - position]
        return out

    def copies(self, origins: np.ndarray, rng: np.random.Generator, factor: float) -> np.ndarray:
        """The origins, each moved by `factor` times the difference of a real text and one of its neighbors."""
        here = rng.integers(0, len(self.real), len(origins))
        there = self.neighbors[here, rng.integers(0, self.neighbors.shape[1], len(origins))]
        return unit(self.real[origins] + factor * (self.real[there] - self.real[here]))

    def _calibrated(self) -> float:
        """The factor at which the median distance to the nearest row is the real one, by halving an interval."""
        rng = np.random.default_rng([self.seed, 1 << 32])
        origins = rng.choice(len(self.real), min(PROBES, len(self.real)), replace=False)
        each = max(1, self.count // len(self.real) - 1)
        goal = float(np.median(self.real_distances[:, 0]))
        low, high = 0.0, 4.0
        for _ in range(HALVINGS):
            factor = (low + high) / 2
            made = self.copies(np.repeat(origins, each), np.random.default_rng([self.seed, 2 << 32]), factor)
            probes = made[::each]
            cosines, _ = nearest(probes, in_memory(np.concatenate([made, self.real])), 2)
            low, high = (factor, high) if 1 - float(np.median(cosines[:, 1])) < goal else (low, factor)
        return (low + high) / 2


def in_memory(matrix: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of a matrix, with the number of their first row."""
    for start in range(0, len(matrix), BLOCK):
        yield start, matrix[start : start + BLOCK]


def on_disk(path: Path, block: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
    """The same of a .npy file, read and not mapped, so that it counts in nobody's memory."""
    with open(path, "rb") as handle:
        np.lib.format.read_magic(handle)
        (count, dimension), _, dtype = np.lib.format.read_array_header_1_0(handle)
        for start in range(0, count, block):
            size = min(block, count - start)
            yield start, np.frombuffer(handle.read(size * dimension * dtype.itemsize), dtype).reshape(size, dimension)


def write_rows(rows: Rows, path: Path) -> None:
    """All rows as a .npy file, block by block."""
    with atomic_path(path) as scratch, open(scratch, "wb") as handle:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows.count, rows.real.shape[1])}
        np.lib.format.write_array_header_1_0(handle, header)
        for start in range(0, rows.count, BLOCK):
            handle.write(rows.block(start, min(start + BLOCK, rows.count)).tobytes())
            if start // BLOCK % 16 == 0:
                say(f"rows: {start:,} of {rows.count:,}")


def write_parts(files: Sequence[Path], skip: int, count: int, path: Path) -> None:
    """Rows `skip` to `skip + count` of the parts together, of unit length, as one .npy file."""
    dimension = np.load(files[0], mmap_mode="r").shape[1]
    with atomic_path(path) as scratch, open(scratch, "wb") as handle:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, dimension)}
        np.lib.format.write_array_header_1_0(handle, header)
        written = 0
        for file in files:
            part = np.load(file)
            some = part[skip : skip + count - written]
            skip = max(0, skip - len(part))
            handle.write(unit(some).tobytes())
            written += len(some)
    if written != count:
        raise SystemExit(f"the parts have {written:,} rows where {count:,} were counted")


def real_distances(path: Path, count: int, seed: int) -> dict[str, Any]:
    """Quantiles of the cosine distance to the nearest and the tenth neighbor, of sampled rows."""
    chosen = np.sort(np.random.default_rng(seed).choice(count, min(PROBES, count), replace=False))
    cosines, _ = nearest(_rows_at(path, chosen), on_disk(path), 11)
    distances = 1 - cosines[:, [1, 10]]
    return {"quantiles": list(QUANTILES), "nearest": _quantiles(distances[:, 0]), "tenth": _quantiles(distances[:, 1])}


def _rows_at(path: Path, chosen: np.ndarray) -> np.ndarray:
    parts = (
        (start, block, chosen[(chosen >= start) & (chosen < start + len(block))]) for start, block in on_disk(path)
    )
    return np.concatenate([block[some - first] for first, block, some in parts])


def likeness(rows: Rows, path: Path) -> dict[str, Any]:
    """Quantiles of the cosine distance to the nearest and the tenth neighbor, of real texts and of all rows."""
    rng = np.random.default_rng([rows.seed, 3 << 32])
    chosen = np.sort(rng.choice(rows.count, min(PROBES, rows.count), replace=False))
    cosines, _ = nearest(_rows_at(path, chosen), on_disk(path), 11)
    made = 1 - cosines[:, [1, 10]]
    return {
        "quantiles": list(QUANTILES),
        "real_nearest": _quantiles(rows.real_distances[:, 0]),
        "made_nearest": _quantiles(made[:, 0]),
        "real_tenth": _quantiles(rows.real_distances[:, 1]),
        "made_tenth": _quantiles(made[:, 1]),
        "factor": rounded(rows.factor),
        "real_rows": len(rows.real),
        "how": "the real vectors, then copies moved by factor * (neighbor - text), of a random real text and one of "
        f"its {rows.neighbors.shape[1]} nearest; the factor makes the median nearest distance the real one",
    }


def _quantiles(values: np.ndarray) -> list[float]:
    return [rounded(float(value)) for value in np.quantile(values, QUANTILES)]

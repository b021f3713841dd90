"""An index in one NumPy file: small and searched exactly, for up to about 100,000 chunks.

The file (`index.npz`) has the vectors, the rows as JSON lines, and the index's description. Every change writes a new
file that replaces the old one in one rename, so a crash leaves either the old file or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.index.backends.index_backend import IndexBackend, Row, Scored
from search_r3.index.index_info import IndexInfo, migrate

FILE = "index.npz"


class NumpyBackend(IndexBackend):
    """Rows in memory with their vectors, (N, dimension) float32. Supports neither text search nor filters."""

    name: ClassVar[str] = "numpy"

    def __init__(self, path: Path, info: IndexInfo, rows: list[Row], vectors_ND: np.ndarray) -> None:
        self._file, self.info = path / FILE, info
        self._set(rows, vectors_ND)

    def _set(self, rows: list[Row], vectors_ND: np.ndarray) -> None:
        self._rows, self._vectors_ND = rows, vectors_ND
        self._position_of = {row["id"]: position for position, row in enumerate(rows)}

    @classmethod
    def create(cls, path: Path, info: IndexInfo) -> NumpyBackend:
        return cls(path, info, [], np.empty((0, info.dimension), dtype=np.float32))

    @classmethod
    def open(cls, path: Path) -> NumpyBackend | None:
        file = path / FILE
        if not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as saved:
                info = IndexInfo(**migrate(json.loads(saved["info"].tobytes()), path))
                rows = [json.loads(line) for line in saved["rows"].tobytes().splitlines()]
                return cls(path, info, rows, saved["vectors"])
        except InputError:
            raise
        except Exception as error:  # numpy, zipfile, zlib and json each raise different errors
            raise InputError(f"the index {path} is damaged ({error}); delete the folder and index again") from error

    def add(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        new = {row["id"]: (row, vector) for row, vector in zip(rows, vectors, strict=True)}
        kept = [position for position, row in enumerate(self._rows) if row["id"] not in new]
        added_MD = np.asarray([vector for _, vector in new.values()], dtype=np.float32).reshape(-1, self.info.dimension)
        matrix_ND = np.concatenate([self._vectors_ND[kept], added_MD])
        self._write([*(self._rows[position] for position in kept), *(row for row, _ in new.values())], matrix_ND)

    def delete(self, ids: Collection[str]) -> None:
        unwanted = set(ids)
        kept = [position for position, row in enumerate(self._rows) if row["id"] not in unwanted]
        self._write([self._rows[position] for position in kept], self._vectors_ND[kept])

    def search(self, vector: np.ndarray, k: int, where: str | None = None, exact: bool = False) -> list[Scored]:
        if not self._rows:
            return []
        norms_N = np.linalg.norm(self._vectors_ND, axis=1) * np.linalg.norm(vector)
        cosines_N = self._vectors_ND @ vector / norms_N.clip(1e-12)
        k = min(k, len(cosines_N))
        least = np.partition(cosines_N, -k)[-k]
        scored = [(self._rows[position], float(cosines_N[position])) for position in np.flatnonzero(cosines_N >= least)]
        return sorted(scored, key=lambda pair: (-pair[1], pair[0]["id"]))[:k]

    def rows(self) -> Iterable[Row]:
        return list(self._rows)

    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        return self._vectors_ND[[self._position_of[identifier] for identifier in ids]]

    def count(self) -> int:
        return len(self._rows)

    def _write(self, rows: list[Row], vectors_ND: np.ndarray) -> None:
        lines = b"\n".join(json.dumps(row).encode() for row in rows)
        info = json.dumps(asdict(self.info)).encode()
        with atomic_path(self._file) as scratch:
            np.savez(
                scratch, vectors=vectors_ND, rows=np.frombuffer(lines, np.uint8), info=np.frombuffer(info, np.uint8)
            )
        self._set(rows, vectors_ND)

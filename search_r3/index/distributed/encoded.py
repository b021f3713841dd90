"""What the workers have encoded, kept next to the spool until the commit: a driver that dies loses next to nothing.

The vectors of about a thousand spooled rows are one Lance file, named by what was encoded: the hashes of the texts
(which cover how many tokens are read) and the model's contract. Whoever comes to the same texts again, another worker
or the next run of the same command, finds the file; numbers of workers and tasks do not matter. Parts end where a
text's hash says so, as in content-defined chunking (LBFS: Muthitacharoen, Chen & Mazieres, SOSP 2001), so a document
that is added or removed between two runs changes only the parts around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from search_r3.files import atomic_path
from search_r3.index.backends.lance.lance_table import FOLLOW_WRITES
from search_r3.index.row_keys import VECTOR
from search_r3.index.storage.location import Location, connect, options_of
from search_r3.index.storage.locking import ENCODED

PART_ROWS, LONGEST_PART = 1024, 4096
"""Mean number of rows of a part, and the maximum. A worker that dies loses at most one part."""
UNREADABLE = (OSError, ValueError, RuntimeError)
"""What Lance raises for a file that is missing, cut off or not one of its files."""


def parts(hashes: Sequence[str], mean: int = PART_ROWS, longest: int = LONGEST_PART) -> Iterator[slice]:
    """Slices of about `mean` rows and at most `longest`, which end where the hashes of the texts say so.

    Args:
        hashes: hexadecimal, of at least 8 characters, in the order of the rows.
    """
    start = 0
    for end, text in enumerate(hashes, 1):
        if int(text[:8], 16) % mean == 0 or end - start == longest:
            yield slice(start, end)
            start = end
    if start < len(hashes):
        yield slice(start, len(hashes))


@dataclass(frozen=True)
class EncodedParts:
    """The encoded parts next to the index at `location`, by one model.

    Attributes:
        contract_hash, dimension: the model's.
    """

    location: Location
    contract_hash: str
    dimension: int

    def read(self, hashes: Sequence[str]) -> np.ndarray | None:
        """The vectors of the texts with these hashes, float32 (texts, dimension), or None if they are not there."""
        from lance.file import LanceFileReader

        if isinstance(self.location, Path) and not _has_bytes(Path(self._file(hashes))):
            return None  # of an empty file, Lance panics
        try:
            reader = LanceFileReader(self._file(hashes), storage_options=options_of(self.location))
            column = reader.read_all().to_table()[VECTOR].combine_chunks()
        except UNREADABLE:
            return None
        vectors = np.array(column.flatten(), dtype=np.float32)  # a copy that can be written to
        if vectors.size != len(hashes) * self.dimension or not np.isfinite(vectors).all():
            return None
        vectors = vectors.reshape(len(hashes), self.dimension)
        return vectors if vectors.any(axis=1).all() else None

    def write(self, hashes: Sequence[str], vectors: np.ndarray) -> None:
        """Keep the vectors, float32 (texts, dimension), of the texts with these hashes."""
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.dimension)
        batch = pa.RecordBatch.from_arrays([column], names=[VECTOR])
        if isinstance(self.location, Path):
            with atomic_path(self._file(hashes)) as file:
                _write(str(file), batch, None)
        else:  # an object appears whole
            _write(self._file(hashes), batch, options_of(self.location))

    def _file(self, hashes: Sequence[str]) -> str:
        name = hashlib.sha256("\n".join([self.contract_hash, *hashes]).encode()).hexdigest()[:40]
        return f"{self.location}/{ENCODED}/data/{name}.lance"


def _has_bytes(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _write(file: str, batch: pa.RecordBatch, options: dict[str, str] | None) -> None:
    from lance.file import LanceFileWriter

    with LanceFileWriter(file, batch.schema, storage_options=options) as writer:
        writer.write_batch(batch)


def drop_encoded(location: Location) -> None:
    """Remove what workers have encoded, once it is in the index."""
    connect(location, FOLLOW_WRITES).drop_table(ENCODED.removesuffix(".lance"), ignore_missing=True)

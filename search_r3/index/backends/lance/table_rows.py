"""A chunk as a stored row: its hashes, the check of its vector, and the conversion of rows to an Arrow table.

Pure functions, shared by local and distributed builds: equal chunks give equal rows on any machine.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.backends.lance.table_columns import as_type, metadata_columns
from search_r3.index.chunking.chunker import Chunk
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.row_keys import COLUMNS, CONTENT, METADATA, PLACE, ROW_HASH, SOURCE, TEXT_HASH, VECTOR


def make_row(chunk: Chunk, max_length: int | None, source: str, place: str) -> dict[str, Any]:
    """A chunk's row without its vector; the values of its metadata columns are under `COLUMNS`.

    `TEXT_HASH` covers what the model is given, `ROW_HASH` the whole row except its source (128 bits of SHA-256 each).

    Args:
        source: the name of the source that the document belongs to.
        place: where the document was read, for messages; kept under `PLACE`.

    Raises:
        InputError: two of its metadata fields map to the same column.
    """
    content = f"{chunk.title} {chunk.text}" if chunk.title else chunk.text
    row: dict[str, Any] = {
        "id": chunk.id,
        "document": chunk.document,
        "title": chunk.title,
        "path": chunk.path,
        "start_line": chunk.start_line,
        "end_line": chunk.end_line,
        CONTENT: content,
        METADATA: json.dumps(chunk.metadata, ensure_ascii=False, sort_keys=True),
        TEXT_HASH: _hash(max_length, content),
    }
    row[ROW_HASH] = _hash(*row.values())
    row |= {SOURCE: source, PLACE: place, COLUMNS: metadata_columns(chunk.metadata, place)}
    return row


def checked_vectors(encoded: Any, ids: list[str], model: Encoder) -> np.ndarray:
    """The model's output for the rows `ids`, checked, as float32 (len(ids), model.dimension).

    Raises:
        InputError: its shape is wrong, or an embedding is NaN, infinite or all zeros.
    """
    matrix = np.asarray(encoded, dtype=np.float32)
    expected = (len(ids), model.dimension)
    if matrix.shape != expected:
        raise InputError(
            f"the model {model.name} returned embeddings of shape {matrix.shape}, expected {expected}; "
            "nothing of this batch was written; check the checkpoint"
        )
    good = np.isfinite(matrix).all(axis=1) & (np.abs(matrix).max(axis=1, initial=0.0) > 0)
    if not good.all():
        wrong = int(np.flatnonzero(~good)[0])
        what = "all zeros" if np.isfinite(matrix[wrong]).all() else "NaN or infinite values"
        raise InputError(
            f'the model {model.name} returned an embedding with {what} for "{ids[wrong]}" ({(~good).sum()} of '
            f"{len(ids)} texts); nothing of this batch was written; check the checkpoint and its dtype"
        )
    return matrix


def as_arrow(rows: list[dict[str, Any]], vectors: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Rows and their vectors, float32 (len(rows), dimension), as a table with the columns of `schema` in order."""
    arrays = []
    for column in schema:
        if column.name == VECTOR:
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]))
        else:
            values = [row[column.name] if column.name in row else _cell(row, column) for row in rows]
            arrays.append(pa.array(values, column.type))
    return pa.Table.from_arrays(arrays, names=[column.name for column in schema])


def _cell(row: dict[str, Any], column: pa.Field) -> Any:
    value = row[COLUMNS].get(column.name)
    if value is None:
        return None
    if (fitting := as_type(value, column.type)) is None:  # `ColumnTypes.fit` refuses such values
        raise ValueError(f"{column.name} is {value!r}, which does not fit a column of {column.type}")
    return fitting


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]

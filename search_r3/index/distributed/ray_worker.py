"""The workers: each loads the model and turns spooled rows into rows of the table, with the local build's code.

They keep no state between calls, so any other worker can repeat the batch of a dead one, up to what that one had
encoded (`encoded`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from search_r3.errors import InputError
from search_r3.files import expand_user
from search_r3.index.backends.lance.table_columns import metadata_columns
from search_r3.index.backends.lance.table_rows import as_arrow
from search_r3.index.build.embedding import embed, prepare
from search_r3.index.distributed.encoded import EncodedParts, parts
from search_r3.index.encoder_protocol import CountTokens, Encoder, document_spaces
from search_r3.index.row_keys import COLUMNS, CONTENT, METADATA, TEXT_HASH
from search_r3.index.storage.location import Location

STORED_VECTOR = "r3_held"
"""Column of a spooled row: its vector, float32 (dimension,), if the index already had its text; else null."""


@dataclass(frozen=True)
class ModelSource:
    """Loads a SearchR3 model in a worker: by name, from a folder that every worker can read, or by hub id.

    For another encoder, a build takes any picklable function that returns one.
    """

    name: str
    device: str | None = None
    dtype: str = "auto"
    engine: str = "auto"

    def __post_init__(self) -> None:
        if (folder := expand_user(self.name)).is_dir():  # workers run in different folders
            object.__setattr__(self, "name", str(folder.resolve()))

    def __call__(self) -> Encoder:
        from search_r3.model.searchr3 import SearchR3

        return SearchR3.from_pretrained(self.name, device=self.device, engine=self.engine, dtype=self.dtype)


@dataclass(frozen=True)
class Described:
    """A worker's description of its model; the driver never loads one.

    `count_tokens` is the model's `token_counter`, so that the driver cuts chunks as a local build does; if the model
    has none, it is None and tokens are estimated.
    """

    name: str
    contract_hash: str
    dimension: int
    source: str
    count_tokens: CountTokens | None = field(default=None, compare=False)
    document_spaces: tuple[str, ...] = ()


def describe(load: Callable[[], Encoder]) -> Described:
    """Load a model and describe it."""
    model = load()
    source, count = getattr(model, "source", ""), getattr(model, "token_counter", None)
    return Described(model.name, model.contract_hash, model.dimension, source, count, document_spaces(model))


@dataclass(frozen=True)
class Job:
    """What every worker of a build needs to know.

    Attributes:
        location: the index, next to which encoded parts are kept.
        load: returns the model.
        model: description that the model must match.
        schema: the table's schema.
        max_length: tokens a text is truncated to; None for the model's limit.
        batch_tokens, batch_size: maximum sizes of a forward pass, as for `build_index`.
    """

    location: Location
    load: Callable[[], Encoder]
    model: Described
    schema: pa.Schema
    max_length: int | None
    batch_tokens: int
    batch_size: int | None


class EncodeRows:
    """Turns spooled rows into rows of the table; created once in each worker."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.load()
        if self.model.contract_hash != job.model.contract_hash:
            raise InputError(
                f"a worker loaded {self.model.name} with contract {self.model.contract_hash[:12]}, expected "
                f"{job.model.contract_hash[:12]}; give all machines the same model"
            )

    def __call__(self, spooled: pa.Table) -> pa.Table:
        """Encode spooled rows; returns rows of the table with their vectors.

        Raises:
            InputError: the model returned NaN, zeros or the wrong shape.
        """
        job = self.job
        rows: list[dict[str, Any]] = spooled.to_pylist()
        vectors = np.empty((len(rows), job.model.dimension), dtype=np.float32)
        new = []
        for number, row in enumerate(rows):
            row[COLUMNS] = metadata_columns(json.loads(row[METADATA]), f'document "{row["document"]}"')
            if (stored := row.pop(STORED_VECTOR)) is None:
                new.append(number)
            else:
                vectors[number] = stored
        hashes = [rows[number][TEXT_HASH] for number in new]
        for part in parts(hashes):
            vectors[new[part]] = self._encoded([rows[number] for number in new[part]], hashes[part])
        return as_arrow(rows, vectors, job.schema)

    def _encoded(self, rows: list[dict[str, Any]], hashes: list[str]) -> np.ndarray:
        """The vectors of a part, (rows, dimension) float32: as it was kept, or encoded and kept."""
        job = self.job
        kept = EncodedParts(job.location, job.model.contract_hash, job.model.dimension)
        if (vectors := kept.read(hashes)) is None:
            texts = [row[CONTENT].strip() for row in rows]
            prepared = prepare(self.model, texts, job.max_length, job.batch_tokens, job.batch_size)
            vectors = embed(self.model, prepared, [row["id"] for row in rows], job.max_length)
            kept.write(hashes, vectors)
        return vectors

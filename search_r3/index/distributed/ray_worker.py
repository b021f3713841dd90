"""What a worker does: it holds the model and turns spooled rows into rows of the table, by the local path's own code.

Nothing is kept between two calls, so a batch that a dead worker had can be done again by any other.
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
from search_r3.index.encoder_protocol import CountTokens, Encoder
from search_r3.index.row_keys import COLUMNS, CONTENT, METADATA

HELD = "r3_held"
"""Of a spooled row: its vector, float32 (dimension,), where the index had its text already; else null."""


@dataclass(frozen=True)
class ModelSource:
    """How a worker gets a SearchR3 model: by a name, a folder that every worker sees, or a hub id.

    For another encoder, a build takes any picklable function that returns one.
    """

    name: str
    device: str | None = None
    dtype: str = "auto"
    engine: str = "auto"

    def __post_init__(self) -> None:
        if (folder := expand_user(self.name)).is_dir():  # workers run in other folders
            object.__setattr__(self, "name", str(folder.resolve()))

    def __call__(self) -> Encoder:
        from search_r3.model.searchr3 import SearchR3

        return SearchR3.from_pretrained(self.name, device=self.device, engine=self.engine, dtype=self.dtype)


@dataclass(frozen=True)
class Described:
    """What a worker says of its model; the driver itself never loads one.

    `count_tokens` is the model's `token_counter`, so that the driver cuts chunks as a local build does; None where the
    model has none, and tokens are estimated.
    """

    name: str
    contract_hash: str
    dimension: int
    source: str
    count_tokens: CountTokens | None = field(default=None, compare=False)


def describe(load: Callable[[], Encoder]) -> Described:
    """Load a model and say what it is."""
    model = load()
    source, count = getattr(model, "source", ""), getattr(model, "token_counter", None)
    return Described(model.name, model.contract_hash, model.dimension, source, count)


@dataclass(frozen=True)
class Job:
    """What every worker of a build needs to know.

    Attributes:
        load: gives the model.
        model: what it must be.
        schema: of the table.
        max_length: tokens a text is cut to; None for the model's own limit.
        batch_tokens, batch_size: of a forward pass, at most, as in `build_index`.
    """

    load: Callable[[], Encoder]
    model: Described
    schema: pa.Schema
    max_length: int | None
    batch_tokens: int
    batch_size: int | None


class EncodeRows:
    """Spooled rows in, the table's rows out; made once in each worker."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.load()
        if self.model.contract_hash != job.model.contract_hash:
            raise InputError(
                f"a worker loaded {self.model.name} with contract {self.model.contract_hash[:12]} where "
                f"{job.model.contract_hash[:12]} was expected; give all machines the same model"
            )

    def __call__(self, spooled: pa.Table) -> pa.Table:
        """Rows of the spool as rows of the table, with their vectors.

        Raises:
            InputError: the model gave NaN, zeros or another shape.
        """
        job = self.job
        rows: list[dict[str, Any]] = spooled.to_pylist()
        vectors = np.empty((len(rows), job.model.dimension), dtype=np.float32)
        new = []
        for number, row in enumerate(rows):
            row[COLUMNS] = metadata_columns(json.loads(row[METADATA]), f'document "{row["document"]}"')
            if (held := row.pop(HELD)) is None:
                new.append(number)
            else:
                vectors[number] = held
        texts = [rows[number][CONTENT].strip() for number in new]
        prepared = prepare(self.model, texts, job.max_length, job.batch_tokens, job.batch_size)
        vectors[new] = embed(self.model, prepared, [rows[number]["id"] for number in new], job.max_length)
        return as_arrow(rows, vectors, job.schema)

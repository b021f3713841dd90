"""What an index says of itself: the model it was made with, its format, and the state of its search structures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from search_r3.errors import InputError
from search_r3.index.encoder_protocol import Encoder, document_spaces

FORMAT_VERSION = 3
FullText = Literal["current", "outdated", "missing", "none"]
"""The state of the full-text index: see `SearchIndex.full_text`."""


class ModelMismatch(InputError):
    """The index was made with another model, whose embeddings cannot be compared with this model's."""


@dataclass(frozen=True)
class IndexInfo:
    """What an index was made with.

    Attributes:
        created: UTC in ISO 8601.
        document_space: what a model's documents must have in common with the index; "" if only an equal contract is
            known to fit (formats before 3, and encoders without document spaces).
    """

    format_version: int
    model_name: str
    contract_hash: str
    dimension: int
    created: str
    search_r3_version: str = ""
    model_source: str = ""
    document_space: str = ""

    @classmethod
    def of(cls, model: Encoder) -> IndexInfo:
        """The description of an index made now with `model`."""
        from search_r3 import __version__

        created = datetime.now(UTC).isoformat(timespec="milliseconds")  # indexes may be made within the same second
        source, space = getattr(model, "source", ""), next(iter(document_spaces(model)), "")
        named = model.name, model.contract_hash, model.dimension
        return cls(FORMAT_VERSION, *named, created, __version__, source, space)

    @property
    def identity(self) -> tuple[str, str, int]:
        """What identifies an index: its creation time, contract and dimension."""
        return self.created, self.contract_hash, self.dimension

    def check_model(self, model: Encoder, path: Path | str) -> None:
        """Refuse a model whose embeddings are not in the same space as those of the index at `path`.

        Raises:
            ModelMismatch: neither the document space nor the contract is the same; both models are named.
        """
        spaces = (model.contract_hash, *document_spaces(model))
        if self.contract_hash not in spaces and self.document_space not in spaces:
            raise ModelMismatch(
                f"{path} was made with {self.model_name} (contract {self.contract_hash[:12]}), but this "
                f"model is {model.name} (contract {model.contract_hash[:12]}): their embeddings cannot be compared. "
                f"Use the index's model, or build a new index with {model.name} in another folder"
            )

    def same_space(self, other: IndexInfo) -> bool:
        """Whether the vectors of both indexes are comparable."""
        same = self.contract_hash == other.contract_hash
        return same or self.document_space == other.document_space != ""

    def check_expected(self, expected: IndexInfo, path: Path | str) -> None:
        """Refuse to change the index at `path` if it was not made with the same model as the `expected` one.

        Raises:
            ModelMismatch: the models' documents are not comparable.
        """
        if not self.same_space(expected):
            raise ModelMismatch(
                f"{path} holds an index that was made with {self.model_name} (contract {self.contract_hash[:12]}), "
                f"not with {expected.model_name} (contract {expected.contract_hash[:12]}); nothing was changed"
            )


@dataclass(frozen=True)
class ApproximateIndex:
    """An approximate index as it was built and measured; stored in the metadata of the table's vector column.

    Attributes:
        kind: LanceDB's name for its type.
        used: whether searches use it. False means that no settings reached the goal, so search is exact.
        recall_at_10: share of the ten nearest neighbors that it finds; the lowest value of `recall_of`.
        recall_of: recall by origin of the queries: "rows" of the table, or real "queries".
        sampled: number of queries of each origin.
        goal: the recall that it must reach.
        partitions: number of partitions.
        nprobes: partitions searched; more with a filter, and all of them if those have too few results.
        refine: candidates scored exactly, as a multiple of the number of results.
        rows: number of rows it was trained on.
        measured_rows: number of rows when its recall was measured.
        built: time of building, UTC in ISO 8601.
        build_seconds, measure_seconds: durations.
    """

    kind: str
    used: bool
    recall_at_10: float
    recall_of: dict[str, float]
    sampled: dict[str, int]
    goal: float
    partitions: int
    nprobes: int
    refine: int
    rows: int
    measured_rows: int
    built: str
    build_seconds: float
    measure_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        of = ", ".join(f"{value:.4f} of {self.sampled[name]} {name}" for name, value in self.recall_of.items())
        what = f"{self.kind}, {self.partitions:,} partitions of {self.rows:,} rows"
        if not self.used:
            return f"{what}: recall@10 {of}, below the goal of {self.goal}, so search is exact"
        return f"{what}: recall@10 {of}, searching {self.nprobes:,} partitions, {self.refine} candidates per result"


def migrate(description: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """Convert an index's description from any older format to `FORMAT_VERSION`, one step at a time.

    Raises:
        InputError: the format is newer; the message names `path`.
    """
    version = int(description["format_version"])
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path} has index format {version}, this search-r3 reads up to {FORMAT_VERSION}; upgrade search-r3"
        )
    for older in range(version, FORMAT_VERSION):
        description = _STEPS[older](description) | {"format_version": older + 1}
    return description


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    0: lambda description: {"created": ""} | description,  # before the first release, `created` was optional
    1: lambda description: description,  # the rows have no source, see `lance_table.migrate_rows`
    2: lambda description: description,  # the document space is not known: the contract must be the same
}
"""Format -> the step to the next one; a step changes the description, not the rows."""

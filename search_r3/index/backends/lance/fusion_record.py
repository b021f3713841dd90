"""The tuned fusion of an index (`search_r3.hybrid_fusion`) as its table records it."""

from __future__ import annotations

from typing import Any

from search_r3.hybrid_fusion import HybridFusion
from search_r3.index.backends.lance.conversion import annotate
from search_r3.index.row_keys import VECTOR

FIELD = "r3_hybrid_fusion"


def read_fusion(table: Any) -> HybridFusion | None:
    """The table's record; None if it has none, or another version wrote it."""
    kept = (table.schema.field(VECTOR).metadata or {}).get(FIELD.encode())
    return HybridFusion.from_json(kept.decode()) if kept else None


def write_fusion(table: Any, fusion: HybridFusion | None) -> None:
    """Record the fusion in the table, in a commit of its own; None removes it."""
    annotate(table, VECTOR, {FIELD: fusion.to_json() if fusion else ""})

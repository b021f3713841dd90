"""A system with changed queries, to measure the effect of case, typos and wording on its results.

All systems get the same changed queries (see `search_r3.data.query_variants`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search_r3.data.query_variants import ORIGINAL, VARIANTS, vary
from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.markdown_table import markdown_table
from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.systems import Answers, System

SEED = 0
"""Seed of the typos. It is constant, since runs with different typos could not be compared."""


class VariantSystem:
    """`system` with all queries changed by `kind`.

    Attributes:
        name: `SYSTEM.KIND`, the name in run files.
        of: the name of the unchanged system.
    """

    def __init__(self, system: System, kind: str) -> None:
        self.system, self.kind = system, kind
        self.of = system.name
        self.name = f"{system.name}.{kind}"
        self.device = system.device

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.system.identity, "queries": self.kind, "queries_seed": SEED}

    def answer(
        self, documents: Mapping[str, str], queries: Mapping[str, str], k: int, cache: EmbeddingCache | None
    ) -> Answers:
        changed = {qid: vary(text, self.kind, SEED) for qid, text in queries.items()}
        return self.system.answer(documents, changed, k, cache)


def refuse_variant_name(name: str) -> None:
    """Raise InputError for a system named like another system's variant: their run files would be the same."""
    if name.rpartition(".")[2] in VARIANTS:
        raise InputError(
            f"the system's name {name} ends like that of a run with changed queries (--queries); give it another name: "
            "LABEL=SPEC"
        )


def is_variant(record: Mapping[str, Any]) -> bool:
    """Whether a metrics record is about changed queries."""
    return "queries" in record


def variants_markdown(records: Sequence[Mapping[str, Any]], measure: str = NDCG) -> str:
    """A table of one measure: one row per data set and system with changed queries, one column per kind of change,
    after a column of the original queries if `records` has them."""
    values = {
        (record["dataset"], record.get("queries_of", record["system"]), record.get("queries", ORIGINAL)): record[
            "measures"
        ][measure]
        for record in records
    }
    rows = [(dataset, system) for dataset, system, kind in values if kind != ORIGINAL]
    kinds = [kind for kind in (ORIGINAL, *VARIANTS) if any((*row, kind) in values for row in rows)]

    def cell(row: tuple[str, str], kind: str) -> str:
        value = values.get((*row, kind))
        return "" if value is None else f"{value:.3f}"

    return markdown_table(
        ["", "", *("as they are" if kind == ORIGINAL else kind for kind in kinds)],
        [[*row, *(cell(row, kind) for kind in kinds)] for row in dict.fromkeys(rows)],
        text_columns=(0, 1),
    )

"""The tables about searching in docs/scale.md, from `scale_search` and from what `capacity.py` measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from scale_plan import GB, TB, Plan
from scale_search import (
    MEASURED,
    MILLION,
    PAGE,
    Costs,
    SearchPlan,
    approximate_costs,
    building_bytes,
    comparisons,
    machines,
    milvus_costs,
    share,
)

ROWS = (1e6, 10e6, 100e6, 1e9)
SHARES = (0.01, 0.1)
LOADS = (10, 100, 1000)
PLACES = {
    "disk": "LanceDB, its disk",
    "object storage": "LanceDB, object storage",
    "milvus": "Milvus, FLAT",
    "milvus ivf": "Milvus, IVF_RABITQ",
}


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bytes_text(size: float) -> str:
    """A number of bytes in GB, or in TB."""
    return f"{size / TB:,.2f} TB" if size >= TB else f"{size / GB:,.1f} GB"


def search_blocks(plan: Plan, search: SearchPlan, told: Mapping[str, str], measured: Any | None) -> dict[str, str]:
    """The blocks of docs/scale.md by name.

    Args:
        told: the parameters of `SearchPlan`, with what they are.
        measured: the figures of capacity.json, if they are there.
    """
    if measured is not None:
        source = "Measured ([capacity.json](../results/benchmarks/capacity.json))."
        told = dict(told) | {name: f"{told[name].partition('. ')[0].rstrip('.')}. {source}" for name in MEASURED}
    rows = [(f"`{field.name}`", f"{getattr(search, field.name):,.10g}", told[field.name]) for field in fields(search)]
    return {
        "searching": _searching_table(plan, search),
        "machines": _machines_table(plan, search),
        "building": _building_table(plan, search),
        "searched": _searched_table(measured),
        "fit": _fit_table(measured, search),
        "search_assumptions": markdown(("parameter", "value", "what it is"), rows),
    }


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.0f} ms" if value < 10 else f"{value:,.0f} s"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:,.2g}"


def _searching_table(plan: Plan, search: SearchPlan) -> str:
    """One machine, by rows and share of partitions."""
    lines = []
    for rows in ROWS:
        for part in sorted({*SHARES, share(rows, search)}):
            costs = approximate_costs(plan, replace(search, probe_share=part, probe_exponent=0.0), rows)
            mark = " (0.98)" if part == share(rows, search) else ""
            lines.append(
                (
                    f"{rows / MILLION:,.0f} million",
                    f"{part:.2g}{mark}",
                    _seconds(costs.cpu_seconds),
                    _rate(costs.a_second(search)),
                    bytes_text(costs.memory),
                    f"{costs.reads:,.0f} of {costs.pages * PAGE / 1e6:,.1f} MB",
                )
            )
    head = (
        "rows",
        "share of partitions",
        "CPU time of a search",
        f"a second, {search.cores:g} cores",
        "memory",
        "reads",
    )
    return markdown(head, lines)


def _machines_table(plan: Plan, search: SearchPlan) -> str:
    lines = []
    for documents in ROWS[1:]:
        rows = documents * plan.chunks_per_document
        for where, name in PLACES.items():
            exact = where == "milvus"
            costs = (
                milvus_costs(plan, search, rows, exact)
                if where.startswith("milvus")
                else approximate_costs(plan, search, rows)
            )
            cells = [_machines_cell(plan, search, rows, load, where, costs) for load in LOADS]
            lines.append((f"{documents / MILLION:,.0f} million", name, bytes_text(costs.memory), *cells))
    head = ("documents", "where", "memory", *(f"{load:,} a second" for load in LOADS))
    return markdown(head, lines)


def _machines_cell(plan: Plan, search: SearchPlan, rows: float, load: float, where: str, costs: Costs) -> str:
    found = machines(plan, search, rows, load, where)
    if math.isinf(found.count):
        if found.limit == "memory":
            return "does not fit"
        return f"{load * costs.reads:,.0f} requests a second: too many"
    return f"{found.count:,.0f} ({found.limit}), ${found.dollars_month:,.0f}"


def _building_table(plan: Plan, search: SearchPlan) -> str:
    found = building_bytes(plan, search)
    lines = [(name, bytes_text(size)) for name, size in found.items() if name != "most"]
    ratio = found["most"] / found["the table"]
    return markdown(
        ("what", "bytes"), [*lines, ("**at the peak**", f"**{bytes_text(found['most'])}** ({ratio:.2f} tables)")]
    )


def _fit_table(measured: Any | None, search: SearchPlan) -> str:
    """Measured searches beside the formula."""
    head = ("rows", "share of partitions", "recall@10", "CPU ms, measured", "by the formula", "off")
    if measured is None:
        return markdown(head, [("not measured yet", *[""] * (len(head) - 1))])
    lines = [
        (
            f"{one.rows:,}", f"{one.share:.3g}", f"{one.recall:.3f}", f"{one.measured_ms:,.1f}",
            f"{one.formula_ms:,.1f}", f"{one.off:+.0%}",
        )
        for one in comparisons(measured, search)
    ]  # fmt: skip
    return markdown(head, lines)


def _searched_table(measured: Any | None) -> str:
    head = (
        "rows", "dimension", "share of partitions", "refine", "recall@10", "CPU ms", "p50 ms", "memory",
        "KB from disk, files not in memory",
    )  # fmt: skip
    if measured is None:
        return markdown(head, [("not measured yet", *[""] * (len(head) - 1))])
    lines = []
    for rows, found in measured["by_rows"].items():
        searched = found["search"]
        cold, peak = searched["with_vectors_on_disk"], bytes_text(searched["peak_bytes"])
        for one in searched["approximate"]:
            lines.append(
                (
                    f"{int(rows):,}", str(measured["dimension"]), f"{one['share']:.3g}", f"{one['refine']}",
                    f"{one['recall_at_10']:.3f}", f"{one['cpu_ms']:,.1f}", f"{one['p50_ms']:,.1f}", peak,
                    f"{cold['kilobytes_from_disk']:,.0f}",
                )
            )  # fmt: skip
        exact = searched["exact"]
        lines.append(
            (
                f"{int(rows):,}", str(measured["dimension"]), "all, exact", "", "1.000", f"{exact['cpu_ms']:,.1f}",
                f"{exact['p50_ms']:,.1f}", peak, "",
            )
        )  # fmt: skip
    return markdown(head, lines)

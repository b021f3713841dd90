"""A study as a page of Markdown: every mode with its difference from off, the cost of budgets, the adaptive rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search_r3.evaluation.markdown_table import markdown_table
from search_r3.evaluation.measures import NDCG

PARTS = ("modes", "controls", "budgets", "auto")
"""Sections of a study's page between the header and the remarks."""


def study_markdown(study: Mapping[str, Any], parts: Sequence[str] = PARTS) -> str:
    """The table of modes (with intervals, corrected p-values, wins, ties and losses against `off`), the other families
    of comparisons, the budget curve and a line on mode `auto`; or only the given `parts`. Remarks on the data set are
    always included."""
    page = [
        f"{study['system']} on {study['dataset']}: {study['num_queries']:,} queries, "
        f"{study['num_documents']:,} documents, {NDCG}",
        *([_modes(study)] if "modes" in parts else []),
        *(_family(family) for family in study["families"] if family["against"] != "off" and "controls" in parts),
        *([_budgets(study)] if "budgets" in parts else []),
        *([f"auto: {study['adaptive']['summary']}."] if "adaptive" in study and "auto" in parts else []),
        *(f"Note: {remark}." for remark in study["remarks"]),
    ]
    return "\n\n".join(part for part in page if part)


def _modes(study: Mapping[str, Any]) -> str:
    against = {
        row["mode"]: row for family in study["families"] if family["against"] == "off" for row in family["comparisons"]
    }
    head = ["mode", NDCG, "against off", "95% interval", "p (Holm)", "wins/ties/losses", ""]
    rows = [
        [mode["mode"], f"{mode['measures'][NDCG]:.4f}", *_cells(against.get(mode["mode"])), mode["description"]]
        for mode in study["modes"]
    ]
    return markdown_table(head, rows, text_columns=(0, len(head) - 1))


def _family(family: Mapping[str, Any]) -> str:
    head = ["mode", f"against {family['against']}", "95% interval", "p (Holm)", "wins/ties/losses"]
    return markdown_table(head, [[row["mode"], *_cells(row)] for row in family["comparisons"]])


def _cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return [""] * 4
    return [
        f"{row['difference']:+.4f}",
        f"{row['low']:+.4f} to {row['high']:+.4f}",
        f"{row['p_corrected']:.4f}" if row["p_corrected"] >= 1e-4 else "< 0.0001",
        f"{row['wins']}/{row['ties']}/{row['losses']}",
    ]


def _budgets(study: Mapping[str, Any]) -> str:
    timed = ["one query: median, p95 ms", "32 queries: median, p95 ms"]
    rows = []
    for point in study["budgets"]:
        emitted = point["emission_rate"]
        cells = [
            "none (off)" if point["budget"] is None else str(point["budget"]),
            f"{point['measures'][NDCG]:.4f}",
            f"{point['mean_tokens']:.1f}",
            "" if emitted is None else f"{emitted:.0%}",
            *(_timed(point["latency"], f"batch_{size}") for size in (1, 32)),
        ]
        rows.append(cells)
    return markdown_table(["budget", NDCG, "mean tokens", "token emitted", *timed], rows)


def _timed(latency: Mapping[str, Any] | None, batch: str) -> str:
    return f"{latency[batch]['median_ms']:.0f}, {latency[batch]['p95_ms']:.0f}" if latency else ""

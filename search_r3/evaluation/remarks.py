"""What is said about a metrics record in one line: its measures, and what a reader must know about its data."""

from __future__ import annotations

from typing import Any

from search_r3.evaluation.given_reasoning import UPPER_BOUNDS
from search_r3.evaluation.records import SMALL


def progress_line(record: dict[str, Any], fresh: bool) -> str:
    """One line about a metrics record: its measures and remarks; `fresh` is False if it existed already."""
    shown = ", ".join(f"{name} {value:.4f}" for name, value in record["measures"].items())
    line = f"{record['dataset']} {record['system']}: {shown}" + ("" if fresh else " (already there)")
    return "; ".join([line, *remarks(record)])


def remarks(record: dict[str, Any]) -> list[str]:
    """What a reader of a metrics record must know about its data: missing and empty documents, which no system can
    find; queries without an answer, which count as 0; queries that are documents of the corpus; and unjudged copies of
    relevant documents."""
    missing, empty, unanswered = (
        record.get(f"num_{name}", 0) for name in ("missing_documents", "empty_documents", "missing_queries")
    )
    lines = []
    if record["dataset"].removesuffix(SMALL) in UPPER_BOUNDS and record.get("given_reasoning", {}).get("own"):
        lines.append("its given reasoning states the answer: an upper bound")
    if missing:
        lines.append(f"{missing:,} relevant documents are not in the corpus ({', '.join(record['missing_documents'])})")
    if empty:
        lines.append(f"{empty:,} documents are empty and never found")
    if unanswered:
        lines.append(f"{unanswered:,} of {record['num_queries']:,} queries have no answer and count as 0")
    if record.get("ignore_identical_ids"):
        lines.append(f"a document with a query's own id is left out, for {record['num_identical_ids']:,} queries")
    elif inside := record.get("num_queries_in_corpus", 0):
        lines.append(
            f"{inside:,} queries are documents of the corpus, by id and text, and find themselves; "
            "--ignore-identical-ids leaves these out"
        )
    if copies := record.get("num_unjudged_copies", 0):
        lines.append(
            f"{copies:,} documents are copies of a relevant document ({', '.join(record['unjudged_copies'][:3])}"
            f"{', ...' if copies > 3 else ''}) without a judgment, and count as not relevant, for "
            f"{record['num_queries_with_unjudged_copies']:,} queries"
        )
    return lines

"""Tables of results in Markdown, generated from metrics records: the metrics, then what they were measured on.

Notes on data sets are below the metrics: missing or empty documents, and queries without an answer. `recompute`
recomputes the records from the run files, and `markdown_blocks` inserts the tables into Markdown files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from search_r3.errors import InputError
from search_r3.evaluation.markdown_table import markdown_table
from search_r3.evaluation.measures import MEASURES, MRR, NDCG, RECALL
from search_r3.evaluation.records import SMALL, read_record
from search_r3.evaluation.systems import BASELINES
from search_r3.evaluation.variant_system import is_variant, variants_markdown

MEANING = {
    NDCG: "nDCG@10 (linear gain)",
    MRR: "MRR@10",
    RECALL: "Recall@100",
}
FIRST_DATASETS = ("scifact", "cosqa", "hotpotqa", "mkqa/en", "s2_search", "cranfield", "cisi")
INCOMPLETE = "†"
"""Marks a data set with relevant documents that are not in its corpus."""
STAGES = ("base", "sft", "grpo")
LABELS = {"bm25": "BM25", "all-minilm-l6-v2": "all-MiniLM-L6-v2"}
STAGE_LABELS = {"base": "base", "sft": "stage 1", "grpo": "stage 2", "v2": "v2"}
MODE_LABELS = {"off": "direct", "on": "with reasoning", "latent": "in latent steps",
               "given": "with given reasoning", "written": "with another model's reasoning", "read": "reading",
               "read+on": "reading, with reasoning", "read-2": "reading twice"}  # fmt: skip
TOLERANCE = 5e-6
"""A measure that differs from its metrics file by more than this comes from another run."""


def load_records(output: str | Path = "results") -> list[dict[str, Any]]:
    """All metrics files under `output`, data sets and systems in the order of the tables.

    Raises:
        InputError: there are none, or one is damaged.
    """
    folder = Path(output) / "metrics"
    records = [read_record(path) for path in sorted(folder.rglob("*.json"))]
    if not records:
        raise InputError(f"no results in {folder}; run an evaluation first: search-r3 evaluate --help")
    return sorted(records, key=lambda r: (_dataset_order(r["dataset"]), _system_order(r["system"])))


def results_markdown(records: Sequence[dict[str, Any]], measures: Sequence[str] = tuple(MEASURES)) -> str:
    """One table per measure (systems as columns, data sets as rows, the best of a row in bold), with all but the first
    collapsed, then notes: numbers of queries and documents, truncation, hardware and dtype, and the reasoning."""
    first, *others = [f"**{MEANING.get(measure, measure)}**\n\n{_table(records, measure)}" for measure in measures]
    collapsed = []
    if others:
        names = " and ".join(MEANING.get(measure, measure) for measure in measures[1:])
        collapsed = ["\n\n".join([f"<details><summary>{names}</summary>", *others, "</details>"])]
    return "\n\n".join([first, *collapsed, _caption(records)])


def records_markdown(records: Sequence[dict[str, Any]]) -> str:
    """`results_markdown` of the records of original queries, then `variants_markdown` of changed queries."""
    plain = [record for record in records if not is_variant(record)]
    pages = [results_markdown(plain)] if plain else []
    if len(plain) < len(records):
        pages.append(f"**{MEANING[NDCG]}**, changed queries\n\n{variants_markdown(records)}")
    return "\n\n".join(pages)


def summary_markdown(records: Sequence[dict[str, Any]], measure: str = NDCG) -> str:
    """One table of `measure` without a caption. Its columns describe the systems ("stage 1, direct" for `NAME-sft.off`)
    instead of naming them, unless two systems have the same description."""
    labels = {record["system"]: _label(record["system"]) for record in records}
    if len(set(labels.values())) < len(labels):
        labels = {name: name for name in labels}
    return _table(records, measure, labels)


def _label(system: str) -> str:
    stem, _, mode = system.rpartition(".")
    stage = STAGE_LABELS.get(stem.rpartition("-")[2])
    return f"{stage}, {MODE_LABELS[mode]}" if stage and mode in MODE_LABELS else LABELS.get(system, system)


def _table(records: Sequence[dict[str, Any]], measure: str, labels: Mapping[str, str] = MappingProxyType({})) -> str:
    values = {(r["dataset"], r["system"]): r["measures"].get(measure) for r in records}
    rows = sorted({r["dataset"] for r in records}, key=_dataset_order)
    columns = sorted({r["system"] for r in records}, key=_system_order)
    incomplete = {r["dataset"] for r in records if r.get("num_missing_documents")}
    best = {
        row: max(f"{values[row, column]:.3f}" for column in columns if values.get((row, column)) is not None)
        for row in rows
    }

    def cell(row: str, column: str) -> str:
        value = values.get((row, column))
        if value is None:
            return ""
        shown = f"{value:.3f}"
        return f"**{shown}**" if shown == best[row] and len(columns) > 1 else shown

    return markdown_table(
        ["", *(labels.get(column, column) for column in columns)],
        [
            [f"{row} {INCOMPLETE}" if row in incomplete else row, *(cell(row, column) for column in columns)]
            for row in rows
        ],
    )


def _caption(records: Sequence[dict[str, Any]]) -> str:
    sizes = {
        r["dataset"]: f"{r['dataset']} {r['num_queries']:,} ({r['settings']['split']}) over {r['num_documents']:,}"
        for r in records
    }
    lines = [f"Queries over documents: {'; '.join(sizes.values())}."]
    if any(name.endswith(SMALL) for name in sizes):
        lines.append(f"A name in `{SMALL}` is a fixed part of a data set, the same for every system.")
    missing = {r["dataset"]: r["num_missing_documents"] for r in records if r.get("num_missing_documents")}
    if missing:
        listed = "; ".join(f"{count:,} of {name}" for name, count in missing.items())
        lines.append(
            f"{INCOMPLETE} Relevant documents that are not in the corpus, so that no system can find them: {listed}."
        )
    empty = {r["dataset"]: r["num_empty_documents"] for r in records if r.get("num_empty_documents")}
    if empty:
        listed = "; ".join(f"{count:,} of {name}" for name, count in empty.items())
        lines.append(f"Empty documents, ranked by no system: {listed}.")
    unanswered = [r for r in records if r.get("num_missing_queries")]
    if unanswered:
        listed = "; ".join(f"{r['system']} for {r['num_missing_queries']:,} of {r['dataset']}" for r in unanswered)
        lines.append(f"Queries without an answer, which count as 0: {listed}.")
    lines += _identical_ids(records)
    copies = {r["dataset"]: r["num_unjudged_copies"] for r in records if r.get("num_unjudged_copies")}
    if copies:
        listed = "; ".join(f"{count:,} of {name}" for name, count in copies.items())
        lines.append(f"Copies of relevant documents without a judgment, which count as not relevant: {listed}.")
    lines += [
        f"Documents: {_grouped(records, _cut)}.",
        f"Machines: {_grouped(records, _machine)}.",
    ]
    reasoned = [r for r in records if r.get("reasoning")]
    if reasoned:
        lines.append(f"Reasoning before the embed token: {_grouped(reasoned, _reasoning, 'by')}.")
    return "\n".join(f"- {line}" for line in lines)


def _identical_ids(records: Sequence[dict[str, Any]]) -> list[str]:
    """Notes on data sets where documents with the query's own id are ignored, or where queries retrieve themselves."""
    ignored = {r["dataset"]: r["num_identical_ids"] for r in records if r.get("ignore_identical_ids")}
    inside = {r["dataset"]: r["num_queries_in_corpus"] for r in records if r.get("num_queries_in_corpus")}
    lines = []
    if ignored:
        listed = "; ".join(f"{count:,} of {name}" for name, count in ignored.items())
        lines.append(f"Queries whose own id a document has, which is left out (`ignore_identical_ids`): {listed}.")
    if inside:
        listed = "; ".join(f"{count:,} of {name}" for name, count in inside.items())
        lines.append(f"Queries that are documents of the corpus and find themselves: {listed}.")
    return lines


def _cut(record: dict[str, Any]) -> str:
    limit = record.get("max_length")
    return "whole" if limit is None else f"cut at {limit} tokens"


def _machine(record: dict[str, Any]) -> str:
    return f"{record['hardware']}, {record['dtype']}"


def _reasoning(record: dict[str, Any]) -> str:
    reasoning = record["reasoning"]
    return f"at most {reasoning['budget']} tokens, token emitted for {reasoning['emission_rate']:.0%} of the queries"


def _grouped(records: Sequence[dict[str, Any]], describe: Callable[[dict[str, Any]], str], word: str = "for") -> str:
    """Each distinct description with the systems it applies to (and their data sets, if not all)."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    datasets_of: dict[str, set[str]] = defaultdict(set)
    for record in sorted(records, key=lambda r: _system_order(r["system"])):
        groups[describe(record)][record["system"]].append(record["dataset"])
        datasets_of[record["system"]].add(record["dataset"])
    parts = []
    for description, systems in groups.items():
        named = [
            name if len(datasets) == len(datasets_of[name]) else f"{name} ({', '.join(datasets)})"
            for name, datasets in systems.items()
        ]
        parts.append(f"{description} {word} {', '.join(named)}")
    return "; ".join(parts)


def _dataset_order(name: str) -> tuple[int, str]:
    stem = name.removesuffix(SMALL)
    return (FIRST_DATASETS.index(stem) if stem in FIRST_DATASETS else len(FIRST_DATASETS), name)


def _system_order(name: str) -> tuple[int, int, str]:
    """Baselines first, then models by training stage: base, sft, grpo, anything else."""
    if name in BASELINES:
        return (BASELINES.index(name), 0, name)
    stem, _, mode = name.rpartition(".")
    if mode not in MODE_LABELS:
        return (len(BASELINES), 0, name)
    stage = next((i for i, stage in enumerate(STAGES) if stem.endswith(f"-{stage}")), len(STAGES))
    return (len(BASELINES) + 1, stage, name)

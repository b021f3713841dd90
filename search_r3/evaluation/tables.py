"""Tables of results in markdown, made from the metrics files, and the block of them in the README kept true.

The README's block stands between two markers. `check_readme` remakes it from the run files themselves, so that a figure
that no run supports cannot stand there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.evaluation.measures import MEASURES, MRR, NDCG, RECALL, measure_run
from search_r3.evaluation.runs import read_run
from search_r3.evaluation.suite import SMALL, dataset_hash, load_dataset, paths, read_record
from search_r3.files import atomic_write_text

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MEANING = {
    NDCG: "nDCG@10 (linear gain)",
    MRR: "MRR@10",
    RECALL: "Recall@100",
}
FIRST_DATASETS = ("scifact", "cosqa", "hotpotqa", "mkqa/en", "s2_search", "cranfield", "cisi")
PEERS = ("bm25", "all-minilm-l6-v2")
STAGES = ("base", "sft", "grpo")
TOLERANCE = 5e-6
"""A measure that differs by more than this from its metrics file comes from another run."""


@dataclass
class Check:
    """What `check_readme` found: problems to mend, and pairs whose figures could not be remade because the data set
    is not here (their metrics file was taken at its word)."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


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
    """One table a measure (systems as columns, data sets as rows, the best of a row in bold), those after the first
    folded away, then what was run on what: queries and documents, where documents were cut, hardware and dtype, and the
    reasoning."""
    first, *others = [f"**{MEANING.get(measure, measure)}**\n\n{_table(records, measure)}" for measure in measures]
    folded = []
    if others:
        names = " and ".join(MEANING.get(measure, measure) for measure in measures[1:])
        folded = ["\n\n".join([f"<details><summary>{names}</summary>", *others, "</details>"])]
    return "\n\n".join([first, *folded, _caption(records)])


def replace_block(text: str, block: str) -> str:
    """`text` with `block` between the markers, in place of what stood there.

    Raises:
        InputError: the markers do not stand in `text` exactly once, in order.
    """
    before, after = _around_block(text)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{after}"


def update_readme(readme: str | Path = "README.md", output: str | Path = "results") -> bool:
    """Remake the README's block from the metrics files; returns whether anything changed."""
    path = Path(readme)
    old = _read(path)
    new = replace_block(old, results_markdown(load_records(output)))
    if new != old:
        atomic_write_text(path, new)
    return new != old


def check_readme(
    readme: str | Path = "README.md", output: str | Path = "results", data_root: str | Path | None = None
) -> Check:
    """Whether the README's block is what the run files give, measured again with the judgments."""
    records, check = rebuild_records(output, data_root)
    text = _read(Path(readme))
    before, after = _around_block(text)
    block = text[len(before) + len(BEGIN) : len(text) - len(after) - len(END)].strip()
    expected = results_markdown(records)
    if block != expected:
        wrong = next((line for line in block.splitlines() if line not in expected.splitlines()), "a line is missing")
        check.problems.append(f"{readme}: the results are not those of {output}; first difference: {wrong}")
    return check


def rebuild_records(
    output: str | Path = "results", data_root: str | Path | None = None
) -> tuple[list[dict[str, Any]], Check]:
    """The records with their measures computed again from the run files, wherever the data set is here."""
    check = Check()
    rebuilt = []
    datasets: dict[tuple[str, str], tuple[Any, str] | None] = {}
    for record in load_records(output):
        name, system, split = record["dataset"], record["system"], record["settings"]["split"]
        label = f"{name} {system}"
        run_path = paths(output, name, system).run
        if not run_path.is_file():
            check.problems.append(f"{label}: its run file {run_path} is missing; evaluate again")
            continue
        if (name, split) not in datasets:
            try:
                dataset = load_dataset(name, split, data_root)
                datasets[name, split] = dataset, dataset_hash(dataset)
            except InputError:
                datasets[name, split] = None
        found = datasets[name, split]
        if found is None or found[1] != record["settings"].get("data_hash"):
            check.unchecked.append(label if found is None else f"{label} (the data here are not those it was run on)")
            rebuilt.append(record)
            continue
        measured = measure_run(read_run(run_path), found[0].qrels).mean
        for measure, value in measured.items():
            if abs(value - record["measures"].get(measure, float("inf"))) > TOLERANCE:
                check.problems.append(
                    f"{label}: {measure} is {value:.6f} by its run file, not {record['measures'].get(measure)}"
                )
        rebuilt.append({**record, "measures": measured})
    return rebuilt, check


def _table(records: Sequence[dict[str, Any]], measure: str) -> str:
    values = {(r["dataset"], r["system"]): r["measures"].get(measure) for r in records}
    rows = sorted({r["dataset"] for r in records}, key=_dataset_order)
    columns = sorted({r["system"] for r in records}, key=_system_order)
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

    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {row} | " + " | ".join(cell(row, column) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


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
        lines.append(f"Relevant documents that are not in the corpus, so that no system can find them: {listed}.")
    lines += [
        f"Documents: {_grouped(records, _cut)}.",
        f"Machines: {_grouped(records, _machine)}.",
    ]
    thinking = [r for r in records if r.get("reasoning")]
    if thinking:
        lines.append(f"Reasoning before the embed token: {_grouped(thinking, _reasoning, 'by')}.")
    return "\n".join(f"- {line}" for line in lines)


def _cut(record: dict[str, Any]) -> str:
    limit = record.get("max_length")
    return "whole" if limit is None else f"cut at {limit} tokens"


def _machine(record: dict[str, Any]) -> str:
    return f"{record['hardware']}, {record['dtype']}"


def _reasoning(record: dict[str, Any]) -> str:
    found = record["reasoning"]
    return f"at most {found['budget']} tokens, token emitted for {found['emission_rate']:.0%} of the queries"


def _grouped(records: Sequence[dict[str, Any]], describe: Callable[[dict[str, Any]], str], word: str = "for") -> str:
    """Each thing that `describe` says, once, with the systems it holds for (and on which data sets, if not on all)."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    of_system: dict[str, set[str]] = defaultdict(set)
    for record in sorted(records, key=lambda r: _system_order(r["system"])):
        groups[describe(record)][record["system"]].append(record["dataset"])
        of_system[record["system"]].add(record["dataset"])
    parts = []
    for description, systems in groups.items():
        named = [
            name if len(found) == len(of_system[name]) else f"{name} ({', '.join(found)})"
            for name, found in systems.items()
        ]
        parts.append(f"{description} {word} {', '.join(named)}")
    return "; ".join(parts)


def _dataset_order(name: str) -> tuple[int, str]:
    stem = name.removesuffix(SMALL)
    return (FIRST_DATASETS.index(stem) if stem in FIRST_DATASETS else len(FIRST_DATASETS), name)


def _system_order(name: str) -> tuple[int, int, str]:
    """Peers first, then models by training stage: base, sft, grpo, anything else."""
    if name in PEERS:
        return (PEERS.index(name), 0, name)
    stem, _, mode = name.rpartition(".")
    if mode not in ("off", "on"):
        return (len(PEERS), 0, name)
    stage = next((i for i, stage in enumerate(STAGES) if stem.endswith(f"-{stage}")), len(STAGES))
    return (len(PEERS) + 1, stage, name)


def _around_block(text: str) -> tuple[str, str]:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise InputError(f"expected the markers {BEGIN} and {END}, each once and in this order, on lines of their own")
    return before, after


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error

"""The page's sections on quality: tables of systems and data sets, with and without reasoning, and what was measured.

Metrics come from the metrics files; tests and recall@10 are computed from the run files (`comparison`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search_r3.evaluation.measures import MEASURES, NDCG
from search_r3.evaluation.publish.tables import MEANING
from search_r3.evaluation.records import SMALL
from search_r3.evaluation.remarks import remarks
from search_r3.evaluation.report.comparison import LEVEL, RECALL_10
from search_r3.evaluation.report.headline import FEW, few
from search_r3.evaluation.report.interval_plots import GRAY, Mark, Row, difference_mark, interval_plot
from search_r3.evaluation.report.load_results import Results
from search_r3.evaluation.report.page_elements import (
    COMPARISON_HEAD,
    BulletList,
    Cell,
    DefinitionList,
    Details,
    Figures,
    Placeholder,
    Section,
    Table,
    Text,
    comparison_cells,
    p_value,
    percent,
    score,
    signed,
)
from search_r3.evaluation.report.plot_parts import WIDTH, Plot
from search_r3.evaluation.report.svg import gain_plot
from search_r3.evaluation.report.system_names import models_of, short_models, short_names
from search_r3.evaluation.significance import macro_interval

EVALUATE = "search-r3 evaluate --dataset scifact --system bm25 --system models/NAME"
UNTESTED = "untested"
"""The verdict of a cell whose difference was not tested."""
MOST_SETS = 3
"""A system measured on one data set alone gets no column of its own where others were measured on this many."""
RESAMPLES = 2_000
"""Bootstrap resamples of a mean in a plot of means; the tests of differences use more."""


def measured(loaded: Results) -> Section:
    """What was measured: sizes, machines, versions, commits and, collapsed, every run with its command."""
    section = Section("measured", "What was measured, where and how")
    if not loaded.records:
        section.blocks.append(Placeholder("Nothing has been measured yet.", EVALUATE))
        return section
    records = loaded.records
    machines = _unique(f"{r.get('hardware', 'unknown')} ({r.get('dtype')})" for r in records)
    versions = _unique(", ".join(f"{k} {v}" for k, v in (r.get("versions") or {}).items()) for r in records)
    commits = _unique((r.get("commit") or "not known")[:7] + _dirty(r) for r in records)
    rows = [
        ("Systems", ", ".join(_unique(r["system"] for r in records))),
        ("Measures", ", ".join(MEANING.get(name, name) for name in MEASURES)),
        ("Machines", "; ".join(machines)),
        ("Versions", "; ".join(versions)),
        ("Commits", ", ".join(commits)),
        ("Seeds", ", ".join(_unique(str(r.get("seed", 0)) for r in records))),
    ]
    sizes = []
    for name in _unique(r["dataset"] for r in records):
        measured_on = [r for r in records if r["dataset"] == name]
        first = measured_on[0]
        facts = [f"{first['num_queries']:,}", f"{first['num_documents']:,}", first["settings"].get("split", "")]
        sizes.append([name, *facts, str(len(measured_on))])
    commands = _unique(r.get("command", "") for r in records)
    detail = [
        [
            r["dataset"],
            r["system"],
            "whole" if r.get("max_length") is None else f"{r['max_length']} tokens",
            str(r.get("dtype")),
            (r.get("commit") or "")[:7] + _dirty(r),
            f"{(r.get('seconds') or {}).get('queries', 0):,.1f}",
            str(commands.index(r.get("command", "")) + 1),
        ]
        for r in records
    ]
    section.summary = f"{len(records)} runs, with commands, commits, versions and machines"
    section.blocks += [
        DefinitionList(rows),
        Table("sizes", "Data sets", ("data set", "queries", "documents", "split", "systems"), sizes, words=(3,)),
        Details(
            "Every run, and the commands",
            [
                Table(
                    "runs",
                    "Runs: length limit of documents, precision, commit, and seconds for all queries (on a machine "
                    "that also did other work, so not a benchmark)",
                    ("data set", "system", "documents", "precision", "commit", "seconds", "command"),
                    detail,
                    words=(1, 2, 3, 4),
                ),
                BulletList([f"Command {i}: {command}" for i, command in enumerate(commands, 1)]),
            ],
        ),
    ]
    return section


def results(loaded: Results) -> Section:
    """Systems and data sets by nDCG@10 with tests against the baseline; other measures (collapsed); remarks."""
    section = Section("results", "Systems and data sets")
    if not loaded.records:
        section.blocks.append(Placeholder("No results yet.", EVALUATE))
        return section
    tests = loaded.tests
    summary = "Bold: the best system on a data set. "
    if tests:
        baseline = short_names([loaded.baseline])[loaded.baseline]
        summary += (
            f"▲ better and ▼ worse than {baseline}: p < {LEVEL:g} by a paired randomization test on the "
            f"same queries, Holm's correction over all {len(tests)} comparisons."
        )
    datasets = _unique(r["dataset"] for r in loaded.records)
    section.summary = f"{len(_unique(r['system'] for r in loaded.records))} systems on {len(datasets)} data sets"
    table = _measure_table(loaded, NDCG, MEANING[NDCG], tests)
    if any(isinstance(cell, Cell) and cell.verdict == UNTESTED for row in table.rows for cell in row):
        summary += " ° not tested."
    summary += _narrow(loaded)
    section.blocks += [table, Text(summary.strip(), "note")]
    plots = [plot for part in ("full", "small") if (plot := systems_plot(loaded, part))]
    if plots:
        section.blocks.append(Figures(plots))
    others = [_measure_table(loaded, name, MEANING.get(name, name), {}) for name in MEASURES if name != NDCG]
    if any(one.recall for one in loaded.by_dataset.values()):
        others.append(_measure_table(loaded, RECALL_10, RECALL_10.capitalize(), {}))
    section.blocks.append(Details("Other measures: " + ", ".join(table.caption for table in others), others))
    if tests:
        rows: list[list[Cell | str]] = [
            [name, system, *comparison_cells(row, LEVEL)] for (name, system), row in tests.items()
        ]
        head = ("data set", "system", *COMPARISON_HEAD)
        caption = f"{NDCG} minus that of {loaded.baseline}; intervals by bootstrap over queries (BCa)"
        section.blocks.append(
            Details(
                f"Every comparison with {short_names([loaded.baseline])[loaded.baseline]}",
                [Table("tests", caption, head, rows, words=(1,))],
            )
        )
    noted = caveats(loaded)
    if noted:
        section.blocks += [Text("Notes on these metrics:"), BulletList(noted)]
    return section


def reasoning(loaded: Results) -> Section:
    """With and without reasoning, for every model and data set with both runs."""
    section = Section("reasoning", "With and without reasoning")
    if not loaded.pairs:
        section.blocks.append(
            Placeholder("No model has runs with reasoning on and off on an available data set.", EVALUATE)
        )
        return section
    section.summary = _counted(loaded.pairs)
    section.blocks.append(Text(_verdict(loaded.pairs)))
    section.blocks.append(Figures(pair_plots(loaded)))
    models = _unique(row["model"] for row in loaded.pairs)
    caption = f"{NDCG} with reasoning minus without; Holm's correction over these {len(loaded.pairs)} comparisons"
    if len(models) == 1:
        tested = [[row["dataset"], *comparison_cells(row, LEVEL)] for row in loaded.pairs]
        section.blocks.append(Table("pairs", f"{models[0]}: {caption}", ("data set", *COMPARISON_HEAD), tested))
    else:
        short = short_models(models)
        tested = [[row["dataset"], short[row["model"]], *comparison_cells(row, LEVEL)] for row in loaded.pairs]
        section.blocks.append(Table("pairs", caption, ("data set", "model", *COMPARISON_HEAD), tested, words=(1,)))
    reasoned = [r for r in loaded.records if r.get("reasoning")]
    lengths: list[list[Cell | str]] = [
        [
            r["dataset"],
            r["system"],
            str(r["reasoning"]["budget"]),
            f"{r['reasoning']['mean_tokens']:.1f}",
            percent(r["reasoning"]["emission_rate"]),
        ]
        for r in reasoned
    ]
    head = ("data set", "system", "budget", "mean tokens", "finished within budget")
    caption = "Reasoning traces: tokens allowed, tokens written, and the share that ended without being cut off"
    section.blocks.append(
        Details("How long the reasoning traces are", [Table("lengths", caption, head, lengths, words=(1,))])
    )
    return section


def gains(loaded: Results) -> Section:
    """On minus off for each query, from the run files, else from a study."""
    section = Section("gains", "Query by query")
    rows = [(r["dataset"], r["model"], r["gains"]) for r in loaded.pairs]
    known = {(name, model) for name, model, _ in rows}
    for study in loaded.studies:
        if (study["dataset"], study["system"]) not in known:
            per_query = study["per_query"]
            rows.append((study["dataset"], study["system"], _difference(per_query["off"], per_query["on"])))
    if not rows:
        section.blocks.append(Placeholder("There are no scores of single queries with reasoning on and off.", EVALUATE))
        return section
    section.blocks.append(
        Text(
            f"Each query's {NDCG} with reasoning minus without, the largest gain first. Queries above the line "
            "improved with reasoning, those below got worse; the flat middle did not change."
        )
    )
    models = models_of(loaded.records)
    several = len({model for _, model, _ in rows}) > 1
    section.summary = "each query's gain or loss by reasoning"
    section.blocks.append(
        Figures([gain_figure(name, models.get(model, model) if several else "", gains) for name, model, gains in rows])
    )
    return section


def gain_figure(dataset: str, model: str, values: Sequence[float], width: int = WIDTH) -> str:
    """The plot of one data set's gains."""
    won, lost = sum(v > 1e-9 for v in values), sum(v < -1e-9 for v in values)
    title = f"{dataset}{': ' + model if model else ''}"
    mean = sum(values) / len(values)
    note = f"{won} won, {len(values) - won - lost} equal, {lost} lost; mean {signed(mean)}"
    description = (
        f"Reasoning helped {won} of {len(values)} queries and harmed {lost}; the mean difference is {signed(mean)}."
    )
    plot = Plot(f"gain-{dataset}-{model}", title, description, "queries", f"{NDCG}, with minus without", width, note)
    return gain_plot(plot, values)


def pair_plots(loaded: Results, width: int = WIDTH) -> list[str]:
    """One plot per model: its differences on all data sets, with intervals."""
    plots = []
    models = short_models(row["model"] for row in loaded.pairs)
    small = {r["dataset"] for r in loaded.records if few(r)}
    for model, short in models.items():
        rows = [row for row in loaded.pairs if row["model"] == model]
        shown = [Row(row["dataset"], [difference_mark(row, LEVEL)], GRAY * (row["dataset"] in small)) for row in rows]
        description = "; ".join(
            f"{r['dataset']} {signed(r['difference'])}, p {p_value(r['p_corrected'])}" for r in rows
        )
        note = "95% intervals; filled: p < 0.05 (Holm)"
        axis = f"{NDCG}, with reasoning minus without"
        title = f"What reasoning changes: {short}"
        plots.append(interval_plot(Plot(f"pairs-{model}", title, description, axis, "", width, note), shown))
    return plots


def systems_plot(loaded: Results, part: str, width: int = WIDTH) -> str:
    """nDCG@10 of all systems with 95% intervals, the best first, on whole data sets ("full") or on fixed parts
    ("small"); "" if there are no results."""
    records = [r for r in loaded.records if r["dataset"].endswith(SMALL) == (part == "small")]
    records = [r for r in records if r["measures"].get(NDCG) is not None]
    if not records:
        return ""
    names = short_names(r["system"] for r in loaded.records)
    rows = []
    for dataset in _unique(r["dataset"] for r in records):
        measured_on = sorted((r for r in records if r["dataset"] == dataset), key=lambda r: -r["measures"][NDCG])
        tone = GRAY if few(measured_on[0]) else ""
        rows.append(Row(f"{dataset} ({measured_on[0]['num_queries']:,})", tone=tone))
        rows += [Row(names[r["system"]], [_mean_mark(loaded, r, tone)], tone) for r in measured_on]
    description = "; ".join(f"{r['dataset']} {names[r['system']]} {score(r['measures'][NDCG])}" for r in records)
    title = f"{MEANING[NDCG]}, {'whole data sets' if part == 'full' else 'fixed parts of data sets'}"
    note = f"95% intervals over queries, the best first; gray: under {FEW} queries"
    if any(mark.low is None for row in rows for mark in row.marks):
        note += "; hollow: not tested"
    return interval_plot(Plot(f"systems-{part}", title, description, "", "", width, note), rows, around_zero=False)


def _mean_mark(loaded: Results, record: Mapping[str, Any], tone: str) -> Mark:
    one = loaded.by_dataset.get(record["dataset"])
    scores = one.scores.get(record["system"]) if one else None
    if not scores:
        return Mark(record["measures"][NDCG])
    return Mark(*macro_interval([list(scores.values())], resamples=RESAMPLES), tone or "s0")


def caveats(loaded: Results) -> list[str]:
    """What a reader must know about the metrics: truncated and missing documents, small data sets, data used in
    training, differing commits, and tests that were not possible."""
    noted = _remarks_by_dataset(loaded)
    cuts: dict[int, list[str]] = {}
    for record in loaded.records:
        if record.get("max_length") is not None:
            cuts.setdefault(record["max_length"], []).append(record["system"])
    for length, systems in cuts.items():
        noted.append(f"Documents were cut at {length} tokens for {', '.join(_unique(systems))}.")
    small = _unique(f"{r['dataset']} ({r['num_queries']})" for r in loaded.records if few(r))
    if small:
        noted.append(f"Few queries, so only large differences show: {', '.join(small)}.")
    if any(r["dataset"].endswith(SMALL) for r in loaded.records):
        noted.append(
            f"A name ending in {SMALL} is a fixed part of a data set, the same for every system; do not compare it "
            "with published results on the whole data set."
        )
    for name, kinds in loaded.trained_on.items():
        if any(r["dataset"].removesuffix(SMALL) == name for r in loaded.records):
            noted.append(
                f"{name}: training pairs were made from it ({', '.join(kinds)}), but never from its test queries."
            )
    commits = _unique((r.get("commit") or "not known")[:7] for r in loaded.records)
    if len(commits) > 1:
        noted.append(f"Measured at {len(commits)} commits of the source; the list of runs below names each.")
    if any(_dirty(r) for r in loaded.records):
        noted.append("A + marks a commit with uncommitted changes.")
    noted += [f"{line}." for one in loaded.by_dataset.values() for line in one.remarks]
    return noted


def _remarks_by_dataset(loaded: Results) -> list[str]:
    """The remarks of the records; a remark that applies to several systems of a data set is one line."""
    same: dict[tuple[str, str], list[str]] = {}
    for name in _unique(r["dataset"] for r in loaded.records):
        for record in loaded.records:
            if record["dataset"] == name:
                for line in remarks(record):
                    same.setdefault((name, line), []).append(record["system"])
    return [f"{name}: {line} ({', '.join(systems)})." for (name, line), systems in same.items()]


def _measure_table(
    loaded: Results, measure: str, caption: str, tests: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Table:
    alone = _alone(loaded)
    systems = [system for system in _unique(r["system"] for r in loaded.records) if system not in alone]
    names = short_names(r["system"] for r in loaded.records)
    values = {(r["dataset"], r["system"]): r["measures"].get(measure) for r in loaded.records}
    if measure == RECALL_10:
        values = {
            (name, system): value for name, one in loaded.by_dataset.items() for system, value in one.recall.items()
        }
    rows: list[list[Cell | str]] = []
    for name in _unique(r["dataset"] for r in loaded.records):
        texts = {system: score(values.get((name, system))) for system in systems}
        known = [text for system, text in texts.items() if values.get((name, system)) is not None]
        best = max(known) if len(known) > 1 else None
        row: list[Cell | str] = [name]
        for system, text in texts.items():
            test = tests.get((name, system))
            significant = test is not None and test["p_corrected"] < LEVEL
            verdict = ("up" if test["difference"] > 0 else "down") if test is not None and significant else ""
            if tests and test is None and system != loaded.baseline and values.get((name, system)) is not None:
                verdict = UNTESTED
            row.append(Cell(text, text == best, verdict))
        rows.append(row)
    return Table(f"table-{measure}", caption, ("data set", *(names[system] for system in systems)), rows)


def _alone(loaded: Results) -> dict[str, str]:
    """Systems measured on one data set alone where others were on several, which would be columns of dashes: system ->
    that data set."""
    by_system: dict[str, list[str]] = {}
    for record in loaded.records:
        by_system.setdefault(record["system"], []).append(record["dataset"])
    if max(map(len, by_system.values()), default=0) < MOST_SETS:
        return {}
    return {system: names[0] for system, names in by_system.items() if len(names) == 1}


def _narrow(loaded: Results) -> str:
    """What the columns' short names stand for, and the systems that have no column."""
    names = short_names(r["system"] for r in loaded.records)
    values = {(r["dataset"], r["system"]): r["measures"].get(NDCG) for r in loaded.records}
    text = "".join(
        f" {names[system]} was measured on {dataset} only: {score(values[dataset, system])}."
        for system, dataset in _alone(loaded).items()
    )
    models = models_of(loaded.records)
    meant = ", ".join(f"{short} is {model}" for model, short in models.items() if short != model)
    return f"{text} Names: {meant}." if meant else text


def _counted(pairs: Sequence[Mapping[str, Any]]) -> str:
    gains, losses = (sum(r["p_corrected"] < LEVEL and sign * r["difference"] > 0 for r in pairs) for sign in (1, -1))
    return (
        f"{len(pairs)} comparisons: {gains} significant gain{'s' * (gains != 1)}, {losses} loss{'es' * (losses != 1)}"
    )


def _verdict(pairs: Sequence[Mapping[str, Any]]) -> str:
    models = short_models(r["model"] for r in pairs)
    named = {id(r): f"{r['dataset']} ({models[r['model']]})" if len(models) > 1 else r["dataset"] for r in pairs}
    helped = [named[id(r)] for r in pairs if r["p_corrected"] < LEVEL and r["difference"] > 0]
    harmed = [named[id(r)] for r in pairs if r["p_corrected"] < LEVEL and r["difference"] < 0]
    summary = f"Of {len(pairs)} comparisons of a model with and without reasoning, "
    if not helped and not harmed:
        return summary + "none shows a significant difference (p < 0.05 after correction)."
    parts = [
        f"{len(names)} show{'s' * (len(names) == 1)} a significant {what}: {', '.join(names)}"
        for what, names in (("gain", helped), ("loss", harmed))
        if names
    ]
    return f"{summary}{' and '.join(parts)} (p < {LEVEL:g} after correction)."


def _difference(off: Sequence[float], on: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(off, on, strict=True)]


def _dirty(record: Mapping[str, Any]) -> str:
    return "+" if (record.get("commit") or "").endswith("-dirty") else ""


def _unique(values: Any) -> list[str]:
    """Unique values in first-seen order."""
    return list(dict.fromkeys(values))

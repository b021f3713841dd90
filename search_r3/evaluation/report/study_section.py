"""The page's section on studies: every control of reasoning with its test, budget curves, and the adaptive curve.

A study is `results/studies/DATASET/SYSTEM.json`, as `evaluation.study` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.report.axes import MINUS, number
from search_r3.evaluation.report.comparison import LEVEL
from search_r3.evaluation.report.interval_plots import Row, difference_mark, interval_plot
from search_r3.evaluation.report.load_results import Results
from search_r3.evaluation.report.page_elements import (
    COMPARISON_HEAD,
    BulletList,
    Cell,
    Details,
    Figures,
    Heading,
    Placeholder,
    Section,
    Table,
    Text,
    comparison_cells,
    percent,
    score,
    signed,
)
from search_r3.evaluation.report.plot_parts import WIDTH, Plot
from search_r3.evaluation.report.svg import Series, line_plot, scatter
from search_r3.evaluation.report.system_names import short_mode

STUDY = "search-r3 study --dataset scifact --system models/NAME"
BATCHES = {"batch_1": "one query", "batch_32": "32 queries"}


def studies(loaded: Results) -> Section:
    """All studies, one after another."""
    section = Section("studies", "Is it the reasoning that helps?")
    if not loaded.studies:
        section.blocks.append(Placeholder("There is no study yet.", STUDY))
        return section
    section.blocks.append(
        Text(
            "Each control puts other text before the embed token, gives the reasoning to another retriever, or fuses "
            "rankings. If another query's reasoning, or none, does as well as the model's own, then the content of the "
            "reasoning is not what helps."
        )
    )
    section.summary = f"controls, budgets and latency on {', '.join(s['dataset'] for s in loaded.studies)}"
    for study in loaded.studies:
        section.blocks += _study(study)
    return section


def _study(study: Mapping[str, Any]) -> list[Any]:
    name = f"study-{study['dataset']}-{study['system']}"
    families = {family["against"]: family["comparisons"] for family in study["families"]}
    settings = study["settings"]
    commit = (study.get("commit") or "not known").removesuffix("-dirty")[:7]
    summary = (
        f"{study['num_queries']:,} queries ({settings['split']}), {study['num_documents']:,} documents, at most "
        f"{settings['budget']} tokens of reasoning, seed {settings['seed']}; {study['hardware']}, commit {commit}."
    )
    blocks: list[Any] = [Heading(f"{study['dataset']}: {study['system']}", name), Text(summary, "note")]
    plots = [control_plot(study), *budget_plots(study), *([plot] if (plot := adaptive_plot(study)) else [])]
    blocks.append(Figures([plot for plot in plots if plot]))
    blocks.append(Text(_adaptive_summary(study)))
    blocks.append(_modes(study, name))
    others = [
        Table(
            f"{name}-{against}",
            f"{NDCG} minus that of {'the baseline alone' if against == 'baseline' else against}",
            ("mode", "against", *COMPARISON_HEAD),
            [[short_mode(row["mode"]), short_mode(row["against"]), *comparison_cells(row, LEVEL)] for row in rows],
            words=(1,),
        )
        for against, rows in families.items()
        if against != "off"
    ]
    blocks.append(
        Details(
            "Against reasoning on, baselines with reasoning, and what each budget costs",
            [*others, _budgets(study, name)],
        )
    )
    if study.get("remarks"):
        blocks.append(BulletList([f"{line}." for line in study["remarks"]]))
    return blocks


def control_plot(study: Mapping[str, Any], width: int = WIDTH) -> str:
    """The difference of every mode from off, with its interval; "" without comparisons."""
    rows = against_off(study)
    if not rows:
        return ""
    shown = [Row(short_mode(row["mode"]), [difference_mark(row, LEVEL)]) for row in rows]
    description = "; ".join(f"{row['mode']} {signed(row['difference'])}" for row in rows)
    title = f"Every mode against off, {study['dataset']}"
    note = "95% intervals; filled: p < 0.05 (Holm)"
    plot = Plot(f"controls-{_key(study)}", title, description, f"{NDCG}, mode minus off", "", width, note)
    return interval_plot(plot, shown)


def against_off(study: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The comparisons of a study's modes with its mode "off"; empty if there are none."""
    return next((family["comparisons"] for family in study["families"] if family["against"] == "off"), ())


def budget_gain_plot(study: Mapping[str, Any], width: int = WIDTH) -> str:
    """What each budget of reasoning changes against off, with its interval; "" without comparisons."""
    rows = {row["mode"]: row for row in against_off(study)}
    points = [point for point in study["budgets"] if point["budget"] is not None and point["mode"] in rows]
    if not points:
        return ""
    names = [str(point["budget"]) for point in points]
    found = [rows[point["mode"]] for point in points]
    line = Series(
        "",
        [(float(i), row["difference"]) for i, row in enumerate(found)],
        ribbon=[(r["low"], r["high"]) for r in found],
    )
    description = "; ".join(
        f"{name}: {signed(row['difference'])} ({signed(row['low'])} to {signed(row['high'])})"
        for name, row in zip(names, found, strict=True)
    )
    plot = Plot(
        f"budget-quality-{_key(study)}", f"Quality by budget, {study['dataset']}", description,
        "tokens of reasoning allowed", f"{NDCG} minus off", width, "95% intervals, uncorrected",
    )  # fmt: skip
    return line_plot(plot, [line], x_names=names, level=("off", 0.0))


def budget_plots(study: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """Change of nDCG@10, tokens and latency over the budgets, and quality against latency; "" for what is missing."""
    points = [point for point in study["budgets"] if point["budget"] is not None]
    off = next((point for point in study["budgets"] if point["budget"] is None), None)
    if not points:
        return []
    names = [str(point["budget"]) for point in points]
    suffix, axis = f", {study['dataset']}", "tokens of reasoning allowed"

    def plot(name: str, title: str, y_label: str, series: list[Series], **options: Any) -> str:
        description = "; ".join(
            f"{one.label or y_label}: " + ", ".join(f"{names[round(x)]} {number(y, None)}" for x, y in one.points)
            for one in series
        )
        about = Plot(f"{name}-{_key(study)}", title + suffix, description, axis, y_label, width)
        return line_plot(about, series, x_names=names, **options)

    tokens = [(float(i), point["mean_tokens"] or 0.0) for i, point in enumerate(points)]
    plots = [
        budget_gain_plot(study, width),
        plot("budget-tokens", "Tokens written by budget", "mean tokens per query", [Series("", tokens)], zero=True),
    ]
    timed = [point for point in points if point.get("latency")]
    if timed:
        lines = []
        for style, (statistic, label) in enumerate((("median_ms", "median"), ("p95_ms", "95th percentile"))):
            at = [
                (float(i), point["latency"]["batch_1"][statistic])
                for i, point in enumerate(points)
                if point.get("latency")
            ]
            lines.append(Series(label, at, style))
        direct = ("off, median", off["latency"]["batch_1"]["median_ms"]) if off and off.get("latency") else None
        plots.append(
            plot("budget-latency", "Latency by budget", "ms, one query at a time", lines, zero=True, level=direct)
        )
        cost = [
            (
                "off" if point["budget"] is None else str(point["budget"]),
                point["latency"]["batch_1"]["median_ms"],
                point["measures"][NDCG],
            )
            for point in study["budgets"]
            if point.get("latency")
        ]
        description = "; ".join(f"{name}: {number(ms, None)} ms, {score(value)}" for name, ms, value in cost)
        about = Plot(
            f"cost-{_key(study)}",
            f"Quality against latency{suffix}",
            description,
            "median ms, one query at a time",
            NDCG,
            width,
            "each point is a token budget",
        )
        plots.append(scatter(about, cost, log_x=True))
    return plots


def adaptive_plot(study: Mapping[str, Any], width: int = WIDTH) -> str:
    """Quality against the share of queries that reason, with the rule's choice marked; "" if no rule was fitted."""
    adaptive = study.get("adaptive") or {}
    curve = adaptive.get("curve")
    if not curve:
        return ""
    lines = [
        Series("the rule", _points(curve, "quality"), 0, markers=False),
        Series("random choice", _points(curve, "random"), 2, markers=False),
        Series("best possible", _points(curve, "best"), 1, markers=False),
    ]
    chosen = study["per_query"].get("auto")
    at = (adaptive["share_of_queries"], sum(chosen) / len(chosen)) if chosen else None
    title = f"Reasoning only where it should help, {study['dataset']}"
    about = Plot(
        f"adaptive-{_key(study)}", title, adaptive["summary"], "share of the queries that reason", NDCG, width,
    )  # fmt: skip
    return line_plot(about, lines, mark=("mode auto", at) if at else None)


def _modes(study: Mapping[str, Any], name: str) -> Table:
    rows = {row["mode"]: row for row in against_off(study)}
    best = max(score(mode["measures"][NDCG]) for mode in study["modes"])
    body: list[list[Cell | str]] = []
    for mode in study["modes"]:
        shown = score(mode["measures"][NDCG])
        row = rows.get(mode["mode"])
        cells = comparison_cells(row, LEVEL) if row else [Cell("")] * len(COMPARISON_HEAD)
        tokens = mode.get("mean_tokens")
        body.append(
            [
                short_mode(mode["mode"]),
                Cell(shown, shown == best),
                *cells,
                "" if tokens is None else f"{tokens:.1f}",
                mode["description"],
            ]
        )
    head = ("mode", NDCG, *COMPARISON_HEAD, "tokens", "description")
    caption = "Every mode against off; Holm's correction over this table"
    return Table(f"{name}-modes", caption, head, body, words=(7,))


def _budgets(study: Mapping[str, Any], name: str) -> Table:
    head = ["budget", NDCG, "mean tokens", "finished within budget"]
    head += [f"{label}: {what} ms" for label in BATCHES.values() for what in ("median", "p95")]
    rows: list[list[Cell | str]] = []
    for point in study["budgets"]:
        row: list[Cell | str] = [
            "off" if point["budget"] is None else str(point["budget"]),
            score(point["measures"][NDCG]),
        ]
        row += [f"{point['mean_tokens'] or 0:.1f}", percent(point["emission_rate"])]
        for batch in BATCHES:
            timed = (point.get("latency") or {}).get(batch)
            row += [f"{timed[key]:,.0f}" if timed else "" for key in ("median_ms", "p95_ms")]
        rows.append(row)
    return Table(f"{name}-budgets", "Quality, tokens and latency of each budget", head, rows)


def _adaptive_summary(study: Mapping[str, Any]) -> str:
    """The adaptive curve in words; the goal is 95% of the gain for half of the tokens."""
    adaptive = study.get("adaptive")
    if not adaptive:
        return "Adaptive reasoning was not part of this study."
    if "curve" not in adaptive:
        return f"Adaptive reasoning: {adaptive['summary']}."
    line = f"Adaptive reasoning: {_minus(adaptive['summary'])}."
    if adaptive["gain_of_on"] <= 0:
        return f"{line} Reasoning on every query gains nothing here, so there is no gain to keep a share of."
    if adaptive.get("tokens_needed") is not None:
        goal = adaptive["tokens_needed"] <= 0.5
        line += (
            f" On the curve, {percent(adaptive['target'])} of the gain needs {percent(adaptive['tokens_needed'])} of "
            f"the tokens ({percent(adaptive['share_needed'])} of the queries); the goal of half the tokens is "
            f"{'met' if goal else 'missed'}."
        )
    return line + (
        f" The rule's own threshold keeps {percent(adaptive['share_of_gain'])} of the gain for "
        f"{percent(adaptive['share_of_tokens'])} of the tokens."
    )


def _minus(text: str) -> str:
    return re.sub(r"(?<![\w-])-(?=\d)", MINUS, text)


def _points(curve: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    return list(zip(curve["shares"], curve[name], strict=True))


def _key(study: Mapping[str, Any]) -> str:
    return f"{study['dataset']}-{study['system']}"

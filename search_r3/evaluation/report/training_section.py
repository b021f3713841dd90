"""The page's sections on training (curves from the kept logs) and on the environment's benchmark.

Metrics that were not logged get no plot. Running means are drawn over the raw values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from search_r3.evaluation.report.axes import number
from search_r3.evaluation.report.load_results import Results, TrainingRun
from search_r3.evaluation.report.page_elements import (
    Details,
    Figures,
    Heading,
    Placeholder,
    Section,
    Table,
    Text,
    score,
)
from search_r3.evaluation.report.plot_parts import WIDTH, Plot
from search_r3.evaluation.report.svg import Point, Series, line_plot
from search_r3.evaluation.report.system_names import short_models
from search_r3.training_curves import (
    FEW_POINTS,
    LOG_SPAN,
    PANELS,
    Panel,
    all_constants,
    best_dev,
    best_policies,
    constants,
    dev_intervals,
    dev_mean,
    finite_points,
    metric_points,
    resumed_after,
    running_mean,
    words_gains,
)

KEEP = "search-r3 card models/NAME --run results/training/NAME --keep runs/NAME"
BENCHMARK = "python benchmarks/environment.py --recording build/recording"
MOST_DOTS = 30
"""A line of more points than this is drawn without dots, and with its raw values behind the running mean."""
MOST_POINTS = 150
"""Maximum number of points of a line; each is the mean over a stretch of steps."""
SHOWN = ("reward", "dev", "words", "kl", "loss", "dev-reward", "length", "dev-length", "age", "stale", "emission")
"""The panels of `training_curves.PANELS` that the page shows, in this order."""
MODES = {"off": "direct", "on": "reasoning", "latent": "latent", "read": "reading"}
"""The modes of the dev plot, by their endings."""
ENVIRONMENT = {
    "age": "mean age of rows, steps",
    "recall": "recall@10, rollouts",
    "error": "reward error, rollouts",
    "dev_error": "reward error, fixed dev queries",
}


def training(loaded: Results) -> Section:
    """The curves of every kept run."""
    section = Section("training", "Training")
    runs = [run for run in loaded.runs if run.steps]
    if not runs:
        section.blocks.append(Placeholder("The results include no training run.", KEEP))
        return section
    section.summary = ", ".join(short_models(run.name for run in runs).values())
    for run in runs:
        about = run.about
        summary = f"{run.steps[-1]['step']:,} steps"
        if about.get("hours"):
            summary += f" in {about['hours']:.2f} hours on {about.get('hardware', 'an unknown machine')}"
        commit = (about.get("commit") or "not known").removesuffix("-dirty")[:7]
        summary += f"; {about['command']}, commit {commit}." if about.get("command") else "."
        section.blocks += [Heading(run.name, f"run-{run.name}"), Text(f"{summary} {_remarks(run)}".strip(), "note")]
        section.blocks.append(Figures(run_plots(run)))
    return section


def _remarks(run: TrainingRun) -> str:
    """The best step, the resumes, and the metrics that never changed."""
    parts = []
    best = best_dev(run.steps, run.dev)
    if best:
        parts.append(f"Best dev nDCG@10 {MODES[best[0]]}: {score(best[2])} after step {best[1]:,}.")
        if not dev_intervals(run.dev, best[0]):
            parts.append("Its log has no intervals of dev metrics.")
    resumed = [f"{step:,}" for step in resumed_after(run.steps)]
    if resumed:
        parts.append(f"Resumed after step {', '.join(resumed)}.")
    if fixed := all_constants(run.steps):
        parts.append(f"Constant: {'; '.join(fixed)}.")
    return " ".join(parts)


def run_plots(run: TrainingRun, width: int = WIDTH, only: Sequence[str] = SHOWN) -> list[str]:
    """One plot for each panel of `only` that the run logged anything for."""
    panels = {panel.name: panel for panel in PANELS}
    plots = []
    for panel in (panels[name] for name in SHOWN if name in only):
        if panel.name == "dev":
            plots += _dev_plot(run, width)
            continue
        if panel.name == "words":
            plots += _words_plot(run, panel, width)
            continue
        lines = _dev_lines(run, panel) if panel.dev else _step_lines(run, panel)
        if not lines or constants(run.steps, panel):
            continue
        title = panel.short_title[0].upper() + panel.short_title[1:]
        summary = [one for one in lines if not one.faint]
        description = "; ".join(
            f"{one.label or title}: {number(one.points[0][1], None)} at step {one.points[0][0]:,.0f}, "
            f"{number(one.points[-1][1], None)} at step {one.points[-1][0]:,.0f}"
            for one in summary
        )
        plot = Plot(f"{panel.name}-{run.name}", title, description, "step", "", width)
        log = panel.log and not panel.from_zero and _wide(summary)
        plots.append(line_plot(plot, lines, zero=panel.from_zero, log=log))
    return plots


def _words_plot(run: TrainingRun, panel: Panel, width: int) -> list[str]:
    """What true words, another query's and its own add to the direct query; [] if no query had given words."""
    lines = [Series(label, points, style) for style, (label, points) in enumerate(words_gains(run.dev).items())]
    if not lines:
        return []
    description = "; ".join(
        f"{one.label}: " + ", ".join(f"{y:+.3f} at step {x:,.0f}" for x, y in one.points) for one in lines
    )
    title = panel.title[0].upper() + panel.title[1:]
    plot = Plot(f"words-{run.name}", title, description, "step", "", width)
    return [line_plot(plot, lines, direct_labels=True, joined=len(lines[0].points) >= FEW_POINTS)]


def _dev_plot(run: TrainingRun, width: int) -> list[str]:
    """The mean dev nDCG@10 of each mode with its intervals, the best step marked; [] if none was logged."""
    lines = []
    for style, (mode, label) in enumerate(MODES.items()):
        points = dev_mean(run.dev, mode)
        if points:
            lines.append(Series(label, points, style, ribbon=dev_intervals(run.dev, mode)))
    if not lines:
        return []
    best = best_dev(run.steps, run.dev)
    description = "; ".join(
        f"{one.label}: " + ", ".join(f"{number(y, 3)} at step {x:,.0f}" for x, y in one.points) for one in lines
    )
    note = "95% intervals over the dev queries" * any(one.ribbon for one in lines)
    plot = Plot(f"dev-{run.name}", "Dev nDCG@10", description, "step", "", width, note)
    mark = (f"best, step {best[1]:,}", (best[1], best[2])) if best else None
    return [line_plot(plot, lines, mark=mark, direct_labels=True, joined=len(lines[0].points) >= FEW_POINTS)]


def environment(loaded: Results) -> Section:
    """The benchmark of the environment: its goals, and the refresh policies in each setting."""
    section = Section("environment", "The retrieval environment")
    known = [(name, record["figures"]) for name, record in loaded.environment if _is_benchmark(record)]
    if not known:
        section.blocks.append(Placeholder("The environment has not been benchmarked.", BENCHMARK))
        return section
    section.blocks.append(
        Text(
            "While a model trains, the embeddings of its documents become stale. Each policy re-encodes some rows per "
            "step; the error is the distance between rewards in the stale corpus and rewards in a fresh one."
        )
    )
    section.summary = "how stale the documents' embeddings become, by refresh policy"
    for name, measured in known:
        goals = {
            key: goal for key, goal in (measured.get("goals") or {}).items() if isinstance(goal, dict) and "met" in goal
        }
        if goals:
            rows = [
                [
                    key.replace("_", " "),
                    number(g["found"], None),
                    number(g["goal"], None),
                    "met" if g["met"] else "missed",
                ]
                for key, g in goals.items()
            ]
            head = ("metric", "measured", "goal (at most)", "verdict")
            section.blocks.append(Table(f"{name}-goals", "Goals", head, rows, words=(3,)))
        for title, world in _worlds(measured):
            section.blocks.append(Heading(title, f"{name}-{title}"))
            section.blocks.append(Figures(environment_plots(f"{name}-{title}", world)))
            section.blocks.append(Details("All policies: means over the steps", [_policies(f"{name}-{title}", world)]))
        if measured.get("million"):
            section.blocks.append(_million(name, measured["million"]))
    return section


def environment_plots(name: str, world: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """One plot per curve with a labeled line for each of the `best_policies`; the table has the others."""
    plots = []
    means = world.get("policies") or {}
    errors = {policy: (means.get(policy) or {}).get("error", math.inf) for policy in world.get("curves") or {}}
    shown = best_policies(errors)
    for curve, label in ENVIRONMENT.items():
        lines = []
        for style, policy in enumerate(shown):
            series = world["curves"][policy].get(curve) or {}
            points = finite_points(list(zip(series.get("steps", ()), series.get("values", ()), strict=False)))
            if points:
                lines.append(Series(policy, _thin(points), style, markers=False))
        if lines:
            description = "; ".join(f"{one.label}: {number(one.points[-1][1], None)} at the end" for one in lines)
            plot = Plot(f"{name}-{curve}", label[0].upper() + label[1:], description, "step", "", width)
            plots.append(line_plot(plot, lines, zero="error" in curve or curve == "age", direct_labels=True))
    return plots


def _step_lines(run: TrainingRun, panel: Panel) -> list[Series]:
    lines = []
    for style, (name, label) in enumerate(panel.metrics.items()):
        points = metric_points(run.steps, name)
        if not points:
            continue
        many = len(points) > MOST_DOTS
        if many and len(panel.metrics) == 1:
            lines.append(Series("", _thin(points), style, faint=True))
        means = running_mean([value for _, value in points])
        smooth = [(step, mean) for (step, _), mean in zip(points, means, strict=True)]
        lines.append(Series(label, _thin(smooth), style, markers=False if many else None))
    return lines


def _dev_lines(run: TrainingRun, panel: Panel) -> list[Series]:
    """One line for every pool and dev metric, such as "cosqa on"; means over pools are left out."""
    by_label: dict[str, list[tuple[int, Any]]] = {}
    for record in run.dev:
        for name, value in record["dev"].items():
            pool, _, ending = name.rpartition(".")
            pool = pool.removesuffix(".dev")
            is_mean = pool == "ndcg@10" or (pool == "live" and panel.name not in ("dev-reward", "gain"))
            if ending in panel.dev and not is_mean:
                label = " ".join(part for part in (pool.replace("live", ""), panel.dev[ending]) if part)
                by_label.setdefault(label or panel.dev[ending], []).append((record["step"], value))
    known = {label: points for label, values in by_label.items() if (points := finite_points(values))}
    return [Series(label, points, style) for style, (label, points) in enumerate(known.items())]


def _policies(name: str, world: Mapping[str, Any]) -> Table:
    columns = {"share_reencoded": "share re-encoded", "age": "age", "recall": "recall@10", "error": "error",
               "end_error": "error at the end", "dev_error": "dev error"}  # fmt: skip
    policies = world.get("policies") or {}
    rows = [
        [policy, *(number(means[key], None) if key in means else "" for key in columns)]
        for policy, means in policies.items()
    ]
    return Table(f"{name}-policies", "Policies", ("policy", *columns.values()), rows)


def _million(name: str, measured: Mapping[str, Any]) -> Table:
    seconds = measured.get("seconds") or {}
    rows = [[f"{part}, seconds per step", number(value, None)] for part, value in seconds.items()]
    rows += [
        [key.removesuffix("_bytes") + ", GiB", number(measured[key] / 2**30, 2)]
        for key in measured
        if key.endswith("_bytes")
    ]
    return Table(
        f"{name}-million", f"{measured.get('rows', 1_000_000):,} rows: time and memory", ("metric", "measured"), rows
    )


def _worlds(measured: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    worlds = [("Recorded: checkpoints of a training run", measured["recorded"])] if measured.get("recorded") else []
    simulated = measured.get("simulated") or {}
    return worlds + [(f"Simulated: {int(rows):,} rows", world) for rows, world in simulated.items()]


def _is_benchmark(record: Any) -> bool:
    measured = record.get("figures") if isinstance(record, dict) else None
    return isinstance(measured, dict) and any(key in measured for key in ("recorded", "simulated", "million"))


def _wide(lines: Sequence[Series]) -> bool:
    values = [y for one in lines for _, y in one.points]
    return min(values) > 0 and max(values) > LOG_SPAN * min(values)


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: the first, the means of stretches of equal length, and the last."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MOST_POINTS - 2))
    thinned = [points[0]]
    for start in range(0, len(points), size):
        part = points[start : start + size]
        thinned.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [*thinned, points[-1]]

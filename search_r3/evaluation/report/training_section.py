"""The page's sections of training (curves from the kept logs) and of the environment's benchmark.

Logs are those of `training.training_log`; what was not logged gets no plot. Running means are drawn over the raw
values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_r3.evaluation.report.axes import number
from search_r3.evaluation.report.load_results import Results, TrainingRun
from search_r3.evaluation.report.page_elements import Figures, Fold, Heading, Missing, Section, Table, Text
from search_r3.evaluation.report.svg import WIDTH, Plot, Point, Series, line_plot

KEEP = "search-r3 card models/NAME --run results/training/NAME --keep runs/NAME"
BENCHMARK = "python benchmarks/environment.py --recording build/recording"
MOST_POINTS = 150
"""Points that a line is drawn with at most: each is the mean of its stretch of steps."""


@dataclass(frozen=True)
class Panel:
    """One plot of a run: metrics of its steps, or endings of its dev metrics, with their labels."""

    name: str
    title: str
    metrics: Mapping[str, str]
    dev: bool = False
    log: bool = False
    zero: bool = False


PANELS = (
    Panel("loss", "Loss and its terms", {"loss": "loss", "infonce": "InfoNCE", "sft": "cross-entropy",
          "distillation": "KL to the teacher", "self_teaching": "KL of changed queries",
          "view_distillation": "KL to the reading view", "in_batch_lm": "in-batch LM",
          "triplet": "triplet", "kl": "KL to the base"}, log=True),
    Panel("dev", "Dev nDCG@10", {"off": "off", "on": "on", "latent": "latent"}, dev=True),
    Panel("reward", "Reward of rollouts", {"reward": "as trained on", "dcg_scaled": "DCG scaled", "dcg": "nDCG",
          "direct": "direct"}),
    Panel("dev-reward", "Dev reward, live corpus", {"reward": "with reasoning", "reward_direct": "direct"}, dev=True),
    Panel("length", "Tokens of a rollout", {"length": ""}, zero=True),
    Panel("dev-length", "Tokens of a dev reasoning trace", {"tokens": ""}, dev=True, zero=True),
    Panel("kl", "KL to stage 1", {"kl_reference": ""}, zero=True),
    Panel("age", "Staleness: mean age of documents, steps", {"mean_age": ""}, zero=True),
    Panel("stale", "Reward error by stale documents", {"staleness_error": ""}, zero=True),
    Panel("emission", "Rollouts that emit the token, and distinct ones", {"emission": "emit", "distinct": "distinct"}),
)  # fmt: skip
ENVIRONMENT = {
    "age": "mean age of rows, steps",
    "recall": "recall@10, rollouts",
    "error": "reward error, rollouts",
    "dev_error": "reward error, fixed dev queries",
}


def training(found: Results) -> Section:
    """The curves of every kept run."""
    section = Section("training", "Training")
    runs = [run for run in found.runs if run.steps]
    if not runs:
        section.blocks.append(Missing("No training run is kept here.", KEEP))
        return section
    for run in runs:
        about = run.about
        summary = f"{run.steps[-1]['step']:,} steps"
        if about.get("hours"):
            summary += f" in {about['hours']:.2f} hours on {about.get('hardware', 'a machine not known')}"
        commit = (about.get("commit") or "not known").removesuffix("-dirty")[:7]
        summary += f"; {about['command']}, commit {commit}." if about.get("command") else "."
        section.blocks += [Heading(run.name, f"run-{run.name}"), Text(summary, "note"), Figures(run_plots(run))]
    return section


def run_plots(run: TrainingRun, width: int = WIDTH, only: Sequence[str] = ()) -> list[str]:
    """A plot for each panel that the run logged anything for; those named in `only`, if any are."""
    plots = []
    for panel in PANELS:
        if only and panel.name not in only:
            continue
        lines = _dev_lines(run, panel) if panel.dev else _step_lines(run, panel)
        if not lines:
            continue
        summary = [one for one in lines if not one.faint]
        description = "; ".join(
            f"{one.label or panel.title}: {number(one.points[0][1], None)} at step {one.points[0][0]:,.0f}, "
            f"{number(one.points[-1][1], None)} at step {one.points[-1][0]:,.0f}"
            for one in summary
        )
        plot = Plot(f"{panel.name}-{run.name}", panel.title, description, "step", "", width)
        plots.append(line_plot(plot, lines, zero=panel.zero, log=panel.log and _wide(summary)))
    return plots


def environment(found: Results) -> Section:
    """The benchmark of the environment: goals, and each world's policies."""
    section = Section("environment", "The retrieval environment")
    known = [(name, record["figures"]) for name, record in found.environment if _is_benchmark(record)]
    if not known:
        section.blocks.append(Missing("The environment has not been benchmarked.", BENCHMARK))
        return section
    section.blocks.append(
        Text(
            "While a model trains, its documents' embeddings age. Each policy re-encodes some rows a step; the error "
            "is how far rewards in the aged corpus are from those in a fresh one."
        )
    )
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
            head = ("what", "found", "goal at most", "verdict")
            section.blocks.append(Table(f"{name}-goals", "Goals", head, rows, words=(3,)))
        for title, world in _worlds(measured):
            section.blocks.append(Heading(title, f"{name}-{title}"))
            section.blocks.append(Figures(environment_plots(f"{name}-{title}", world)))
            section.blocks.append(Fold("Means over the steps, by policy", [_policies(f"{name}-{title}", world)]))
        if measured.get("million"):
            section.blocks.append(_million(name, measured["million"]))
    return section


def environment_plots(name: str, world: Mapping[str, Any], width: int = WIDTH) -> list[str]:
    """A plot a curve, a line a policy."""
    plots = []
    for curve, label in ENVIRONMENT.items():
        lines = []
        for style, (policy, of) in enumerate((world.get("curves") or {}).items()):
            at = of.get(curve) or {}
            points = [
                (float(step), value)
                for step, value in zip(at.get("steps", ()), at.get("values", ()), strict=False)
                if isinstance(value, int | float) and math.isfinite(value)
            ]
            if points:
                lines.append(Series(policy, _thin(points), style, markers=False))
        if lines:
            description = "; ".join(f"{one.label}: {number(one.points[-1][1], None)} at the end" for one in lines)
            plots.append(
                line_plot(
                    Plot(f"{name}-{curve}", label[0].upper() + label[1:], description, "step", "", width),
                    lines,
                    zero="error" in curve or curve == "age",
                )
            )
    return plots


def _step_lines(run: TrainingRun, panel: Panel) -> list[Series]:
    lines = []
    for style, (name, label) in enumerate(panel.metrics.items()):
        points = [
            (float(r["step"]), v) for r in run.steps if (v := ({**r.get("terms", {}), **r}).get(name)) is not None
        ]
        points = [(x, float(y)) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
        if not points:
            continue
        if len(points) > 30 and len(panel.metrics) == 1:
            lines.append(Series("", _thin(points), style, faint=True))
        lines.append(Series(label, _thin(_smooth(points)), style, markers=False if len(points) > 30 else None))
    return lines


def _dev_lines(run: TrainingRun, panel: Panel) -> list[Series]:
    """A line for every pool and ending, such as "cosqa on"."""
    found: dict[str, list[Point]] = {}
    for record in run.dev:
        for name, value in record["dev"].items():
            pool, _, ending = name.rpartition(".")
            pool = pool.removesuffix(".dev")
            means = pool == "ndcg@10" or (pool == "live" and panel.name != "dev-reward")  # of pools that stand there
            if ending in panel.metrics and not means and isinstance(value, int | float) and math.isfinite(value):
                label = " ".join(part for part in (pool.replace("live", ""), panel.metrics[ending]) if part)
                found.setdefault(label or panel.metrics[ending], []).append((float(record["step"]), float(value)))
    return [Series(label, points, style) for style, (label, points) in enumerate(found.items())]


def _policies(name: str, world: Mapping[str, Any]) -> Table:
    columns = {"share_reencoded": "share re-encoded", "age": "age", "recall": "recall@10", "error": "error",
               "end_error": "error at the end", "dev_error": "dev error"}  # fmt: skip
    policies = world.get("policies") or {}
    rows = [
        [policy, *(number(of[key], None) if key in of else "" for key in columns)] for policy, of in policies.items()
    ]
    return Table(f"{name}-policies", "Policies", ("policy", *columns.values()), rows)


def _million(name: str, measured: Mapping[str, Any]) -> Table:
    seconds = measured.get("seconds") or {}
    rows = [[f"{part}, seconds a step", number(value, None)] for part, value in seconds.items()]
    rows += [
        [key.removesuffix("_bytes") + ", GiB", number(measured[key] / 2**30, 2)]
        for key in measured
        if key.endswith("_bytes")
    ]
    return Table(
        f"{name}-million", f"{measured.get('rows', 1_000_000):,} rows: time and memory", ("what", "found"), rows
    )


def _worlds(measured: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = [("Recorded: a run's own checkpoints", measured["recorded"])] if measured.get("recorded") else []
    return found + [(f"Simulated: {int(rows):,} rows", of) for rows, of in (measured.get("simulated") or {}).items()]


def _is_benchmark(record: Any) -> bool:
    measured = record.get("figures") if isinstance(record, dict) else None
    return isinstance(measured, dict) and any(key in measured for key in ("recorded", "simulated", "million"))


def _wide(lines: Sequence[Series]) -> bool:
    values = [y for one in lines for _, y in one.points]
    return min(values) > 0 and max(values) > 30 * min(values)


def _smooth(points: list[Point]) -> list[Point]:
    """The mean of each value and its neighbors, a twentieth of all; the same for few values."""
    half = len(points) // 40
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        found.append((x, (sums[high] - sums[low]) / (high - low)))
    return found


def _thin(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS: stretches of equal length by their means, with both ends where they are."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS - 2))
    found = [points[0]]
    for start in range(0, len(points), size):
        part = points[start : start + size]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [*found, points[-1]]

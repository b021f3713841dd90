"""Runs' curves, drawn from their logs on one page of small panels: one run with all its figures, or several compared.

A figure that was not logged has no panel. A legend is above its panel, never on a line; the colors are Okabe and Ito's,
which color-blind readers can distinguish, and dashes distinguish two lines of one color.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.optional import optional_imports

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (4, 1.6)), (0, (1, 1)))
WIDTH, ROW_HEIGHT, DPI = 12.0, 2.6, 120
"""Inches, and dots an inch: 1,440 px wide, with letters of 8 points that are legible at 1,200."""
MOST_RUNS = len(COLORS) * len(DASHES)
NEEDS_ROWS = {"infonce_reasoning": "rows_reasoning", "accuracy_reasoning": "rows_reasoning"}
"""Figures that mean nothing at a step where this other figure, if it is logged, is 0."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """What one panel shows."""

    title: str
    figures: dict[str, str] = field(default_factory=dict)
    """Figures of the steps, and their labels: a color each."""
    dev: dict[str, str] = field(default_factory=dict)
    """Endings of dev figures, and their titles in a comparison: a color for each pool, dashes for the second."""
    log: bool = False
    """Logarithmic, if the values span more than a factor of `SPAN`."""
    share: bool = False
    """Values in 0..1, all of which is shown."""
    exact: bool = False
    """Without noise: drawn as it is, not as a running mean."""


SPAN = 30.0
TERMS = {"loss": "loss", "infonce": "InfoNCE", "triplet": "triplet", "sft": "cross-entropy", "kl": "KL to the base",
         "distillation": "KL to the teacher", "self_teaching": "KL of changed queries",
         "view_distillation": "KL to the reading view", "in_batch_lm": "in-batch LM"}  # fmt: skip
BY_CONVERSATION = ("direct", "reasoning")
PANELS = (
    Panel("dev nDCG@10 (dashed: reasoning on)", dev={"off": "dev nDCG@10, off", "on": "dev nDCG@10, on"}),
    Panel("loss and its terms", TERMS, log=True),
    Panel("InfoNCE", dict(zip(("infonce_query", "infonce_reasoning"), BY_CONVERSATION, strict=True)), log=True),
    Panel("in-batch accuracy", dict(zip(("accuracy_query", "accuracy_reasoning"), BY_CONVERSATION, strict=True))),
    Panel("gradient norm", {"grad_norm": ""}, log=True),
    Panel("learning rate", {"lr": ""}, exact=True),
    Panel("dev uniformity (lower: more even)", dev={"uniformity": "dev uniformity"}),
    Panel("dev alignment (lower: nearer)", dev={"alignment": "dev alignment"}),
    Panel("dev reasoning that ends (dashed: distinct)", share=True,
          dev={"emission": "dev reasoning that ends", "distinct": "dev distinct reasoning"}),
    Panel("dev tokens of reasoning", dev={"tokens": "dev tokens of reasoning"}),
    Panel("reward of rollouts", {"reward": "as trained on", "dcg_scaled": "DCG scaled", "dcg": "nDCG",
                                 "direct": "direct"}),
    Panel("dev reward, live corpus (dashed: direct)",
          dev={"reward": "dev reward, live corpus", "reward_direct": "dev reward, direct"}),
    Panel("rollouts above 0.5", {"dcg_scaled_high": "DCG scaled", "dcg_high": "nDCG"}, share=True),
    Panel("rollouts", {"emission": "with the token", "distinct": "distinct", "zero_variance": "groups all equal"},
          share=True),
    Panel("tokens of a rollout", {"length": ""}),
    Panel("entropy, nats a token", {"entropy": ""}),
    Panel("policy loss", {"policy": ""}),
    Panel("contrastive term", {"contrastive": ""}),
    Panel("KL to stage 1", {"kl_reference": ""}, log=True),
    Panel("share of tokens clipped", {"clip_low": "below", "clip_high": "above"}),
    Panel("mean age of documents, steps", {"mean_age": ""}, exact=True),
    Panel("reward error by stale documents", {"staleness_error": ""}, exact=True),
    Panel("tokens a second", {"tokens_per_second": ""}),
    Panel("peak memory, GiB", {"memory_gib": ""}, exact=True),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A curve: (step, value) in the order of steps, and how it is drawn."""

    label: str
    points: Points
    color: str
    dashes: Any = "-"
    dev: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Run:
    """A training run's log: the records of its steps, and those of its evaluations."""

    name: str
    steps: list[dict[str, Any]]
    dev: list[dict[str, Any]]

    def figure(self, name: str) -> Points:
        """A figure of the steps, where it is a number and means something."""
        found = []
        for record in self.steps:
            values = record.get("terms", {}) | record
            if name in values and values.get(NEEDS_ROWS.get(name, ""), 1):
                found.append((record["step"], values[name]))
        return _finite(found)

    def dev_figures(self, ending: str) -> dict[str, Points]:
        """A dev figure of every pool, the mean over the pools first: pool -> points."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for record in self.dev:
            values = {_pool(name): value for name, value in record["dev"].items() if name.split(".")[-1] == ending}
            if values and "mean" not in values:
                values["mean"] = sum(values.values()) / len(values)
            for pool in sorted(values, key=lambda pool: (pool != "mean", pool)):
                found.setdefault(pool, []).append((record["step"], values[pool]))
        if len(found) == 2:  # one pool is its own mean
            found.pop("mean", None)
        return {pool: points for pool, values in found.items() if (points := _finite(values))}


def read_log(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step records and the dev records of a run's `log.jsonl`, which may still be written to.

    Raises:
        InputError: no such run, a broken line (named; a half-written last line is left out), or a log without a step.
    """
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the output folder of a training run, or its log.jsonl")
    steps: list[dict[str, Any]] = []
    dev: list[dict[str, Any]] = []
    text = path.read_bytes().decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            (dev if "dev" in record else steps).append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if steps and not line.endswith("\n"):
                continue
            raise InputError(f"{path}, line {number}: not a record of a training log ({error})") from error
    if not steps:
        raise InputError(f"{path} has no step yet; let the run begin first")
    return steps, dev


def plot_runs(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Draw one run with all its figures, or several compared (a line a run, a panel a figure), to an image.

    Args:
        runs: folders of training runs, or their log.jsonl. Each is called by its folder's name.
        output: the image; its ending says the format (.png, .svg, .pdf). By default `curves.png` in the run's folder,
            or `compare.png` beside the first of several.

    Returns:
        The image's path.

    Raises:
        InputError: see `read_log`; no run or more than `MOST_RUNS`; an ending that cannot be drawn; or matplotlib is
            not installed.
    """
    with optional_imports("evaluation", "plotting"):
        from matplotlib.figure import Figure
    given = {(Path(run) if Path(run).is_dir() else Path(run).parent).resolve(): Path(run) for run in runs}
    folders = list(given)
    if not 1 <= len(folders) <= MOST_RUNS:
        raise InputError(f"{len(folders)} runs cannot be drawn in one picture; give 1 to {MOST_RUNS}")
    read = [Run(name, *read_log(given[folder])) for name, folder in zip(_distinct_names(folders), folders, strict=True)]
    drawn = [(panel, lines) for panel, lines in (_one_run(read[0]) if len(read) == 1 else _compared(read)) if lines]

    columns = 3 if len(read) == 1 else 4  # a comparison has more panels, and no legends in them
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * rows + 0.6), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    last = max(record["step"] for run in read for record in (*run.steps, *run.dev))
    for axis, (panel, lines) in zip(axes, drawn, strict=False):
        _draw(axis, panel, lines, legend=len(read) == 1)
        axis.set_xlim(-0.02 * last, 1.02 * last)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    if len(read) == 1:
        figure.suptitle(_headline(read[0]), fontsize=11, x=0.01, ha="left")
    else:
        _legend_of_runs(figure, read)
    if output:
        target = Path(output)
    elif len(read) == 1:
        (run,) = given.values()
        target = (run if run.is_dir() else run.parent) / "curves.png"
    else:
        target = folders[0].parent / "compare.png"
    kind = target.suffix.lstrip(".").lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"cannot draw {target}: {target.suffix!r} is not an image format; try .png, .svg or .pdf")
    with atomic_path(target) as scratch:
        figure.savefig(scratch, format=kind, dpi=DPI)
    return target


def _one_run(run: Run) -> list[tuple[Panel, list[Line]]]:
    pools = list(dict.fromkeys(pool for panel in PANELS for name in panel.dev for pool in run.dev_figures(name)))
    pools = [pool for pool in pools if pool != "mean"]
    colors = {pool: COLORS[i % (len(COLORS) - 1)] for i, pool in enumerate(pools)} | {"mean": COLORS[-1]}
    found = []
    for panel in PANELS:
        lines = []
        for (name, label), color in zip(panel.figures.items(), COLORS, strict=False):
            lines.append(Line(label, run.figure(name), color, bold=name == "loss"))
        for ending, dashes in zip(panel.dev, DASHES, strict=False):
            for pool, points in run.dev_figures(ending).items():
                label = pool if dashes == "-" else ""
                lines.append(Line(label, points, colors[pool], dashes, True, pool == "mean"))
        found.append((panel, [line for line in lines if line.points]))
    return found


def _compared(runs: Sequence[Run]) -> list[tuple[Panel, list[Line]]]:
    """A panel for each figure of `PANELS`, dev figures as the mean over the pools."""
    found = []
    for panel in PANELS:
        titles = {
            name: label if panel.figures is TERMS else f"{panel.title}, {label}".removesuffix(", ")
            for name, label in panel.figures.items()
        }
        for name, title in (titles | panel.dev).items():
            lines = []
            for i, run in enumerate(runs):
                points = run.figure(name) if name in titles else next(iter(run.dev_figures(name).values()), [])
                if points:
                    lines.append(Line(run.name, points, *_style(i), dev=name in panel.dev))
            found.append((replace(panel, title=title), lines))
    return found


def _style(i: int) -> tuple[str, Any]:
    return COLORS[i % len(COLORS)], DASHES[i // len(COLORS)]


def _draw(axis: Any, panel: Panel, lines: list[Line], *, legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    title, values = panel.title, [value for line in lines for _, value in line.points]
    if all(line.dashes == "-" for line in lines):
        title = title.split(" (dashed")[0]
    scale = 1.0
    if 0 < max(values) < 0.01:  # a learning rate: the power of ten goes into the title, not into a corner
        power = math.floor(math.log10(max(values)))
        scale, title = 10.0**-power, f"{title}, in 1e{power}"
    for line in lines:
        x, y = [step for step, _ in line.points], [scale * value for _, value in line.points]
        style: dict[str, Any] = {"color": line.color, "linestyle": line.dashes, "linewidth": 2.0 if line.bold else 1.5}
        raw = line.dev or panel.exact
        if len(y) <= 30:  # points show where something was measured; hollow ones leave the dashes legible
            style |= {
                "marker": "o",
                "markersize": 3.2,
                "markerfacecolor": line.color if line.dashes == "-" else "white",
            }
        elif legend and not raw:  # a single run: every step behind the running mean
            axis.plot(x, y, color=line.color, alpha=0.18, linewidth=0.7)
        axis.plot(x, y if raw else _smooth(y), label=line.label or "_", **style)
    smooth = [scale * v for line in lines for v in _smooth([value for _, value in line.points]) if v > 0]
    if panel.log and smooth and max(smooth) > SPAN * min(smooth):
        axis.set_yscale("log", nonpositive="mask")
        axis.set_ylim(max(min(smooth), max(smooth) / 1e5) / 1.5, max(scale * max(values), max(smooth)) * 1.5)
    elif panel.share:
        axis.set_ylim(-0.04, 1.04)
    if max(values) >= 1000:
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.tick_params(labelsize=8, length=2.5, color="#888888")
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#888888")
    labels = [line.label for line in lines if line.label] if legend else []
    columns = 4 if sum(map(len, labels)) <= 30 else 3
    if labels:
        axis.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, fontsize=8, frameon=False, borderpad=0.1,
            borderaxespad=0.2, handlelength=1.7, handletextpad=0.4, columnspacing=0.9, labelspacing=0.2,
        )  # fmt: skip
    axis.set_title(title, fontsize=9.5, loc="left", pad=5 + 11.5 * math.ceil(len(labels) / columns), fontweight="bold")


def _legend_of_runs(figure: Any, runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for i, run in enumerate(runs):
        color, dashes = _style(i)
        handles.append(Line2D([], [], color=color, linestyle=dashes, linewidth=2, label=run.name))
    widest = max(len(run.name) for run in runs)
    columns = max(1, min(len(runs), 150 // (widest + 8)))  # about 150 letters of 9 points go into 12 inches
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize=9, frameon=False)


def _headline(run: Run) -> str:
    """The run's name, how far it is, and its best dev figure."""
    text = f"{run.name}: {run.steps[-1]['step']:,} steps"
    quality = next(iter(run.dev_figures("off").values()), [])
    if quality:
        step, best = max(quality, key=lambda point: point[1])
        text += f", best dev nDCG@10 without reasoning {best:.3f} (step {step:,})"
    return text


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as tell them apart."""
    names = [folder.name or str(folder) for folder in folders]
    deepest = max(len(folder.parts) for folder in folders)
    for depth in range(2, deepest + 1):
        if len(set(names)) == len(names):
            break
        names = [
            "/".join(folder.parts[-depth:]) if names.count(name) > 1 else name
            for name, folder in zip(names, folders, strict=True)
        ]
    return names


def _pool(name: str) -> str:
    """The pool that a dev figure is of: "cosqa" for "cosqa.dev.off", "mean" for "ndcg@10.off" and "emission"."""
    pool = name.rpartition(".")[0].removesuffix(".dev")
    return "mean" if pool in ("", "ndcg@10") else pool


def _finite(points: list[tuple[int, Any]]) -> Points:
    return [
        (step, float(value)) for step, value in points if isinstance(value, int | float) and math.isfinite(float(value))
    ]


def _smooth(values: list[float]) -> list[float]:
    """The mean of each value and its neighbors: a twentieth of all, none for few values."""
    half = len(values) // 40
    if half == 0:
        return values
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    found = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        found.append((sums[high] - sums[low]) / (high - low))
    return found

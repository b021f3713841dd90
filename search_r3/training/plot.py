"""Draw the curves of training runs as small panels on one page: one run with all its metrics, or several compared.

One run begins with what decides about it: the reward (or the loss), the dev metrics with intervals, and the KL; its
lines are labeled at their ends, and metrics that never change are given in words. A metric that was not logged has no
panel. The colors are Okabe and Ito's, which color-blind readers can distinguish; dashes distinguish lines of the same
color.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.optional import optional_imports
from search_r3.training_curves import (
    FEW_POINTS,
    LOG_SPAN,
    PANELS,
    Panel,
    Points,
    Records,
    all_constants,
    best_dev,
    constants,
    dev_intervals,
    dev_mean,
    finite_points,
    metric_points,
    read_log,
    resumed_after,
    running_mean,
    spread,
    words_gains,
)

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (4, 1.6)), (0, (1, 1)))
WIDTH, ROW_HEIGHT, DPI = 12.0, 2.6, 120
"""Inches, and dots per inch: 1,440 px wide; 8-point text is still legible at 1,200 px."""
MOST_RUNS = len(COLORS) * len(DASHES)
MODES = {"off": "direct", "on": "with reasoning", "latent": "latent", "read": "reading"}
"""The modes of the first row's dev panel, by their endings."""
DEV = Panel("dev-means", "dev nDCG@10")
FIRST = (("reward", "dev-means", "kl"), ("loss", "dev-means", "accuracy"))
"""Panels of the first row: of a run that logs rewards, and of others."""
_GAP = 0.085
"""Least distance of two labels at the ends of lines, as a share of a panel's height."""


@dataclass(frozen=True)
class Theme:
    """The colors of a picture."""

    ground: str
    ink: str
    muted: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1b1f26", "#666d78", "#e4e4e4", COLORS)
DARK = Theme("#14171c", "#e7eaee", "#a2abb8", "#2c323b",
             ("#5db3f0", "#ff9248", "#40c596", "#ec95c6", "#dfbb3b", "#9bcdf2", "#e7eaee"))  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A curve: (step, value) points in the order of steps, and its style; `color` is an index into a theme's lines."""

    label: str
    points: Points
    color: int
    dashes: Any = "-"
    dev: bool = False
    bold: bool = False
    interval: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Run:
    """A training run's log: the records of its steps and of its evaluations."""

    name: str
    steps: Records
    dev: Records

    def dev_metrics(self, ending: str) -> dict[str, Points]:
        """The points of a dev metric for every pool, starting with the mean over the pools: pool -> points."""
        by_pool: dict[str, list[tuple[int, Any]]] = {"mean": dev_mean(self.dev, ending)}
        for record in self.dev:
            for name, value in sorted(record["dev"].items()):
                if name.split(".")[-1] == ending and (pool := _pool(name)) != "mean":
                    by_pool.setdefault(pool, []).append((record["step"], value))
        if len(by_pool) == 2:  # the mean of one pool is that pool
            del by_pool["mean"]
        return {pool: points for pool, values in by_pool.items() if (points := finite_points(values))}


def plot_runs(runs: Sequence[str | Path], output: str | Path | None = None, *, dark: bool = False) -> Path:
    """Draw one run with all its metrics, or compare several (one line per run, one panel per metric), in an image file.

    Args:
        runs: folders of training runs, or their log.jsonl. Each run is labeled with its folder's name.
        output: the image file; its extension determines the format (.png, .svg, .pdf). By default `curves.png` in the
            run's folder, or `compare.png` next to the first of several.
        dark: draw on a dark ground.

    Returns:
        The image's path.

    Raises:
        InputError: a log is missing, damaged or has no step yet; there is no run, or more than `MOST_RUNS`; the image
            format is not supported; or matplotlib is not installed.
    """
    with optional_imports("evaluation", "plotting"):
        from matplotlib.figure import Figure
    given = {(Path(run) if Path(run).is_dir() else Path(run).parent).resolve(): Path(run) for run in runs}
    folders = list(given)
    if not 1 <= len(folders) <= MOST_RUNS:
        raise InputError(f"{len(folders)} runs cannot be drawn in one picture; give 1 to {MOST_RUNS}")
    theme = DARK if dark else LIGHT
    names = zip(_distinct_names(folders), folders, strict=True)
    read = [Run(name, *_read_run(given[folder])) for name, folder in names]
    drawn = [(panel, lines) for panel, lines in (_one_run(read[0]) if len(read) == 1 else _compared(read)) if lines]

    columns = 3 if len(read) == 1 else 4  # a comparison has more panels, without legends
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * rows + 0.6), layout="constrained", facecolor=theme.ground)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    last = max(record["step"] for run in read for record in (*run.steps, *run.dev))
    for axis, (panel, lines) in zip(axes, drawn, strict=False):
        axis.set_xlim(-0.02 * last, 1.02 * last)
        _draw(axis, panel, lines, theme, alone=len(read) == 1)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9, color=theme.ink)
    if len(read) == 1:
        _mark_run(axes, drawn, read[0], theme)
        figure.suptitle(_headline(read[0]), fontsize=10, x=0.01, ha="left", color=theme.ink, linespacing=1.5)
    else:
        _legend_of_runs(figure, read, theme)
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


def _read_run(run: Path) -> tuple[Records, Records]:
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the output folder of a training run, or its log.jsonl")
    steps, dev = read_log(path)
    if not steps:
        raise InputError(f"{path} has no step yet; let the run begin first")
    return steps, dev


def _one_run(run: Run) -> list[tuple[Panel, list[Line]]]:
    """The panels of one run: the first row of FIRST, then the others; those of constants are left out."""
    pools = list(dict.fromkeys(pool for panel in PANELS for name in panel.dev for pool in run.dev_metrics(name)))
    pools = [pool for pool in pools if pool != "mean"]
    colors = {pool: i % (len(COLORS) - 1) for i, pool in enumerate(pools)} | {"mean": len(COLORS) - 1}
    drawn: dict[str, tuple[Panel, list[Line]]] = {DEV.name: (DEV, _dev_means(run))}
    for panel in PANELS:
        lines = []
        for i, (name, label) in enumerate(panel.metrics.items()):
            lines.append(Line(label, metric_points(run.steps, name), *_style(i), bold=name == "loss"))
        for ending, dashes in zip(panel.dev, DASHES, strict=False):
            for pool, points in run.dev_metrics(ending).items():
                label = pool if dashes == "-" else ""
                lines.append(Line(label, points, colors[pool], dashes, True, pool == "mean"))
        if panel.name == "words":
            lines = [Line(name, points, i, dev=True) for i, (name, points) in enumerate(words_gains(run.dev).items())]
        if panel.name != "dev" or len(pools) > 1:  # one pool is what the first row shows
            drawn[panel.name] = (panel, [] if constants(run.steps, panel) else [one for one in lines if one.points])
    first = FIRST[0] if drawn["reward"][1] else FIRST[1]
    order = [*first, *(name for name in drawn if name not in first)]
    return [drawn[name] for name in order if drawn[name][1]]


def _dev_means(run: Run) -> list[Line]:
    found = [(label, dev_mean(run.dev, mode), dev_intervals(run.dev, mode)) for mode, label in MODES.items()]
    return [
        Line(label, points, i, dev=True, bold=True, interval=interval)
        for i, (label, points, interval) in enumerate(found)
        if points
    ]


def _compared(runs: Sequence[Run]) -> list[tuple[Panel, list[Line]]]:
    """One panel for each metric of `PANELS`, dev metrics as the mean over the pools."""
    drawn = []
    for panel in PANELS:
        for name, label in (panel.metrics | panel.dev).items():
            lines = []
            for i, run in enumerate(runs):
                dev = name in panel.dev
                points = dev_mean(run.dev, name) if dev else metric_points(run.steps, name)
                if points:
                    lines.append(Line(run.name, points, *_style(i), dev=dev))
            drawn.append((replace(panel, title=panel.title_of(label)), lines))
    return drawn


def _style(i: int) -> tuple[int, Any]:
    return i % len(COLORS), DASHES[i // len(COLORS)]


def _draw(axis: Any, panel: Panel, lines: list[Line], theme: Theme, *, alone: bool) -> None:
    """One panel; that of a run drawn `alone` has labels at the ends of its lines and the raw values behind them."""
    title, values = panel.title, [value for line in lines for _, value in line.points]
    if all(line.dashes == "-" for line in lines):
        title = title.split(" (dashed")[0]
    scale = 1.0
    if 0 < max(values) < 0.01:  # a learning rate: the power of ten is in the title, not in a corner of the panel
        power = math.floor(math.log10(max(values)))
        scale, title = 10.0**-power, f"{title}, in 1e{power}"
    if panel is DEV and any(line.interval for line in lines):
        title += ", 95% intervals"
    for line in lines:
        _draw_line(axis, line, theme, scale, raw=line.dev or panel.exact, faint=alone)
    smooth = [scale * v for line in lines for v in running_mean([value for _, value in line.points]) if v > 0]
    if panel.log and smooth and max(smooth) > LOG_SPAN * min(smooth):
        axis.set_yscale("log", nonpositive="mask")
        axis.set_ylim(max(min(smooth), max(smooth) / 1e5) / 1.5, max(scale * max(values), max(smooth)) * 1.5)
    elif panel.share:
        axis.set_ylim(-0.04, 1.04)
    _decorate(axis, title, theme, thousands=max(values) >= 1000)
    if alone:
        last = [(line, running_mean([value for _, value in line.points])[-1]) for line in lines if line.label]
        label_ends(axis, [(line.label, scale * value, theme.lines[line.color]) for line, value in last])


def _draw_line(axis: Any, line: Line, theme: Theme, scale: float, *, raw: bool, faint: bool) -> None:
    x, y = [step for step, _ in line.points], [scale * value for _, value in line.points]
    color = theme.lines[line.color]
    style: dict[str, Any] = {"color": color, "linestyle": line.dashes, "linewidth": 2.0 if line.bold else 1.5}
    if len(y) <= 30:  # markers show where values were measured; hollow ones keep the dashes visible
        face = color if line.dashes == "-" else theme.ground
        style |= {"marker": "o", "markersize": 3.2, "markerfacecolor": face}
    elif faint and not raw:  # a single run: the raw values, faint, below the running mean
        axis.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
    if line.dev and len(y) < FEW_POINTS:
        style["linestyle"] = "none"
    if line.interval:
        low, high = zip(*line.interval, strict=True)
        if len(y) < FEW_POINTS:
            axis.vlines(x, low, high, color=color, linewidth=1.2)
        else:
            axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axis.plot(x, y if raw else running_mean(y), label=line.label or "_", **style)


def _decorate(axis: Any, title: str, theme: Theme, *, thousands: bool) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if thousands:
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_facecolor(theme.ground)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.tick_params(which="both", labelsize=8, length=2.5, color=theme.muted, labelcolor=theme.ink)
    axis.grid(color=theme.grid, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(theme.muted)
    axis.set_title(title, fontsize=9.5, loc="left", pad=6, fontweight="bold", color=theme.ink)


def label_ends(axis: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write labels to the right of a panel, one below another where their lines end close together.

    Args:
        axis: a matplotlib panel whose lines are drawn already.
        ends: (label, last value, color) of each line.
    """
    axis.get_ylim()  # the limits are set by the data only when they are asked for
    to_axis = axis.transData + axis.transAxes.inverted()
    places = spread([to_axis.transform((0, value))[1] for _, value, _ in ends], _GAP, 0.02, 0.98)
    for (label, _, color), y in zip(ends, places, strict=True):
        axis.annotate(
            label, (1.0, y), (3, 0), xycoords="axes fraction", textcoords="offset points", va="center", ha="left",
            fontsize=8, color=color, annotation_clip=False,
        )  # fmt: skip


def _mark_run(axes: Sequence[Any], drawn: Sequence[tuple[Panel, list[Line]]], run: Run, theme: Theme) -> None:
    """Mark where the run was resumed in every panel, and its best step in those of the first row."""
    best = best_dev(run.steps, run.dev)
    for i, (axis, (panel, _)) in enumerate(zip(axes, drawn, strict=False)):
        for step in resumed_after(run.steps):
            axis.axvline(step, color=theme.muted, linewidth=0.8, linestyle=DASHES[2], zorder=0)
        if best and i < len(FIRST[0]):
            axis.axvline(best[1], color=theme.ink, linewidth=0.8, linestyle=DASHES[1], zorder=0)
        if best and panel is DEV:
            axis.plot([best[1]], [best[2]], marker="o", markersize=9, fillstyle="none", color=theme.ink, label="_best")


def _legend_of_runs(figure: Any, runs: Sequence[Run], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for i, run in enumerate(runs):
        color, dashes = _style(i)
        handles.append(Line2D([], [], color=theme.lines[color], linestyle=dashes, linewidth=2, label=run.name))
    widest = max(len(run.name) for run in runs)
    columns = max(1, min(len(runs), 150 // (widest + 8)))  # about 150 characters of 9 points fit into 12 inches
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, fontsize=9, frameon=False, labelcolor=theme.ink
    )


def _headline(run: Run) -> str:
    """The run's name, steps and best dev metric; then what the marks mean, and the metrics that never changed."""
    text = f"{run.name}: {run.steps[-1]['step']:,} steps"
    best = best_dev(run.steps, run.dev)
    if best:
        text += f"; best dev nDCG@10 {MODES[best[0]]} {best[2]:.3f} after step {best[1]:,} (dashed line)"
    resumed = resumed_after(run.steps)
    if resumed:
        text += f"; resumed after step {', '.join(f'{step:,}' for step in resumed)} (dotted line)"
    fixed = all_constants(run.steps)
    return text + (f"\nconstant: {'; '.join(fixed)}" if fixed else "")


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parent folders as needed to distinguish them."""
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
    """The pool of a dev metric: "cosqa" for "cosqa.dev.off", "mean" for "ndcg@10.off" and "emission"."""
    pool = name.rpartition(".")[0].removesuffix(".dev")
    return "mean" if pool in ("", "ndcg@10") else pool

"""The replays' curves on one page: a row of panels for each world, a color for each policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from search_r3.files import atomic_path
from search_r3.training.plot import COLORS, DASHES

WIDTH, ROW_HEIGHT, DPI = 12.0, 2.9, 120
"""As `training.plot`: 1,440 px wide, legible at 1,200."""
PANELS = (
    ("age", "mean age of rows, steps"),
    ("recall", "recall@10, rollouts"),
    ("error", "reward error, rollouts"),
    ("dev_error", "reward error, fixed dev queries"),
)
SHARE = 12
"""A batch's own figures jump: each is drawn as the mean of itself and the steps around it, this part of all."""


def draw(worlds: dict[str, dict[str, Any]], target: Path) -> Path:
    """Draw `worlds` (title -> policy -> curve name -> (steps, values)) to an image."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for policies in worlds.values() for name in policies))
    styles = {name: (COLORS[i % len(COLORS)], DASHES[i // len(COLORS)]) for i, name in enumerate(names)}
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(worlds) + 0.9), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.07)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(worlds), len(PANELS), squeeze=False)
    for line, (title, policies) in enumerate(worlds.items()):
        for axis, (curve, label) in zip(grid[line], PANELS, strict=True):
            for name, curves in policies.items():
                steps, values = curves[curve]
                values = smooth(values) if curve in ("recall", "error") else values
                color, dashes = styles[name]
                axis.plot(steps, values, color=color, linestyle=dashes, linewidth=1.6, alpha=0.9)
            if "error" in curve:
                axis.set_ylim(bottom=0)
            if curve == "error":
                axis.axhline(0.02, color="#888888", linewidth=0.9, linestyle=DASHES[2])
            axis.set_title(label, fontsize=9.5, loc="left", fontweight="bold")
            if curve == "age":
                axis.set_ylabel(title, fontsize=10, fontweight="bold")
            axis.set_xlabel("step", fontsize=8.5)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.tick_params(labelsize=8, length=2.5, color="#888888")
            axis.grid(color="#e4e4e4", linewidth=0.6)
            axis.set_axisbelow(True)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            for side in ("left", "bottom"):
                axis.spines[side].set_color("#888888")
    handles = [
        Line2D([], [], color=color, linestyle=dashes, linewidth=2, label=name)
        for name, (color, dashes) in styles.items()
    ]
    handles.append(Line2D([], [], color="#888888", linestyle=DASHES[2], linewidth=1, label="goal: error 0.02"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=9, frameon=False)
    with atomic_path(target) as scratch:
        figure.savefig(scratch, format=target.suffix.lstrip(".") or "png", dpi=DPI)
    return target


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and those around it."""
    half = len(values) // (2 * SHARE)
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in around]

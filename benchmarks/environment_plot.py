"""The replays' curves on one page: a row of panels for each world, with the two best refresh policies against none.

    python benchmarks/environment_plot.py [--dark]        # again from results/benchmarks/environment.json

All policies are in the JSON's table and in the report.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from search_r3.files import atomic_path
from search_r3.training.plot import DARK, DASHES, LIGHT, Theme, label_ends
from search_r3.training_curves import best_policies

WIDTH, ROW_HEIGHT, DPI = 12.0, 2.6, 120
"""As `training.plot`: 1,440 px wide, legible at 1,200."""
PANELS = (
    ("age", "mean age of rows, steps"),
    ("recall", "recall@10, rollouts"),
    ("error", "reward error, rollouts"),
    ("dev_error", "reward error, fixed dev queries"),
)
GOAL = 0.02
"""The most reward error that the environment aims at."""
SHARE = 12
"""A batch's own figures jump: each is drawn as the mean of itself and the steps around it, this part of all."""
RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"


def draw(worlds: dict[str, dict[str, Any]], target: Path, *, dark: bool = False) -> Path:
    """Draw `worlds` (title -> policy -> curve name -> (steps, values)) to an image."""
    from matplotlib.figure import Figure

    theme = DARK if dark else LIGHT
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(worlds) + 0.3), layout="constrained", facecolor=theme.ground)
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.07)  # type: ignore[union-attr, call-arg]
    grid = figure.subplots(len(worlds), len(PANELS), squeeze=False)
    for row, (title, policies) in zip(grid, worlds.items(), strict=True):
        shown = shown_policies(policies)
        for axis, (curve, label) in zip(row, PANELS, strict=True):
            _panel(axis, {name: policies[name][curve] for name in shown}, curve, label, theme)
        row[0].set_ylabel(title, fontsize=10, fontweight="bold", color=theme.ink)
    with atomic_path(target) as scratch:
        figure.savefig(scratch, format=target.suffix.lstrip(".") or "png", dpi=DPI)
    return target


def shown_policies(policies: dict[str, Any]) -> list[str]:
    """The `best_policies` by the means of their curves."""
    errors = {name: curves["error"][1] for name, curves in policies.items()}
    return best_policies({name: sum(values) / max(1, len(values)) for name, values in errors.items()})


def _panel(axis: Any, lines: dict[str, Any], curve: str, label: str, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    ends = []
    for i, (name, (steps, values)) in enumerate(lines.items()):
        values = smooth(values) if curve in ("recall", "error") else values
        axis.plot(steps, values, color=theme.lines[i], linestyle=DASHES[i], linewidth=1.6)
        ends.append((name, values[-1], theme.lines[i]))
    if "error" in curve:
        axis.set_ylim(bottom=0)
        shown = axis.get_ylim()[1] >= GOAL
        if shown:
            axis.axhline(GOAL, color=theme.muted, linewidth=0.9, linestyle=DASHES[2])
        ends.append(("goal" if shown else f"goal {GOAL} ↑", GOAL, theme.muted))
    axis.set_title(label, fontsize=9.5, loc="left", fontweight="bold", color=theme.ink)
    axis.set_xlabel("step", fontsize=8.5, color=theme.ink)
    axis.set_facecolor(theme.ground)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.tick_params(labelsize=8, length=2.5, color=theme.muted, labelcolor=theme.ink)
    axis.grid(color=theme.grid, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(theme.muted)
    label_ends(axis, ends)


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and those around it."""
    half = len(values) // (2 * SHARE)
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in around]


def worlds_of(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The worlds of a benchmark's figures, as `draw` takes them."""
    found = {"recorded": figures["recorded"]} if figures.get("recorded") else {}
    found |= {f"{int(rows):,} simulated": world for rows, world in figures.get("simulated", {}).items()}
    return {
        title: {
            policy: {name: (series["steps"], series["values"]) for name, series in curves.items()}
            for policy, curves in world["curves"].items()
        }
        for title, world in found.items()
    }


def main() -> None:
    """Draw the kept results again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "environment.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "environment.png")
    parser.add_argument("--dark", action="store_true", help="draw on a dark ground")
    given = parser.parse_args()
    figures = json.loads(given.results.read_text(encoding="utf-8"))["figures"]
    print(draw(worlds_of(figures), given.output, dark=given.dark))


if __name__ == "__main__":
    main()

"""A run's curves, drawn from its log: loss and terms, in-batch accuracy, gradient norm and rate, dev figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.files import atomic_path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
NEEDS_ROWS = {"infonce_reasoning": "rows_reasoning", "accuracy_reasoning": "rows_reasoning"}
"""Figures that mean nothing at a step where this other figure is 0."""


def read_log(run: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step records and the dev records of a run's `log.jsonl`.

    Raises:
        InputError: no such run, a broken line (named), or a log without a step.
    """
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the output folder of a training run, or its log.jsonl")
    steps: list[dict[str, Any]] = []
    dev: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            (dev if "dev" in record else steps).append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a record of a training log ({error})") from error
    if not steps:
        raise InputError(f"{path} has no step yet; let the run begin first")
    return steps, dev


def plot_run(run: str | Path, output: str | Path | None = None) -> Path:
    """Draw a run to a PNG; returns its path, by default `curves.png` in the run's folder.

    Raises:
        InputError: see `read_log`; or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plotting needs matplotlib; run: pip install 'search-r3[evaluation]'") from error
    steps, dev = read_log(run)
    names = list(dict.fromkeys(name for record in steps for name in record.get("terms", {})))
    losses = ["loss", *(n for n in names if n.split("_")[0] in ("infonce", "sft", "kl", "triplet"))]
    shares = [n for n in names if n.startswith("accuracy")]
    figures = list(dict.fromkeys(name for record in dev for name in record["dev"]))
    quality = [n for n in figures if n.endswith((".off", ".on"))]

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, title, lines in zip(
        axes,
        ("loss and its terms", "in-batch accuracy", "dev nDCG@10", "gradient norm, and learning rate x 1,000"),
        (
            {name: _series(steps, name) for name in losses},
            {name.removeprefix("accuracy_"): _series(steps, name) for name in shares},
            {name: [(r["step"], r["dev"][name]) for r in dev if name in r["dev"]] for name in quality},
            {
                "gradient norm": _series(steps, "grad_norm"),
                "rate x 1,000": [(step, 1000 * value) for step, value in _series(steps, "lr")],
            },
        ),
        strict=True,
    ):
        _draw(axis, title, lines, smooth=title != "dev nDCG@10")
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    figure.suptitle(folder.resolve().name)
    target = Path(output) if output else folder / "curves.png"
    with atomic_path(target) as scratch:
        figure.savefig(scratch, format=target.suffix.lstrip(".") or "png", dpi=130)
    return target


def _series(steps: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    found = []
    for record in steps:
        values = record.get("terms", {}) | record
        counter = NEEDS_ROWS.get(name)
        if name in values and not (counter and not values.get(counter)):
            found.append((record["step"], float(values[name])))
    return found


def _draw(axis: Any, title: str, lines: dict[str, list[tuple[int, float]]], smooth: bool) -> None:
    shown = [(label, series) for label, series in lines.items() if series]
    for (label, series), colour in zip(shown, (c for _ in shown for c in COLOURS), strict=False):
        x, y = zip(*series, strict=True)
        if smooth and len(y) > 20:
            axis.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            axis.plot(x, _running_mean(list(y), len(y) // 20), color=colour, label=label, linewidth=1.6)
        else:
            axis.plot(x, y, color=colour, label=label, linewidth=1.6, marker="o", markersize=3)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.25)
    if shown:
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "nothing was logged", ha="center", va="center", transform=axis.transAxes, color="gray")


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of the last `width` values at each place."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - width + 1) : i + 1])]

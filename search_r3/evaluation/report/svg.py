"""Plots as SVG text, by pure functions: lines, histograms, scatter plots, and gains for each query.

`plot_parts` has what all plots are made of, `interval_plots` the rows with intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from search_r3.evaluation.report.axes import number, padded
from search_r3.evaluation.report.plot_parts import (
    LETTER,
    Plot,
    PlotArea,
    dot,
    line,
    px,
    safe,
    style_class,
    text_at,
)
from search_r3.training_curves import spread

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend ("" leaves it out) and its points from left to right."""

    label: str
    points: Sequence[Point]
    style: int = 0
    """Index of the color and dashes; see STYLES."""
    faint: bool = False
    """Thin and pale, for the raw values behind a running mean."""
    markers: bool | None = None
    """Whether each point has a dot; by default if there are few points."""
    ribbon: Sequence[tuple[float, float]] = ()
    """The interval (low, high) of each point, drawn behind the line."""


def line_plot(
    plot: Plot,
    series: Sequence[Series],
    *,
    x_names: Sequence[str] | None = None,
    y_range: tuple[float, float] | None = None,
    zero: bool = False,
    log: bool = False,
    level: tuple[str, float] | None = None,
    mark: tuple[str, Point] | None = None,
    direct_labels: bool = False,
    joined: bool = True,
) -> str:
    """Lines over a common x axis.

    Args:
        x_names: labels of the x values 0, 1, 2, ...
        y_range: ends of the y axis; by default chosen by the points, and starting at 0 if `zero`.
        log: use a logarithmic y axis, if all values are above 0.
        level: a horizontal line and its label, such as a baseline.
        mark: a point to highlight, and its label.
        direct_labels: write each label at the end of its line instead of into a legend.
        joined: False draws the points alone, which are too few to show a trend.

    Raises:
        ValueError: there are no points.
    """
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError(f"{plot.title}: no points to draw")
    ys = [y for _, y in points] + [y for one in series for ends in one.ribbon for y in ends]
    ys += ([level[1]] if level else []) + ([mark[1][1]] if mark else [])
    log = log and min(ys) > 0
    y_low, y_high = y_range or ((min(ys) / 1.2, max(ys) * 1.2) if log else padded(ys, zero=zero))
    xs = [x for x, _ in points]
    x_ends = (-0.3, len(x_names) - 0.7) if x_names else (min(xs), max(xs))
    named = [one for one in series if one.label and one.points]
    legend = [] if direct_labels else [(one.label, one.style) for one in named]
    room = 6 + LETTER * max((len(one.label) for one in named), default=0) if direct_labels else 0
    area = PlotArea(plot, legend, (y_low, y_high), x_ends, log=log, x_names=x_names, room=room)
    parts, level_label = _level(area, level, points) if level else ([], "")
    for one in series:
        if one.points:
            parts += _drawn(area, one, x_names, joined=joined)
    parts.append(level_label)
    if mark:
        parts += _marked(area, *mark)
    if direct_labels:
        places = spread([area.y(one.points[-1][1]) for one in named], 12, area.top + 4, area.bottom - 2)
        parts += [
            text_at(area.right + 5, y + 4, one.label, f"note {style_class(one.style)}")
            for one, y in zip(named, places, strict=True)
        ]
    return area.finish(parts)


def _level(area: PlotArea, level: tuple[str, float], points: Sequence[Point]) -> tuple[list[str], str]:
    """The horizontal line, and its label on the side with more room, which is drawn above the series."""
    y, middle = area.y(level[1]), (area.left + area.right) / 2
    near = [[abs(area.y(b) - y) for a, b in points if (area.x(a) > middle) == right] for right in (False, True)]
    left = min(near[0], default=math.inf) > min(near[1], default=math.inf)
    label_x, style = (area.left + 4, "note halo") if left else (area.right - 2, "note end halo")
    return [line(area.left, y, area.right, y, "level")], text_at(label_x, y - 4, level[0], style)


def _drawn(area: PlotArea, one: Series, x_names: Sequence[str] | None, *, joined: bool) -> list[str]:
    style, parts = style_class(one.style), []
    if one.ribbon and not joined:
        for (x, _), (low, high) in zip(one.points, one.ribbon, strict=True):
            parts.append(line(area.x(x), area.y(low), area.x(x), area.y(high), f"range {style}"))
    elif one.ribbon:
        sides = [(x, a, b) for (x, _), (a, b) in zip(one.points, one.ribbon, strict=True)]
        around = [*((x, a) for x, a, _ in sides), *((x, b) for x, _, b in reversed(sides))]
        parts.append(f'<path class="ribbon {style}" d="{_path(area, around)}Z"/>')
    if joined:
        parts.append(f'<path class="line {style}{" faint" if one.faint else ""}" d="{_path(area, one.points)}"/>')
    if one.markers or (one.markers is None and len(one.points) <= 30 and not one.faint):
        for x, y in one.points:
            shown = x_names[round(x)] if x_names else number(x, None)
            tip = f"{one.label + ', ' if one.label else ''}{shown}: {number(y, None)}"
            parts.append(dot(area.x(x), area.y(y), style, tip))
    return parts


def _path(area: PlotArea, points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{px(area.x(x))} {px(area.y(y))}" for x, y in points)


def _marked(area: PlotArea, label: str, point: Point) -> list[str]:
    x, y = area.x(point[0]), area.y(point[1])
    right = x > (area.left + area.right) / 2
    below = y < area.top + 22
    style = f"note halo{' end' if right else ''}"
    return [
        f'<circle class="ring" cx="{px(x)}" cy="{px(y)}" r="7"/>',
        text_at(x + (-2 if right else 2), y + (21 if below else -12), label, style),
    ]


def scatter(plot: Plot, points: Sequence[tuple[str, float, float]], *, log_x: bool = False) -> str:
    """Scatter plot of named points (name, x, y), with the name next to each point.

    Raises:
        ValueError: there are none.
    """
    if not points:
        raise ValueError(f"{plot.title}: no points to draw")
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    log_x = log_x and min(xs) > 0
    ends = (min(xs) / 1.25, max(xs) * 1.25) if log_x else padded(xs, share=0.1)
    area = PlotArea(plot, [], padded(ys, share=0.15), ends, log_x=log_x)
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for name, at_x, at_y in points:
        x, y = area.x(at_x), area.y(at_y)
        parts.append(dot(x, y, "s0", f"{name}: {number(at_x, None)}, {number(at_y, None)}"))
        end = x + 8 + LETTER * len(name) > area.right
        text_y = y + 4
        for shift in (0, -12, 12, -24, 24):  # level with the dot, or else where it overlaps no other name
            box = (x - LETTER * len(name) - 8 if end else x + 8, text_y + shift, LETTER * len(name))
            if all(abs(box[1] - b) >= 11 or box[0] + box[2] < a or a + w < box[0] for a, b, w in taken):
                break
        taken.append(box)
        parts.append(text_at(x + (-8 if end else 8), box[1], name, f"note halo{' end' if end else ''}"))
    return area.finish(parts)


def histogram(plot: Plot, edges: Sequence[float], groups: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Histogram of several groups, as overlaid outlines.

    Args:
        edges: edges of the bins in ascending order, one more than there are bins.
        groups: the name of each group, and its share in each bin.

    Raises:
        ValueError: there are no bins, or a group has a different number of shares.
    """
    if len(edges) < 2 or not groups or any(len(shares) != len(edges) - 1 for _, shares in groups):
        raise ValueError(f"{plot.title}: expected a share for each of {len(edges) - 1} bins")
    highest = max(max(shares) for _, shares in groups)
    legend = [(name, i) for i, (name, _) in enumerate(groups)]
    area = PlotArea(plot, legend, (0, highest * 1.06 or 1.0), (edges[0], edges[-1]), squares=True, percent=True)
    parts = []
    for i, (name, shares) in enumerate(groups):
        path = f"M{px(area.x(edges[0]))} {px(area.y(0))}"
        for left, right, share in zip(edges, edges[1:], shares, strict=False):
            y = px(area.y(share))
            path += f"L{px(area.x(left))} {y}L{px(area.x(right))} {y}"
        tip = f"<title>{safe(name)}</title>"
        parts.append(
            f'<path class="step {style_class(i)}" d="{path}L{px(area.x(edges[-1]))} {px(area.y(0))}Z">{tip}</path>'
        )
    return area.finish(parts)


def gain_plot(plot: Plot, gains: Sequence[float]) -> str:
    """One thin bar per query, sorted by gain: bars above the line are gains, bars below are losses.

    Raises:
        ValueError: there are none.
    """
    if not gains:
        raise ValueError(f"{plot.title}: no gains to draw")
    ordered = sorted(gains, reverse=True)
    low, high = padded([*ordered, 0.0])
    area = PlotArea(plot, [], (low, high), (0, len(ordered)))
    zero, parts = area.y(0), []
    for style, chosen in (("up", [g > 0 for g in ordered]), ("down", [g < 0 for g in ordered])):
        indices = [i for i, is_chosen in enumerate(chosen) if is_chosen]
        if indices:
            first, last = indices[0], indices[-1] + 1
            path = f"M{px(area.x(first))} {px(zero)}"
            for i in range(first, last):
                path += f"V{px(area.y(ordered[i]))}H{px(area.x(i + 1))}"
            parts.append(f'<path class="area {style}" d="{path}V{px(zero)}Z"/>')
    parts.append(line(area.left, zero, area.right, zero, "axis"))
    return area.finish(parts)

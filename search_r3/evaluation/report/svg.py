"""Plots as SVG text, by pure functions: lines, bars, intervals, histograms, scatter plots, and gains for each query.

Marks have classes (`s0` to `s6` for the series) instead of colors; the style sheet `templates/plot.css` colors them for
light and dark mode. The default width fits a phone, so that text stays legible there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from search_r3.evaluation.report.axes import Scale, number, padded, tick_labels

WIDTH = 330
"""Default width of a plot in pixels; a page may stretch it a little."""
HEIGHT = 170
"""Height of the plotting area, in pixels."""
STYLES = 7
"""Number of the classes s0 to s6 in `plot.css`; more series reuse them with other dashes."""
LETTER = 6.1
"""Width in pixels of a letter of 11 pixels height, at least the average of all system fonts."""
BOLD = 7.8
"""The same for a bold title of 13 pixels height."""
RIGHT = 10
ROW = 15
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

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


@dataclass(frozen=True)
class Interval:
    """A row of `intervals`: a difference with its interval; a `significant` one has a filled dot."""

    label: str
    value: float
    low: float
    high: float
    significant: bool


@dataclass(frozen=True)
class Plot:
    """What all plots have in common: `name` makes ids unique on a page, `description` is for screen readers."""

    name: str
    title: str
    description: str
    x_label: str = ""
    y_label: str = ""
    width: int = WIDTH
    note: str = ""
    """A line below the title that explains the marks."""


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
) -> str:
    """Lines over a common x axis.

    Args:
        x_names: labels of the x values 0, 1, 2, ...
        y_range: ends of the y axis; by default chosen by the points, and starting at 0 if `zero`.
        log: use a logarithmic y axis, if all values are above 0.
        level: a horizontal line and its label, such as a baseline.
        mark: a point to highlight, and its label.

    Raises:
        ValueError: there are no points.
    """
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError(f"{plot.title}: no points to draw")
    ys = [y for _, y in points] + ([level[1]] if level else []) + ([mark[1][1]] if mark else [])
    log = log and min(ys) > 0
    y_low, y_high = y_range or ((min(ys) / 1.2, max(ys) * 1.2) if log else padded(ys, zero=zero))
    xs = [x for x, _ in points]
    x_low, x_high = (-0.3, len(x_names) - 0.7) if x_names else (min(xs), max(xs))
    legend = [(one.label, one.style) for one in series if one.label]
    area = _PlotArea(plot, legend, (y_low, y_high), (x_low, x_high), log=log, x_names=x_names)
    parts = []
    level_label = ""
    if level:
        y = area.y(level[1])
        parts.append(_line(area.left, y, area.right, y, "level"))
        middle = (area.left + area.right) / 2
        near = [[abs(area.y(b) - y) for a, b in points if (area.x(a) > middle) == right] for right in (False, True)]
        left = min(near[0], default=math.inf) > min(near[1], default=math.inf)  # the side with more room
        label_x, style = (area.left + 4, "note halo") if left else (area.right - 2, "note end halo")
        level_label = _text(label_x, y - 4, level[0], style)
    for one in series:
        if not one.points:
            continue
        path = "M" + "L".join(f"{_n(area.x(x))} {_n(area.y(y))}" for x, y in one.points)
        parts.append(f'<path class="line {_style(one.style)}{" faint" if one.faint else ""}" d="{path}"/>')
        if one.markers or (one.markers is None and len(one.points) <= 30 and not one.faint):
            for x, y in one.points:
                shown = x_names[round(x)] if x_names else number(x, None)
                tip = f"{one.label + ', ' if one.label else ''}{shown}: {number(y, None)}"
                parts.append(_dot(area.x(x), area.y(y), _style(one.style), tip))
    parts.append(level_label)
    if mark:
        x, y = area.x(mark[1][0]), area.y(mark[1][1])
        right = x > (area.left + area.right) / 2
        below = y < area.top + 22
        parts.append(f'<circle class="ring" cx="{_n(x)}" cy="{_n(y)}" r="7"/>')
        parts.append(
            _text(x + (-2 if right else 2), y + (21 if below else -12), mark[0], f"note halo{' end' if right else ''}")
        )
    return area.finish(parts)


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
    area = _PlotArea(plot, [], padded(ys, share=0.15), ends, log_x=log_x)
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for name, at_x, at_y in points:
        x, y = area.x(at_x), area.y(at_y)
        parts.append(_dot(x, y, "s0", f"{name}: {number(at_x, None)}, {number(at_y, None)}"))
        end = x + 8 + LETTER * len(name) > area.right
        text_y = y + 4
        for shift in (0, -12, 12, -24, 24):  # level with the dot, or else where it overlaps no other name
            box = (x - LETTER * len(name) - 8 if end else x + 8, text_y + shift, LETTER * len(name))
            if all(abs(box[1] - b) >= 11 or box[0] + box[2] < a or a + w < box[0] for a, b, w in taken):
                break
        taken.append(box)
        parts.append(_text(x + (-8 if end else 8), box[1], name, f"note halo{' end' if end else ''}"))
    return area.finish(parts)


def bars(plot: Plot, groups: Sequence[tuple[str, Sequence[float | None]]], labels: Sequence[str]) -> str:
    """Horizontal bar chart starting at 0, one group of bars per row of `groups` (name, one value or None per label).

    Raises:
        ValueError: there are no values, or one is below 0.
    """
    values = [value for _, row in groups for value in row if value is not None]
    if not values or min(values) < 0:
        raise ValueError(f"{plot.title}: bars need values of 0 or more")
    head = _Head(plot, [(label, i) for i, label in enumerate(labels)], squares=True)
    scale = Scale(0, max(values) or 1.0, 4, plot.width - RIGHT - 44)
    y, parts = head.bottom + 6.0, []
    for name, row in groups:
        parts.append(_text(4, y + 11, name, "row"))
        y += 16
        for i, value in enumerate(row):
            if value is None:
                continue
            width = scale(value) - 4
            tip = f"<title>{_safe(f'{name}, {labels[i]}: {value:.3f}')}</title>"
            parts.append(
                f'<rect class="bar {_style(i)}" x="4" y="{_n(y)}" width="{_n(width)}" height="11" rx="2">{tip}</rect>'
            )
            parts.append(_text(4 + width + 5, y + 9.5, f"{value:.3f}", "value"))
            y += 13
        y += 9
    return _wrap(plot, head.parts + parts, y + 2)


def intervals(plot: Plot, rows: Sequence[Interval]) -> str:
    """Differences with their intervals, one row each, around a vertical line at 0; significant ones have filled dots.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError(f"{plot.title}: no differences to draw")
    head = _Head(plot, [])
    low, high = padded([v for row in rows for v in (row.low, row.high, row.value)] + [0.0])
    scale = Scale(low, high, 8, plot.width - RIGHT - 6)
    top = head.bottom + 4.0
    bottom = top + 31 * len(rows) + 4
    ticks = scale.ticks(5)
    parts = [_line(scale(tick), top, scale(tick), bottom, "grid") for tick in ticks]
    parts.append(_line(scale(0), top, scale(0), bottom, "axis"))
    for i, row in enumerate(rows):
        y = top + 31 * i
        parts.append(_text(4, y + 12, row.label, "row halo"))
        parts.append(_text(plot.width - RIGHT, y + 12, number(row.value, 3, sign=True), "value end halo"))
        y += 21
        style = ("up" if row.value > 0 else "down") if row.significant else "unsure"
        parts.append(_line(scale(row.low), y, scale(row.high), y, f"range {style}"))
        tip = f"{row.label}: {number(row.value, 4, sign=True)} ({number(row.low, 4)} to {number(row.high, 4)})"
        parts.append(_dot(scale(row.value), y, style, tip, 4))
    parts += _x_axis(scale, ticks, tick_labels(ticks), bottom)
    bottom += 17
    if plot.x_label:
        parts.append(_text(plot.width - RIGHT, bottom + 13, plot.x_label, "label end"))
        bottom += 17
    return _wrap(plot, head.parts + parts, bottom + 2)


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
    area = _PlotArea(plot, legend, (0, highest * 1.06 or 1.0), (edges[0], edges[-1]), squares=True, percent=True)
    parts = []
    for i, (name, shares) in enumerate(groups):
        path = f"M{_n(area.x(edges[0]))} {_n(area.y(0))}"
        for left, right, share in zip(edges, edges[1:], shares, strict=False):
            y = _n(area.y(share))
            path += f"L{_n(area.x(left))} {y}L{_n(area.x(right))} {y}"
        tip = f"<title>{_safe(name)}</title>"
        parts.append(f'<path class="step {_style(i)}" d="{path}L{_n(area.x(edges[-1]))} {_n(area.y(0))}Z">{tip}</path>')
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
    area = _PlotArea(plot, [], (low, high), (0, len(ordered)))
    zero, parts = area.y(0), []
    for style, chosen in (("up", [g > 0 for g in ordered]), ("down", [g < 0 for g in ordered])):
        indices = [i for i, is_chosen in enumerate(chosen) if is_chosen]
        if indices:
            first, last = indices[0], indices[-1] + 1
            path = f"M{_n(area.x(first))} {_n(zero)}"
            for i in range(first, last):
                path += f"V{_n(area.y(ordered[i]))}H{_n(area.x(i + 1))}"
            parts.append(f'<path class="area {style}" d="{path}V{_n(zero)}Z"/>')
    parts.append(_line(area.left, zero, area.right, zero, "axis"))
    return area.finish(parts)


class _Head:
    """Title, note, legend and y label, from top to bottom; the plotting area starts at `bottom`."""

    def __init__(self, plot: Plot, legend: Sequence[tuple[str, int]], *, squares: bool = False) -> None:
        self.parts: list[str] = []
        self.bottom = 0.0
        for line in _wrapped(plot.title, (plot.width - 8) / BOLD):
            self._add(line, "title", 17)
        for line in _wrapped(plot.note, (plot.width - 8) / LETTER):
            self._add(line, "label", 14)
        if legend:
            self._legend(legend, plot.width, squares)
        if plot.y_label:
            self._add(plot.y_label, "label", 14)
        self.bottom += 6

    def _add(self, text: str, style: str, height: float) -> None:
        self.bottom += height
        self.parts.append(_text(4, self.bottom - 3, text, style))

    def _legend(self, legend: Sequence[tuple[str, int]], width: int, squares: bool) -> None:
        x, y = 4.0, self.bottom + 14
        for label, style in legend:
            needed = 24 + LETTER * len(label) + 12
            if x > 4 and x + needed > width:
                x, y = 4.0, y + ROW
            if squares:
                square = f'x="{_n(x)}" y="{_n(y - 9)}" width="12" height="10" rx="2"'
                self.parts.append(f'<rect class="bar {_style(style)}" {square}/>')
            else:
                self.parts.append(f'<path class="line {_style(style)}" d="M{_n(x)} {_n(y - 4)}h18"/>')
            self.parts.append(_text(x + (17 if squares else 23), y, label, "note"))
            x += needed - (6 if squares else 0)
        self.bottom = y + 6


class _PlotArea:
    """The head, both axes with their grid, and the scales `x` and `y` of the plotting area."""

    def __init__(
        self,
        plot: Plot,
        legend: Sequence[tuple[str, int]],
        y_ends: tuple[float, float],
        x_ends: tuple[float, float],
        *,
        log: bool = False,
        log_x: bool = False,
        x_names: Sequence[str] | None = None,
        squares: bool = False,
        percent: bool = False,
    ) -> None:
        self.plot, self.head = plot, _Head(plot, legend, squares=squares)
        self.top = self.head.bottom
        self.bottom = self.top + HEIGHT
        y = Scale(*y_ends, self.bottom, self.top, log)
        y_ticks = y.ticks(5)
        y_texts = [number(100 * t, 0) + "%" for t in y_ticks] if percent else tick_labels(y_ticks)
        self.left = 10 + LETTER * max(map(len, y_texts), default=1)
        self.right = plot.width - RIGHT
        self.x, self.y = Scale(*x_ends, self.left, self.right, log_x), y
        self.axes = [_line(self.left, y(t), self.right, y(t), "grid") for t in y_ticks]
        self.axes += [
            _text(self.left - 5, y(t) + 4, text, "tick end") for t, text in zip(y_ticks, y_texts, strict=True)
        ]
        whole = all(float(end).is_integer() for end in x_ends) and x_ends[1] - x_ends[0] > 1  # steps, queries
        x_ticks = [float(i) for i in range(len(x_names))] if x_names else self.x.ticks(5, whole=whole)
        x_texts = list(x_names) if x_names else tick_labels(x_ticks)
        self.axes += _x_axis(self.x, x_ticks, x_texts, self.bottom)
        self.axes.append(_line(self.left, self.bottom, self.right, self.bottom, "axis"))

    def finish(self, parts: Sequence[str]) -> str:
        """The whole plot, with `parts` in the plotting area."""
        end, label = self.bottom + 18, []
        if self.plot.x_label:
            label, end = [_text(self.right, end + 13, self.plot.x_label, "label end")], end + 17
        return _wrap(self.plot, [*self.head.parts, *self.axes, *parts, *label], end + 2)


def _x_axis(scale: Scale, ticks: Sequence[float], texts: Sequence[str], y: float) -> list[str]:
    parts = []
    for tick, text in zip(ticks, texts, strict=True):
        x, half = scale(tick), LETTER * len(text) / 2
        anchor = " end" if x + half > scale.end + RIGHT else "" if x - half < 0 else " mid"
        text_x = scale.end + RIGHT if anchor == " end" else 0.0 if anchor == "" else x
        parts.append(_line(x, y, x, y + 4, "axis"))
        parts.append(_text(text_x, y + 16, text, f"tick{anchor}"))
    return parts


def _wrap(plot: Plot, parts: Sequence[str], height: float) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", plot.name)
    title = f'<title id="{name}-t">{_safe(plot.title)}</title><desc id="{name}-d">{_safe(plot.description)}</desc>'
    size = f'viewBox="0 0 {plot.width} {math.ceil(height)}" width="{plot.width}" height="{math.ceil(height)}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" aria-labelledby="{name}-t {name}-d" {size}>'
    )
    return "\n".join([head + title, *filter(None, parts), "</svg>"])


def _wrapped(text: str, letters: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= letters:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _style(index: int) -> str:
    return f"s{index % STYLES}" + (f" again{index // STYLES}" if index >= STYLES else "")


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _dot(x: float, y: float, style: str, tip: str, radius: float = 3.2) -> str:
    return f'<circle class="dot {style}" cx="{_n(x)}" cy="{_n(y)}" r="{radius:g}"><title>{_safe(tip)}</title></circle>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{_n(x)}" y="{_n(y)}">{_safe(text)}</text>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 0.05 else "0"


def _safe(text: str) -> str:
    """Escaped text without the characters that XML does not allow."""
    return escape(_CONTROL.sub("", text), quote=True)

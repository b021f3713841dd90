"""What every plot of the report is made of: its head and legend, axes and grid, and single marks as SVG text.

Marks have classes (`s0` to `s6` for the series) instead of colors; the style sheet `templates/plot.css` colors them for
light and dark mode. The default width fits a phone, so that text stays legible there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from search_r3.evaluation.report.axes import Scale, number, tick_labels

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


class Head:
    """Title, note, legend and y label, from top to bottom; the plotting area starts at `bottom`."""

    def __init__(self, plot: Plot, legend: Sequence[tuple[str, int]], *, squares: bool = False) -> None:
        self.parts: list[str] = []
        self.bottom = 0.0
        for line in wrapped(plot.title, (plot.width - 8) / BOLD):
            self._add(line, "title", 17)
        for line in wrapped(plot.note, (plot.width - 8) / LETTER):
            self._add(line, "label", 14)
        if legend:
            self._legend(legend, plot.width, squares)
        if plot.y_label:
            self._add(plot.y_label, "label", 14)
        self.bottom += 6

    def _add(self, text: str, style: str, height: float) -> None:
        self.bottom += height
        self.parts.append(text_at(4, self.bottom - 3, text, style))

    def _legend(self, legend: Sequence[tuple[str, int]], width: int, squares: bool) -> None:
        x, y = 4.0, self.bottom + 14
        for label, style in legend:
            needed = 24 + LETTER * len(label) + 12
            if x > 4 and x + needed > width:
                x, y = 4.0, y + ROW
            if squares:
                square = f'x="{px(x)}" y="{px(y - 9)}" width="12" height="10" rx="2"'
                self.parts.append(f'<rect class="bar {style_class(style)}" {square}/>')
            else:
                self.parts.append(f'<path class="line {style_class(style)}" d="M{px(x)} {px(y - 4)}h18"/>')
            self.parts.append(text_at(x + (17 if squares else 23), y, label, "note"))
            x += needed - (6 if squares else 0)
        self.bottom = y + 6


class PlotArea:
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
        room: float = 0,
    ) -> None:
        """`room` is left free on the right, in pixels, for labels at the ends of lines."""
        self.plot, self.head = plot, Head(plot, legend, squares=squares)
        self.top = self.head.bottom
        self.bottom = self.top + HEIGHT
        y = Scale(*y_ends, self.bottom, self.top, log)
        y_ticks = y.ticks(5)
        y_texts = [number(100 * t, 0) + "%" for t in y_ticks] if percent else tick_labels(y_ticks)
        self.left = 10 + LETTER * max(map(len, y_texts), default=1)
        self.right = plot.width - RIGHT - room
        self.x, self.y = Scale(*x_ends, self.left, self.right, log_x), y
        self.axes = [line(self.left, y(t), self.right, y(t), "grid") for t in y_ticks]
        self.axes += [
            text_at(self.left - 5, y(t) + 4, text, "tick end") for t, text in zip(y_ticks, y_texts, strict=True)
        ]
        whole = all(float(end).is_integer() for end in x_ends) and x_ends[1] - x_ends[0] > 1  # steps, queries
        x_ticks = [float(i) for i in range(len(x_names))] if x_names else self.x.ticks(5, whole=whole)
        x_texts = list(x_names) if x_names else tick_labels(x_ticks)
        self.axes += x_axis(self.x, x_ticks, x_texts, self.bottom)
        self.axes.append(line(self.left, self.bottom, self.right, self.bottom, "axis"))

    def finish(self, parts: Sequence[str]) -> str:
        """The whole plot, with `parts` in the plotting area."""
        end, label = self.bottom + 18, []
        if self.plot.x_label:
            label, end = [text_at(self.right, end + 13, self.plot.x_label, "label end")], end + 17
        return framed(self.plot, [*self.head.parts, *self.axes, *parts, *label], end + 2)


def x_axis(scale: Scale, ticks: Sequence[float], texts: Sequence[str], y: float) -> list[str]:
    parts = []
    for tick, text in zip(ticks, texts, strict=True):
        x, half = scale(tick), LETTER * len(text) / 2
        anchor = " end" if x + half > scale.end + RIGHT else "" if x - half < 0 else " mid"
        text_x = scale.end + RIGHT if anchor == " end" else 0.0 if anchor == "" else x
        parts.append(line(x, y, x, y + 4, "axis"))
        parts.append(text_at(text_x, y + 16, text, f"tick{anchor}"))
    return parts


def framed(plot: Plot, parts: Sequence[str], height: float) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", plot.name)
    title = f'<title id="{name}-t">{safe(plot.title)}</title><desc id="{name}-d">{safe(plot.description)}</desc>'
    size = f'viewBox="0 0 {plot.width} {math.ceil(height)}" width="{plot.width}" height="{math.ceil(height)}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" aria-labelledby="{name}-t {name}-d" {size}>'
    )
    return "\n".join([head + title, *filter(None, parts), "</svg>"])


def wrapped(text: str, letters: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= letters:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def style_class(index: int) -> str:
    return f"s{index % STYLES}" + (f" again{index // STYLES}" if index >= STYLES else "")


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line class="{style}" x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}"/>'


def dot(x: float, y: float, style: str, tip: str, radius: float = 3.2) -> str:
    """A circle with its tooltip."""
    place = f'cx="{px(x)}" cy="{px(y)}" r="{radius:g}"'
    return f'<circle class="dot {style}" {place}><title>{safe(tip)}</title></circle>'


def square(x: float, y: float, style: str, tip: str, half: float = 3.2) -> str:
    """A square with its tooltip, for a second series that must not differ by its color alone."""
    corner = f'x="{px(x - half)}" y="{px(y - half)}" width="{2 * half:g}" height="{2 * half:g}"'
    return f'<rect class="dot {style}" {corner}><title>{safe(tip)}</title></rect>'


def text_at(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{px(x)}" y="{px(y)}">{safe(text)}</text>'


def px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 0.05 else "0"


def safe(text: str) -> str:
    """Escaped text without the characters that XML does not allow."""
    return escape(_CONTROL.sub("", text), quote=True)

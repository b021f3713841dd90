"""Values with their 95% intervals as SVG text, one row each, label at the left: the forest plot, and its relatives.

`templates/plot.css` colors the marks. A row of a small data set is gray, and a value without a test has no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_r3.evaluation.report.axes import Scale, number, padded, tick_labels
from search_r3.evaluation.report.plot_parts import (
    LETTER,
    RIGHT,
    Head,
    Plot,
    dot,
    framed,
    line,
    square,
    text_at,
    x_axis,
)

GRAY = "gray"
"""The class of a mark of a small data set."""
SHAPES = (dot, square)
"""The marks of the first and the second series."""
_LABELS = 0.5
"""The share of a plot's width that labels may take."""
_ROW = 20
_MARK = 13
"""Height in pixels of each mark of a row beyond the first."""


@dataclass(frozen=True)
class Mark:
    """A value with its interval; `low` and `high` are None if there is none, which draws a hollow mark.

    Attributes:
        style: its class: "up", "down", "unsure", GRAY, or "s0" to "s6" for a series.
        shape: index into SHAPES.
    """

    value: float
    low: float | None = None
    high: float | None = None
    style: str = "s0"
    shape: int = 0


@dataclass(frozen=True)
class Row:
    """A row of marks; one without marks is a heading. `tone` is "", "strong", or GRAY for its label."""

    label: str
    marks: Sequence[Mark] = ()
    tone: str = ""


def difference_mark(row: Mapping[str, Any], level: float) -> Mark:
    """The difference of a `significance.Comparison` in dictionary form: green above 0 and red below it if its corrected
    p-value is below `level`, else hollow."""
    verdict = "up" if row["difference"] > 0 else "down"
    return Mark(row["difference"], row["low"], row["high"], verdict if row["p_corrected"] < level else "unsure")


def interval_plot(
    plot: Plot, rows: Sequence[Row], legend: Sequence[str] = (), *, around_zero: bool = True, digits: int = 3
) -> str:
    """Rows of values with intervals.

    Args:
        legend: the names of the series "s0", "s1", ... in the order of SHAPES.
        around_zero: the values are differences: 0 is within the axis and marked, and values have a sign.
        digits: decimals of the values written at the right, which rows of one mark have.

    Raises:
        ValueError: there are no marks.
    """
    marks = [mark for row in rows for mark in row.marks]
    if not marks:
        raise ValueError(f"{plot.title}: no values to draw")
    ends = [end for m in marks for end in (m.value, m.low, m.high) if end is not None]
    low, high = padded([*ends, 0.0] if around_zero else ends)
    longest = max(len(row.label) for row in rows if row.marks)
    left = min(12 + LETTER * longest, _LABELS * plot.width)
    single = all(len(row.marks) <= 1 for row in rows)
    values = LETTER * (digits + 4) if single else 0
    scale = Scale(low, high, left, plot.width - RIGHT - values)
    head = Head(plot, [])
    parts = [*head.parts, *_legend(legend, head.bottom)]
    top = head.bottom + (18 if legend else 0) + 4.0
    drawn, y = [], top
    for row in rows:
        height = _ROW + _MARK * max(len(row.marks) - 1, 0)
        strong = " strong" if row.tone == "strong" or not row.marks else ""
        style = f"row{strong}{' muted' if row.tone == GRAY else ''}"
        drawn.append(text_at(4, y + height / 2 + 4, row.label, style))
        for i, mark in enumerate(row.marks):
            at = y + _ROW / 2 + _MARK * i
            drawn += _mark(scale, mark, at, row.label, legend[mark.shape] if legend else "", around_zero)
        if single and row.marks:
            text = number(row.marks[0].value, digits, sign=around_zero)
            muted = " muted" if row.tone == GRAY else ""
            drawn.append(text_at(plot.width - 4, y + height / 2 + 4, text, f"value end{muted}"))
        y += height
    ticks = scale.ticks(4)
    parts += [line(scale(tick), top, scale(tick), y, "grid") for tick in ticks]
    if around_zero:
        parts.append(line(scale(0), top, scale(0), y, "axis"))
    parts += [*drawn, *x_axis(scale, ticks, tick_labels(ticks), y)]
    y += 17
    if plot.x_label:
        parts.append(text_at(plot.width - RIGHT, y + 13, plot.x_label, "label end"))
        y += 17
    return framed(plot, parts, y + 2)


def _mark(scale: Scale, mark: Mark, y: float, label: str, series: str, signed: bool) -> list[str]:
    name = f"{label}, {series}" if series else label
    shown = number(mark.value, 4, sign=signed)
    if mark.low is None or mark.high is None:
        return [SHAPES[mark.shape](scale(mark.value), y, "unsure", f"{name}: {shown}, not tested", 4)]
    tip = f"{name}: {shown} ({number(mark.low, 4, sign=signed)} to {number(mark.high, 4, sign=signed)})"
    return [
        line(scale(mark.low), y, scale(mark.high), y, f"range {mark.style}"),
        SHAPES[mark.shape](scale(mark.value), y, mark.style, tip, 4),
    ]


def _legend(names: Sequence[str], y: float) -> list[str]:
    parts, x = [], 10.0
    for i, name in enumerate(names):
        parts.append(SHAPES[i](x, y + 8, f"s{i}", name, 4))
        parts.append(text_at(x + 9, y + 12, name, "note"))
        x += 30 + LETTER * len(name)
    return parts

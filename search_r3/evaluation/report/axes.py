"""Scales of a plot's axes: the pixel position of a value, and round numbers for the tick labels.

Ticks are 1, 2, 2.5 or 5 times a power of ten, as in Heckbert's "Nice numbers for graph labels" (Graphics Gems, 1990).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

STEPS = (1.0, 2.0, 2.5, 5.0)
MINUS = "−"


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from values to pixels; `start` may be above `end`, as for y."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel position of a value; values outside the scale are clamped to its nearer end."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * ((value - low) / (high - low) if high > low else 0.5)

    def ticks(self, count: int = 5, *, whole: bool = False) -> list[float]:
        """About `count` round values within the scale; `whole` allows integers only."""
        if self.log:
            return log_ticks(self.low, self.high, count)
        return nice_ticks(self.low, self.high, count, whole=whole)


def nice_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round values from `low` to `high`, as close to `count` of them as possible; `whole` allows integers only.

    Raises:
        ValueError: the ends are not finite, or in the wrong order.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high < low:
        raise ValueError(f"no axis from {low} to {high}")
    if high == low:
        return [low]
    power = math.floor(math.log10(high - low))
    steps = [step * 10.0**p for p in (power - 1, power) for step in STEPS]
    steps = [step for step in steps if not whole or step.is_integer()] or [1.0]
    ticks = [range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) for step in steps]
    best = min(range(len(steps)), key=lambda i: (abs(len(ticks[i]) - count), len(ticks[i])))
    return [round(i * steps[best], 12) + 0.0 for i in ticks[best]]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten from `low` to `high`, and 2 and 5 times these if there are fewer than three.

    Raises:
        ValueError: the ends are not both above 0 and in order.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"no logarithmic axis from {low} to {high}")
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * (1 - 1e-9) <= f * 10.0**p <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            break
    if len(ticks) < 2:
        return nice_ticks(low, high, count)
    return ticks[:: math.ceil(len(ticks) / (2 * count))]


def padded(values: Iterable[float], *, share: float = 0.06, zero: bool = False) -> tuple[float, float]:
    """The ends of an axis around `values`, with some room; `zero` makes the axis start (or end) exactly at 0.

    Raises:
        ValueError: no values.
    """
    known = list(values)
    low, high = min(known), max(known)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = share * (high - low) or abs(high) * share or 1.0
    return (low if zero and low == 0 else low - room), (high if zero and high == 0 else high + room)


def tick_labels(ticks: Iterable[float]) -> list[str]:
    """Labels for the ticks, all with the same number of decimal places and with commas as thousands separators."""
    values = list(ticks)
    largest = max((abs(value) for value in values), default=0.0)
    gaps = [b - a for a, b in pairwise(values)]
    smallest = min((gap for gap in gaps if gap > 0), default=largest or 1.0)
    if largest and (largest >= 1e6 or smallest < 1e-5):
        return [number(value, None) for value in values]
    digits = next(d for d in range(7) if d == 6 or all(abs(round(v, d) - v) < 1e-9 + smallest / 1e3 for v in values))
    return [number(value, digits) for value in values]


def number(value: float, digits: int | None = 3, *, sign: bool = False) -> str:
    """Format a number for display, with a true minus sign and `digits` decimals (None: three significant digits)."""
    text = f"{value:.3g}" if digits is None else f"{value:,.{digits}f}"
    text = text.replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    if not any(letter in "123456789" for letter in text):
        return text.lstrip("-")  # no minus sign before a zero
    return text.replace("-", MINUS) if text.startswith("-") else f"+{text}" if sign else text.replace("e-", f"e{MINUS}")

"""What a page is made of, before any HTML: sections of headings, text, tables, figures, folds and examples.

The sections' modules fill these in plain Python and `templates/page.html.j2` writes them, so that all escaping is the
template's and nothing else makes HTML. A block's `kind` names the macro that writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from search_r3.evaluation.report.axes import MINUS, number

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """One number of a table: `best` of its row or column; `verdict` "up" or "down" against a baseline."""

    text: str
    best: bool = False
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first column names the row. Columns in `words` hold text, the others numbers."""

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Text:
    """A paragraph; `tone` is "" or "note" (small) or "warn"."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Listing:
    """Points of a list, each a line."""

    kind: ClassVar[str] = "listing"
    points: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Heading:
    """A heading below the section's."""

    kind: ClassVar[str] = "heading"
    text: str
    name: str


@dataclass(frozen=True)
class Figures:
    """Plots side by side where there is room; each is SVG of our own making."""

    kind: ClassVar[str] = "figures"
    plots: Sequence[str]


@dataclass(frozen=True)
class Missing:
    """What is not there, and the command that makes it."""

    kind: ClassVar[str] = "missing"
    text: str
    command: str


@dataclass(frozen=True)
class Examples:
    """Queries with what was written and found, side by side; see `study._examples` for their form."""

    kind: ClassVar[str] = "examples"
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fold:
    """Blocks that are folded away, unless `opened`."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: Sequence[Any]
    opened: bool = False


@dataclass
class Section:
    """A part of the page with its place in the contents."""

    name: str
    title: str
    blocks: list[Any] = field(default_factory=list)


def score(value: float | None) -> str:
    """A measure with three digits, or a dash."""
    return DASH if value is None else number(value, 3)


def signed(value: float) -> str:
    """A difference with its sign and four digits."""
    return number(value, 4, sign=True)


def p_value(value: float) -> str:
    """A p-value as one reports it."""
    return "< 0.001" if value < 0.001 else number(value, 3)


def percent(value: float | None) -> str:
    """A share, in whole percent."""
    return DASH if value is None else f"{100 * value:.0f}%".replace("-", MINUS)


def comparison_cells(row: Mapping[str, Any], level: float = 0.05) -> list[Cell]:
    """Difference (with its verdict), interval, corrected p and wins/ties/losses of a `significance.Comparison` as a
    dictionary."""
    sure = row["p_corrected"] < level
    verdict = ("up" if row["difference"] > 0 else "down") if sure else ""
    return [
        Cell(signed(row["difference"]), verdict=verdict),
        Cell(f"{signed(row['low'])} to {signed(row['high'])}"),
        Cell(p_value(row["p_corrected"])),
        Cell(f"{row['wins']} / {row['ties']} / {row['losses']}"),
    ]


COMPARISON_HEAD = ("difference", "95% interval", "p (Holm)", "wins / ties / losses")

"""The elements of a report's page as data: sections of headings, text, tables, figures and examples.

The modules of the sections create these elements, and the templates turn them into HTML, so that only templates write
and escape HTML. An element's `kind` is the name of its macro in `templates/blocks.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from search_r3.evaluation.report.axes import MINUS, number

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """A number in a table; `best` in its row or column; `verdict` is "up", "down" (against a baseline), "untested" or
    ""."""

    text: str
    best: bool = False
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row. The columns listed in `words` hold text, the others numbers."""

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Text:
    """A paragraph; `tone` is "", "note" (small) or "warn"."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class BulletList:
    """A list with one line per point."""

    kind: ClassVar[str] = "bullet_list"
    points: Sequence[str]


@dataclass(frozen=True)
class DefinitionList:
    """A list of labels and their values."""

    kind: ClassVar[str] = "definition_list"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Heading:
    """A heading within a section; `name` is its anchor."""

    kind: ClassVar[str] = "heading"
    text: str
    name: str


@dataclass(frozen=True)
class Figures:
    """Plots from `report.svg`, side by side if there is room."""

    kind: ClassVar[str] = "figures"
    plots: Sequence[str]


@dataclass(frozen=True)
class Placeholder:
    """A note that something is missing, with the command that creates it."""

    kind: ClassVar[str] = "placeholder"
    text: str
    command: str


@dataclass(frozen=True)
class Examples:
    """Queries with their reasoning traces and top documents; see `evaluation.examples` for the form of a row."""

    kind: ClassVar[str] = "examples"
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Details:
    """A collapsible block, collapsed unless `opened`."""

    kind: ClassVar[str] = "details"
    title: str
    blocks: Sequence[Any]
    opened: bool = False


@dataclass(frozen=True)
class Answer:
    """A question of the first screen: the verdict in a few words, one sentence with intervals, and what it is about."""

    question: str
    verdict: str
    sentence: str
    note: str = ""


@dataclass(frozen=True)
class Front:
    """The answers of the first screen beside their plot ("" if there is none)."""

    kind: ClassVar[str] = "front"
    answers: Sequence[Answer]
    plot: str


@dataclass
class Section:
    """A section of the page, listed in the table of contents; folded, it shows its title and its `summary`."""

    name: str
    title: str
    blocks: list[Any] = field(default_factory=list)
    summary: str = ""
    folded: bool = True


def score(value: float | None) -> str:
    """Format a measure with three decimals; a dash for None."""
    return DASH if value is None else number(value, 3)


def signed(value: float) -> str:
    """Format a difference with its sign and four decimals."""
    return number(value, 4, sign=True)


def p_value(value: float) -> str:
    """Format a p-value in the usual way."""
    return "< 0.001" if value < 0.001 else number(value, 3)


def percent(value: float | None) -> str:
    """Format a share in whole percent; a dash for None."""
    return DASH if value is None else f"{100 * value:.0f}%".replace("-", MINUS)


def comparison_cells(row: Mapping[str, Any], level: float = 0.05) -> list[Cell]:
    """Cells for a `significance.Comparison` in dictionary form: difference (with its verdict), interval, corrected
    p-value, and wins, ties and losses."""
    significant = row["p_corrected"] < level
    verdict = ("up" if row["difference"] > 0 else "down") if significant else ""
    return [
        Cell(signed(row["difference"]), verdict=verdict),
        Cell(f"{signed(row['low'])} to {signed(row['high'])}"),
        Cell(p_value(row["p_corrected"])),
        Cell(f"{row['wins']} / {row['ties']} / {row['losses']}"),
    ]


COMPARISON_HEAD = ("difference", "95% interval", "p (Holm)", "wins / ties / losses")

"""The text of a PDF's page in the order in which it is read, from the places of its characters.

A PDF draws characters in any order: two columns may be drawn line by line across both. So characters are joined to
runs, and runs are ordered by position: a recursive cut at the gutters between columns (after the XY-cut of Nagy and
Seth, 1984), where runs across a gutter, such as headings, divide the columns into bands.

Coordinates are in points from the lower left corner of the page.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

SAME_RUN = 0.9
"""Distance between two characters of a run, in heights of a line; the gutter between columns is wider."""
MIN_LINES, MIN_CHARACTERS = 3, 14
"""What is on either side of a gutter has at least this many lines, of this many characters on average: else it is a
table, which is read line by line."""
MAX_ACROSS = 0.3
"""Share of the runs that may lie across a gutter."""
GUTTER_STEP = 3.0  # points
MAX_RUNS = 2000
"""More are a table or a drawing, not columns of text."""
PARAGRAPH = 1.35
"""Distance between the first lines of two paragraphs, in distances between lines."""
FULL_LINE = 0.75
"""Share of a column's width that a line has which goes on below."""
LINE_END_HYPHENS = "\ufffe\x02\u00ad"
"""What pdfium gives for a hyphen at the end of a line, and the soft hyphen."""
LIGATURES = {
    0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"
}  # fmt: skip
WORD_END = re.compile(r"([^\W\d_]+)([-‐" + LINE_END_HYPHENS + r"])$")
WORD_START = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Character:
    """A character and its box; without a box, which is one that the reader made up (a space, a line break)."""

    text: str
    box: tuple[float, float, float, float] | None
    """left, bottom, right, top"""


@dataclass(slots=True)
class Run:
    """Text that stands together on one line."""

    text: str
    left: float
    bottom: float
    right: float
    top: float

    @property
    def height(self) -> float:
        return self.top - self.bottom

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2


def page_text(characters: Iterable[Character]) -> str:
    """The text of a page: paragraphs with an empty line between them, hyphens at the ends of lines joined, ligatures as
    letters."""
    lines = list(_runs(characters))
    level = [run for run in lines if not _is_upright(run)]
    paragraphs: list[list[str]] = []
    for region in _in_reading_order(level):
        found = list(_paragraphs(region))
        if paragraphs and found and _goes_on(paragraphs[-1], found[0]):
            paragraphs[-1] += found.pop(0)
        paragraphs += found
    paragraphs += [[run.text] for run in lines if _is_upright(run)]
    whole = {word for run in lines for word in re.findall(r"[\w-]+", run.text.lower())}
    texts = (_joined(paragraph, whole) for paragraph in paragraphs)
    return "\n\n".join(text for text in texts if text)


# ---------------------------------------------------------------------------------------------------------------- runs


def _runs(characters: Iterable[Character]) -> Iterator[Run]:
    run: Run | None = None
    last = (0.0, 0.0, 0.0, 0.0)
    for character in characters:
        text, box = character.text.translate(LIGATURES), character.box
        if text in "\r\n":
            if run is not None:
                yield _stripped(run)
            run = None
        elif text.isspace() or box is None:
            if run is not None:
                run.text += " " if text.isspace() else text
        elif run is not None and _is_near(last, box):
            run.text += text
            run.left, run.bottom = min(run.left, box[0]), min(run.bottom, box[1])
            run.right, run.top = max(run.right, box[2]), max(run.top, box[3])
            last = box
        else:
            if run is not None:
                yield _stripped(run)
            run, last = Run(text, *box), box
    if run is not None:
        yield _stripped(run)


def _stripped(run: Run) -> Run:
    run.text = " ".join(run.text.split(" ")).strip()
    return run


def _is_near(last: Sequence[float], box: Sequence[float]) -> bool:
    apart = max(box[0] - last[2], last[0] - box[2])
    above = max(box[1] - last[3], last[1] - box[3])
    height = max(last[3] - last[1], box[3] - box[1])
    return apart <= SAME_RUN * height and above <= 0


def _is_upright(run: Run) -> bool:
    """Whether a run is written from bottom to top, such as a stamp in the margin."""
    return len(run.text) > 2 and run.height > 3 * (run.right - run.left)


# --------------------------------------------------------------------------------------------------------------- order


def _in_reading_order(runs: list[Run]) -> Iterator[list[Run]]:
    """The regions of a page in order, each one column wide."""
    gutter = _gutter(runs)
    if gutter is None:
        if runs:
            yield runs
        return
    across = sorted((run for run in runs if run.left < gutter < run.right), key=lambda run: -run.middle)
    beside = [run for run in runs if not run.left < gutter < run.right]
    pending: list[Run] = []
    for run in across:
        above = [one for one in beside if one.middle > run.middle]
        if above:
            if pending:
                yield pending
                pending = []
            yield from _columns(above, gutter)
            beside = [one for one in beside if one.middle <= run.middle]
        pending.append(run)
    if pending:
        yield pending
    yield from _columns(beside, gutter)


def _columns(runs: list[Run], gutter: float) -> Iterator[list[Run]]:
    yield from _in_reading_order([run for run in runs if run.right <= gutter])
    yield from _in_reading_order([run for run in runs if run.right > gutter])


def _gutter(runs: list[Run]) -> float | None:
    """Where two columns meet, or None: the place with the fewest runs across, if text stands on both sides of it."""
    if not 2 * MIN_LINES <= len(runs) <= MAX_RUNS:
        return None
    best: tuple[int, float, float] | None = None
    for across, place in _least_crossed(runs):
        if best is not None and across > best[0]:
            break
        sides = [run for run in runs if run.right <= place], [run for run in runs if run.left >= place]
        if all(map(_is_prose, sides)) and _overlap(*sides):
            width = min(run.left for run in sides[1]) - max(run.right for run in sides[0])
            if best is None or (across, -width) < best[:2]:
                best = (across, -width, place)
    return None if best is None else best[2]


def _least_crossed(runs: list[Run]) -> list[tuple[int, float]]:
    """(runs across, place) of the places that few runs lie across, fewest first."""
    left, right = min(run.left for run in runs), max(run.right for run in runs)
    changes = [0] * (int((right - left) / GUTTER_STEP) + 2)
    for run in runs:
        changes[int((run.left - left) / GUTTER_STEP) + 1] += 1
        changes[math.ceil((run.right - left) / GUTTER_STEP)] -= 1
    counts = list(itertools.accumulate(changes))
    places = [(count, left + step * GUTTER_STEP) for step, count in enumerate(counts[1:-1], start=1)]
    return sorted(one for one in places if one[0] <= MAX_ACROSS * len(runs))


def _is_prose(runs: list[Run]) -> bool:
    lines = len({round(run.middle) for run in runs})  # a justified line may be several runs
    return lines >= MIN_LINES and sum(len(run.text) for run in runs) >= MIN_CHARACTERS * lines


def _overlap(one: list[Run], other: list[Run]) -> bool:
    """Whether two columns stand side by side for at least half of the shorter one's height."""
    tops = max(run.top for run in one), max(run.top for run in other)
    bottoms = min(run.bottom for run in one), min(run.bottom for run in other)
    shorter = min(tops[0] - bottoms[0], tops[1] - bottoms[1])
    return min(tops) - max(bottoms) >= shorter / 2


# ---------------------------------------------------------------------------------------------------------- paragraphs


def _rows(runs: list[Run]) -> list[Run]:
    """Runs of one region joined to its lines, from top to bottom."""
    rows: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: -run.middle):
        if rows and abs(rows[-1][0].middle - run.middle) < min(rows[-1][0].height, run.height) / 2:
            rows[-1].append(run)
        else:
            rows.append([run])
    return [_row(row) for row in rows]


def _row(runs: list[Run]) -> Run:
    runs = sorted(runs, key=lambda run: run.left)
    return Run(
        " ".join(run.text for run in runs if run.text),
        runs[0].left,
        min(run.bottom for run in runs),
        max(run.right for run in runs),
        max(run.top for run in runs),
    )


def _paragraphs(region: list[Run]) -> Iterator[list[str]]:
    """The lines of each paragraph; "\\n" before a line keeps it apart, such as those of a list or a table."""
    from statistics import median

    rows = [row for row in _rows(region) if row.text]
    if not rows:
        return
    distances = [above.middle - below.middle for above, below in itertools.pairwise(rows)]
    usual = median(distances) if distances else 0.0
    left, right = min(row.left for row in rows), max(row.right for row in rows)
    paragraph = [rows[0].text]
    for above, below, distance in zip(rows, rows[1:], distances, strict=False):
        if distance > PARAGRAPH * usual or not 0.8 < above.height / below.height < 1.25:
            yield paragraph
            paragraph = [below.text]
        elif above.right - left >= FULL_LINE * (right - left) or above.text[-1] in LINE_END_HYPHENS:
            paragraph.append(below.text)
        else:
            paragraph.append("\n" + below.text)
    yield paragraph


def _goes_on(before: list[str], after: list[str]) -> bool:
    """Whether a paragraph goes on at the top of the next column."""
    return before[-1][-1] not in '.:!?)”"' and after[0][:1].islower()


def _joined(lines: list[str], whole: set[str]) -> str:
    """The lines of a paragraph as one text. A word that is divided is joined, unless the page has it with a hyphen
    elsewhere, and not without (`whole`: its words)."""
    text = ""
    for line in lines:
        end, start = WORD_END.search(text), WORD_START.match(line.lstrip("\n"))
        if end and start and start[0][0].islower():
            divided = f"{end[1]}-{start[0]}".lower()
            hyphen = "-" if divided in whole and divided.replace("-", "") not in whole else ""
            text = f"{text[:-1]}{hyphen}{line.lstrip(chr(10))}"
        elif line.startswith("\n") or not text:
            text += line
        else:
            text += f" {line}"
    return re.sub(f"[{LINE_END_HYPHENS}](?=\\s|$)", "-", text).translate(dict.fromkeys(map(ord, LINE_END_HYPHENS)))

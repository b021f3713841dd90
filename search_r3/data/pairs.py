"""Training pairs: a query, the document that answers it, and optionally more of them, hard negatives, reasoning, and
what a search found.

On disk, one JSON object per line. `build_pairs` creates such files, `mine` adds negatives, `add_first_hits` passages,
and `train sft` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from search_r3.data.io.jsonl import id_field, read_jsonl, string_field, write_jsonl
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

FIELDS = ("id", "query", "positive", "negatives", "reasoning", "source", "positives", "grade", "passages")


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """One example for stage 1.

    `positive` and `negatives` are documents' full texts; `reasoning` is the trace before the embed token, if any;
    `source` names the pair's origin ("docstrings:torch", "titles:scifact"). `positives` are further relevant documents
    with their grades, and `grade` is that of `positive`; grades are above 0, larger means more relevant. `passages` are
    the full texts of the documents that a search with the query found, best first, whether they answer it or not.
    """

    id: str
    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    reasoning: str | None = None
    source: str = ""
    positives: tuple[tuple[str, float], ...] = ()
    grade: float = 1.0
    passages: tuple[str, ...] = ()

    @property
    def relevant(self) -> dict[str, float]:
        """All documents that answer the query, `positive` first: text -> grade."""
        return {self.positive: self.grade} | dict(self.positives)

    def as_row(self) -> list[Any]:
        """The fields' values in their order, as JSON keeps them; `from_row` reads them back."""
        return list(astuple(self))

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> TrainingPair:
        """The pair that `as_row` described."""
        identity, query, positive, negatives, reasoning, source, positives, grade, *more = row
        further = tuple((text, float(value)) for text, value in positives)
        passages = tuple(more[0]) if more else ()  # rows of earlier versions have none
        return cls(identity, query, positive, tuple(negatives), reasoning, source, further, grade, passages)


def read_pairs(path: str | Path) -> list[TrainingPair]:
    """Read a JSONL file of training pairs; `id`, `query` and `positive` are required, the other fields are optional.

    An id that is a whole number is converted to its digits.

    Raises:
        InputError: the file cannot be read or is empty; a line is broken, has an unknown field or one of the wrong
            type, an empty text, a grade not above 0, a positive given twice or among the negatives, or an id used
            before (file, line and field are named).
    """
    if not Path(path).exists():
        raise InputError(
            f"{path} does not exist; `search-r3 data build RECIPE {path}` makes pairs, and "
            f"`search-r3 data reason PAIRS {path}` pairs with reasoning"
        )
    pairs: list[TrainingPair] = []
    shared: dict[str, str] = {}  # a document of many queries is kept once
    seen: dict[str, int] = {}
    for number, value in read_jsonl(path):
        where = f"{path}, line {number}"
        if "analysis" in value:
            raise InputError(f'{where}: the field "analysis" is now called "reasoning"; rename the key')
        refuse_unknown(value, FIELDS, where, what="field")
        _, identity = id_field(value, path, number, ("id",))
        if identity in seen:
            raise InputError(f'{where}: the id "{identity}" was already used in line {seen[identity]}; ids are unique')
        seen[identity] = number
        positive = string_field(value, "positive", path, number, empty=False)
        reasoning = value.get("reasoning")
        positives = tuple(
            (shared.setdefault(text, text), grade)
            for text, grade in _positives(value.get("positives"), positive, where)
        )
        pairs.append(
            TrainingPair(
                identity,
                string_field(value, "query", path, number, empty=False),
                positive,
                _negatives(value.get("negatives"), (positive, *(text for text, _ in positives)), where),
                None if reasoning is None else string_field(value, "reasoning", path, number),
                string_field(value, "source", path, number, default=""),
                positives,
                _grade(value.get("grade", 1), where),
                tuple(shared.setdefault(text, text) for text in _texts(value.get("passages"), "passages", where)),
            )
        )
    if not pairs:
        raise InputError(f"{path} holds no training pair; expected JSON lines with id, query and positive")
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[TrainingPair]) -> None:
    """Write pairs as JSONL atomically; empty fields and a grade of 1 are omitted.

    Raises:
        InputError: the file cannot be written.
    """
    write_jsonl(path, map(_record, pairs))


def _record(pair: TrainingPair) -> dict[str, Any]:
    needed = ("id", "query", "positive")
    record: dict[str, Any] = dict(zip(FIELDS, pair.as_row(), strict=True))
    record["positives"] = [{"text": text, "grade": grade} for text, grade in pair.positives]
    if pair.grade == 1:
        del record["grade"]
    return {key: value for key, value in record.items() if value or key in needed}


def _positives(value: Any, positive: str, where: str) -> list[tuple[str, float]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InputError(
            f'{where}: the field "positives" must be a list of {{"text": ..., "grade": ...}}, got {str(value)[:80]}'
        )
    found: dict[str, float] = {}
    for entry in value:
        refuse_unknown(entry, ("text", "grade"), f"{where}, positives", what="field")
        text = entry.get("text")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f'{where}: the field "positives" must hold texts, none empty, got {str(text)[:80]}')
        if text == positive or text in found:
            raise InputError(f'{where}: the field "positives" names {text[:60]!r} a second time; remove it')
        found[text] = _grade(entry.get("grade", 1), f"{where}, positives")
    return list(found.items())


def _grade(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and value > 0):
        raise InputError(f'{where}: the field "grade" must be a number above 0, got {str(value)[:80]}')
    return float(value)


def _negatives(given: Any, positives: Sequence[str], where: str) -> tuple[str, ...]:
    value = _texts(given, "negatives", where)
    if positives[0] in value:
        raise InputError(f'{where}: the field "negatives" contains the positive itself; remove it')
    if further := set(positives) & set(value):
        raise InputError(f'{where}: the field "negatives" contains {min(further)[:60]!r}, a positive; remove it')
    return value


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise InputError(f'{where}: the field "{name}" must be a list of texts, none empty, got {str(value)[:80]}')
    return tuple(value)

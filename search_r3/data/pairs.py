"""Training pairs: a query, the document that answers it, and optionally hard negatives and a reasoning trace.

On disk, one JSON object per line. `build_pairs` creates such files, `mine` adds negatives, `train sft` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search_r3.data.io.jsonl import id_field, read_jsonl, string_field, write_jsonl
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

FIELDS = ("id", "query", "positive", "negatives", "reasoning", "source")


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """One example for stage 1.

    `positive` and `negatives` are documents' full texts; `reasoning` is the trace before the embed token, if any;
    `source` names the pair's origin ("docstrings:torch", "titles:scifact").
    """

    id: str
    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    reasoning: str | None = None
    source: str = ""


def read_pairs(path: str | Path) -> list[TrainingPair]:
    """Read a JSONL file of training pairs; `id`, `query` and `positive` are required, the other fields are optional.

    An id that is a whole number is converted to its digits.

    Raises:
        InputError: the file cannot be read or is empty; a line is broken, has an unknown field or one of the wrong
            type, an empty text, a negative equal to the positive, or an id used before (file, line and field are
            named).
    """
    pairs: list[TrainingPair] = []
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
        pairs.append(
            TrainingPair(
                identity,
                string_field(value, "query", path, number, empty=False),
                positive,
                _negatives(value.get("negatives"), positive, where),
                None if reasoning is None else string_field(value, "reasoning", path, number),
                string_field(value, "source", path, number, default=""),
            )
        )
    if not pairs:
        raise InputError(f"{path} holds no training pair; expected JSON lines with id, query and positive")
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[TrainingPair]) -> None:
    """Write pairs as JSONL atomically; empty fields are omitted.

    Raises:
        InputError: the file cannot be written.
    """
    needed = ("id", "query", "positive")
    rows = (asdict(pair) for pair in pairs)
    write_jsonl(path, ({key: value for key, value in row.items() if value or key in needed} for row in rows))


def _negatives(value: Any, positive: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise InputError(f'{where}: the field "negatives" must be a list of texts, none empty, found {str(value)[:80]}')
    if positive in value:
        raise InputError(f'{where}: the field "negatives" contains the positive itself; remove it')
    return tuple(value)

"""What the process of one step of one system is told, and the rows that a filter keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FILTER_FIELD = "part"
FILTER_SHARES = (0.01, 0.1, 0.5)


def filter_value(number: Any) -> Any:
    """The value of FILTER_FIELD of row `number`, 0 to 99, each of a hundredth of the rows, which lie anywhere (Knuth's
    multiplicative hash). For an int or an array of int64."""
    return (number * 2654435761 % 2**32) * 100 >> 32


@dataclass(frozen=True)
class Spec:
    """One step of one system.

    Attributes:
        system: one of SYSTEMS.
        step: "build", "search", "filter" or "together".
        data: the folder with rows.npy, queries.npy (tuning half, then measuring half), truth.npy, truth-SHARE.npy and
            texts.json.
        folder: where the system keeps its index.
        goal: recall@k to be reached.
        start: rows from which on ours builds an approximate index.
        setting: what "search" was measured with, for "filter" and "together".
        clients: searches at once of "together".
        budget: seconds after which a measurement ends with the queries that it has.
    """

    system: str
    step: str
    data: str
    folder: str
    k: int = 10
    goal: float = 0.98
    threads: int = 2
    start: int = 100_000
    setting: Any = None
    clients: int = 8
    budget: float = 120.0

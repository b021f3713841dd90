"""Values of parametrized tests that `make test` leaves to `make test-nightly`, as one value shows most of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def nightly(*values: Any) -> list[Any]:
    """`values` for `pytest.mark.parametrize`, marked `nightly`; a tuple is the values of several parameters."""
    given = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*value, marks=pytest.mark.nightly) for value in given]


def now(kinds: Iterable[str], *chosen: str) -> list[Any]:
    """The `chosen` kinds for every run of the tests, the others marked `nightly`."""
    return [*chosen, *nightly(*(kind for kind in kinds if kind not in chosen))]

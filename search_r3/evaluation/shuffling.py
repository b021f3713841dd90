"""Gives each query what belongs to another one, for controls: does the content help, or only that there is some?"""

from __future__ import annotations

import numpy as np

from search_r3.errors import InputError


def derangement(count: int, seed: int) -> list[int]:
    """A random permutation of `count` indices without a fixed point: one cycle (Sattolo 1986).

    Raises:
        InputError: there is only one index.
    """
    if count < 2:
        raise InputError(f"{count} query cannot be given what belongs to another one; the control needs at least 2")
    rng = np.random.default_rng(seed)
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(rng.integers(last))  # never `last` itself, so the result is one cycle
        order[last], order[other] = order[other], order[last]
    return order

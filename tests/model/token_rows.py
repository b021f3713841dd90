"""Rows of token ids for tests of engines, and how far apart embeddings are."""

from __future__ import annotations

from typing import Any

import numpy as np


def token_rows(*lengths: int) -> list[list[int]]:
    """A row of each length, the same at every call, no special token of the tiny models among them."""
    random = np.random.default_rng(0)
    return [random.integers(10, 390, size=length).tolist() for length in lengths]


def distance(one: Any, other: Any) -> float:
    """The largest cosine distance between unit rows of the same number."""
    return float((1 - (np.stack(one) * np.stack(other)).sum(-1)).max())

"""Latency of query embeddings: median and 95th percentile of timed calls, one query or a batch at a time.

Only the encoding of queries is timed (including reasoning); the search is the same for every mode. Other processes
affect such timings, so the system load is recorded with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

BATCHES = (1, 32)
MIN_CALLS = 4
"""Minimum number of timed calls; percentiles of fewer are meaningless."""


def time_queries(encode: Callable[[list[str], int], Any], queries: Sequence[str], batch_size: int) -> dict[str, float]:
    """Time `encode(batch, batch_size)` over `queries` in batches, after one untimed call.

    Queries are reused from the beginning to fill the last batch and to reach at least MIN_CALLS batches.

    Returns:
        `calls`; `median_ms` and `p95_ms` of a call, which is how long each of its queries waits; `ms_per_query`, the
        mean time of a call divided by its queries.

    Raises:
        ValueError: no queries, or a batch size under 1.
    """
    if not queries or batch_size < 1:
        raise ValueError(f"{len(queries)} queries in batches of {batch_size}: expected at least one of each")
    calls = max(MIN_CALLS, -(-len(queries) // batch_size))
    batches = [[queries[(c * batch_size + i) % len(queries)] for i in range(batch_size)] for c in range(calls)]
    encode(batches[0], batch_size)
    seconds_C = np.empty(calls)
    for call, batch in enumerate(batches):
        started = time.perf_counter()
        encode(batch, batch_size)
        seconds_C[call] = time.perf_counter() - started
    return {
        "calls": calls,
        "median_ms": round(float(np.median(seconds_C)) * 1e3, 2),
        "p95_ms": round(float(np.quantile(seconds_C, 0.95)) * 1e3, 2),
        "ms_per_query": round(float(seconds_C.mean()) / batch_size * 1e3, 2),
    }


def time_mode(
    model: Any,
    queries: Sequence[str],
    budget: int | Literal["latent"] | None,
    passages: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """`time_queries` for each of BATCHES with this budget (None: direct embeddings), and the load.

    Args:
        passages: the texts that each query is embedded with, if it is; the search that found them is not timed.
    """
    read_with = dict(zip(queries, passages or (), strict=False))

    def encode(batch: list[str], size: int) -> Any:
        settings: dict[str, Any] = {"batch_size": size, "show_progress_bar": False}
        if passages is not None:
            settings["passages"] = [read_with[query] for query in batch]
        if budget is None:
            return model.encode_query(batch, reasoning=False, **settings)
        if budget == "latent":
            return model.encode_query(batch, reasoning="latent", **settings)
        return model.reason(batch, max_reasoning_tokens=budget, **settings)

    timed: dict[str, Any] = {f"batch_{size}": time_queries(encode, queries, size) for size in BATCHES}
    return timed | {"load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}

"""The approximate index of a large table: built, compared with exact search on sampled queries, and used only if good.

It partitions the vectors by k-means and compresses them with RaBitQ to one bit per dimension (Gao & Long 2024, arXiv
2405.12497); the best candidates are rescored with the exact vectors. The numbers of partitions and candidates are
chosen by the recall measured here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from search_r3.files import check_temporary_folder
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.index_info import ApproximateIndex
from search_r3.index.row_keys import VECTOR

APPROXIMATE_FROM = 100_000  # rows; exact search reads every vector: about 30 ms for this many of 576 dimensions
GOAL = 0.98
DEPTH = 10  # recall@10
SAMPLES = 200  # rows, and as many real queries: a standard error of about 0.004 at a recall of 0.98
SAME = 1e-5  # cosine; a hit counts if it is as near as the tenth neighbor, whichever of equal rows it is
TIES = 10  # fetched beyond the cut of an approximate search, so that ids decide between equal scores
GROWN = 2.0  # retrain when the table has grown by this factor
CHANGED = 0.1  # measure the recall again when the number of rows has changed by this share
SAMPLE_BYTES = 400_000_000  # maximum size of the vectors that k-means is trained on
K_MEANS_ROUNDS = 20
HALVINGS = 2  # of the interval that contains the smallest number of partitions that reaches the goal
FIRST_REFINE, LAST_REFINE = 2, 32  # candidates scored exactly per result
BLOCK = 4096  # rows read at a time
FILTERED_PROBES = -0.25
"""With a filter that keeps a share of the rows, the nearest of them lie farther away: so many more partitions are
searched as the share to this power. Measured at 1%, 10% and 50% (LOG.md, 2026-11-30)."""
FIELD = "r3_approximate"


def read_approximate(table: Any) -> ApproximateIndex | None:
    """The table's record of its approximate index, or None if it has none."""
    kept = (table.schema.field(VECTOR).metadata or {}).get(FIELD.encode())
    if not kept:
        return None
    try:
        return ApproximateIndex(**json.loads(kept))
    except (ValueError, TypeError):
        return None  # written by a later version; search is exact then


def keep_approximate(
    table: Any,
    start: int | None = APPROXIMATE_FROM,
    queries: Callable[[], np.ndarray] | None = None,
    check: Callable[[], None] = lambda: None,
) -> ApproximateIndex | None:
    """Build the table's approximate index if it is due, retrain it if the table outgrew it, and measure it again if
    rows changed. New rows must have been indexed before (`compact`).

    Args:
        table: an open table of unit vectors.
        start: number of rows from which an approximate index is built; None never builds one.
        queries: returns embeddings of real queries, (n, dimension) float32; only called if something is measured.
        check: called after measuring, before the result is written; raises if the right to write was lost.

    Returns:
        The approximate index, or None if there is none.
    """
    current = read_approximate(table)
    rows = table.count_rows()
    if not any(VECTOR in index.columns for index in table.list_indices()):
        current = None
    if current is None or rows >= GROWN * current.rows:
        if rows < DEPTH or (current is None and (start is None or rows < start)):
            return None
        renewed = train_approximate(table, rows)
    elif abs(rows - current.measured_rows) > CHANGED * current.measured_rows:
        renewed = replace(current, measured_rows=rows)
    else:
        return current
    renewed = tuned(table, renewed, None if queries is None else queries())
    check()
    _write(table, renewed)
    return renewed


def encoder_of(model: Encoder, queries: Sequence[str]) -> Callable[[], np.ndarray] | None:
    """A function that embeds at most SAMPLES of `queries`, evenly spread, without reasoning; None without queries."""
    if not queries:
        return None
    step = max(1, len(queries) // SAMPLES)
    chosen = [query for query in queries[::step] if query.strip()][:SAMPLES]
    return lambda: np.asarray(model.encode_query(chosen, reasoning=False), dtype=np.float32)


def probing(search: Any, settings: ApproximateIndex | None, kept: float = 1.0, everywhere: bool = False) -> Any:
    """Make a vector search use the approximate index as it was measured, or search exactly if `settings` is None.

    Rows that are not indexed yet are always compared.

    Args:
        kept: share of the rows that the search's filter keeps.
        everywhere: search all partitions: the nearest have too few rows.
    """
    if settings is None or not settings.used:
        return search.bypass_vector_index()
    nprobes = settings.partitions if everywhere else filtered_probes(settings, kept)
    return search.minimum_nprobes(nprobes).maximum_nprobes(nprobes).refine_factor(settings.refine)


def filtered_probes(settings: ApproximateIndex, kept: float) -> int:
    """The number of partitions to search with a filter that keeps this share of the rows."""
    if not 0 < kept < 1:
        return settings.nprobes
    return min(settings.partitions, math.ceil(settings.nprobes * kept**FILTERED_PROBES))


def tuned(table: Any, start: ApproximateIndex, queries: np.ndarray | None = None, seed: int = 0) -> ApproximateIndex:
    """`start` with the cheapest settings that reach its goal, measured; `used` is False if none do.

    Each step doubles the partitions or the candidates, whichever gives the better recall. Of the partitions that the
    last doubling added, as many quarters are removed again as the goal allows.
    """
    begun = time.perf_counter()
    samples = Samples.of(table, queries, seed)

    def tried(nprobes: int, refine: int) -> ApproximateIndex:
        given = replace(start, used=True, nprobes=nprobes, refine=refine)
        recall = samples.recall(table, given)
        sampled = {name: len(rows) for name, rows in samples.queries.items()}
        return replace(given, recall_of=recall, sampled=sampled, recall_at_10=min(recall.values()))

    now, short = tried(max(1, start.partitions // 64), FIRST_REFINE), 0
    while now.recall_at_10 < now.goal:
        steps = []
        if now.nprobes < now.partitions:
            steps.append(tried(min(2 * now.nprobes, now.partitions), now.refine))
        if now.refine < LAST_REFINE:
            steps.append(tried(now.nprobes, 2 * now.refine))
        if not steps:
            now = replace(now, used=False)
            break
        short, now = now.nprobes, max(steps, key=lambda step: step.recall_at_10)
    for _ in range(HALVINGS if now.used else 0):
        if (middle := (short + now.nprobes) // 2) in (short, now.nprobes):
            break
        less = tried(middle, now.refine)
        short, now = (short, less) if less.recall_at_10 >= now.goal else (middle, now)
    return replace(now, measure_seconds=round(time.perf_counter() - begun, 1))


@dataclass(frozen=True)
class Samples:
    """Sampled queries by origin ("rows", "queries"), with the exact cosine of each one's tenth neighbor.

    Attributes:
        queries: (Q, dimension) float32.
        own: for each query that is a row its id, as a row does not count as its own neighbor; "" for real queries.
        tenth: (Q,) float32.
    """

    queries: dict[str, np.ndarray]
    own: dict[str, list[str]]
    tenth: dict[str, np.ndarray]

    @classmethod
    def of(cls, table: Any, queries: np.ndarray | None, seed: int) -> Samples:
        """Sample rows, and search for all queries exactly in one pass over the vectors."""
        count = table.count_rows()
        drawn = np.random.default_rng(seed).choice(count, size=min(SAMPLES, count), replace=False)
        rows = table.take_offsets([int(offset) for offset in drawn]).select(["id", VECTOR]).to_arrow()
        ids = rows["id"].to_pylist()
        by_origin = {"rows": _matrix(rows[VECTOR].combine_chunks(), len(rows))}
        own = {"rows": ids}
        if queries is not None and len(queries):
            by_origin["queries"] = np.asarray(queries, dtype=np.float32)
            own["queries"] = [""] * len(queries)
        together = np.concatenate(list(by_origin.values()))
        best = nearest_cosines(table, together, [name for names in own.values() for name in names], DEPTH)
        ends = np.cumsum([len(rows) for rows in by_origin.values()])[:-1]
        return cls(by_origin, own, dict(zip(by_origin, np.split(best[:, -1], ends), strict=True)))

    def recall(self, table: Any, settings: ApproximateIndex) -> dict[str, float]:
        """Recall@10 of `settings` by origin of the queries, searching the way users' searches do."""
        return {name: float(np.mean(list(self._each(table, settings, name)))) for name in self.queries}

    def _each(self, table: Any, settings: ApproximateIndex, name: str) -> Iterator[float]:
        for vector, own, tenth in zip(self.queries[name], self.own[name], self.tenth[name], strict=True):
            search = table.search(vector, vector_column_name=VECTOR, query_type="vector").distance_type("cosine")
            hits = probing(search, settings).select(["id", "_distance"]).limit(DEPTH + TIES).to_arrow()
            pairs = zip(hits["id"].to_pylist(), hits["_distance"].to_pylist(), strict=True)
            near = [1.0 - distance for identifier, distance in pairs if identifier != own][:DEPTH]
            yield sum(cosine >= tenth - SAME for cosine in near) / DEPTH


def nearest_cosines(table: Any, queries: np.ndarray, own: Sequence[str], k: int) -> np.ndarray:
    """The `k` largest cosines of each query over the whole table, best first, (Q, k), read in blocks.

    Args:
        queries: (Q, dimension) float32, unit rows.
        own: for each query the id of a row that does not count, or "".
    """
    query_of = {identifier: number for number, identifier in enumerate(own) if identifier}
    best = np.full((len(queries), k), -1.0, dtype=np.float32)
    for batch in table.search().select(["id", VECTOR]).to_batches(BLOCK):
        block = _matrix(batch[VECTOR], batch.num_rows)
        cosines = queries @ block.T
        for column, identifier in enumerate(batch["id"].to_pylist()):
            if identifier in query_of:
                cosines[query_of[identifier], column] = -1.0
        if cosines.shape[1] > k:
            cosines = np.partition(cosines, -k, axis=1)[:, -k:]
        best = np.sort(np.concatenate([best, cosines], axis=1), axis=1)[:, -k:]
    return best[:, ::-1]


def _matrix(column: Any, rows: int) -> np.ndarray:
    """A column of vectors as a matrix of unit rows, (rows, dimension)."""
    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks()
    matrix = column.flatten().to_numpy(zero_copy_only=False).reshape(rows, -1)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-12)


def train_approximate(table: Any, rows: int) -> ApproximateIndex:
    """Build the approximate index of a table of `rows` rows, anew; how it is searched is chosen by `tuned`."""
    from lancedb.index import IvfFlat, IvfRq

    dimension = table.schema.field(VECTOR).type.list_size
    partitions = max(1, round(rows**0.5))
    sample = max(8, min(64, SAMPLE_BYTES // (4 * dimension * partitions)))
    kind = IvfFlat if dimension % 8 else IvfRq  # one bit per dimension must fill whole bytes
    config = kind(distance_type="cosine", num_partitions=partitions, sample_rate=sample, max_iterations=K_MEANS_ROUNDS)
    begun = time.perf_counter()
    check_temporary_folder("building the approximate index")  # LanceDB would panic
    table.create_index(VECTOR, config=config)
    return ApproximateIndex(
        kind="IVF_FLAT" if kind is IvfFlat else "IVF_RQ",
        used=False,
        recall_at_10=0.0,
        recall_of={},
        sampled={},
        goal=GOAL,
        partitions=partitions,
        nprobes=1,
        refine=FIRST_REFINE,
        rows=rows,
        measured_rows=rows,
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        build_seconds=round(time.perf_counter() - begun, 1),
        measure_seconds=0.0,
    )


def _write(table: Any, approximate: ApproximateIndex) -> None:
    kept = {FIELD: json.dumps(approximate.to_dict())}
    if hasattr(table, "update_field_metadata"):
        table.update_field_metadata({"path": VECTOR, "metadata": kept})
    else:  # before LanceDB 0.33.1
        table.replace_field_metadata(VECTOR, kept)

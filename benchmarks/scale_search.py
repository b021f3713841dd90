"""What searching takes: time, memory and reads of one search by rows, and machines for a corpus and a load.

Formulas with parameters, as in `scale_plan`. Those that `capacity.py` measures are fitted to its results by `fitted`;
until they are there, the defaults say what they rest on. The model that embeds the query is not in: see "Answering".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from scale_plan import GB, HOUR, Plan, table
from scipy.optimize import nnls

from search_r3.errors import InputError

MILLION, PAGE = 1e6, 4096
CANDIDATES = 20
"""Results that are fetched: ten, and ten more among which equal scores are put in order."""


@dataclass(frozen=True)
class SearchPlan:
    """What goes in besides `Plan`. "Assumed": put in your own; "measured": by a benchmark of this repository."""

    probe_share: float = 0.36
    """Share of the partitions that a search of a million rows compares, for a recall@10 of 0.98. Measured."""
    probe_exponent: float = 0.0
    """It falls as rows to this power. Assumed: 0 is the worst case."""
    refine: float = 4.0
    """Candidates compared exactly, for each result. Measured (index.json)."""
    scan_ns_byte: float = 1.5
    """CPU time per byte of codes. From index.json: 22 ms on two cores for 360,000 codes of 80 bytes."""
    memory_ns_byte: float = 0.26
    """CPU time per byte of vectors in memory: centers, and all of a FLAT index. Measured: 30 ms on two cores for
    100,000 of 576 dimensions."""
    page_us: float = 10.0
    """CPU time for each 4 KiB of a candidate's vector that is read. Assumed."""
    words_ns_row: float = 10.0
    """CPU time of the search by words, per row of the index. Assumed."""
    fixed_ms: float = 5.0
    """CPU time of a search that depends on no number of rows. Assumed."""
    cores: float = 16.0
    """Of a search machine. Assumed, as the next ones."""
    memory_gb: float = 128.0
    """Of a search machine."""
    memory_share: float = 0.7
    """Share of it that the index may take; the rest is for the system, the model and requests."""
    busy_share: float = 0.5
    """Share of its cores' time that may be used before requests wait for each other."""
    disk_reads_second: float = 400_000.0
    """Random reads of 4 KiB from a local NVMe disk. Assumed: data sheets say 500,000 to 1,000,000."""
    object_reads_second: float = 5_500.0
    """GET requests of one prefix of a bucket. Amazon's figure for S3; an index is one prefix."""
    object_dollars_million: float = 0.4
    """A million GET requests: S3 Standard, list price of us-east-1. Assumed, November 2026."""
    machine_dollars_hour: float = 1.0
    """A search machine, rented. Assumed, November 2026."""
    least_machines: float = 2.0
    """So that one may fail or be restarted."""
    milvus_memory: float = 1.2
    """Memory of Milvus for each byte of an index that it keeps there. Assumed."""
    rewritten_share: float = 1.0
    """Share of the rows that the largest compaction rewrites before the old files are removed. 1: the worst case."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0.0 if field.name == "probe_exponent" else math.ulp(0.0)
            if not (math.isfinite(value) and value >= least):
                raise InputError(f"{field.name} is {value}; it must be a number above 0")
        for name in ("probe_share", "memory_share", "busy_share", "rewritten_share"):
            if getattr(self, name) > 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, at most 1")


def partitions(rows: float) -> float:
    """Of an approximate index: the square root of its rows."""
    return max(1.0, round(math.sqrt(rows)))


def share(rows: float, search: SearchPlan) -> float:
    """Share of the partitions that a search compares, at least one partition and at most all."""
    wanted = search.probe_share * (rows / MILLION) ** -search.probe_exponent
    return min(1.0, max(wanted, 1 / partitions(rows)))


def code_bytes(dimension: float) -> float:
    """Of a row in the approximate index: one bit a dimension, and two float32 factors (RaBitQ)."""
    return dimension / 8 + 8


@dataclass(frozen=True)
class Costs:
    """What an index takes while it is searched.

    Attributes:
        cpu_seconds: of one search, on one core.
        memory: bytes that have to be in memory for that.
        reads: of vectors and rows that are not, for one search: requests, if they are on object storage.
        pages: the same in parts of 4 KiB.
    """

    cpu_seconds: float
    memory: float
    reads: float
    pages: float

    def a_second(self, search: SearchPlan) -> float:
        """Searches that the cores of one machine answer in a second."""
        return search.cores * search.busy_share / self.cpu_seconds


def vector_pages(search: SearchPlan, dimension: float) -> float:
    """Parts of 4 KiB that the candidates' vectors are read in."""
    return search.refine * CANDIDATES * math.ceil(4 * dimension / PAGE)


def search_seconds(search: SearchPlan, dimension: float, rows: float, part: float) -> float:
    """CPU time of a hybrid search that compares the codes of a share `part` of the partitions."""
    nanoseconds = (
        search.scan_ns_byte * rows * code_bytes(dimension) * part
        + search.memory_ns_byte * 4 * dimension * partitions(rows)
        + search.words_ns_row * rows
    )
    return (search.fixed_ms + search.page_us * vector_pages(search, dimension) / 1e3) / 1e3 + nanoseconds / 1e9


def words_bytes(plan: Plan, rows: float) -> float:
    """Of the full-text index."""
    return plan.index_share * plan.text_bytes * rows


def approximate_costs(plan: Plan, search: SearchPlan, rows: float) -> Costs:
    """A hybrid search by LanceDB's approximate index: centers, codes and words in memory, vectors and rows read.

    Each candidate that is compared exactly is a read of its vector, each result one of its row for each of two lists.
    """
    dimension, candidates = plan.sizes.hidden, search.refine * CANDIDATES
    centers, codes = partitions(rows) * 4 * dimension, rows * code_bytes(dimension)
    memory = codes + centers + words_bytes(plan, rows)
    pages = vector_pages(search, dimension) + 2 * CANDIDATES
    seconds = search_seconds(search, dimension, rows, share(rows, search))
    return Costs(seconds, memory, candidates + 2 * CANDIDATES, pages)


def exact_costs(plan: Plan, search: SearchPlan, rows: float) -> Costs:
    """A hybrid search that compares all vectors, which have to be in memory."""
    vectors = 4 * plan.sizes.hidden * rows
    nanoseconds = search.memory_ns_byte * vectors + search.words_ns_row * rows
    memory = vectors + words_bytes(plan, rows)
    return Costs(search.fixed_ms / 1e3 + nanoseconds / 1e9, memory, 2 * CANDIDATES, 2 * CANDIDATES)


def milvus_costs(plan: Plan, search: SearchPlan, rows: float, exact: bool) -> Costs:
    """The same in Milvus, whose machines divide the rows among themselves: FLAT (`exact`), which is the index that
    search-r3 makes, or one that was exchanged for IVF_RABITQ with 8-bit vectors to compare exactly."""
    found = (exact_costs if exact else approximate_costs)(plan, search, rows)
    compared = 0.0 if exact else plan.sizes.hidden * rows
    return replace(found, memory=search.milvus_memory * (found.memory + compared), reads=0.0, pages=0.0)


@dataclass(frozen=True)
class Machines:
    """Search machines for a load.

    Attributes:
        count: how many; infinite if an index does not fit into one and cannot be divided.
        limit: what decides: "memory", "cores", "disk", "requests" or "availability".
        dollars_month: for machines and requests.
    """

    count: float
    limit: str
    dollars_month: float


def machines(plan: Plan, search: SearchPlan, rows: float, load: float, where: str) -> Machines:
    """For `load` searches a second of `rows` rows.

    Args:
        where: "disk" or "object storage": LanceDB, each machine searches the whole table; "milvus": FLAT; "milvus
            ivf": IVF_RABITQ.
    """
    room = search.memory_gb * GB * search.memory_share
    divided = where.startswith("milvus")
    costs = milvus_costs(plan, search, rows, where == "milvus") if divided else approximate_costs(plan, search, rows)
    needs = {"availability": search.least_machines, "cores": load / costs.a_second(search)}
    if divided:
        needs["memory"] = costs.memory / room
    elif costs.memory > room:
        return Machines(math.inf, "memory", math.inf)
    if where == "disk":
        needs["disk"] = load * costs.pages / (search.disk_reads_second * search.busy_share)
    if where == "object storage" and load * costs.reads > search.object_reads_second:
        return Machines(math.inf, "requests", math.inf)  # more machines would not help
    limit = max(needs, key=lambda name: needs[name])
    count = math.ceil(needs[limit] - 1e-9)
    month = 730 * HOUR
    asked = costs.reads * load * month / MILLION * search.object_dollars_million if where == "object storage" else 0.0
    return Machines(count, limit, count * search.machine_dollars_hour * 730 + asked)


def building_bytes(plan: Plan, search: SearchPlan) -> dict[str, float]:
    """Bytes at the peak of a Ray build: the table, and what is beside it until the build ends."""
    parts = table(plan)
    rows = {"text, ids, hashes": parts["text, ids, hashes"], "vectors": parts["vectors, float32"]}
    indices = parts["full-text index"] + parts["approximate index"]
    found = {
        "the table": parts["total"],
        "spool: text, ids, hashes": rows["text, ids, hashes"],
        "kept parts: the vectors": rows["vectors"],
        "old versions: rewritten rows": search.rewritten_share * sum(rows.values()),
        "old versions: replaced indexes": indices,
    }
    # The spool and the parts go before anything is compacted.
    while_encoding = found["the table"] - indices + found["spool: text, ids, hashes"] + found["kept parts: the vectors"]
    while_compacting = found["the table"] + found["old versions: rewritten rows"] + indices
    return found | {"most": max(while_encoding, while_compacting)}


# ------------------------------------------------------------------------------------------------------------ measured

MEASURED = (
    "probe_share", "probe_exponent", "refine", "scan_ns_byte", "page_us", "words_ns_row", "fixed_ms",
)  # fmt: skip
"""Parameters that `fitted` takes from capacity.json."""


def fitted(figures: Mapping[str, Any], search: SearchPlan | None = None) -> SearchPlan:
    """`search` with the parameters that capacity.json has measured.

    The share of partitions is interpolated for the goal, on a logarithmic scale, with the least `refine` that reaches
    it at every number of rows, and fitted to rows by a power law; CPU time to bytes of codes, pages of vectors and rows
    linearly (least squares of the relative error, not below 0).
    """
    search, goal, dimension = search or SearchPlan(), figures["goal"], figures["dimension"]
    rows = sorted(map(int, figures["by_rows"]))
    found = [figures["by_rows"][str(count)]["search"] for count in rows]
    needed: list[float | None] = []
    for refine in sorted({one["refine"] for each in found for one in each["approximate"]}):
        needed = [share_for(with_refine(one["approximate"], refine), goal) for one in found]
        search = replace(search, refine=float(refine))
        if None not in needed:
            break
    points = [(math.log(count / MILLION), math.log(part)) for count, part in zip(rows, needed, strict=True) if part]
    changed: dict[str, float] = {}
    if len(points) > 1:
        slope, level = np.polyfit(*zip(*points, strict=True), 1)
        changed |= {"probe_share": min(1.0, float(np.exp(level))), "probe_exponent": max(0.0, -float(slope))}
    scanned = []
    for count, each in zip(rows, found, strict=True):
        centers = search.memory_ns_byte * 4 * dimension * partitions(count) / 1e6
        for one in each["approximate"]:
            pages = vector_pages(replace(search, refine=float(one["refine"])), dimension)
            scanned.append((count * one["share"] * code_bytes(dimension), pages, 1.0, one["cpu_ms"] - centers))
    scan, page, fixed = _linear(scanned)
    words, words_fixed = _linear([(count, 1.0, one["words"]["cpu_ms"]) for count, one in zip(rows, found, strict=True)])
    changed |= {"scan_ns_byte": scan * 1e6, "page_us": page * 1e3, "words_ns_row": words * 1e6}
    changed["fixed_ms"] = fixed + words_fixed
    return replace(search, **{name: float(f"{max(value, 1e-6):.3g}") for name, value in changed.items()})


def with_refine(tried: list[dict[str, float]], refine: float) -> list[dict[str, float]]:
    """Those that were searched with this many candidates for each result."""
    return [one for one in tried if one["refine"] == refine]


@dataclass(frozen=True)
class Comparison:
    """A hybrid search that was measured, and what the formula says of it: milliseconds of CPU time."""

    rows: int
    share: float
    recall: float
    measured_ms: float
    formula_ms: float

    @property
    def off(self) -> float:
        """By how much the formula is too high; below 0, too low."""
        return self.formula_ms / self.measured_ms - 1


def comparisons(figures: Mapping[str, Any], search: SearchPlan) -> list[Comparison]:
    """Every share of partitions that was searched with `search.refine`, and the search by words beside it."""
    found = []
    for rows in sorted(map(int, figures["by_rows"])):
        each = figures["by_rows"][str(rows)]["search"]
        for one in with_refine(each["approximate"], search.refine):
            measured = one["cpu_ms"] + each["words"]["cpu_ms"]
            formula = search_seconds(search, figures["dimension"], rows, one["share"]) * 1e3
            found.append(Comparison(rows, one["share"], one["recall_at_10"], measured, formula))
    return found


def share_for(tried: list[dict[str, float]], goal: float) -> float | None:
    """The least share of partitions with a recall of `goal`, between two that were measured; None if none has it."""
    best: float | None = None
    for refine in {one["refine"] for one in tried}:
        points = sorted((one["share"], one["recall_at_10"]) for one in tried if one["refine"] == refine)
        for (before, low), (after, high) in zip([(points[0][0], 0.0), *points], points, strict=False):
            if high >= goal:
                part = 1.0 if high == low else (goal - low) / (high - low)
                here = math.exp(math.log(before) + max(0.0, part) * (math.log(after) - math.log(before)))
                best = here if best is None else min(best, here)
                break
    return best


def _linear(points: Sequence[Sequence[float]]) -> list[float]:
    """The factors, none below 0, with which all but the last number of each point add up to the last."""
    matrix = np.array(points, dtype=float)
    known, wanted = matrix[:, :-1] / matrix[:, -1:], np.ones(len(matrix))
    size = np.abs(known).max(axis=0)
    return list(nnls(known / size, wanted)[0] / size)

"""Whether two systems differ on the same queries: a paired randomization test, a bootstrap interval, Holm's correction.

All functions take per-query differences of a measure, float (Q,), and use numpy only. Sources: Smucker, Allan &
Carterette 2007 (doi 10.1145/1321440.1321528) for the choice of the randomization test, Efron 1987
(doi 10.2307/2289144) for the BCa interval, and Holm 1979 (Scandinavian Journal of Statistics 6, 65-70) for the
correction for multiple comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from search_r3.errors import InputError

PERMUTATIONS = 10_000
RESAMPLES = 10_000
LEVEL = 0.95
TIE = 1e-9
"""Scores of a query that differ by at most this count as equal; measures are sums of a few floats."""
_ROWS = 512
"""Permutations or resamples kept in memory at once."""


@dataclass(frozen=True)
class Comparison:
    """System B against system A on the same queries.

    Attributes:
        difference: mean of B - A.
        low, high: the bootstrap interval of that mean.
        p: two-sided p-value of the randomization test.
        p_corrected: `p` after Holm's correction over its family of comparisons.
        wins, ties, losses: queries where B is better, equal, worse.
    """

    difference: float
    low: float
    high: float
    p: float
    p_corrected: float
    wins: int
    ties: int
    losses: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, rounded to six decimal places."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def randomization_test(differences_Q: npt.ArrayLike, *, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """Two-sided p-value of the mean difference being 0, by flipping the signs of the differences.

    Under the null hypothesis the two scores of each query are exchangeable. If the n differences other than 0 have at
    most `permutations` sign patterns (2^n), all are tried (exact). Otherwise `permutations` patterns are drawn, and p
    is (hits + 1) / (permutations + 1), which is never 0 and never too small (Phipson & Smyth 2010).

    Raises:
        ValueError: not a vector of finite numbers, or fewer than 1 permutation.
    """
    differences = _row(differences_Q)
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}; expected at least 1")
    nonzero = differences[np.abs(differences) > TIE]  # flipping the sign of 0 changes nothing
    if len(nonzero) == 0:
        return 1.0
    total, size = float(nonzero.sum()), float(np.abs(nonzero).sum())
    threshold = abs(total) - 1e-12 * size  # patterns with the observed sum must count in spite of rounding
    if len(nonzero) < 63 and 2 ** len(nonzero) <= permutations:
        patterns = np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1
        return float(np.mean(np.abs(2.0 * (patterns @ nonzero) - total) >= threshold))
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, permutations, _ROWS):
        rows = min(_ROWS, permutations - start)
        flips = rng.integers(0, 2, size=(rows, len(nonzero)), dtype=np.int8)
        hits += int(np.sum(np.abs(2.0 * (flips.astype(np.float64) @ nonzero) - total) >= threshold))
    return (hits + 1) / (permutations + 1)


def bootstrap_interval(
    differences_Q: npt.ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> tuple[float, float]:
    """The bootstrap interval of the mean difference, from resamples of the queries with replacement.

    Args:
        level: nominal coverage of the true mean, between 0 and 1.
        method: "percentile" takes the quantiles of the resampled means; "bca" corrects them for bias and skewness.

    Returns:
        low and high; both are the mean if all differences are equal.

    Raises:
        ValueError: not a vector of finite numbers, or a bad level, number of resamples or method.
    """
    differences = _row(differences_Q)
    if not 0 < level < 1 or resamples < 1 or method not in ("bca", "percentile"):
        raise ValueError(
            f"level {level}, resamples {resamples}, method {method!r}: expected 0 < level < 1, 1 or more, "
            "and bca or percentile"
        )
    mean = float(differences.mean())
    if np.ptp(differences) <= TIE:
        return mean, mean
    rng = np.random.default_rng(seed)
    means_B = np.empty(resamples)
    for start in range(0, resamples, _ROWS):
        rows = min(_ROWS, resamples - start)
        drawn = rng.integers(0, len(differences), size=(rows, len(differences)), dtype=np.int32)
        means_B[start : start + rows] = differences[drawn].mean(axis=1)
    outer = ((1 - level) / 2, (1 + level) / 2)
    if method == "bca":
        outer = _corrected_levels(outer, means_B, differences)
    low, high = np.quantile(means_B, outer)
    return float(low), float(high)


def macro_interval(
    differences: Sequence[npt.ArrayLike], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The mean over data sets of their mean differences, with its bootstrap interval: mean, low, high.

    The queries of each data set are resampled on their own, so that every data set counts equally whatever its size;
    the interval covers other queries of these data sets, not other data sets. Percentile method.

    Args:
        differences: the per-query values or differences of each data set, float (Q,).

    Raises:
        ValueError: no data set, or one is not a vector of finite numbers.
    """
    rows = [_row(row) for row in differences]
    if not rows:
        raise ValueError("no data sets to average over")
    rng = np.random.default_rng(seed)
    means_B = np.zeros(resamples)
    for row in rows:
        for start in range(0, resamples, _ROWS):
            size = (min(_ROWS, resamples - start), len(row))
            means_B[start : start + _ROWS] += row[rng.integers(0, len(row), size=size, dtype=np.int32)].mean(axis=1)
    low, high = np.quantile(means_B / len(rows), ((1 - level) / 2, (1 + level) / 2))
    return float(np.mean([row.mean() for row in rows])), float(low), float(high)


def holm(p_values: npt.ArrayLike) -> np.ndarray:
    """Holm's step-down correction: adjusted p-values (m,), in the order given, each at most 1.

    Rejecting hypotheses whose adjusted p-value is at most alpha limits the probability of any false rejection to alpha,
    regardless of how the tests depend on each other. The adjusted value of the i-th smallest p-value is the
    maximum over j <= i of (m - j) p_j (j from 0).

    Raises:
        ValueError: a value is not between 0 and 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be a vector of numbers from 0 to 1, not {p_values!r}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def wins_ties_losses(differences_Q: npt.ArrayLike, tie: float = TIE) -> tuple[int, int, int]:
    """Numbers of differences above `tie`, within +-`tie`, and below -`tie`."""
    differences = _row(differences_Q)
    wins, losses = int(np.sum(differences > tie)), int(np.sum(differences < -tie))
    return wins, len(differences) - wins - losses, losses


def paired(a: Mapping[str, float], b: Mapping[str, float]) -> np.ndarray:
    """B - A for every query, float64 (Q,), in the order of `a`.

    Raises:
        InputError: the two were not measured on the same queries.
    """
    if a.keys() != b.keys():
        other = next(iter(a.keys() ^ b.keys()))
        raise InputError(f"query {other} was measured for one of the two systems only; measure both on the same split")
    return np.array([b[qid] - a[qid] for qid in a], dtype=np.float64)


def compare_family(differences: Sequence[npt.ArrayLike], *, level: float = LEVEL, seed: int = 0) -> list[Comparison]:
    """Compare several systems with one baseline (or any family of comparisons), corrected for their number.

    Args:
        differences: the per-query differences of each comparison, float (Q,).
        seed: every comparison starts from it, so a result does not depend on which others are made.
    """
    rows = [_row(row) for row in differences]
    raw = [randomization_test(row, seed=seed) for row in rows]
    comparisons = []
    for row, p, corrected in zip(rows, raw, holm(raw), strict=True):
        low, high = bootstrap_interval(row, level=level, seed=seed)
        wins, ties, losses = wins_ties_losses(row)
        comparisons.append(Comparison(float(row.mean()), low, high, p, float(corrected), wins, ties, losses))
    return comparisons


def _corrected_levels(levels: tuple[float, float], means_B: np.ndarray, values_Q: np.ndarray) -> tuple[float, float]:
    """Efron's bias-corrected and accelerated levels, with the jackknife estimate of the acceleration of a mean."""
    normal, mean = NormalDist(), values_Q.mean()
    below = (np.mean(means_B < mean) + np.mean(means_B <= mean)) / 2
    bias = normal.inv_cdf(float(np.clip(below, 1 / (2 * len(means_B)), 1 - 1 / (2 * len(means_B)))))
    centered = (values_Q - mean) / max(len(values_Q) - 1, 1)  # mean of all minus mean without one
    acceleration = float((centered**3).sum() / (6 * (centered**2).sum() ** 1.5))

    def corrected(level: float) -> float:
        z = bias + normal.inv_cdf(level)
        return normal.cdf(bias + z / (1 - acceleration * z))

    return corrected(levels[0]), corrected(levels[1])


def _row(values: npt.ArrayLike) -> np.ndarray:
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or len(row) == 0 or not np.isfinite(row).all():
        raise ValueError(f"expected a vector of finite differences, at least one, not shape {row.shape}")
    return row

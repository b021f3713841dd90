"""Fusing the two ranked lists of a hybrid search: by normalized scores (linear, dbsf, rsf), or by reciprocal rank.

A convex combination of normalized scores (Bruch, Gai & Ingber 2023, arXiv 2210.11934) beats reciprocal rank fusion
(Cormack, Clarke & Buettcher 2009, doi 10.1145/1571941.1572114) and needs few queries to tune. The scale of a list is
its standard deviation (Montague & Aslam 2001, doi 10.1145/502585.502657), so a hit that stands out from all others,
as the only text with a rare word does, counts for more than the first among equals. "dbsf" and "rsf" are
distribution-based and relative score fusion, by the names and formulas of Qdrant, Weaviate and mteb.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fusion = Literal["linear", "dbsf", "rsf", "rrf"]
"""How a hybrid search fuses its lists; all but "rrf" have a weight."""
RRF_K = 60
DEPTH = 100
"""Number of top results that determine a list's scale, so that scores do not depend on the list's length."""
VECTOR_WEIGHT = 0.65
"""Chosen on dev queries of six data sets: docs/indexing.md, "Hybrid search"."""
DEVIATIONS = 10.0
"""No score of a hundred is more standard deviations from their mean: a single text with a word gets 1, the others 0."""
LEAST_DEVIATION = 0.01
"""Minimum standard deviation of cosines. The top hundred of a query have 0.02 to 0.06; less, among a few chunks, is no
evidence."""
LEAST_SHARE = 0.02
"""Minimum standard deviation of BM25 scores, as a share of the best score."""
DBSF_DEVIATIONS = 3.0
"""DBSF: 0 and 1 are so many standard deviations below and above the mean."""
ALL_EQUAL = 0.5
"""DBSF and RSF: the normalized score of equal scores, which have no scale."""

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Scale:
    """Normalizes the scores of a list: the best becomes 1, `lowest` and anything below or absent the minimum."""

    best: float
    lowest: float
    deviation: float

    @classmethod
    def of(cls, best_scores: Sequence[float], least_deviation: float) -> Scale:
        """The scale of scores in descending order, at least one."""
        mean = math.fsum(best_scores) / len(best_scores)
        variance = math.fsum((score - mean) ** 2 for score in best_scores) / len(best_scores)
        return cls(best_scores[0], best_scores[-1], max(math.sqrt(variance), least_deviation))

    def normalize(self, score: float | None) -> float:
        """1 minus the distance from the best in units of DEVIATIONS standard deviations, 0 to 1; `score` is None if
        absent."""
        below = self.best - max(self.lowest if score is None else score, self.lowest)
        return max(1.0 - below / (DEVIATIONS * self.deviation), 0.0) if below > 0.0 else 1.0


def fuse_scores(
    cosines: Scores, bm25: Scores, weight: float = VECTOR_WEIGHT, depth: int = DEPTH
) -> list[tuple[str, float]]:
    """Fuse two lists of one query: weight * cosine + (1 - weight) * BM25 score, both normalized.

    The best of a list becomes 1; the top `depth` determine its scale. Ids missing from a list get the score of the last
    of these. If fewer texts share a word with the query, the others have a BM25 score of 0; if none does, the words
    contribute 0 for all.

    Args:
        cosines: id -> cosine, of the nearest.
        bm25: id -> BM25 score above 0, of the best.
        weight: weight of the vectors, 0 to 1.
        depth: number of top results that determine a list's scale.

    Returns:
        (id, fused score from 0 to 1), best first; ties by larger cosine, then BM25 score, then id.
    """
    near = sorted(cosines.values(), reverse=True)[:depth]
    words = sorted(bm25.values(), reverse=True)[:depth]
    words += [0.0] * (min(depth, max(len(cosines), len(bm25))) - len(words))
    near_scale = Scale.of(near, LEAST_DEVIATION) if near else None
    words_scale = Scale.of(words, LEAST_SHARE * words[0]) if bm25 else None
    fused = {
        key: (weight * near_scale.normalize(cosines.get(key)) if near_scale else 0.0)
        + ((1.0 - weight) * words_scale.normalize(bm25.get(key)) if words_scale else 0.0)
        for key in {**cosines, **bm25}
    }
    return _in_order(fused, cosines, bm25)


def fuse(
    method: Fusion, cosines: Scores, bm25: Scores, weight: float = VECTOR_WEIGHT, depth: int = DEPTH
) -> list[tuple[str, float]]:
    """Fuse two lists of one query by a method's name.

    Args:
        cosines, bm25, weight, depth: as for `fuse_scores`; "rrf" has no weight, and ranks whole lists.

    Returns:
        (id, fused score), best first. The scores of all methods but "rrf" are from 0 to 1.
    """
    if method == "linear":
        return fuse_scores(cosines, bm25, weight, depth)
    if method == "rrf":
        return reciprocal_rank_fusion([_best(cosines, len(cosines)), _best(bm25, len(bm25))])
    normalize = distribution_based if method == "dbsf" else relative_scores
    near, words = (normalize({key: scores[key] for key in _best(scores, depth)}) for scores in (cosines, bm25))
    fused = {key: weight * near.get(key, 0.0) + (1.0 - weight) * words.get(key, 0.0) for key in {**cosines, **bm25}}
    return _in_order(fused, cosines, bm25)


def distribution_based(scores: Scores) -> dict[str, float]:
    """The normalized scores of DBSF: 0 is three standard deviations below the mean, 1 three above; others are cut off.

    Mazzeo 2023, "Distribution-Based Score Fusion"; as in mteb, the variance is the population's.
    """
    if not scores:
        return {}
    mean = math.fsum(scores.values()) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores.values()) / len(scores))
    if deviation < 1e-9:
        return dict.fromkeys(scores, ALL_EQUAL)
    low, width = mean - DBSF_DEVIATIONS * deviation, 2 * DBSF_DEVIATIONS * deviation
    return {key: min(max((score - low) / width, 0.0), 1.0) for key, score in scores.items()}


def relative_scores(scores: Scores) -> dict[str, float]:
    """The normalized scores of RSF: the lowest is 0, the highest 1."""
    if not scores:
        return {}
    low, high = min(scores.values()), max(scores.values())
    if high == low:
        return dict.fromkeys(scores, ALL_EQUAL)
    return {key: (score - low) / (high - low) for key, score in scores.items()}


def _best(scores: Scores, depth: int) -> list[str]:
    """The ids of the top `depth`, best first, equal scores by id."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:depth]


def _in_order(fused: Scores, cosines: Scores, bm25: Scores) -> list[tuple[str, float]]:
    """Best first; ties by larger cosine, then BM25 score, then id."""
    nowhere = -math.inf
    order = sorted(fused, key=lambda key: (-fused[key], -cosines.get(key, nowhere), -bm25.get(key, nowhere), key))
    return [(key, fused[key]) for key in order]


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], k: int = RRF_K) -> list[tuple[str, float]]:
    """Fuse ranked lists of ids: (id, sum of 1 / (k + rank)), best first, equal scores by id.

    Sums are exact (`math.fsum`), so a tie is a tie whatever the order of the lists.
    """
    parts: dict[str, list[float]] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, start=1):
            parts.setdefault(key, []).append(1.0 / (k + rank))
    scores = {key: math.fsum(found) for key, found in parts.items()}
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))

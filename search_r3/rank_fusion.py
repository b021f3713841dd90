"""Fusing ranked lists of one query: by normalized scores, as a hybrid search does, or by reciprocal rank.

A convex combination of normalized scores (Bruch, Gai & Ingber 2023, arXiv 2210.11934) beats reciprocal rank fusion
(Cormack, Clarke & Buettcher 2009, doi 10.1145/1571941.1572114) and needs few queries to tune. The scale of a list is
its standard deviation (Montague & Aslam 2001, doi 10.1145/502585.502657), so a hit that stands out from all others,
as the only text with a rare word does, counts for more than the first among equals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

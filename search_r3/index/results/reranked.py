"""The hits of a search in the order of a reranker."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from search_r3.errors import InputError
from search_r3.index.run_search import MAX_HITS, Hit, SearchResult
from search_r3.rerankers.base import ReadingLimit, Reranker, nothing

RERANK = "rerank"
"""The name of the reranker's list in a hit's `ranks` and `scores`."""


def check_rerank(rerank: int, k: int) -> None:
    """Raise InputError unless the first `rerank` hits can be reranked for the best `k`."""
    if isinstance(rerank, bool) or not isinstance(rerank, int) or not k <= rerank <= MAX_HITS:
        raise InputError(
            f"rerank is {rerank}; give how many hits to rerank, from k ({k}) to {MAX_HITS:,}: the best {k} are returned"
        )


def rerank_hits(
    result: SearchResult,
    reranker: Reranker,
    k: int,
    *,
    total_tokens: int | None = None,
    between: Callable[[], None] = nothing,
) -> SearchResult:
    """The best `k` hits of `result` by `reranker`, which reads the query and each hit's title and text; what the model
    wrote about the query is not read.

    `score` and `scores["rerank"]` are the reranker's relevance, 0 to 1; the other scores and ranks stay.

    Args:
        result: a search with as many hits as are to be reranked.
        total_tokens, between: see `search_r3.rerankers.base`.

    Raises:
        TooManyTokens: the hits have more than `total_tokens`.
    """
    started = time.perf_counter()
    texts = [f"{hit.title} {hit.text}" if hit.title else hit.text for hit in result.hits]
    scores = reranker.score(result.query, texts, limit=ReadingLimit(total_tokens=total_tokens), between=between)
    order = scores.best(k)
    best = result.chosen(order)
    hits = [
        _scored(hit, float(scores.relevance[i]), rank)
        for rank, (i, hit) in enumerate(zip(order, best.hits, strict=True), start=1)
    ]
    took = (time.perf_counter() - started) * 1e3
    timings = replace(result.timings, search_ms=round(result.timings.search_ms + took, 2))
    return replace(best, hits=hits, timings=timings)


def _scored(hit: Hit, relevance: float, rank: int) -> Hit:
    return replace(hit, score=relevance, ranks=hit.ranks | {RERANK: rank}, scores=hit.scores | {RERANK: relevance})

"""Ranking the rows of an index for a query: the backend's ranked lists, fused, one row of each document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from search_r3.hybrid_fusion import HybridFusion
from search_r3.index.backends.index_backend import IndexBackend, Row, Scored
from search_r3.index.results.query_words import without_stop_words
from search_r3.index.row_keys import CONTENT
from search_r3.index.storage.deadline import in_thread

Mode = Literal["hybrid", "vector", "text"]
POOL = 100  # a hybrid search fuses at least this many rows of each list
MAX_POOL = 20_000  # most chunks fetched to find k documents; if a few documents have that many, fewer than k are found

Ordered = tuple[Row, float, dict[str, int], dict[str, float]]  # row, score, ranks, scores


@dataclass(frozen=True)
class RowRanking:
    """The options of a search that rank the rows for a vector; words are searched for those of `corrections` and of
    `reasoning` too."""

    backend: IndexBackend
    query: str
    mode: Mode
    where: str | None
    exact: bool
    chunks: bool
    fusion: HybridFusion
    corrections: str = ""
    reasoning: str = ""
    _by_words: dict[int, Callable[[], list[Scored]]] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The query, with the corrections of its typos."""
        return f"{self.query} {self.corrections}" if self.corrections else self.query

    def begin(self, k: int) -> None:
        """Start searching for the words of a hybrid search on object storage, while the query is embedded."""
        if self.backend.remote and self.mode == "hybrid":
            self._search_text(self._pool(k))

    def best(self, vector: np.ndarray | None, k: int, equal: dict[str, list[Row]] | None = None) -> list[Ordered]:
        """The `k` best rows; without `chunks`, one of each document. With `equal`, one of each text: the others are
        recorded in it, by the id of that row."""
        pool = self._pool(k)
        while True:
            lists: dict[str, list[Scored]] = {}
            by_words = None if self.mode == "vector" else self._search_text(pool)
            if vector is not None:
                lists["vector"] = self.backend.search(vector, pool, self.where, self.exact)
            if by_words is not None:
                lists["text"] = by_words()
            order = _order(lists, self.query, self.fusion)
            order = order if self.chunks else _first_of_each_document(order)
            order = order if equal is None else _first_of_each_text(order, equal)
            if len(order) >= k or pool >= MAX_POOL or all(len(ranking) < pool for ranking in lists.values()):
                return order[:k]
            pool *= 4  # a few documents filled the lists

    def with_reasoning(self, text: str) -> RowRanking:
        """The same, with the words of a reasoning trace."""
        return replace(self, reasoning=text, _by_words={})

    def _pool(self, k: int) -> int:
        return max(POOL, 2 * k) if self.mode == "hybrid" else k

    def _search_text(self, pool: int) -> Callable[[], list[Scored]]:
        """A function that returns the rows for the words. They are the same whatever the vector is, so that a search
        that reads asks for them once; on object storage they are searched for at the same time as the vector."""
        if pool not in self._by_words:
            words = without_stop_words(f"{self.words} {self.reasoning}" if self.reasoning else self.words)

            def search() -> list[Scored]:
                return self.backend.search_text(words, pool, self.where)

            if self.backend.remote:
                wait = in_thread(search, inside=False)
                self._by_words[pool] = lambda: wait(None)
            else:
                found = search()
                self._by_words[pool] = lambda: found
        return self._by_words[pool]


def _order(lists: dict[str, list[Scored]], query: str, fusion: HybridFusion) -> list[Ordered]:
    """The rows of all lists, best first."""
    rows = {row["id"]: row for ranking in lists.values() for row, _ in ranking}
    ranks = {name: {row["id"]: rank for rank, (row, _) in enumerate(ranking, 1)} for name, ranking in lists.items()}
    scores = {name: {row["id"]: float(score) for row, score in ranking} for name, ranking in lists.items()}
    if len(lists) == 1:
        order = list(next(iter(scores.values())).items())
    else:
        order = fusion.fuse(query, scores["vector"], scores["text"])
    return [
        (
            rows[identifier],
            score,
            {name: ranks[name][identifier] for name in lists if identifier in ranks[name]},
            {name: scores[name][identifier] for name in lists if identifier in scores[name]},
        )
        for identifier, score in order
    ]


def _first_of_each_document(order: list[Ordered]) -> list[Ordered]:
    best: dict[str, Ordered] = {}
    for entry in order:
        best.setdefault(entry[0]["document"], entry)
    return list(best.values())


def _first_of_each_text(order: list[Ordered], equal: dict[str, list[Row]]) -> list[Ordered]:
    """One entry for rows with the same text, in the place of the best of them. It is the row with the first id, so that
    two searches show the same one."""
    equal.clear()
    groups: dict[str, list[Ordered]] = {}
    for entry in order:
        groups.setdefault(" ".join(text_of(entry[0]).split()), []).append(entry)
    best = []
    for group in groups.values():
        shown, *others = sorted((entry[0] for entry in group), key=lambda row: row["id"])
        if others:
            equal[shown["id"]] = others
        best.append((shown, *group[0][1:]))
    return best


def text_of(row: Row) -> str:
    """A chunk's text without its title."""
    return row[CONTENT][len(row["title"]) + 1 :] if row["title"] else row[CONTENT]

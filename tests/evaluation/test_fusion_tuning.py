"""Choosing a fusion on judged queries: the best constant, a weight by query where it helps, honest held-out figures."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3.evaluation.fusion_tuning import QueryLists, candidates, documents, fused_documents, tune_fusion
from search_r3.hybrid_fusion import DEFAULT_FUSION, HybridFusion
from search_r3.metrics import run_ndcg, run_recall

CHUNKS = [f"c{i}" for i in range(60)]
DOCUMENT_OF = {chunk: chunk.replace("c", "d") for chunk in CHUNKS}


def lists(seed: int, near: float, words: float, text: str = "a query", reasoned: float | None = None) -> QueryLists:
    """A query whose right document each list finds with its own power."""
    rng = np.random.default_rng(seed)
    right = CHUNKS[seed % 60]

    def scores(power: float, scale: float) -> dict[str, float]:
        values = rng.normal(size=60)
        values[seed % 60] += power
        found = {chunk: float(scale * (5 + value)) for chunk, value in zip(CHUNKS, values, strict=True)}
        return dict(sorted(found.items(), key=lambda item: -item[1])[:40])

    more = None if reasoned is None else scores(reasoned, 3.0)
    return QueryLists(str(seed), text, scores(near, 0.05), scores(words, 3.0), more, {DOCUMENT_OF[right]: 1.0})


def test_the_constant_weight_follows_the_better_list_and_figures_are_those_of_runs() -> None:
    train, held_out = [lists(i, 0.5, 4.0) for i in range(60)], [lists(i, 0.5, 4.0) for i in range(100, 130)]
    ticks: list[int] = []
    found = tune_fusion(train, held_out, DOCUMENT_OF, DEFAULT_FUSION, ticks.append)
    assert sum(ticks) == candidates(train) == 64
    assert found.fusion.vector_weight < 0.5
    assert not found.fusion.reasoning_words
    qrels = {one.id: dict.fromkeys(one.relevant, 1) for one in held_out}
    for name, fusion in (("before", DEFAULT_FUSION), ("after", found.fusion)):
        run = {
            one.id: {key: -float(rank) for rank, key in enumerate(fused_documents(one, fusion, DOCUMENT_OF))}
            for one in held_out
        }
        assert found.held_out[name]["ndcg@10"] == pytest.approx(np.mean([*run_ndcg(run, qrels).values()]))
        assert found.held_out[name]["recall@10"] == pytest.approx(np.mean([*run_recall(run, qrels, 10).values()]))
    assert found.gain > 0
    assert found.better > found.worse
    vectors_better = tune_fusion([lists(i, 4.0, 0.5) for i in range(60)], held_out, DOCUMENT_OF, DEFAULT_FUSION)
    assert vectors_better.fusion.vector_weight > 0.5
    assert vectors_better.gain < 0, "what was chosen on other queries may be worse, and says so"


def test_the_words_of_the_reasoning_are_chosen_where_they_help() -> None:
    train = [lists(i, 1.0, 1.0, reasoned=5.0) for i in range(60)]
    found = tune_fusion(train, [lists(i, 1.0, 1.0, reasoned=5.0) for i in range(100, 130)], DOCUMENT_OF, DEFAULT_FUSION)
    assert found.fusion.reasoning_words
    assert found.gain > 0
    assert candidates(train) == 128


def test_a_weight_by_query_is_learned_where_the_query_tells() -> None:
    long = "a long question in many words that nobody wrote"

    def some(start: int, count: int) -> list[QueryLists]:
        return [lists(i, 3.0, -2.0, long) if i % 2 else lists(i, -2.0, 3.0, "id") for i in range(start, start + count)]

    found = tune_fusion(some(0, 160), some(200, 60), DOCUMENT_OF, DEFAULT_FUSION)
    rule = found.fusion.rule
    assert rule is not None
    constant = HybridFusion(found.fusion.method, found.fusion.vector_weight)
    fixed = tune_fusion(some(0, 160)[:20], some(200, 60), DOCUMENT_OF, constant)
    assert found.held_out["after"]["ndcg@10"] > fixed.held_out["before"]["ndcg@10"] + 0.02


def test_few_queries_give_no_rule() -> None:
    train = [lists(i, 3.0, -2.0, "a b c d e") if i % 2 else lists(i, -2.0, 3.0, "id") for i in range(20)]
    assert tune_fusion(train, train, DOCUMENT_OF, DEFAULT_FUSION).fusion.rule is None


def test_a_document_stands_where_its_best_chunk_does() -> None:
    assert documents(["x1", "y1", "x2"], {"x1": "x", "x2": "x", "y1": "y"}) == ["x", "y"]

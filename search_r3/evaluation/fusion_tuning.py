"""Chooses how an index's hybrid searches fuse their lists, on judged queries whose lists were searched for once.

First the method and one weight, by the mean nDCG@10 of the training queries. Then perhaps a weight by query
(`search_r3.hybrid_fusion.WeightRule`): a logistic regression tells from a query's features whether it would rather have
more weight on the vectors or less, and how far the weight may move is chosen by cross-validation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from search_r3.hybrid_fusion import HybridFusion, WeightRule, query_features
from search_r3.metrics import dcg
from search_r3.model.adaptive_reasoning import GainRegression
from search_r3.rank_fusion import Fusion, Scores, fuse

K = 10
WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))
"""Of the vectors."""
METHODS: tuple[Fusion, ...] = ("linear", "dbsf", "rsf")
STEP = 0.2
"""A query's gain is nDCG@10 with so much more weight on the vectors minus that with so much less."""
SPANS = (0.1, 0.2, 0.3)
"""How far a rule's weight may move from the constant one."""
MIN_DIFFERENT = 30
"""Queries whose nDCG@10 depends on the weight; with fewer there is no rule."""
RULE_GAIN = 0.002
"""nDCG@10 that a rule must gain in cross-validation over the constant weight."""


@dataclass(frozen=True)
class QueryLists:
    """What a judged query's searches found.

    Attributes:
        cosines, bm25: chunk -> score, of the best 100.
        bm25_reasoning: the same for the words of the query and its reasoning; None if it was not reasoned about.
        relevant: document -> grade, above 0.
    """

    id: str
    text: str
    cosines: Scores
    bm25: Scores
    bm25_reasoning: Scores | None
    relevant: Mapping[str, float]

    def words(self, with_reasoning: bool) -> Scores:
        """The list by words, of the query alone or with its reasoning."""
        return self.bm25_reasoning if with_reasoning and self.bm25_reasoning is not None else self.bm25


@dataclass(frozen=True)
class FusionTuning:
    """What tuning chose, and what it gives on the held-out queries.

    Attributes:
        fusion: chosen on the training queries.
        train: nDCG@10 of each method's best constant weight, and of the chosen fusion, on the training queries. That
            of a weight by query is of cross-validation.
        held_out: "vectors", "words", "before", "after" -> measure -> mean.
        better, worse: held-out queries whose nDCG@10 rose and fell.
    """

    fusion: HybridFusion
    train: dict[str, float]
    held_out: dict[str, dict[str, float]]
    better: int
    worse: int

    @property
    def gain(self) -> float:
        """The rise of nDCG@10 on the held-out queries."""
        return self.held_out["after"]["ndcg@10"] - self.held_out["before"]["ndcg@10"]


def tune_fusion(
    train: Sequence[QueryLists],
    held_out: Sequence[QueryLists],
    document_of: Mapping[str, str],
    before: HybridFusion,
    progress: Callable[[int], None] = lambda done: None,
) -> FusionTuning:
    """Choose a fusion on `train`, and measure it and `before` on `held_out`; at least one query each.

    Args:
        document_of: the document of each chunk; a document stands where its best chunk does.
        progress: called with 1 after each constant fusion that was measured.
    """
    constant, values = _best_constant(train, document_of, progress)
    chosen = _by_query(train, document_of, constant, values) or (constant, values[_name(constant)])
    fusion, trained = chosen
    orders: dict[str, list[list[str]]] = {
        "vectors": [documents(list(one.cosines), document_of) for one in held_out],
        "words": [documents(list(one.bm25), document_of) for one in held_out],
        "before": [fused_documents(one, before, document_of) for one in held_out],
        "after": [fused_documents(one, fusion, document_of) for one in held_out],
    }
    ndcg = {name: _ndcg(found, held_out) for name, found in orders.items()}
    means = {
        name: {"ndcg@10": float(ndcg[name].mean()), "recall@10": float(_recall(found, held_out).mean())}
        for name, found in orders.items()
    }
    rise_Q = ndcg["after"] - ndcg["before"]
    best = {name: round(value, 4) for name, value in values.items()} | {"chosen": round(trained, 4)}
    return FusionTuning(fusion, best, means, int((rise_Q > 1e-9).sum()), int((rise_Q < -1e-9).sum()))


def fused_documents(one: QueryLists, fusion: HybridFusion, document_of: Mapping[str, str]) -> list[str]:
    """The documents of a query in the order of a fusion."""
    words = one.words(fusion.reasoning_words)
    return documents([key for key, _ in fusion.fuse(one.text, one.cosines, words)], document_of)


def documents(chunks: Sequence[str], document_of: Mapping[str, str]) -> list[str]:
    """The documents of chunks, each where its first chunk is."""
    return list(dict.fromkeys(document_of[key] for key in chunks))


def _name(fusion: HybridFusion) -> str:
    return fusion.method + (" with the reasoning's words" if fusion.reasoning_words else "")


def _best_constant(
    train: Sequence[QueryLists], document_of: Mapping[str, str], progress: Callable[[int], None]
) -> tuple[HybridFusion, dict[str, float]]:
    """The best method and weight, and the mean nDCG@10 of each method at its best weight."""
    found: dict[str, tuple[float, HybridFusion]] = {}
    for fusion in _constant_fusions(train):
        value = float(_ndcg([fused_documents(one, fusion, document_of) for one in train], train).mean())
        name = _name(fusion)
        if name not in found or value > found[name][0]:
            found[name] = value, fusion
        progress(1)
    best = max(found.values(), key=lambda pair: pair[0])[1]
    return best, {name: value for name, (value, _) in found.items()}


def candidates(train: Sequence[QueryLists]) -> int:
    """The number of constant fusions that `tune_fusion` measures."""
    return len(_constant_fusions(train))


def _constant_fusions(train: Sequence[QueryLists]) -> list[HybridFusion]:
    reasoned = [False, True] if any(one.bm25_reasoning is not None for one in train) else [False]
    kinds: list[tuple[Fusion, float]] = [*product(METHODS, WEIGHTS), ("rrf", WEIGHTS[-1])]
    return [HybridFusion(method, weight, reasoning_words=words) for words, (method, weight) in product(reasoned, kinds)]


def _by_query(
    train: Sequence[QueryLists], document_of: Mapping[str, str], constant: HybridFusion, values: Mapping[str, float]
) -> tuple[HybridFusion, float] | None:
    """The constant fusion with a weight by query, and its nDCG@10 in cross-validation; None if that is no better."""
    if constant.method == "rrf":
        return None
    lists = [(one, one.words(constant.reasoning_words)) for one in train]

    def at(weight_Q: Sequence[float]) -> np.ndarray:
        orders = [
            documents([key for key, _ in fuse(constant.method, one.cosines, words, weight)], document_of)
            for (one, words), weight in zip(lists, weight_Q, strict=True)
        ]
        return _ndcg(orders, train)

    middle = constant.vector_weight
    more, less = (at([min(max(middle + step, 0.0), 1.0)] * len(train)) for step in (STEP, -STEP))
    gain_Q = more - less
    if int((np.abs(gain_Q) > 1e-9).sum()) < MIN_DIFFERENT:
        return None
    features_QF = np.array([query_features(one.text, one.cosines, words) for one, words in lists])
    share_Q = 0.5 * (
        1.0 + np.tanh(0.5 * GainRegression.unseen_logits(features_QF, gain_Q, seed=0))
    )  # the logistic function
    ranges = [(max(middle - span, 0.0), min(middle + span, 1.0)) for span in SPANS]
    reached = [float(at([low + (high - low) * share for share in share_Q]).mean()) for low, high in ranges]
    best = max(reached)
    if best < values[_name(constant)] + RULE_GAIN:
        return None
    whole = GainRegression.fit(features_QF, gain_Q)
    low, high = ranges[reached.index(best)]
    weights, mean, scale = (tuple(part.tolist()) for part in (whole.weights_F, whole.mean_F, whole.scale_F))
    rule = WeightRule(weights, mean, scale, whole.bias, round(low, 4), round(high, 4))
    return replace(constant, rule=rule), best


def _ndcg(orders: Sequence[Sequence[str]], queries: Sequence[QueryLists]) -> np.ndarray:
    """nDCG@10 of each query, float64 (Q,)."""
    pairs = zip(orders, queries, strict=True)
    return np.array([_ndcg_of(order, one.relevant) for order, one in pairs])


def _ndcg_of(order: Sequence[str], relevant: Mapping[str, float]) -> float:
    ideal = dcg(sorted(relevant.values(), reverse=True), K)
    return float(dcg([relevant.get(document, 0.0) for document in order[:K]], K) / ideal)


def _recall(orders: Sequence[Sequence[str]], queries: Sequence[QueryLists]) -> np.ndarray:
    """Recall@10 of each query, float64 (Q,)."""
    pairs = zip(orders, queries, strict=True)
    return np.array([sum(name in one.relevant for name in order[:K]) / len(one.relevant) for order, one in pairs])

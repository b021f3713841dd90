"""How the hybrid searches of an index fuse their lists: the method, its weight, and perhaps a weight by query.

The default is that of `rank_fusion`; `search-r3 tune` chooses another on judged queries and stores it with the index.
That a query's best weight can be told from the query itself is from DAT (Hsu & Tzeng 2025, arXiv 2503.23013); the
features are those of query performance prediction (Shtok et al. 2012).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from search_r3.rank_fusion import DEPTH, VECTOR_WEIGHT, Fusion, Scores, fuse

FORMAT = 1
FEATURES = (
    "query_words", "agreement", "nearest_words", "first_cosine",
    "cosine", "cosine_margin", "cosine_entropy", "words_margin", "words_entropy",
)  # fmt: skip
FEATURE_DEPTH = 10
"""Number of top results that the features look at."""
TEMPERATURE = 0.05
"""Temperature of the softmax over cosines, as in `search_r3.model.adaptive_reasoning`."""


@dataclass(frozen=True)
class WeightRule:
    """A weight of the vectors by query: from `low` to `high`, the nearer to `high` the likelier vectors are better.

    weight = low + (high - low) * sigmoid(bias + weights . (features - mean) / scale)

    Attributes:
        weights, mean, scale: one number for each of FEATURES.
    """

    weights: tuple[float, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    bias: float
    low: float
    high: float

    def weight(self, features: Sequence[float]) -> float:
        """The weight of the vectors for a query with these `query_features`, `low` to `high`."""
        terms = zip(features, self.mean, self.scale, self.weights, strict=True)
        logit = self.bias + sum((value - mean) / scale * weight for value, mean, scale, weight in terms)
        share = 0.5 * (1.0 + math.tanh(0.5 * logit))  # the logistic function, without overflow
        return self.low + (self.high - self.low) * share


@dataclass(frozen=True)
class HybridFusion:
    """How two lists are fused.

    Attributes:
        method: see `search_r3.rank_fusion.fuse`.
        vector_weight: the weight of the vectors, 0 to 1, if there is no `rule`.
        rule: sets the weight by query.
        reasoning_words: the words of the reasoning are searched for too.
        contract_hash: contract of the model that it was tuned for; "" for any.
        about: where it was tuned and what it reached there, for information.
    """

    method: Fusion = "linear"
    vector_weight: float = VECTOR_WEIGHT
    rule: WeightRule | None = None
    reasoning_words: bool = False
    contract_hash: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    def fuse(self, query: str, cosines: Scores, bm25: Scores) -> list[tuple[str, float]]:
        """(id, fused score), best first; `search_r3.rank_fusion.fuse` describes the arguments."""
        weight = self.vector_weight if self.rule is None else self.rule.weight(query_features(query, cosines, bm25))
        return fuse(self.method, cosines, bm25, weight)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"format": FORMAT, "features": FEATURES, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> HybridFusion | None:
        """What `to_json` wrote; None if another version did, or it is damaged."""
        try:
            record = json.loads(text)
            if record.pop("format") != FORMAT or tuple(record.pop("features")) != FEATURES:
                return None
            if record["rule"] is not None:
                rule: dict[str, Any] = {
                    name: tuple(map(float, value)) if isinstance(value, list) else float(value)
                    for name, value in record["rule"].items()
                }
                record["rule"] = WeightRule(**rule)
            found = cls(**record)
            return found if found._is_valid() else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _is_valid(self) -> bool:
        rule = self.rule
        weights = [self.vector_weight] if rule is None else [self.vector_weight, rule.low, rule.high]
        numbers = [] if rule is None else [*rule.weights, *rule.mean, *rule.scale, rule.bias]
        lengths = set() if rule is None else {len(rule.weights), len(rule.mean), len(rule.scale)}
        return (
            self.method in get_args(Fusion)
            and all(0 <= weight <= 1 for weight in weights)
            and all(math.isfinite(number) for number in numbers)
            and lengths <= {len(FEATURES)}
            and (rule is None or 0 not in rule.scale)
        )

    def __str__(self) -> str:
        if self.method == "rrf":
            said = "rrf"
        elif self.rule is None:
            said = f"{self.method}, weight of the vectors {self.vector_weight:g}"
        else:
            said = f"{self.method}, weight of the vectors {self.rule.low:g} to {self.rule.high:g} by query"
        return said + (", the reasoning's words searched for too" if self.reasoning_words else "")


DEFAULT_FUSION = HybridFusion()


def query_features(query: str, cosines: Scores, bm25: Scores) -> tuple[float, ...]:
    """The FEATURES of a query, by its text and the top DEPTH of both lists.

    query_words: the logarithm of 1 + its number of distinct words. agreement: the share of the ten nearest that are
    among the ten best by words. nearest_words: the BM25 score of the nearest, relative to the best one.
    first_cosine: the cosine of the best by words, relative to the best one, from 0 (as the last of the list) to 1.
    cosine, cosine_margin: the best cosine, and by how much it exceeds the second. cosine_entropy: that of the ten
    best's softmax, divided by its maximum. words_margin, words_entropy: the same of BM25 scores, divided by the
    best and by their sum. A feature that needs a hit more than there are is 0.
    """
    near = sorted(cosines, key=lambda key: (-cosines[key], key))[:DEPTH]
    first = sorted(bm25, key=lambda key: (-bm25[key], key))[:DEPTH]
    top_near, top_first = near[:FEATURE_DEPTH], first[:FEATURE_DEPTH]
    agreement = len({*top_near} & {*top_first}) / FEATURE_DEPTH
    nearest_words = first_cosine = 0.0
    if near and first:
        nearest_words = bm25.get(near[0], 0.0) / bm25[first[0]]
        best, last = cosines[near[0]], cosines[near[-1]]
        if best > last:
            first_cosine = (max(cosines.get(first[0], last), last) - best) / (best - last) + 1.0
    cosine = [cosines[key] for key in top_near]
    words = [bm25[key] for key in top_first]
    softmax = [math.exp((value - cosine[0]) / TEMPERATURE) for value in cosine]
    return (
        math.log1p(len(set(query.lower().split()))),
        agreement,
        nearest_words,
        first_cosine,
        cosine[0] if cosine else 0.0,
        cosine[0] - cosine[1] if len(cosine) > 1 else 0.0,
        _entropy(softmax),
        1.0 - words[1] / words[0] if len(words) > 1 else 0.0,
        _entropy(words),
    )


def _entropy(parts: Sequence[float]) -> float:
    """The entropy of positive parts of a whole, divided by its maximum; 0 for fewer than two."""
    if len(parts) < 2:
        return 0.0
    whole = math.fsum(parts)
    shares = [part / whole for part in parts if part > 0]
    return -math.fsum(share * math.log(share) for share in shares) / math.log(len(parts))

"""Adaptive reasoning, `reasoning="auto"`: whether to reason about a query is predicted from its direct search's scores.

A logistic regression on four features of the best cosines (how high, how far apart, how even), fitted to where
reasoning helped on dev queries and stored as JSON next to the adapter. The idea of reasoning only about queries that
need it is from AdaQR (arXiv 2510.21727); the spread of scores as an indicator of query difficulty is older (Shtok et
al. 2012).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.optional import require

ADAPTIVE_FILE = "adaptive.json"
FORMAT = 1
FEATURES = ("top", "margin", "spread", "entropy")
DEPTH = 10
TEMPERATURE = 0.05
"""Temperature of the softmax whose entropy is a feature: the upper end of what the contrastive loss uses."""
RIDGE = 1.0
"""Penalty on the standardized weights: the modes differ on few dev queries, so the rule must be regularized."""
BIAS_FEATURE = 10.0
"""Value of the constant feature. It divides the penalty on the bias by its square, which makes it small but not 0: all
queries may be of one class."""
FOLDS = 5
MIN_DIFFERENT = 8
"""Minimum number of queries on which the two modes differ; fewer than two per feature would overfit."""
ALWAYS, NEVER = -1e9, 1e9


@dataclass(frozen=True)
class AdaptiveRule:
    """Reason where `bias + weights . (features - mean) / scale >= threshold`.

    Attributes:
        contract_hash: contract of the model whose cosines the rule was fitted on; it applies to no other model.
        weights, mean, scale: one number per feature in FEATURES.
        bias: bias of the regression; at threshold 0 the rule reasons wherever it expects a gain.
        threshold: chosen for the desired share of the gain; ALWAYS or NEVER if that is best.
        depth: number of top scores that are used.
        temperature: temperature of the softmax whose entropy is a feature.
        about: where the rule was fitted and what it reached there, for information.
    """

    contract_hash: str
    weights: tuple[float, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    bias: float
    threshold: float
    depth: int = DEPTH
    temperature: float = TEMPERATURE
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        scores_QK: npt.ArrayLike,
        differences_Q: npt.ArrayLike,
        *,
        contract_hash: str,
        target: float = 0.95,
        depth: int = DEPTH,
        seed: int = 0,
        about: dict[str, Any] | None = None,
    ) -> AdaptiveRule:
        """Fit the rule to queries that were searched both ways.

        The regression separates queries that reasoning helped from those that it harmed, each weighted by the size of
        the difference. The threshold is the one with the least reasoning that reaches `target` of the whole gain, by
        the predictions of models that had not seen the query (FOLDS folds). If reasoning everywhere gains nothing, it
        is the threshold with the largest gain.

        Args:
            scores_QK: cosines of the direct search, best first, (Q, K).
            differences_Q: the measure with reasoning minus that without, (Q,).
            contract_hash: contract of the model.
            target: fraction of the gain of reasoning everywhere, above 0 and at most 1.
            depth: number of top scores to use.
            seed: seed of the folds.
            about: stored in the rule, for information.

        Raises:
            InputError: too few queries differ, shapes or the target are invalid, or scikit-learn is not installed.
        """
        features_QF = score_features(scores_QK, depth, TEMPERATURE)
        gains_Q = np.asarray(differences_Q, dtype=np.float64)
        if gains_Q.shape != (len(features_QF),) or not np.isfinite(gains_Q).all():
            raise InputError(
                f"{len(features_QF)} rows of scores and differences of shape {gains_Q.shape}; give one difference "
                "per row"
            )
        if not 0 < target <= 1:
            raise InputError(f"target must be above 0 and at most 1, got {target}")
        different = int(np.sum(np.abs(gains_Q) > 1e-9))
        if different < MIN_DIFFERENT:
            raise InputError(
                f"reasoning changed {different} of {len(gains_Q)} queries; the rule needs at least {MIN_DIFFERENT}: "
                "give more dev queries"
            )
        unseen_Q = GainRegression.unseen_logits(features_QF, gains_Q, seed)
        whole = GainRegression.fit(features_QF, gains_Q)
        count = _fewest(unseen_Q, gains_Q, target)
        seen_Q = np.sort(whole.logits(features_QF))[::-1]
        if 0 < count < len(gains_Q):
            threshold = float((seen_Q[count - 1] + seen_Q[count]) / 2)
        else:
            threshold = NEVER if count == 0 else ALWAYS
        return cls(
            contract_hash=contract_hash,
            weights=tuple(whole.weights_F.tolist()),
            mean=tuple(whole.mean_F.tolist()),
            scale=tuple(whole.scale_F.tolist()),
            bias=whole.bias,
            threshold=threshold,
            depth=depth,
            about={"queries": len(gains_Q), "different": different, "target": target, **(about or {})},
        )

    def priority(self, scores_QK: npt.ArrayLike) -> np.ndarray:
        """The regression's logit for each query, float64 (Q,): the higher, the more reasoning should help."""
        features_QF = score_features(scores_QK, self.depth, self.temperature)
        return (features_QF - self.mean) / self.scale @ np.array(self.weights) + self.bias

    def decide(self, scores_QK: npt.ArrayLike) -> np.ndarray:
        """Which queries to reason about, bool (Q,), given the cosines of their direct search, best first, (Q, K).

        Raises:
            InputError: the scores are not a matrix with columns, or a score is not finite.
        """
        return self.priority(scores_QK) >= self.threshold

    def save(self, path: str | Path) -> None:
        """Write the rule as JSON, atomically. `SearchR3` loads the file ADAPTIVE_FILE of an adapter's folder."""
        record = {"format": FORMAT, "features": FEATURES, **asdict(self)}
        atomic_write_text(path, json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, contract_hash: str | None = None) -> AdaptiveRule:
        """Read a rule.

        Args:
            contract_hash: contract of the model that will use the rule; None skips the check.

        Raises:
            InputError: the file is missing, damaged or of another version, or the rule belongs to another model.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            version = record.pop("format"), tuple(record.pop("features"))
            if version != (FORMAT, FEATURES):
                raise InputError(f"{path} was written by another version; fit it again with search-r3 study")
            known = {f.name for f in fields(cls)}
            values: dict[str, Any] = {name: value for name, value in record.items() if name in known}
            values |= {name: tuple(values[name]) for name in ("weights", "mean", "scale")}
            rule = cls(**values)
            numbers = [*rule.weights, *rule.mean, *rule.scale, rule.bias, rule.threshold, rule.temperature]
            lengths = {len(rule.weights), len(rule.mean), len(rule.scale)}
            if lengths != {len(FEATURES)} or not np.isfinite(numbers).all() or rule.depth < 1:
                raise ValueError("numbers are missing or not finite")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not a rule for reasoning ({error}); fit it again with search-r3 study"
            ) from error
        if contract_hash is not None and rule.contract_hash != contract_hash:
            raise InputError(
                f"{path} was fitted on the model with contract {rule.contract_hash[:12]}, not {contract_hash[:12]}; "
                "fit it again with search-r3 study"
            )
        return rule


def rule_of(model: Any) -> AdaptiveRule:
    """The rule of a model, for searches with `reasoning="auto"`.

    Raises:
        InputError: the model has no rule, or its rule is damaged or belongs to another model.
    """
    rule: AdaptiveRule | None = getattr(model, "adaptive_rule", None)
    if rule is None:
        raise InputError(
            f"reasoning auto needs a model with a rule, and {model.name} has none; choose on or off, or fit a rule "
            "with search-r3 study"
        )
    return rule


def score_features(scores_QK: npt.ArrayLike, depth: int = DEPTH, temperature: float = TEMPERATURE) -> np.ndarray:
    """The FEATURES of each query's best scores, float64 (Q, 4).

    top: the best score; margin: the best minus the second; spread: the best minus the mean of the others; entropy: that
    of the softmax, divided by its maximum. Features that need a second score are 0 if there is none.

    Raises:
        InputError: the scores are not a matrix with columns, or a score is not finite.
    """
    scores = np.asarray(scores_QK, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0 or not np.isfinite(scores).all():
        raise InputError(f"scores have shape {scores.shape}; expected a matrix of finite numbers, one row per query")
    best = -np.sort(-scores, axis=1)[:, :depth]
    out = np.zeros((len(best), len(FEATURES)))
    out[:, 0] = best[:, 0]
    if best.shape[1] > 1:
        out[:, 1] = best[:, 0] - best[:, 1]
        out[:, 2] = best[:, 0] - best[:, 1:].mean(axis=1)
        weights = np.exp((best - best[:, :1]) / temperature)
        shares = weights / weights.sum(axis=1, keepdims=True)
        logs = np.log(np.where(shares > 0, shares, 1.0))
        out[:, 3] = -(shares * logs).sum(axis=1) / np.log(best.shape[1])
    return out


@dataclass(frozen=True)
class GainRegression:
    """Whether one way is better than another for a query, by its features.

    Attributes:
        weights_F, mean_F, scale_F: of the standardized features, float64 (F,).
        bias: the logit of a query of average features.
    """

    weights_F: np.ndarray
    mean_F: np.ndarray
    scale_F: np.ndarray
    bias: float

    def logits(self, features_QF: np.ndarray) -> np.ndarray:
        """The logit of P(gain > 0) for each query, float64 (Q,)."""
        return (features_QF - self.mean_F) / self.scale_F @ self.weights_F + self.bias

    @classmethod
    def unseen_logits(cls, features_QF: np.ndarray, gains_Q: np.ndarray, seed: int) -> np.ndarray:
        """`logits` of each query by a model fitted without it, in a cross-validation of FOLDS, float64 (Q,)."""
        unseen_Q = np.empty(len(gains_Q))
        folds_Q = np.random.default_rng(seed).permutation(len(gains_Q)) % FOLDS
        for fold in range(FOLDS):
            test_Q = folds_Q == fold
            model = cls.fit(features_QF[~test_Q], gains_Q[~test_Q])
            unseen_Q[test_Q] = model.logits(features_QF[test_Q])
        return unseen_Q

    @classmethod
    def fit(cls, features_QF: np.ndarray, gains_Q: np.ndarray) -> GainRegression:
        """Ridge logistic regression: P(gain > 0), each query weighted by |gain|, with mean weight 1.

        Raises:
            InputError: scikit-learn is not installed.
        """
        linear_model = require("sklearn.linear_model", "evaluation", "fitting a rule to queries")
        mean_F, scale_F = features_QF.mean(axis=0), features_QF.std(axis=0)
        scale_F = np.where(scale_F > 1e-9, scale_F, 1.0)
        gain_Q = np.abs(gains_Q)
        weight_Q = gain_Q / gain_Q[gain_Q > 0].mean() if (gain_Q > 0).any() else gain_Q
        # The bias is the weight of a constant feature, whose size makes its penalty small. Two rows of weight 0 make
        # sure that both classes occur.
        x = np.column_stack([(features_QF - mean_F) / scale_F, np.full(len(gains_Q), BIAS_FEATURE)])
        x = np.vstack([x, np.zeros((2, x.shape[1]))])
        regression = linear_model.LogisticRegression(
            C=1 / RIDGE, fit_intercept=False, solver="newton-cholesky", tol=1e-9, max_iter=200
        ).fit(x, [*(gains_Q > 0), False, True], sample_weight=[*weight_Q, 0, 0])
        *weights, bias = regression.coef_[0]
        return cls(np.array(weights), mean_F, scale_F, float(bias * BIAS_FEATURE))


def _fewest(priority_Q: np.ndarray, gains_Q: np.ndarray, target: float) -> int:
    """The number of queries, taken by priority, that reaches `target` of the whole gain; if there is no gain, the
    number with the largest one.
    """
    total_C = np.concatenate([[0.0], np.cumsum(gains_Q[np.argsort(-priority_Q, kind="stable")])])
    if total_C[-1] <= 0:
        return int(total_C.argmax())
    return int(np.argmax(total_C >= target * total_C[-1]))

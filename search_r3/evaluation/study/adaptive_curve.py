"""How much of reasoning's gain is kept when only some queries reason: the curve, and the mode `auto` of a study.

The rule is `search_r3.model.adaptive_reasoning.AdaptiveRule`. It is fitted on dev queries if the data set has some, and
otherwise by cross-fitting on the judged queries: each query is decided by a rule that did not see it, and the study
says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from search_r3.data.beir import BeirDataset
from search_r3.data.dev_pools import POOLS, dev_pool
from search_r3.errors import InputError
from search_r3.evaluation.measures import NDCG, measure_run
from search_r3.evaluation.runs import read_run
from search_r3.evaluation.significance import paired
from search_r3.evaluation.study.controls import ControlSystem, StudyContext, mode_paths, study_path
from search_r3.evaluation.suite import evaluate_system, paths
from search_r3.evaluation.systems import Answers
from search_r3.model.adaptive_reasoning import FOLDS, AdaptiveRule
from search_r3.retrievers.dense import exact_search

TARGET = 0.95
"""The share of the gain to reach with as few tokens as possible."""
POINTS = 20
"""Number of steps of the curve in a study's file."""


@dataclass(frozen=True)
class Curve:
    """Quality against the share of queries that reason, queries of the highest priority first.

    Attributes:
        shares: (Q + 1,) from 0 to 1.
        quality: mean of the measure when that share of queries reasons, (Q + 1,).
        best: the same with the queries that gain most first; no rule can be better.
        tokens: share of all reasoning tokens that this takes, (Q + 1,).
    """

    shares: np.ndarray
    quality: np.ndarray
    best: np.ndarray
    tokens: np.ndarray

    def share_for(self, target: float = TARGET) -> float | None:
        """The smallest share of queries that keeps `target` of the full gain; None if there is no gain."""
        index = self._index(target)
        return None if index is None else float(self.shares[index])

    def tokens_for(self, target: float = TARGET) -> float | None:
        """The share of tokens at that share of queries."""
        index = self._index(target)
        return None if index is None else float(self.tokens[index])

    def to_dict(self, points: int = POINTS) -> dict[str, Any]:
        """JSON-ready, at `points` + 1 shares; `random` is the expected quality of a random choice, a straight line."""
        indices = np.unique(np.round(np.linspace(0, len(self.shares) - 1, points + 1)).astype(int))
        line = self.quality[0] + self.shares * (self.quality[-1] - self.quality[0])
        columns = {"shares": self.shares, "quality": self.quality, "best": self.best, "tokens": self.tokens}
        return {name: np.round(values[indices], 6).tolist() for name, values in {**columns, "random": line}.items()}

    def _index(self, target: float) -> int | None:
        gain = self.quality - self.quality[0]
        return int(np.argmax(gain >= target * gain[-1])) if gain[-1] > 1e-12 else None


def reasoning_curve(
    priority_Q: npt.ArrayLike, off_Q: npt.ArrayLike, on_Q: npt.ArrayLike, tokens_Q: npt.ArrayLike | None = None
) -> Curve:
    """The curve when queries reason in the order of their priority.

    Args:
        priority_Q: the highest priority reasons first; equal priorities keep their order.
        off_Q, on_Q: the measure without and with reasoning.
        tokens_Q: reasoning tokens of each query; 1 each by default.

    Raises:
        ValueError: shapes differ, or there are no queries.
    """
    priority, off, on = (np.asarray(row, dtype=np.float64) for row in (priority_Q, off_Q, on_Q))
    tokens = np.ones_like(off) if tokens_Q is None else np.asarray(tokens_Q, dtype=np.float64)
    if not len(off) or any(row.shape != off.shape for row in (priority, on, tokens)):
        raise ValueError(
            f"priority {priority.shape}, off {off.shape}, on {on.shape}, tokens {tokens.shape}: expected one"
        )
    order, gains = np.argsort(-priority, kind="stable"), on - off

    def cumulative(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(values)])

    return Curve(
        shares=np.arange(len(off) + 1) / len(off),
        quality=off.mean() + cumulative(gains[order]) / len(off),
        best=off.mean() + cumulative(np.sort(gains)[::-1]) / len(off),
        tokens=cumulative(tokens[order]) / max(float(tokens.sum()), 1e-12),
    )


def add_adaptive(
    data: BeirDataset,
    split: str,
    context: StudyContext,
    output: str | Path,
    *,
    data_root: str | Path | None = None,
    dev_queries: int = 200,
    force: bool = False,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Fit the rule, run mode `auto`, and describe it; the rule is stored with the study's records as `adaptive.json`.

    Returns:
        the record of mode `auto` and its description for the study; None and the reason if no rule can be fitted.
    """
    on = context.traces()
    tokens_Q = np.array([len(ids) for ids in on.token_ids], dtype=np.float64)
    scores = {mode: _scores(data, context, output, mode) for mode in ("off", "on")}
    off_Q, on_Q = (np.array([scores[mode][qid] for qid in context.queries]) for mode in ("off", "on"))
    cosines_QK = best_cosines(context)
    try:
        if data.name in POOLS and dev_queries:
            rule, fitted_on = _on_dev(data.name, context, data_root, dev_queries), f"{data.name}'s dev queries"
            priority_Q, chosen_Q = rule.priority(cosines_QK), rule.decide(cosines_QK)
        else:
            priority_Q, chosen_Q = cross_fit(cosines_QK, on_Q - off_Q, context.model.contract_hash)
            about = {"dataset": data.name, "split": split, "budget": context.config.budget}
            rule = AdaptiveRule.fit(
                cosines_QK, on_Q - off_Q, contract_hash=context.model.contract_hash, target=TARGET, about=about
            )
            fitted_on = "the judged queries themselves, by cross-fitting"
    except InputError as error:
        return None, {"summary": f"no rule: {error}"}
    rule.save(study_path(output, data.name, context.name).with_suffix("") / "adaptive.json")
    system = _AutoSystem(context, chosen_Q, {"fitted_on": fitted_on})
    record, _ = evaluate_system(
        data,
        split,
        system,
        output,
        None,
        force=force,
        seed=context.config.seed,
        files=mode_paths(output, data.name, context.name, "auto"),
    )
    curve = reasoning_curve(priority_Q, off_Q, on_Q, tokens_Q)
    gain, kept = float((on_Q - off_Q).mean()), float((on_Q - off_Q)[chosen_Q].sum() / len(off_Q))
    share, needed = float(chosen_Q.mean()), curve.share_for()
    return record, {
        "summary": f"{share:.0%} of the queries reason, for {kept:+.4f} of {gain:+.4f}; rule fitted on {fitted_on}",
        "fitted_on": fitted_on,
        "share_of_queries": round(share, 6),
        "share_of_tokens": round(float(tokens_Q[chosen_Q].sum() / max(tokens_Q.sum(), 1e-12)), 6),
        "gain": round(kept, 6),
        "gain_of_on": round(gain, 6),
        "share_of_gain": round(kept / gain, 6) if gain > 1e-12 else None,
        "target": TARGET,
        "share_needed": needed,
        "tokens_needed": curve.tokens_for(),
        "curve": curve.to_dict(),
        "rule": {"weights": rule.weights, "bias": rule.bias, "threshold": rule.threshold, **rule.about},
        "chosen": [int(value) for value in chosen_Q],
    }


def best_cosines(context: StudyContext) -> np.ndarray:
    """The cosines that the rule uses: the best ones of the direct search, float32 (Q, K)."""
    if not context.ignore_identical_ids:
        return exact_search(context.direct_rows, context.document_rows, context.depth)[0]
    ranked = [sorted(scores.values(), reverse=True) for scores in context.answers("off").run.values()]
    return np.array([row[: min(map(len, ranked))] for row in ranked], dtype=np.float32)


def cross_fit(
    scores_QK: np.ndarray, differences_Q: np.ndarray, contract_hash: str, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Each query's priority and decision by a rule fitted on the other folds: float64 (Q,) and bool (Q,).

    A priority is given as a quantile, 0 to 1, among the queries that its rule was fitted on, since logits of different
    rules cannot be compared.
    """
    folds_Q = np.random.default_rng(seed).permutation(len(differences_Q)) % FOLDS
    priority_Q, chosen_Q = np.empty(len(differences_Q)), np.empty(len(differences_Q), dtype=bool)
    for fold in range(FOLDS):
        test_Q = folds_Q == fold
        rule = AdaptiveRule.fit(scores_QK[~test_Q], differences_Q[~test_Q], contract_hash=contract_hash)
        fitted = np.sort(rule.priority(scores_QK[~test_Q]))
        priority_Q[test_Q] = np.searchsorted(fitted, rule.priority(scores_QK[test_Q])) / len(fitted)
        chosen_Q[test_Q] = rule.decide(scores_QK[test_Q])
    return priority_Q, chosen_Q


class _AutoSystem:
    """Mode `auto`: a query's ranking is that of `on` if the rule says so, else that of `off`."""

    def __init__(self, context: StudyContext, chosen_Q: np.ndarray, identity: dict[str, Any]) -> None:
        self.context, self.chosen_Q = context, chosen_Q
        self.name, self.device = f"{context.name}.auto", context.system.device
        chosen = hashlib.sha256(np.packbits(chosen_Q).tobytes()).hexdigest()
        self.identity = ControlSystem(context, "on").identity | {"mode": "auto", "chosen": chosen, **identity}

    def answer(self, documents: Any, queries: Any, k: int, cache: Any) -> Answers:
        """The rankings chosen by the rule, and the mean cost of a query."""
        off, on = self.context.answers("off"), self.context.answers("on")
        chosen = dict(zip(queries, self.chosen_Q.tolist(), strict=True))
        run = {qid: (on if chosen[qid] else off).run[qid] for qid in queries}
        reasoning = [
            record if chosen[record["qid"]] else {"qid": record["qid"], "text": "", "num_tokens": 0, "forced": False}
            for record in on.reasoning or ()
        ]
        share = float(np.mean(self.chosen_Q))
        seconds = off.query_seconds + share * on.query_seconds
        return Answers(run, off.document_seconds, seconds, reasoning)


def _on_dev(name: str, context: StudyContext, data_root: str | Path | None, count: int) -> AdaptiveRule:
    """The rule fitted on a data set's dev queries, with searches in its whole corpus."""
    dev = dev_pool(name, data_root, max_queries=count, max_documents=10**9)
    queries = {qid: dev.queries[qid] for qid in dev.qrels if qid in dev.queries}
    dev_context = StudyContext(
        context.system, context.name, context.documents, queries, context.config,
        depth=context.depth, embeddings=context.embeddings, reasoning_cache=context.reasoning_cache,
        ignore_identical_ids=context.ignore_identical_ids,
    )  # fmt: skip
    dev_context.share_documents(context)
    off, on = (measure_run(dev_context.answers(mode).run, dev.qrels).per_query[NDCG] for mode in ("off", "on"))
    differences = paired(off, on)
    about = {"dataset": dev.name, "budget": context.config.budget, "gain_of_on": round(float(differences.mean()), 6)}
    return AdaptiveRule.fit(
        best_cosines(dev_context), differences, contract_hash=context.model.contract_hash, target=TARGET, about=about
    )


def _scores(data: BeirDataset, context: StudyContext, output: str | Path, mode: str) -> dict[str, float]:
    run = read_run(paths(output, data.name, f"{context.name}.{mode}").run)
    return measure_run(run, data.qrels, data.corpus).per_query[NDCG]

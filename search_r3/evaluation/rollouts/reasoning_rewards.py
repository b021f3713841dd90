"""Rewards of a model's reasoning in a corpus freshly encoded by the model itself, and comparisons of two models.

Pure functions over embeddings and rewards. Source: Search-R3 (arXiv 2510.07048), stage 2, whose metric is the share of
rollouts above 0.5. It is computed for `dcg_scaled` and for `dcg`, since an embedding space in which all cosines are
high inflates the former.

A metric is called KIND.REWARD. Kinds: "sampled", the mean over a query's sampled traces, each scored by its own
embedding; "penalized", the same with the penalty where the embed token had to be forced, as in training; "greedy", the
trace that a search uses; "direct", no reasoning.

Shape suffixes: R rollouts, Q queries, N documents, D dimensions, C columns of a reward (documents and what follows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from search_r3.environment.reward_protocol import RankedRollouts
from search_r3.environment.reward_terms import WeightedRewards
from search_r3.environment.rewards import MISSING_TOKEN_REWARD, REWARDS, missing_token_penalty
from search_r3.evaluation.markdown_table import markdown_table
from search_r3.evaluation.significance import (
    RESAMPLES,
    Comparison,
    bootstrap_interval,
    holm,
    randomization_test,
    wins_ties_losses,
)
from search_r3.ranking import rank_of_best_positive

MEASURED_REWARDS = tuple(name for name, reward in REWARDS.items() if not isinstance(reward, type))
"""The environment's built-in rewards that take no parameters."""
KINDS = ("sampled", "penalized", "greedy", "direct")
METRICS = tuple(f"{kind}.{reward}" for kind in KINDS for reward in MEASURED_REWARDS)
HALF = 0.5
"""The paper's threshold: 69% of its rollouts are above it after stage 2."""
EDGES = tuple(round(MISSING_TOKEN_REWARD + i / 20, 2) for i in range(31))
"""Edges of the histograms' bins, from the missing token's reward to 1. The last bin includes both of its edges."""
DIGITS = 6
"""Decimal places of the values stored for each query, from which comparisons are computed."""
_CELLS = 4_000_000
"""Number of cosines (float32) computed at once, so that memory does not grow with the number of rollouts."""


@dataclass(frozen=True)
class EmbeddingRewards:
    """The rewards of some embeddings, and the rank of the best positive of each.

    Attributes:
        rewards: name of the reward -> float32 (R,).
        rank_R: int64, from 1: the rank of each embedding's best positive in a search of the whole corpus, where ties go
            to the smaller row (in the rewards, to the lower grade); 0 if none can be retrieved.
    """

    rewards: dict[str, np.ndarray]
    rank_R: np.ndarray


def score_embeddings(
    embeddings_RD: np.ndarray,
    query_R: npt.ArrayLike,
    grades_Q: Sequence[Mapping[int, float]],
    documents_ND: np.ndarray,
    *,
    k: int = 10,
    unfindable_Q: Sequence[Sequence[float]] | None = None,
    ignored_Q: Sequence[int | None] | None = None,
) -> EmbeddingRewards:
    """Rank the whole corpus for each embedding, exactly, and reward the ranking.

    Rewards see the ranking alone: the reasoning traces are not passed on, so no reward that reads them is measured.

    Args:
        embeddings_RD, documents_ND: unit rows of one model, float32.
        query_R: for each embedding the index of its query.
        grades_Q: for each query its judged documents: row -> grade.
        k: number of ranks that the rewards consider.
        unfindable_Q: for each query the grades of judged documents that have no embedding (they are empty). They count
            in the ideal ranking but are never retrieved.
        ignored_Q: for each query the row of a document to ignore, or None; if it is judged, it counts in the ideal
            ranking.

    Raises:
        ValueError: shapes that do not fit, or embeddings that are not finite unit rows.
    """
    query_R = np.asarray(query_R, dtype=np.int64)
    lost_Q = unfindable_Q or [()] * len(grades_Q)
    if len(query_R) != len(embeddings_RD) or len(lost_Q) != len(grades_Q):
        raise ValueError(
            f"{len(embeddings_RD)} embeddings and {len(query_R)} query indices, {len(grades_Q)} queries with judgments "
            f"and {len(lost_Q)} lists of empty documents; expected one index per embedding, and one list per query"
        )
    count = len(documents_ND)
    most = max(map(len, lost_Q), default=0)
    # k fillers come before the documents and the empty documents after them, all with the lowest cosine. The fillers
    # have no grade and win the tie, so an empty document never earns anything in the top k of a small corpus.
    fillers = k if most or ignored_Q is not None else 0
    corpus = slice(fillers, fillers + count)
    columns = fillers + count + most
    rewards: dict[str, list[Tensor]] = {name: [] for name in MEASURED_REWARDS}
    functions = {name: WeightedRewards.from_recipe([{"name": name}]) for name in MEASURED_REWARDS}
    ranks = []
    size = max(1, _CELLS // max(1, columns))
    for start in range(0, len(query_R), size):
        part = query_R[start : start + size]
        cosine_RC = torch.full((len(part), columns), -1.0)
        cosine_RC[:, corpus] = torch.from_numpy(embeddings_RD[start : start + size] @ documents_ND.T)
        grade_RC = torch.zeros((len(part), columns))
        for row, query in enumerate(part):
            grades = grades_Q[query]
            columns_of = [fillers + document for document in grades]
            grade_RC[row, columns_of] = torch.tensor(list(grades.values()), dtype=torch.float32)
            grade_RC[row, corpus.stop : corpus.stop + len(lost_Q[query])] = torch.tensor(lost_Q[query])
        ignored_RC = torch.zeros((len(part), columns), dtype=torch.bool)
        for row, query in enumerate(part):
            if ignored_Q is not None and (document := ignored_Q[query]) is not None:
                ignored_RC[row, fillers + document] = True
        cosine_RC.masked_fill_(ignored_RC, -1.0)  # the fillers win the tie
        ranked = RankedRollouts.without_text(cosine_RC, grade_RC, k)
        for name, reward in functions.items():
            rewards[name].append(reward(ranked))
        ranks.append(rank_of_best_positive(cosine_RC[:, corpus], ((grade_RC > 0) & ~ignored_RC)[:, corpus]))
    empty = torch.zeros(0)
    return EmbeddingRewards(
        {name: torch.cat([empty, *parts]).numpy() for name, parts in rewards.items()},
        np.concatenate([np.zeros(0, dtype=np.int64), *ranks]),
    )


def per_query(
    sampled: EmbeddingRewards,
    emitted_R: npt.ArrayLike,
    tokens_R: npt.ArrayLike,
    greedy: EmbeddingRewards,
    direct: EmbeddingRewards,
) -> dict[str, list[float]]:
    """Every metric, and the samples' emission rate and length, as one number per query (the mean over its samples).

    Args:
        sampled: rewards of Q * G rollouts, grouped by query.
        emitted_R: boolean, False where the embed token had to be forced.
        tokens_R: length of each trace in tokens, without the embed token.
        greedy, direct: rewards of Q embeddings each.
    """
    count = len(direct.rank_R)
    rows = _by_metric(sampled, emitted_R, greedy, direct)
    rows |= {"sampled.emission": np.asarray(emitted_R), "sampled.tokens": np.asarray(tokens_R)}
    return {
        name: [round(float(value), DIGITS) for value in row.astype(np.float64).reshape(count, -1).mean(axis=1)]
        for name, row in rows.items()
    }


def penalized(sampled: EmbeddingRewards, emitted_R: npt.ArrayLike) -> dict[str, np.ndarray]:
    """The samples' rewards as in training: the penalty if the embed token was not emitted."""
    emitted = torch.as_tensor(np.asarray(emitted_R))
    return {name: missing_token_penalty(row, emitted).numpy() for name, row in sampled.rewards.items()}


def summarize(
    sampled: EmbeddingRewards, emitted_R: npt.ArrayLike, greedy: EmbeddingRewards, direct: EmbeddingRewards
) -> tuple[dict[str, dict[str, float]], dict[str, list[int]]]:
    """For every metric, over its rollouts: the mean and the share above 0.5; and the histogram's counts, by `EDGES`."""
    rows = {name: row.astype(np.float64) for name, row in _by_metric(sampled, emitted_R, greedy, direct).items()}
    metrics = {
        name: {"mean": round(float(row.mean()), DIGITS), "share_above_half": round(float((row > HALF).mean()), DIGITS)}
        for name, row in rows.items()
    }
    return metrics, {name: np.histogram(row, EDGES)[0].tolist() for name, row in rows.items()}


def _by_metric(
    sampled: EmbeddingRewards, emitted_R: npt.ArrayLike, greedy: EmbeddingRewards, direct: EmbeddingRewards
) -> dict[str, np.ndarray]:
    """The values of every metric of `METRICS`, one per embedding."""
    by_kind = {
        "sampled": sampled.rewards,
        "penalized": penalized(sampled, emitted_R),
        "greedy": greedy.rewards,
        "direct": direct.rewards,
    }
    return {f"{kind}.{name}": by_kind[kind][name] for kind in KINDS for name in MEASURED_REWARDS}


def compare(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], seed: int = 0
) -> tuple[dict[str, Comparison], dict[str, list[float]]]:
    """After against before on the same queries: a comparison for every metric, and its differences by query.

    The interval is the percentile bootstrap over queries, the test is the paired randomization test, and `p_corrected`
    is corrected over all metrics (Holm).

    Args:
        before, after: metric -> one number per query, in the same order of queries.

    Raises:
        ValueError: the numbers of queries differ, or are 0.
    """
    rows = {name: np.asarray(after[name], float) - np.asarray(before[name], float) for name in METRICS}
    raw = {name: randomization_test(row, seed=seed) for name, row in rows.items()}
    corrected = dict(zip(raw, holm(list(raw.values())), strict=True))
    comparisons = {}
    for name, row in rows.items():
        low, high = bootstrap_interval(row, resamples=RESAMPLES, seed=seed, method="percentile")
        wins, ties, losses = wins_ties_losses(row)
        p = raw[name], float(corrected[name])
        comparisons[name] = Comparison(float(row.mean()), low, high, *p, wins, ties, losses)
    return comparisons, {name: [round(float(value), DIGITS) for value in row] for name, row in rows.items()}


def rewards_markdown(record: Mapping[str, Any]) -> str:
    """A record of `measure_rollouts` as a Markdown table: one model, or before, after and their difference."""
    models = [record["before"], record["after"]] if "comparisons" in record else [record]
    head = ["reward", *(f"{model['system']}: mean" for model in models), *("above 0.5" for _ in models)]
    if len(models) > 1:
        head += ["difference", "95% interval", "p"]
    rows = []
    for name in models[0]["figures"]:
        means = [model["figures"][name]["mean"] for model in models]
        shares = [model["figures"][name]["share_above_half"] for model in models]
        line = [name, *(f"{mean:.4f}" for mean in means), *(f"{share:.1%}" for share in shares)]
        if len(models) > 1:
            row = record["comparisons"][name]
            line += [f"{row['difference']:+.4f}", f"{row['low']:+.4f} to {row['high']:+.4f}", f"{row['p']:.4f}"]
        rows.append(line)
    text = [f"{record['dataset']}: {record['num_queries']:,} queries, {record['num_documents']:,} documents", ""]
    text.append(markdown_table(head, rows))
    for model in models:
        lengths = [
            f"{kind} {model['emission_rate'][kind]:.1%} and {model['mean_tokens'][kind]:.1f} tokens"
            for kind in ("sampled", "greedy")
        ]
        text += [
            "",
            f"{model['system']}: reasoning traces finished within the budget, and their mean length: "
            + ", ".join(lengths),
        ]
    return "\n".join(text)

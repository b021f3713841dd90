"""The built-in rewards as pure functions: how well an embedding ranks the corpus, and the shaping of that number.

Source: Search-R3 (arXiv 2510.07048), stage 2: a DCG of the cosine ranking, "DCG_scaled". The paper does not say how it
is scaled; the formulas here are ours, and `ndcg` is nDCG@k as trec_eval computes it (linear gain). `REWARDS` has the
rewards that a recipe can name; `reward_protocol.Reward` explains how to write another.

Shape suffixes: R rollouts, N documents. Rows are rollouts and columns are documents. The columns must include **every
positive** of each query (the ideal ranking is computed from them) and every document that can be in the top k; other
documents of the corpus may be left out.

Order: descending cosine, compared in float32. Among equal cosines the *lower grade* comes first, so that ties are never
an advantage and an embedding space that has collapsed to one point earns nothing (`search_r3.ranking.graded_ranking`).
A grade of 0 or below gains nothing.

All functions take tensors or arrays and return (R,) float32 on the device of the cosines. They compute in float64 and
without gradients: a reward reaches the model only through the log-probabilities of the sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from search_r3.environment.reward_protocol import RankedRollouts
from search_r3.environment.topk import top_k

MISSING_TOKEN_REWARD = -0.5
"""The reward of a rollout without the embed token, which is worse than a miss (0)."""
COSINE_SLACK = 0.01
"""Accepted excess of a cosine over 1: unit rows rounded to bf16 give up to 1.008."""


def dcg_scaled(cos_RN: Any, rel_RN: Any, k: int = 10) -> Tensor:
    """DCG of the ranking with each gain scaled by its cosine, over the ideal DCG without cosines.

        sum_{i=1..k} rel_(i) * clip(cos_(i), 0, 1) / log2(i + 1)   /   sum_{i=1..k} ideal_i / log2(i + 1)

    where (i) is the document at rank i and ideal_i the i-th highest grade of the row.

    Args:
        cos_RN: cosines, float, within [-1, 1] (up to `COSINE_SLACK`, for rounding).
        rel_RN: grades, integers or floats; above 0 is relevant.
        k: rank cutoff.

    Returns:
        (R,) float32 in [0, 1]. 0 if no positive is in the top k, or if there is no positive at all (then every rollout
        of the group earns the same, and the advantages are 0). A positive with a cosine of 0 or below gains nothing,
        whatever its rank: a negative cosine is not similarity.

    Raises:
        ValueError: the arguments are not matrices of equal shape, a value is NaN, a cosine is outside [-1, 1], or k is
            below 1.
    """
    cos_RN, rel_RN = _checked(cos_RN, rel_RN)
    return _ndcg(cos_RN, rel_RN, k, scaled=True).to(torch.float32)


def ndcg(cos_RN: Any, rel_RN: Any, k: int = 10) -> Tensor:
    """nDCG@k, which is `dcg_scaled` without the cosines; recipes call it "dcg". Equal to ir_measures' nDCG@k.

    For arguments, errors and queries without a positive, see `dcg_scaled`. Returns (R,) float32 in [0, 1].
    """
    cos_RN, rel_RN = _checked(cos_RN, rel_RN)
    return _ndcg(cos_RN, rel_RN, k, scaled=False).to(torch.float32)


def margin_rank(cos_RN: Any, rel_RN: Any, k: int = 10, delta: float = 0.0) -> Tensor:
    """nDCG@k plus the margin of the positive over the best negative, which can still grow once the ranking is right.

        nDCG@k + clip(cos+ - cos- - delta, 0, 1)

    cos+ is the highest cosine among the documents with the row's *highest* grade, cos- the highest among those without
    a positive grade; positives with a lower grade are ignored.

    Args:
        delta: the margin up to which nothing is paid, within [-1, 1]. With 0 (our choice; the paper gives no value)
            every lead of the positive is paid.

    Returns:
        (R,) float32 in [0, 2]. The second term is 0 if the row has no positive, or only positives.

    Raises:
        ValueError: as `dcg_scaled`, or `delta` is outside [-1, 1].
    """
    if not (math.isfinite(delta) and -1 <= delta <= 1):
        raise ValueError(f"delta must be from -1 to 1, got {delta}")
    cos_RN, rel_RN = _checked(cos_RN, rel_RN)
    total_R = _ndcg(cos_RN, rel_RN, k, scaled=False)
    if cos_RN.shape[1]:
        best_R1 = rel_RN.amax(dim=1, keepdim=True)
        positive_R = cos_RN.masked_fill((rel_RN != best_R1) | (best_R1 == 0), -math.inf).amax(dim=1)
        negative_R = cos_RN.masked_fill(rel_RN > 0, -math.inf).amax(dim=1)
        both_R = torch.isfinite(positive_R) & torch.isfinite(negative_R)
        margin_R = torch.where(both_R, positive_R.double() - negative_R.double() - delta, 0.0)
        total_R = total_R + margin_R.clamp(0.0, 1.0)
    return total_R.to(torch.float32)


def log_rank(cos_RN: Any, rel_RN: Any, ranks_RN: Any = None, documents: int | None = None) -> Tensor:
    """How far down the ranking the positives are, on a logarithmic scale, mean over all of them.

        mean over positives of   1 - log(rank) / log(documents)

    rank is 1 + the number of documents *without* a positive grade whose cosine is at least the positive's: positives
    do not push each other down, and ties are never an advantage. It has no cutoff, so a positive that climbs from rank
    1,000 to 100 is paid as much as one from 10 to 1, and it counts every piece of evidence, not only the best one.

    Args:
        ranks_RN: these ranks in a corpus of which the columns are a part; only the values of positives are read. None
            ranks the columns.
        documents: size of that corpus; by default, the number of columns.

    Returns:
        (R,) float32 in [0, 1]; 0 if the row has no positive.

    Raises:
        ValueError: as `dcg_scaled`, or a rank is outside [1, documents].

    Source: LREM (arXiv 2510.14321), 1 - log(rank) / log(N) of one positive within a batch; several positives, and
    ranks without the other positives, are our choice.
    """
    cos_RN, rel_RN = _checked(cos_RN, rel_RN)
    positive_RN = rel_RN > 0
    documents = cos_RN.shape[1] if documents is None else documents
    if ranks_RN is None:
        negative_RN = cos_RN.masked_fill(positive_RN, -math.inf).sort(dim=1).values
        below_RN = torch.searchsorted(negative_RN, cos_RN.contiguous(), right=False)  # of the row's N, with positives
        ranks_RN = 1 + cos_RN.shape[1] - below_RN
    ranks_RN = torch.as_tensor(ranks_RN, device=cos_RN.device).to(torch.float64)
    of_positives = ranks_RN[positive_RN]
    if of_positives.numel() and not (of_positives.min() >= 1 and of_positives.max() <= documents):
        raise ValueError(f"a positive's rank must be from 1 to {documents}, the number of documents")
    ranks_RN = torch.where(positive_RN, ranks_RN, 1.0)
    share_RN = 1 - torch.log(ranks_RN) / math.log(max(documents, 2))
    total_R = (share_RN * positive_RN).sum(dim=1)
    return (total_R / positive_RN.sum(dim=1).clamp(min=1)).to(torch.float32)


def missing_token_penalty(rewards_R: Any, emitted_R: Any, penalty: float = MISSING_TOKEN_REWARD) -> Tensor:
    """The reward where `emitted_R` is True, else `penalty`, whatever the forced embedding would have earned.

    Apply it after all other shaping, so that no bonus reduces the penalty.

    Raises:
        ValueError: shapes differ, `emitted_R` is not boolean, a value is NaN, or the penalty is not below 0, the reward
            of a miss.
    """
    if not (math.isfinite(penalty) and penalty < 0):
        raise ValueError(f"the penalty must be a finite number below 0, the reward of a miss, got {penalty}")
    rewards_R = _vector("rewards_R", rewards_R)
    emitted_R = torch.as_tensor(emitted_R, device=rewards_R.device)
    if emitted_R.dtype != torch.bool or emitted_R.shape != rewards_R.shape:
        raise ValueError(
            f"emitted_R must be boolean with the rewards' shape {tuple(rewards_R.shape)}, "
            f"got {emitted_R.dtype} {tuple(emitted_R.shape)}"
        )
    return torch.where(emitted_R, rewards_R, penalty)


def length_shaping(rewards_R: Any, tokens_R: Any, budget: int, free: int = 0, weight: float = 0.05) -> Tensor:
    """Subtract a cost for reasoning tokens: 0 up to `free`, then linear, reaching `weight` at the budget.

        r - weight * clip((tokens - free) / (budget - free), 0, 1)

    With a weight below 0.5, a miss at full length still earns more than a missing token. Source: the soft overlong
    penalty of DAPO (arXiv 2503.14476, equation 13), with our weight.

    Args:
        tokens_R: number of reasoning tokens of each rollout, without the embed token.
        budget: maximum number of tokens of a rollout, above `free`.

    Raises:
        ValueError: shapes differ, a value is NaN, a length, `free` or `weight` is negative, or `budget` is not above
            `free`.
    """
    rewards_R = _vector("rewards_R", rewards_R)
    tokens_R = _vector("tokens_R", tokens_R).to(rewards_R.device)
    if tokens_R.shape != rewards_R.shape:
        raise ValueError(
            f"tokens_R has the shape {tuple(tokens_R.shape)}, rewards_R {tuple(rewards_R.shape)}; they must be equal"
        )
    if free < 0 or budget <= free:
        raise ValueError(f"budget must be above free, and free 0 or more, got budget {budget} and free {free}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be a finite number, 0 or above, got {weight}")
    if bool((tokens_R < 0).any()):
        raise ValueError(f"tokens_R must be 0 or more, got {tokens_R.min().item():g}")
    return rewards_R - weight * ((tokens_R - free) / (budget - free)).clamp(0.0, 1.0)


def gain_over_direct(rewards_R: Any, direct_R: Any, weight: float = 1.0) -> Tensor:
    """Add a bonus in proportion to the gain over the reward of the query's direct embedding.

        r + weight * max(r - direct, 0)

    `r - direct` alone would have no effect: all rollouts of a group share one query, so subtracting its direct reward
    shifts the whole group, and the advantage subtracts the group's mean anyway. The kink at `direct` has one: within a
    group, an improvement above the direct embedding counts 1 + weight times as much as one below it.

    Args:
        direct_R: the reward of the direct embedding of each rollout's query, on the same documents.
        weight: 0 or more. For rewards in [0, m] the result is in [0, m + weight m].

    Raises:
        ValueError: shapes differ, a value is NaN, or the weight is negative.
    """
    rewards_R = _vector("rewards_R", rewards_R)
    direct_R = _vector("direct_R", direct_R).to(rewards_R.device)
    if direct_R.shape != rewards_R.shape:
        raise ValueError(
            f"direct_R has the shape {tuple(direct_R.shape)}, rewards_R {tuple(rewards_R.shape)}; they must be equal"
        )
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be a finite number, 0 or above, got {weight}")
    return rewards_R + weight * (rewards_R - direct_R).clamp(min=0.0)


@dataclass(frozen=True)
class MarginRank:
    """`margin_rank` as a reward for recipes."""

    delta: float = 0.0
    """The lead over the best negative up to which nothing is paid, within [-1, 1]."""

    def __post_init__(self) -> None:
        if not -1 <= self.delta <= 1:
            raise ValueError(f"delta must be from -1 to 1, got {self.delta}")

    def __call__(self, rollouts: RankedRollouts, /) -> Tensor:
        return margin_rank(rollouts.cosines_RN, rollouts.grades_RN, rollouts.k, self.delta)


@dataclass(frozen=True)
class LogRank:
    """`log_rank` as a reward for recipes."""

    needs_ranks: ClassVar[bool] = True

    def __call__(self, rollouts: RankedRollouts, /) -> Tensor:
        return log_rank(rollouts.cosines_RN, rollouts.grades_RN, rollouts.ranks_RN, rollouts.documents)


REWARDS: dict[str, Callable[..., Any]] = {
    "dcg_scaled": lambda rollouts: dcg_scaled(rollouts.cosines_RN, rollouts.grades_RN, rollouts.k),
    "dcg": lambda rollouts: ndcg(rollouts.cosines_RN, rollouts.grades_RN, rollouts.k),
    "margin_rank": MarginRank,
    "log_rank": LogRank,
}
"""Built-in rewards by name: a function, or a class whose fields are the reward's parameters. "dcg" is nDCG@k."""


def _ndcg(cos_RN: Tensor, rel_RN: Tensor, k: int, *, scaled: bool) -> Tensor:
    """nDCG@k, (R,) float64; `scaled` multiplies gains by cosines. `rel_RN` is float64 without negative grades."""
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    by_grade_RN = rel_RN.argsort(dim=1, stable=True)  # in a tie, the lower grade comes first
    top_RK, positions_RK = top_k(cos_RN.gather(1, by_grade_RN), k)
    columns_RK = by_grade_RN.gather(1, positions_RK)
    discount_K = 1.0 / torch.log2(torch.arange(top_RK.shape[1], dtype=torch.float64, device=cos_RN.device) + 2.0)
    gain_RK = rel_RN.gather(1, columns_RK)
    if scaled:
        gain_RK = gain_RK * top_RK.double().clamp(0.0, 1.0)
    dcg_R = (gain_RK * discount_K).sum(dim=1)
    ideal_R = (rel_RN.topk(top_RK.shape[1], dim=1).values * discount_K).sum(dim=1)
    return torch.where(ideal_R > 0, dcg_R / ideal_R.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _checked(cos_RN: Any, rel_RN: Any) -> tuple[Tensor, Tensor]:
    """Cosines in float32, the precision of the order, and grades in float64 with negative ones set to 0."""
    cos_RN = torch.as_tensor(cos_RN).detach()
    rel_RN = torch.as_tensor(rel_RN).detach().to(cos_RN.device)
    if cos_RN.dim() != 2 or cos_RN.shape != rel_RN.shape:
        raise ValueError(
            f"cosines have the shape {tuple(cos_RN.shape)}, grades {tuple(rel_RN.shape)}; "
            "expected two equal (rollouts, documents) matrices"
        )
    cos_RN, rel_RN = cos_RN.to(torch.float32), rel_RN.to(torch.float64)
    if bool(torch.isnan(cos_RN).any()):
        row = int(torch.isnan(cos_RN).any(dim=1).nonzero()[0])
        raise ValueError(f"the cosines of rollout {row} contain NaN; its embedding is broken")
    if cos_RN.numel() and float(cos_RN.abs().max()) > 1 + COSINE_SLACK:
        raise ValueError(f"a cosine is {float(cos_RN.abs().max()):g}; expected -1 to 1: embeddings must be unit rows")
    if not bool(torch.isfinite(rel_RN).all()):
        raise ValueError("the grades contain NaN or infinity; give finite numbers")
    return cos_RN, rel_RN.clamp(min=0.0)


def _vector(name: str, values: Any) -> Tensor:
    vector = torch.as_tensor(values).detach()
    if vector.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got the shape {tuple(vector.shape)}")
    vector = vector.to(torch.float32)
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{name} contains NaN or infinity")
    return vector

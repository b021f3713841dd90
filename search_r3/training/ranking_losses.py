"""Losses over several graded positives of a query: multi-positive InfoNCE, LambdaLoss and ApproxNDCG.

All are pure functions of two (B, M) matrices, the cosines of B queries with M candidates and the candidates' grades. A
grade of 0 is a negative; every candidate with a grade above 0 is a positive. Sources: each function's docstring.

Shape suffixes: B queries, M candidates, P the most positives of a query, D embedding dimensions. As in `losses`, all is
computed in float32 at least, also inside an autocast region.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MU = 10.0
"""The weight of NDCG-Loss2 beside LambdaRank in NDCG-Loss2++: allRank's default."""


def multi_positive(cos_BM: Tensor, grade_BM: Tensor, temperature: float) -> Tensor:
    """InfoNCE with every positive of a query as a target, weighted by its share of the query's grades.

        mean_b  sum_p  g_bp / (sum_m g_bm) * -log( exp(cos_bp / tau) / sum_m exp(cos_bm / tau) )

    With one positive per query it is `losses.info_nce`. The other positives stay in the denominator, so its minimum is
    the entropy of the weights, not 0.

    Args:
        cos_BM: cosines, any float dtype.
        grade_BM: grades of the same candidates, 0 or above, any float dtype; a constant.
        temperature: tau > 0.

    Returns:
        Scalar, float32 (float64 for float64 inputs), averaged over the queries with a positive; 0, still attached to
        the graph, if there is none.

    Raises:
        ValueError: wrong shapes or dtypes, a grade below 0 or not finite, or a temperature not above 0.

    Source: supervised contrastive learning (Khosla et al., arXiv 2004.11362), equation 2, whose weights are equal.
    """
    scores_BM, grade_BM = _checked(cos_BM, grade_BM, temperature)
    weight_BM = grade_BM / grade_BM.sum(1, keepdim=True)
    return -(weight_BM * scores_BM.log_softmax(-1)).sum() / max(len(scores_BM), 1)


def lambda_loss(cos_BM: Tensor, grade_BM: Tensor, temperature: float, mu: float = MU) -> Tensor:
    """A bound of 1 - NDCG over all pairs of candidates with different grades: NDCG-Loss2++, in bits per query.

        mean_b  sum over g_i > g_j of  (rho_ij + mu delta_ij) |G_i - G_j| * -log2 sigmoid((cos_i - cos_j) / tau)
        rho_ij = |1/D(r_i) - 1/D(r_j)|,  delta_ij = |1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)|,  D(r) = log2(1 + r)

    r is a candidate's rank by cosine from 1, G its gain 2^g - 1 divided by the ideal DCG of all candidates. The
    weights are constants: the gradient is that of the log-sigmoids.

    Args:
        cos_BM, grade_BM, temperature: as for `multi_positive`; 1/tau is the paper's sigma.
        mu: weight of delta; 0 is LambdaRank.

    Returns, raises: as `multi_positive`.

    Source: Wang et al., "The LambdaLoss Framework for Ranking Metric Optimization" (CIKM 2018), with the hard
    assignment of ranks.
    """
    scores_BM, grade_BM = _checked(cos_BM, grade_BM, temperature)
    grade_BP, place_BP = _positives(grade_BM)
    ideal_B1 = _ideal_dcg(grade_BP)[:, None]
    rank_BM = _ranks(scores_BM)
    rank_BP1, rank_B1M = rank_BM.gather(1, place_BP)[:, :, None], rank_BM[:, None, :]
    distance_BPM = (rank_BP1 - rank_B1M).abs()
    rho_BPM = (1 / _discount(rank_BP1) - 1 / _discount(rank_B1M)).abs()
    # A candidate and itself have no distance; the pair has no weight, since its grades are equal.
    delta_BPM = 1 / _discount(distance_BPM.clamp(min=1)) - 1 / _discount(distance_BPM + 1)
    gain_BPM = (_gain(grade_BP) / ideal_B1)[:, :, None] - (_gain(grade_BM) / ideal_B1)[:, None, :]
    weight_BPM = (rho_BPM + mu * delta_BPM) * gain_BPM.clamp(min=0)
    margin_BPM = scores_BM.gather(1, place_BP)[:, :, None] - scores_BM[:, None, :]
    return -(weight_BPM * F.logsigmoid(margin_BPM)).sum() / math.log(2) / max(len(scores_BM), 1)


def approx_ndcg(cos_BM: Tensor, grade_BM: Tensor, temperature: float) -> Tensor:
    """1 - NDCG with every rank replaced by a smooth one: in [0, 1], 0 for a perfect ranking with wide margins.

        mean_b  1 - sum_p G_p / log2(1 + r_p),    r_p = 1 + sum over m != p of sigmoid((cos_m - cos_p) / tau)

    G is the gain 2^g - 1 divided by the ideal DCG of all candidates.

    Args:
        cos_BM, grade_BM, temperature: as for `multi_positive`; 1/tau is the paper's alpha.

    Returns, raises: as `multi_positive`.

    Source: Qin, Liu and Li, "A general approximation framework for direct optimization of information retrieval
    measures" (Information Retrieval 13, 2010), section 3.
    """
    scores_BM, grade_BM = _checked(cos_BM, grade_BM, temperature)
    grade_BP, place_BP = _positives(grade_BM)
    behind_BPM = (scores_BM[:, None, :] - scores_BM.gather(1, place_BP)[:, :, None]).sigmoid()
    rank_BP = 0.5 + behind_BPM.sum(-1)  # the candidate itself is in the sum, with 0.5
    dcg_B = (_gain(grade_BP) / _discount(rank_BP)).sum(1)
    return (1 - dcg_B / _ideal_dcg(grade_BP)).sum() / max(len(scores_BM), 1)


RANKING_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "multi_positive": multi_positive,
    "lambda": lambda_loss,
    "approx_ndcg": approx_ndcg,
}
"""The losses by the names that a recipe's `ranking_loss` takes, besides "infonce"."""


def cosines(q_BD: Tensor, d_MD: Tensor) -> Tensor:
    """(B, M) cosines of unit rows, float32 at least, also inside an autocast region."""
    with torch.autocast(device_type=q_BD.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (q_BD.dtype, d_MD.dtype) else torch.float32
        return q_BD.to(dtype) @ d_MD.to(dtype).T


def _checked(cos_BM: Tensor, grade_BM: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The cosines divided by the temperature, and the grades, of the queries that have a positive."""
    if cos_BM.dim() != 2 or grade_BM.shape != cos_BM.shape:
        raise ValueError(
            f"cos_BM and grade_BM must have one shape of two dimensions, got {tuple(cos_BM.shape)} "
            f"and {tuple(grade_BM.shape)}"
        )
    for name, tensor in (("cos_BM", cos_BM), ("grade_BM", grade_BM)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float tensor, got {tensor.dtype}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if not bool((grade_BM.isfinite() & (grade_BM >= 0)).all()):
        raise ValueError("grade_BM must hold finite grades of 0 or above; 0 is a negative")
    dtype = torch.float64 if cos_BM.dtype == torch.float64 else torch.float32
    has_B = (grade_BM > 0).any(1)
    return cos_BM[has_B].to(dtype) / temperature, grade_BM[has_B].detach().to(dtype)


def _positives(grade_BM: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P) grades of each query's positives, the highest first and 0 where it has fewer, and their places in M."""
    most = int((grade_BM > 0).sum(1).max()) if len(grade_BM) else 0
    grade_BP, place_BP = grade_BM.topk(most, dim=1)
    return grade_BP, place_BP


def _ranks(scores_BM: Tensor) -> Tensor:
    """Each candidate's rank from 1, as a float; of equal scores the first candidate ranks higher."""
    order_BM = scores_BM.detach().argsort(dim=1, descending=True, stable=True)
    rank_M = torch.arange(1, scores_BM.shape[1] + 1, device=scores_BM.device, dtype=scores_BM.dtype)
    return torch.empty_like(scores_BM).scatter_(1, order_BM, rank_M.expand_as(scores_BM))


def _gain(grade: Tensor) -> Tensor:
    return torch.exp2(grade) - 1


def _discount(rank: Tensor) -> Tensor:
    return torch.log2(1 + rank)


def _ideal_dcg(grade_BP: Tensor) -> Tensor:
    """(B,) the DCG of the positives in the best order; `grade_BP` is sorted."""
    rank_P = torch.arange(1, grade_BP.shape[1] + 1, device=grade_BP.device, dtype=grade_BP.dtype)
    return (_gain(grade_BP) / _discount(rank_P)).sum(1)

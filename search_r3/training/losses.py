"""Stage 1's losses as pure functions on tensors: contrastive, triplet, cross-entropy, KL to the base, distillation.

Source: Search-R3 (arXiv 2510.07048), stage 1: L = w1 L_SFT + w2 L_KL + w3 L_InfoNCE + w4 L_triplet. The weights, the
temperature and the margin come from the caller; nothing here depends on a model. Soft labels from a teacher, Matryoshka
dimensions, and two measures of an embedding's geometry are additions; docstrings name their sources.

Shape suffixes: B queries, N documents, D embedding dimensions, K negatives of a query, T token positions,
V vocabulary ids. A scalar has none.

Every function computes in float32 at least (bf16 and fp16 inputs are upcast, float64 stays float64), also inside an
autocast region: a cosine rounded to bf16 and divided by a temperature of 0.02 would be off by as much as 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(q_BD: Tensor, d_ND: Tensor, target_B: Tensor, temperature: float, mask_BN: Tensor | None = None) -> Tensor:
    """The contrastive loss of every query against all documents of the batch.

        mean_b  -log( exp(cos(q_b, d_t(b)) / tau)  /  sum_n exp(cos(q_b, d_n) / tau) ),    n not masked for b

    Args:
        q_BD: query embeddings, unit rows, any float dtype.
        d_ND: document embeddings, unit rows: positives, in-batch and hard negatives, rows of other processes.
        target_B: the row of each query's positive in `d_ND`, integers in [0, N).
        temperature: tau > 0 (0.02 to 0.05 is usual).
        mask_BN: boolean; True where a document is a *false* negative of a query (the same document under another
            query, or another relevant document) and is to be left out of that query's denominator.

    Returns:
        Scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: wrong shapes or dtypes, no queries, temperature not above 0, a target outside [0, N), or a mask
            that hides a query's own positive.

    Source: arXiv 2510.07048, L_InfoNCE; masking false negatives is our choice (`None` is the paper's formula).
    """
    _check_rank("q_BD", q_BD, 2)
    _check_rank("d_ND", d_ND, 2)
    queries, documents = q_BD.shape[0], d_ND.shape[0]
    if queries == 0:
        raise ValueError("info_nce needs at least one query, got q_BD with 0 rows")
    if q_BD.shape[1] != d_ND.shape[1]:
        raise ValueError(f"queries have {q_BD.shape[1]} dimensions but documents {d_ND.shape[1]}; they must agree")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    _check_ids("target_B", target_B, (queries,), documents, "documents")
    if mask_BN is not None:
        _check_mask("mask_BN", mask_BN, (queries, documents))
        hidden_B = mask_BN.gather(1, target_B.long().unsqueeze(1)).squeeze(1)
        if bool(hidden_B.any()):
            row = int(hidden_B.nonzero()[0])
            raise ValueError(
                f"mask_BN hides document {int(target_B[row])}, which is the positive of query {row}; "
                "a positive must stay in the denominator"
            )
    with _no_autocast(q_BD):
        q_BD, d_ND = _upcast(q_BD, d_ND)
        logits_BN = q_BD @ d_ND.T / temperature
        if mask_BN is not None:
            logits_BN = logits_BN.masked_fill(mask_BN, -math.inf)
        return F.cross_entropy(logits_BN, target_B.long())


def triplet_margin(
    q_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor, margin: float = 0.15, mask_BK: Tensor | None = None
) -> Tensor:
    """How far a hard negative comes within `margin` of the positive, on average over (query, negative) pairs.

        mean  max(0, cos(q, d-) - cos(q, d+) + margin)

    Args:
        q_BD, positive_BD: embeddings, unit rows, any float dtype.
        negative_BD: unit rows: one negative per query, (B, D), or K, (B, K, D).
        margin: theta >= 0, in cosine units; the paper has a margin but not its value, 0.1 to 0.2 is usual.
        mask_BK: boolean, (B,) or (B, K) as the negatives; True where a negative is *missing* (a padding row) and is
            left out of the mean.

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0, still attached to the graph, if no pair is left.

    Raises:
        ValueError: wrong shapes or dtypes, or a negative or non-finite margin.

    Source: arXiv 2510.07048, L_triplet.
    """
    _check_rank("q_BD", q_BD, 2)
    if positive_BD.shape != q_BD.shape:
        raise ValueError(
            f"positive_BD must have the queries' shape {tuple(q_BD.shape)}, got {tuple(positive_BD.shape)}"
        )
    batch, dimension = q_BD.shape
    shape = negative_BD.shape
    if negative_BD.dim() not in (2, 3) or shape[0] != batch or shape[-1] != dimension:
        raise ValueError(
            f"negatives must have the shape ({batch}, {dimension}) or ({batch}, K, {dimension}), got {tuple(shape)}"
        )
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin must be a finite number, 0 or above, got {margin}")
    if mask_BK is not None:
        _check_mask("mask_BK", mask_BK, tuple(shape[:-1]))
    for name, tensor in (("positive_BD", positive_BD), ("negative_BD", negative_BD)):
        _check_float(name, tensor)
    with _no_autocast(q_BD):
        q_BD, positive_BD, negative_BD = _upcast(q_BD, positive_BD, negative_BD)
        negative_BKD = (
            negative_BD.reshape(batch, -1, dimension)
            if negative_BD.numel()
            else negative_BD.new_zeros(batch, 0, dimension)
        )
        near_BK = (q_BD.unsqueeze(1) * negative_BKD).sum(-1)
        right_B1 = (q_BD * positive_BD).sum(-1, keepdim=True)
        excess_BK = (near_BK - right_B1 + margin).clamp(min=0)
        if mask_BK is not None:
            excess_BK = excess_BK[~mask_BK.reshape(excess_BK.shape)]
        return excess_BK.sum() / max(excess_BK.numel(), 1)


def sft_cross_entropy(logits_TV: Tensor, targets_T: Tensor, keep_T: Tensor | None = None) -> Tensor:
    """Cross-entropy of the next token, averaged over the kept positions.

        mean over kept t of  -log softmax(logits_t)[targets_t]

    Args:
        logits_TV: row t is the prediction *for* `targets_T[t]`: the caller has done the shift by one. Batches are
            flattened to one row per position.
        targets_T: integers in [0, V) wherever kept; elsewhere anything (such as -100).
        keep_T: boolean, True where the position counts (the assistant turn); None keeps all.

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0, still attached to the graph, if nothing is kept.

    Raises:
        ValueError: wrong shapes or dtypes, or a kept target outside [0, V).

    Source: arXiv 2510.07048, L_SFT.
    """
    _check_rank("logits_TV", logits_TV, 2)
    positions, vocabulary = logits_TV.shape
    keep_T = _checked_keep(keep_T, logits_TV)
    if targets_T.shape != (positions,):
        raise ValueError(f"targets_T must have the shape ({positions},), got {tuple(targets_T.shape)}")
    targets_T = targets_T[keep_T]
    _check_ids("targets_T", targets_T, tuple(targets_T.shape), vocabulary, "vocabulary ids")
    with _no_autocast(logits_TV):
        (logits_TV,) = _upcast(logits_TV[keep_T])
        total = F.cross_entropy(logits_TV, targets_T.long(), reduction="sum")
        return total / max(targets_T.numel(), 1)


def kl_to_base(
    logits_TV: Tensor, base_logits_TV: Tensor, keep_T: Tensor | None = None, exclude_ids: Iterable[int] = ()
) -> Tensor:
    """How far the tuned model's next-token distribution has moved from the base's, in nats per kept position.

        mean over kept t of  sum_v p_t(v) (log p_t(v) - log p0_t(v)),   p = tuned, p0 = base

    The excluded ids leave both distributions, which are then renormalized over the rest: the base never emits the
    embed token, and padding rows of the matrix are not tokens, so neither says anything about language ability.

    Args:
        logits_TV: of the tuned model, any float dtype.
        base_logits_TV: of the base model at the same positions; treated as a constant (no gradient flows into it).
        keep_T: boolean, True where the position counts; None keeps all. The caller leaves out the positions whose
            target is the embed token: there the term would fight L_SFT.
        exclude_ids: vocabulary ids to remove (embed token, padding rows).

    Returns:
        Scalar >= 0, float32 (float64 for float64 inputs); 0, still attached to the graph, if nothing is kept.

    Raises:
        ValueError: wrong shapes or dtypes, an excluded id outside [0, V), or every id excluded.

    Source: arXiv 2510.07048, L_KL; the exclusions are our choice (`()` is the paper's formula).
    """
    _check_rank("logits_TV", logits_TV, 2)
    _check_float("base_logits_TV", base_logits_TV)
    if base_logits_TV.shape != logits_TV.shape:
        raise ValueError(
            f"base_logits_TV must have the tuned logits' shape {tuple(logits_TV.shape)}, "
            f"got {tuple(base_logits_TV.shape)}"
        )
    vocabulary = logits_TV.shape[1]
    keep_T = _checked_keep(keep_T, logits_TV)
    excluded = sorted({int(token) for token in exclude_ids})
    if excluded and not (excluded[0] >= 0 and excluded[-1] < vocabulary):
        wrong = excluded[0] if excluded[0] < 0 else excluded[-1]
        raise ValueError(f"exclude_ids has {wrong}, which is outside the vocabulary of {vocabulary} ids")
    if len(excluded) == vocabulary:
        raise ValueError(f"exclude_ids removes all {vocabulary} ids; at least one must stay")
    with _no_autocast(logits_TV):
        logits_TV, base_logits_TV = _upcast(logits_TV[keep_T], base_logits_TV.detach()[keep_T])
        gone_V = torch.zeros(vocabulary, dtype=torch.bool, device=logits_TV.device)
        gone_V[excluded] = True
        log_p_TV = logits_TV.masked_fill(gone_V, -math.inf).log_softmax(-1)
        log_base_TV = base_logits_TV.masked_fill(gone_V, -math.inf).log_softmax(-1)
        # An excluded id has p = 0 and a difference of -inf - -inf: without the fill, 0 * nan would poison the sum.
        difference_TV = (log_p_TV - log_base_TV).masked_fill(gone_V, 0.0)
        return (log_p_TV.exp() * difference_TV).sum() / max(logits_TV.shape[0], 1)


def score_distillation(
    student_BN: Tensor,
    teacher_BN: Tensor,
    temperature: float,
    teacher_temperature: float,
    mask_BN: Tensor | None = None,
) -> Tensor:
    """KL from the student's to a teacher's distribution over each query's candidates, in nats per query.

        mean_b  sum_n p_b(n) (log p_b(n) - log s_b(n)),   p = softmax(teacher / tau_t), s = softmax(student / tau)

    The two distributions need no common scale, only a temperature each: adding a constant to a row, which is the main
    difference between the cosines of two encoders, changes nothing. A constant teacher asks for equal scores.

    Args:
        student_BN: the student's cosines, one row per query and one column per candidate document, any float dtype.
        teacher_BN: the teacher's scores of the same candidates, a constant (no gradient flows into it); NaN where the
            teacher did not score, and that candidate is left out.
        temperature, teacher_temperature: tau and tau_t > 0. The loss is not multiplied by tau^2.
        mask_BN: boolean; True where a candidate is left out of both softmaxes (a padding column).

    Returns:
        Scalar >= 0, float32 (float64 for float64 inputs), averaged over the queries with at least two candidates left
        (with fewer there is nothing to compare); 0, still attached to the graph, if there is no such query.

    Raises:
        ValueError: wrong shapes or dtypes, a temperature not above 0, or an infinite teacher score.

    Source: distillation (Hinton et al., arXiv 1503.02531) over a list of candidates, as RocketQAv2 (arXiv 2110.07367)
    uses it. MarginMSE (arXiv 2010.02666) fits differences of scores instead: it needs a teacher on our scale.
    """
    _check_rank("student_BN", student_BN, 2)
    _check_float("teacher_BN", teacher_BN)
    if teacher_BN.shape != student_BN.shape:
        raise ValueError(
            f"teacher_BN must have the student's shape {tuple(student_BN.shape)}, got {tuple(teacher_BN.shape)}"
        )
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    if mask_BN is not None:
        _check_mask("mask_BN", mask_BN, tuple(student_BN.shape))
    if bool(teacher_BN.isinf().any()):
        raise ValueError("teacher_BN has an infinite score; mark a candidate that the teacher did not score with NaN")
    out_BN = teacher_BN.isnan() if mask_BN is None else teacher_BN.isnan() | mask_BN
    scored_B = (~out_BN).sum(1) >= 2
    out_BN = out_BN[scored_B]
    with _no_autocast(student_BN):
        student_BN, teacher_BN = _upcast(student_BN[scored_B], teacher_BN.detach()[scored_B])
        log_s_BN = (student_BN / temperature).masked_fill(out_BN, -math.inf).log_softmax(-1)
        log_p_BN = (teacher_BN / teacher_temperature).masked_fill(out_BN, -math.inf).log_softmax(-1)
        difference_BN = (log_p_BN - log_s_BN).masked_fill(out_BN, 0.0)  # -inf - -inf, as in kl_to_base
        return (log_p_BN.exp() * difference_BN).sum() / max(student_BN.shape[0], 1)


def truncated(x_BD: Tensor, dim: int) -> Tensor:
    """The first `dim` of D coordinates of unit rows, as unit rows again: (B, dim), float32 at least.

    Raises:
        ValueError: wrong rank or dtype, or `dim` not in 1..D.

    Source: Matryoshka representations (arXiv 2205.13147).
    """
    _check_rank("x_BD", x_BD, 2)
    if not 1 <= dim <= x_BD.shape[1]:
        raise ValueError(f"cannot keep {dim} of {x_BD.shape[1]} dimensions; expected 1 to {x_BD.shape[1]}")
    (x_BD,) = _upcast(x_BD)
    return x_BD if dim == x_BD.shape[1] else F.normalize(x_BD[:, :dim], dim=-1)


def matryoshka(
    loss_fn: Callable[..., Tensor], dims: Sequence[int], weights: Sequence[float] | None = None
) -> Callable[..., Tensor]:
    """`loss_fn` at several embedding dimensions: a function of the same embeddings, the weighted mean of the losses.

        matryoshka(lambda q, d: info_nce(q, d, target, 0.03), (576, 256, 64))(q_BD, d_ND)

    Args:
        loss_fn: takes embeddings with unit rows, each truncated to one dimension, and returns a scalar.
        dims: numbers of leading dimensions, in any order; include the full dimension for it to count.
        weights: one for each of `dims`, 0 or more; None counts all the same. Divided by their sum, so that the term
            keeps its size relative to the other terms (the paper sums instead).

    Raises:
        ValueError: no dimension, a repeated dimension or one below 1, weights that differ in number from `dims`, are
            negative, not finite or all 0. The returned function: a dimension above D (from `truncated`).

    Source: arXiv 2205.13147.
    """
    if not dims or len(set(dims)) != len(dims) or min(dims) < 1:
        raise ValueError(f"dims must be different numbers from 1 up, at least one, got {tuple(dims)}")
    shares = [1.0] * len(dims) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(dims):
        raise ValueError(f"there are {len(dims)} dims but {len(shares)} weights; give one weight per dimension")
    if not (all(math.isfinite(share) and share >= 0 for share in shares) and sum(shares) > 0):
        raise ValueError(f"weights must be finite, 0 or more and not all 0, got {tuple(shares)}")
    parts = [(dim, share / sum(shares)) for dim, share in zip(dims, shares, strict=True) if share]

    def at_every_dimension(*embeddings: Tensor) -> Tensor:
        losses = [share * loss_fn(*(truncated(x, dim) for x in embeddings)) for dim, share in parts]
        return torch.stack(losses).sum()

    return at_every_dimension


def uniformity(x_ND: Tensor) -> Tensor:
    """How evenly the embeddings cover the sphere: 0 if all coincide, lower is more even (about -4 at best).

        log mean over pairs i < j of  exp(-2 ||x_i - x_j||^2)

    Args:
        x_ND: at least two embeddings, unit rows, any float dtype. Needs memory for N^2 numbers.

    Returns:
        Scalar <= 0, float32 (float64 for float64 inputs).

    Raises:
        ValueError: wrong rank or dtype, or fewer than two rows.

    Source: Wang and Isola (arXiv 2005.10242), L_uniform with t = 2.
    """
    _check_rank("x_ND", x_ND, 2)
    rows = x_ND.shape[0]
    if rows < 2:
        raise ValueError(f"uniformity is over pairs of embeddings, got {rows} of them")
    with _no_autocast(x_ND):
        (x_ND,) = _upcast(x_ND)
        squares_N = x_ND.square().sum(1)
        distance_NN = (squares_N[:, None] + squares_N - 2 * x_ND @ x_ND.T).clamp(min=0)
        later_NN = torch.ones(rows, rows, dtype=torch.bool, device=x_ND.device).triu(1)
        return (-2 * distance_NN[later_NN]).logsumexp(0) - math.log(rows * (rows - 1) / 2)


def alignment(q_BD: Tensor, d_BD: Tensor) -> Tensor:
    """How far each query is from its own document: mean ||q - d||^2, which is 2 - 2 cos for unit rows.

    Returns:
        Scalar in 0..4, float32 (float64 for float64 inputs); lower is better, but 0 is also reached if all embeddings
        coincide.

    Raises:
        ValueError: wrong ranks, dtypes or shapes, or no row.

    Source: Wang and Isola (arXiv 2005.10242), L_align with alpha = 2.
    """
    _check_rank("q_BD", q_BD, 2)
    _check_rank("d_BD", d_BD, 2)
    if q_BD.shape != d_BD.shape or not q_BD.shape[0]:
        raise ValueError(
            f"alignment is over pairs of a query and its document, got the shapes {tuple(q_BD.shape)} "
            f"and {tuple(d_BD.shape)}"
        )
    q_BD, d_BD = _upcast(q_BD, d_BD)
    return (q_BD - d_BD).square().sum(1).mean()


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a float tensor, got {tensor.dtype}")


def _check_rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got the shape {tuple(tensor.shape)}")
    _check_float(name, tensor)


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be a boolean tensor, got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(mask.shape)}")


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...], limit: int, of_what: str) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be an integer tensor, got {ids.dtype}")
    if tuple(ids.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(ids.shape)}")
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} has {low if low < 0 else high}, expected 0 to {limit - 1} ({limit} {of_what})")


def _checked_keep(keep_T: Tensor | None, logits_TV: Tensor) -> Tensor:
    if keep_T is None:
        return torch.ones(logits_TV.shape[0], dtype=torch.bool, device=logits_TV.device)
    _check_mask("keep_T", keep_T, (logits_TV.shape[0],))
    return keep_T

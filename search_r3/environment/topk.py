"""The order of `search_r3.ranking` in PyTorch: score descending, and of equal scores the smaller row number first.

With it, a search, a merge of several shards and a reward always agree about rank k. `torch.topk` alone leaves the order
of ties undefined.

A float32 score and a row number are packed into one int64 key: the score's bits (made monotone) above the inverted bits
of the row. Keys are distinct and sort in the order above, so the top k of the keys is unique.

Shape suffixes: Q queries, N documents (columns), K results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_ROWS = 2**31 - 1
"""A row number must fit the signed lower half of a key, because -1 marks an empty position, the last of equal
scores."""
_LOW = 0xFFFFFFFF


def pack(scores: Tensor, rows: Tensor) -> Tensor:
    """int64 keys that sort by (score, row); `rows` is broadcast to `scores`, and -1 marks an empty position.

    -0.0 counts as 0.0. Scores are compared in float32. The caller must exclude NaN, which cannot be ordered.
    """
    bits = (scores.to(torch.float32) + 0.0).contiguous().view(torch.int32)
    # The bits of negative floats grow with their magnitude: inverting the lower 31 makes integers sort like floats.
    monotone = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (monotone.to(torch.int64) << 32) | (~rows.to(torch.int64) & _LOW)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The (scores float32, rows int64) of keys, exactly as they were packed (except 0.0 for -0.0)."""
    monotone = (keys >> 32).to(torch.int32)
    scores = torch.where(monotone < 0, monotone ^ 0x7FFFFFFF, monotone).view(torch.float32)
    return scores, ~((keys << 32) >> 32)


def top_k(scores_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k columns of every row, best first: (scores (Q, K) float32, columns (Q, K) int64), K = min(k, N)."""
    return unpack(keys_of_best(scores_QN, torch.arange(scores_QN.shape[1], device=scores_QN.device), k))


def keys_of_best(scores_QN: Tensor, rows_N: Tensor, k: int) -> Tensor:
    """Keys of every query's best k, largest first, (Q, min(k, N)) int64; `rows_N` are the columns' row numbers.

    Only columns that can be among the best are packed: the k that `torch.topk` returns or, if others tie with the last
    of those, enough to include all ties.
    """
    scores_QN = scores_QN.to(torch.float32)
    if k >= scores_QN.shape[1] or scores_QN.shape[0] == 0:
        return best_keys(pack(scores_QN, rows_N), k)
    values_QK, columns_QK = scores_QN.topk(max(k, 1), dim=1)
    enough = int((scores_QN >= values_QK[:, -1:]).sum(dim=1).max())
    if enough > k:
        values_QK, columns_QK = scores_QN.topk(enough, dim=1)
    return best_keys(pack(values_QK, rows_N[columns_QK]), k)


def merge_top_k(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The best k of several shards' results for the same queries, as if one search had covered all rows.

    Args:
        parts: for every shard (scores (Q, K_s) float32, rows (Q, K_s) int64), with row numbers of the *whole* corpus,
            each row in one shard only. A shard with fewer than k rows may pad with score -inf and row -1.

    Returns:
        (scores (Q, K) float32, rows (Q, K) int64), best first, K = min(k, sum of all K_s).

    Raises:
        ValueError: there are no parts, shapes differ, k is below 1, or a score is NaN.
    """
    if not parts:
        raise ValueError("merge_top_k needs at least one part")
    for number, (scores, rows) in enumerate(parts):
        if scores.dim() != 2 or scores.shape != rows.shape or scores.shape[0] != parts[0][0].shape[0]:
            raise ValueError(
                f"part {number} has scores {tuple(scores.shape)} and rows {tuple(rows.shape)}; "
                f"expected two equal shapes with {parts[0][0].shape[0]} queries"
            )
        if bool(torch.isnan(scores).any()):
            raise ValueError(f"part {number} has a NaN score, which cannot be ranked")
    return unpack(best_keys(torch.cat([pack(scores, rows) for scores, rows in parts], dim=1), k))


def best_keys(keys_QN: Tensor, k: int) -> Tensor:
    """The k largest keys of every row, largest first."""
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    return keys_QN.topk(min(k, keys_QN.shape[1]), dim=1).values

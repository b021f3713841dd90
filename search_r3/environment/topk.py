"""The order of `search_r3.ranking` in PyTorch: score descending, and of equal scores the smaller row number first.

So a search, a merge of several shards and a reward never disagree about rank k. `torch.topk` alone
promises nothing about ties.

How: a float32 score and a row number are packed into one int64 key, the score's bits (made monotone) above the inverted
bits of the row. Keys are distinct and compare as the order above, so that any top-k of keys is the only right one.

Shape suffixes: Q queries, N documents (columns), K results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_ROWS = 2**31 - 1
"""A row number must fit the key's lower half, signed, because -1 marks an empty place, the last of equal scores."""
_LOW = 0xFFFFFFFF


def pack(scores: Tensor, rows: Tensor) -> Tensor:
    """int64 keys that sort as (score, row); `rows` broadcasts against `scores`, -1 marks an empty place.

    -0.0 counts as 0.0. The scores are compared in float32. NaN is the caller's to refuse: it has no place in an order.
    """
    bits = (scores.to(torch.float32) + 0.0).contiguous().view(torch.int32)
    # Negative floats grow in magnitude with their bits: turning the lower 31 over makes integers sort as the floats.
    monotone = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (monotone.to(torch.int64) << 32) | (~rows.to(torch.int64) & _LOW)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(scores float32, rows int64) of keys: the exact scores that went in (but 0.0 for -0.0)."""
    monotone = (keys >> 32).to(torch.int32)
    scores = torch.where(monotone < 0, monotone ^ 0x7FFFFFFF, monotone).view(torch.float32)
    return scores, ~((keys << 32) >> 32)


def top_k(scores_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k columns of every row, best first: (scores (Q, K) float32, columns (Q, K) int64), K = min(k, N)."""
    return unpack(keys_of_best(scores_QN, torch.arange(scores_QN.shape[1], device=scores_QN.device), k))


def keys_of_best(scores_QN: Tensor, rows_N: Tensor, k: int) -> Tensor:
    """Keys of every query's best k, largest first, (Q, min(k, N)) int64; `rows_N` are the columns' row numbers.

    Only columns that may be among them are packed: the k that `torch.topk` finds, or, where others equal the last of
    those, as many as it takes to hold all the equals, whichever it would have preferred.
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
    """The best k of several local results for the same queries, as if one search had seen all rows.

    Args:
        parts: of every shard (scores (Q, K_s) float32, rows (Q, K_s) int64), with row numbers of the *whole* corpus,
            each row in one shard only. A shard with fewer than k rows may pad with score -inf and row -1.

    Returns:
        (scores (Q, K) float32, rows (Q, K) int64), best first, K = min(k, all places given).

    Raises:
        ValueError: no parts, unequal shapes, k below 1, or a NaN.
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
            raise ValueError(f"part {number} has a NaN score; a ranking needs numbers")
    return unpack(best_keys(torch.cat([pack(scores, rows) for scores, rows in parts], dim=1), k))


def best_keys(keys_QN: Tensor, k: int) -> Tensor:
    """The k largest keys of every row, largest first."""
    if k < 1:
        raise ValueError(f"k is {k}; a cut-off is 1 or more")
    return keys_QN.topk(min(k, keys_QN.shape[1]), dim=1).values

"""Approximate nearest neighbors of every row of a corpus, in time that grows as N^1.5 instead of N^2.

An inverted file (IVF): randomly chosen rows are the centroids, every row joins the bucket of its nearest centroid, and
the search within a bucket is exact. Neighbors in different buckets are missed, so a second round uses other centroids,
and the best results of all rounds are kept. Used once, to build the graph of a corpus of up to millions of rows.

Shape suffixes: N rows, C centroids, L neighbors, B rows of a bucket, D dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.live_corpus import Corpus
from search_r3.environment.topk import best_keys, keys_of_best, pack, unpack

ROUNDS = 2
LARGEST_BUCKET = 4096
"""Larger buckets are split at random, so that a collapsed embedding space does not cost N^2."""
ASSIGN_BLOCK = 4096
EMPTY = -1


def nearest_in_buckets(
    corpus: Corpus, links: int, *, seed: int = 0, rounds: int = ROUNDS, largest: int = LARGEST_BUCKET
) -> tuple[np.ndarray, np.ndarray]:
    """The approximate nearest neighbors of every row, nearest first, without the row itself.

    The cosines are exact; a neighbor that never shares a bucket is missed. If all rows fit into one bucket, the search
    is exact. The same seed gives the same buckets.

    Args:
        links: L, neighbors per row.
        rounds: number of times the rows are divided into buckets.
        largest: maximum size of a bucket.

    Returns:
        (row numbers (N, L) int32 padded with -1, cosines (N, L) float32 padded with -inf).

    Raises:
        ValueError: `links`, `rounds` or `largest` is below 1, or the corpus has rows that were never written.
    """
    if min(links, rounds, largest) < 1:
        raise ValueError(f"links, rounds and largest must be 1 or more, got {links}, {rounds} and {largest}")
    rows = len(corpus)
    rng = np.random.default_rng(seed)
    keys_NL = torch.full((rows, links), 0, dtype=torch.int64)
    keys_NL[:] = pack(torch.tensor(-torch.inf), torch.tensor(EMPTY))
    for _ in range(rounds):
        for bucket in _buckets(corpus, rng, largest):
            members_B = torch.from_numpy(bucket)
            keys_NL[members_B] = _merge(keys_NL[members_B], _within(corpus, members_B, links), links)
    cosines_NL, ids_NL = unpack(keys_NL)
    return ids_NL.numpy().astype(np.int32), cosines_NL.numpy()


def _buckets(corpus: Corpus, rng: np.random.Generator, largest: int) -> list[np.ndarray]:
    """A partition of all rows into about sqrt(N) buckets of at most `largest` rows."""
    rows = len(corpus)
    if rows <= largest:
        return [np.arange(rows)]
    centroid_CD = corpus.vectors(np.sort(rng.choice(rows, size=round(rows**0.5), replace=False)))
    nearest_N = np.empty(rows, dtype=np.int64)
    for start in range(0, rows, ASSIGN_BLOCK):
        block = corpus.vectors(np.arange(start, min(start + ASSIGN_BLOCK, rows)))
        nearest_N[start : start + len(block)] = (block @ centroid_CD.T).argmax(dim=1).cpu().numpy()
    # Shuffled within a bucket, so that splitting it does not follow the order of the corpus.
    order_N = rng.permutation(rows)
    order_N = order_N[np.argsort(nearest_N[order_N], kind="stable")]
    groups = np.split(order_N, np.flatnonzero(np.diff(nearest_N[order_N])) + 1)
    pieces = [piece for group in groups for piece in np.array_split(group, -(-len(group) // largest))]
    return [np.sort(piece) for piece in pieces]


def _within(corpus: Corpus, members_B: Tensor, links: int) -> Tensor:
    """Keys of each member's nearest other members, (B, <= L) int64."""
    if len(members_B) == 1:
        return torch.empty(1, 0, dtype=torch.int64)
    vectors_BD = corpus.vectors(members_B)
    cosines_BB = (vectors_BD @ vectors_BD.T).cpu()
    cosines_BB.fill_diagonal_(-torch.inf)
    return keys_of_best(cosines_BB, members_B, min(links, len(members_B) - 1))


def _merge(old_BL: Tensor, new_BL: Tensor, links: int) -> Tensor:
    """The best distinct rows of both; a row that occurs twice counts once, with its larger cosine."""
    keys = torch.cat([old_BL, new_BL], dim=1).sort(dim=1, descending=True).values
    ids = unpack(keys)[1]
    order = ids.argsort(dim=1, stable=True)  # equal ids next to each other, the better one first
    sorted_ids = ids.gather(1, order)
    repeated = torch.zeros_like(keys, dtype=torch.bool)
    repeated[:, 1:] = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    keys = keys.gather(1, order).masked_fill(repeated, int(pack(torch.tensor(-torch.inf), torch.tensor(EMPTY))))
    return best_keys(keys, links)

"""NeighborGraph: the nearest neighbors of every document, at a fixed width, re-linked locally when vectors change.

It is not used for ranking: it tells the refresh policies which rows training has probably moved, so that those are
re-encoded. Source: the proximity graph of Search-R3 (arXiv 2510.07048); the algorithm is ours.

Definition: every row chooses its `links` nearest other rows. A choice is an edge in *both* directions, and each row
then keeps its `width` nearest edges. Because `links <= width`, a row always keeps its own choices, and only a hub drops
rows that chose it. "Nearest" means the order of `topk`: cosine, then row number.

Shape suffixes: N rows, M slots per row (`width`), L choices per row (`links`), R selected rows, P pairs of rows.

Each edge stores its cosine, which stays correct as long as every update of the corpus is followed by `relink` of the
same rows: an edge's cosine changes only if one of its two rows does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.approximate_neighbors import nearest_in_buckets
from search_r3.environment.live_corpus import Corpus, check_rows
from search_r3.errors import InputError

FORMAT = 1
EXACT_LIMIT = 100_000
"""Number of rows up to which `build` is exact by default: 2 N^2 D operations, 11.5e12 at this size and D = 576."""
BLOCK = 1024
"""Number of rows searched at once."""


class NeighborGraph:
    """Fixed-width adjacency, nearest first, padded with -1.

    Attributes:
        ids_NM: int32 row numbers; -1 after the last neighbor.
        cosines_NM: float32; -inf after the last neighbor.
    """

    def __init__(self, rows: int, *, width: int = 16, links: int = 8) -> None:
        """A graph without edges.

        Raises:
            InputError: not 1 <= links <= width (both come from the recipe).
            ValueError: `rows` is below 1.
        """
        if rows < 1:
            raise ValueError(f"rows must be 1 or more, got {rows}")
        if not 1 <= links <= width:
            raise InputError(f"graph_links must be from 1 to graph_width ({width}), got {links}")
        self.links = links
        self.ids_NM = np.full((rows, width), -1, dtype=np.int32)
        self.cosines_NM = np.full((rows, width), -np.inf, dtype=np.float32)

    @classmethod
    def build(
        cls, corpus: Corpus, *, width: int = 16, links: int = 8, approximate: bool | None = None, seed: int = 0
    ) -> NeighborGraph:
        """The graph of the corpus as it is now.

        Args:
            approximate: search only within random buckets (see `approximate_neighbors`), for millions of rows: cosines
                are exact, but some neighbors are missed. None: exact up to `EXACT_LIMIT` rows.
            seed: seed of the buckets.

        Raises the errors of the constructor and of `corpus.search`.
        """
        graph = cls(len(corpus), width=width, links=links)
        if approximate is None:
            approximate = len(corpus) > EXACT_LIMIT
        if approximate:
            ids_NL, cosines_NL = nearest_in_buckets(corpus, links, seed=seed)
            graph._link(np.arange(len(corpus)), ids_NL, cosines_NL)
        else:
            graph.relink(torch.arange(len(corpus)), corpus)
        return graph

    def __len__(self) -> int:
        return len(self.ids_NM)

    @property
    def width(self) -> int:
        return self.ids_NM.shape[1]

    def relink(self, rows: Any, corpus: Corpus) -> None:
        """Replace the edges of rows whose vectors changed: drop all of them, search again, and add both directions.

        The links chosen by `rows` are exact. A row outside `rows` that had chosen one of them loses that edge, unless
        it is chosen back, and gets no replacement until it is re-linked itself. Re-linking all rows gives the same
        graph as `build`.

        Args:
            rows: row numbers; repetitions have no effect.

        Raises:
            ValueError: a row is outside the graph, or the corpus has another size.
        """
        if len(corpus) != len(self):
            raise ValueError(f"the corpus has {len(corpus)} rows, the graph {len(self)}")
        rows_R = np.unique(check_rows(rows, len(self)).numpy())
        self._drop(rows_R)
        parts = [self._nearest(corpus, rows_R[start : start + BLOCK]) for start in range(0, len(rows_R), BLOCK)]
        if parts:
            self._link(
                *(corpus.all_gather_rows(torch.cat(column)).cpu().numpy() for column in zip(*parts, strict=True))
            )

    def neighbors(self, rows: Any, hops: int = 1) -> np.ndarray:
        """The distinct rows within `hops` edges of any of `rows`, without `rows` themselves, (n,) int64.

        Order: fewer hops first; within a hop, all nearest neighbors before all second nearest, and so on.

        Raises:
            ValueError: a row is outside the graph, or `hops` is below 0.
        """
        if hops < 0:
            raise ValueError(f"hops must be 0 or more, got {hops}")
        frontier = check_rows(rows, len(self)).numpy()
        seen_N = np.zeros(len(self), dtype=bool)
        seen_N[frontier] = True
        reached = []
        for _ in range(hops):
            ids = self.ids_NM[frontier].T.ravel()
            ids = ids[ids >= 0]
            ids = ids[~seen_N[ids]]
            first = np.sort(np.unique(ids, return_index=True)[1])
            frontier = ids[first].astype(np.int64)
            seen_N[frontier] = True
            reached.append(frontier)
        return np.concatenate(reached) if reached else np.zeros(0, dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors (not copied) and JSON values, for `training.run_checkpoint`."""
        return {
            "format": FORMAT,
            "links": self.links,
            "ids": torch.from_numpy(self.ids_NM),
            "cosines": torch.from_numpy(self.cosines_NM),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the graph from `state`, bit for bit.

        Raises:
            InputError: the state has another size, width, number of links or format.
        """
        if state.get("format") != FORMAT:
            raise InputError(f"the saved graph has format {state.get('format')!r}, this version reads {FORMAT}")
        saved = (*state["ids"].shape, state["links"])
        if saved != (*self.ids_NM.shape, self.links) or state["cosines"].shape != state["ids"].shape:
            raise InputError(
                f"the saved graph has (rows, width, links) = {saved}, this one {(*self.ids_NM.shape, self.links)}; "
                "use the corpus and the graph settings of the run that saved it"
            )
        self.ids_NM[:] = state["ids"].numpy()
        self.cosines_NM[:] = state["cosines"].numpy()

    def _nearest(self, corpus: Corpus, block_R: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """This process's share of the block: (rows (R,), the rows they choose (R, L) int32, cosines (R, L))."""
        mine_R = corpus.local_rows(block_R)
        cosines, nearest = corpus.search(corpus.vectors(torch.from_numpy(mine_R)), self.links + 1)
        ids, kept = _without_self(nearest.cpu().numpy(), cosines.cpu().numpy(), mine_R, self.links)
        ids_RL = np.full((len(mine_R), self.links), -1, dtype=np.int32)
        cosines_RL = np.full((len(mine_R), self.links), -np.inf, dtype=np.float32)
        ids_RL[:, : ids.shape[1]] = ids
        cosines_RL[:, : ids.shape[1]] = kept
        return torch.from_numpy(mine_R), torch.from_numpy(ids_RL), torch.from_numpy(cosines_RL)

    def _drop(self, rows_R: np.ndarray) -> None:
        """Remove every edge from or to these rows, and close the gaps."""
        gone_N = np.zeros(len(self), dtype=bool)
        gone_N[rows_R] = True
        # -1 reads the last row's flag: without `>= 0`, every row with a free slot could be rewritten for nothing.
        hit_NM = gone_N[self.ids_NM] & (self.ids_NM >= 0)
        hit_NM[rows_R] = True
        touched_R = np.flatnonzero(hit_NM.any(axis=1))
        ids = np.where(hit_NM[touched_R], -1, self.ids_NM[touched_R])
        cosines = np.where(hit_NM[touched_R], -np.inf, self.cosines_NM[touched_R])
        order = np.argsort(ids < 0, axis=1, kind="stable")  # the kept edges keep their order
        self.ids_NM[touched_R] = np.take_along_axis(ids, order, axis=1)
        self.cosines_NM[touched_R] = np.take_along_axis(cosines, order, axis=1)

    def _link(self, rows_R: np.ndarray, ids_RL: np.ndarray, cosines_RL: np.ndarray) -> None:
        """Add choices of rows without edges as edges in both directions; keep each row's `width` nearest."""
        chosen = ids_RL >= 0
        here_P = np.broadcast_to(rows_R[:, None], ids_RL.shape)[chosen].astype(np.int64)
        there_P, cosine_P = ids_RL[chosen].astype(np.int64), cosines_RL[chosen]
        # Two rows that chose each other share one edge with one cosine: the two products may differ in the last bit.
        pair_P = np.minimum(here_P, there_P) * len(self) + np.maximum(here_P, there_P)
        order_P = np.lexsort((cosine_P, pair_P))
        pair_P, cosine_P = pair_P[order_P], cosine_P[order_P]
        last_P = np.append(pair_P[1:] != pair_P[:-1], True) if len(pair_P) else np.zeros(0, dtype=bool)
        low_P, high_P = np.divmod(pair_P[last_P], len(self))
        cosine_P = cosine_P[last_P]

        affected_A = np.unique(np.concatenate([low_P, high_P]))
        old_AM = self.ids_NM[affected_A]
        row_P = np.concatenate([low_P, high_P, np.repeat(affected_A, self.width)[old_AM.ravel() >= 0]])
        id_P = np.concatenate([high_P, low_P, old_AM[old_AM >= 0]])
        cosine_P = np.concatenate([cosine_P, cosine_P, self.cosines_NM[affected_A][old_AM >= 0]])

        order_P = np.lexsort((id_P, -cosine_P, row_P))
        row_P, id_P, cosine_P = row_P[order_P], id_P[order_P], cosine_P[order_P]
        slot_P = np.arange(len(row_P)) - np.searchsorted(row_P, row_P)
        keep_P = slot_P < self.width
        self.ids_NM[affected_A] = -1
        self.cosines_NM[affected_A] = -np.inf
        self.ids_NM[row_P[keep_P], slot_P[keep_P]] = id_P[keep_P]
        self.cosines_NM[row_P[keep_P], slot_P[keep_P]] = cosine_P[keep_P]


def _without_self(
    ids_RK: np.ndarray, cosines_RK: np.ndarray, rows_R: np.ndarray, links: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `links` results of each row other than the row itself, which identical rows may outrank."""
    itself_RK = ids_RK == rows_R[:, None]
    # Where the row itself is not among the results, drop the last one, so that all rows have the same number left.
    itself_RK[~itself_RK.any(axis=1), -1] = True
    shape = (len(rows_R), ids_RK.shape[1] - 1)
    return ids_RK[~itself_RK].reshape(shape)[:, :links], cosines_RK[~itself_RK].reshape(shape)[:, :links]

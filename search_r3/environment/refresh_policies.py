"""Which rows to re-encode now: refresh policies behind one protocol, and the gauge of how stale the corpus has become.

Source: Search-R3 (arXiv 2510.07048) re-encodes selectively, where training has touched; the algorithm is ours. The
other policies are what that claim is tested against.

Shape suffixes: R some rows, N documents of a pool (columns), Q queries.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from search_r3.environment.live_corpus import Corpus, check_rows
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.rewards import Reward, dcg_scaled
from search_r3.environment.topk import top_k
from search_r3.errors import InputError


@dataclass
class RefreshConfig:
    """How the environment's corpus is kept current."""

    policy: str = "selective"
    """"selective" (where training has touched), "random" (anywhere), "full" (everything, at times) or "none"."""
    budget: int = 256
    """Rows re-encoded in one step at most; "full" has no budget."""
    hops: int = 1
    """"selective": edges of the graph to follow from the positives (and the candidates); 0 follows none."""
    candidate_neighbors: bool = False
    """"selective": also take the graph neighbors of the candidates, not of the positives alone."""
    first_ranks: int = 10
    """"selective": what a search returns up to this rank comes before all but the positives, as the reward looks there;
    0 goes by age alone."""
    every: int = 50
    """"full": steps between re-encodings of the whole corpus."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            near = difflib.get_close_matches(str(self.policy), POLICIES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"there is no refresh policy {self.policy!r}{hint} (there are {', '.join(POLICIES)})")
        if self.budget < 1:
            raise InputError(f"budget must be 1 or more, got {self.budget}; policy 'none' refreshes nothing")
        if self.hops < 0:
            raise InputError(f"hops must be 0 or more, got {self.hops}")
        if self.first_ranks < 0:
            raise InputError(f"first_ranks must be 0 or more, got {self.first_ranks}")
        if self.every < 1:
            raise InputError(f"every must be 1 or more, got {self.every}")


class RefreshPolicy(Protocol):
    """Chooses what to re-encode at a step."""

    def choose(
        self,
        positives: Any,
        candidates: Any,
        step: int,
        corpus: Corpus,
        graph: NeighborGraph | None,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Distinct row numbers to re-encode with the weights of `step`, most urgent first, (R,) int64.

        Never a row that is fresh at `step` already.

        Args:
            positives: rows judged relevant to the batch's queries; any number of times each.
            candidates: rows that the rollouts' searches returned, (rollouts, k) best first, or flat; -1 is no row.
            graph: the corpus's graph; only "selective" with hops needs one.
            rng: the only source of chance.

        Raises:
            ValueError: a row outside the corpus, or no graph where one is needed.
        """


@dataclass(frozen=True)
class Selective:
    """Positives, candidates, and graph neighbors of the positives (and optionally of the candidates).

    Order: positives before all else; then candidates among the first `first_ranks` of any rollout (a stale one there
    alters its reward now); then all others. Within each the stalest first; of equal age, candidates before neighbors,
    better ranks and nearer neighbors first. The first `budget` of them.

    Candidates without ranks (a flat list) are among the others.
    """

    budget: int
    hops: int = 1
    candidate_neighbors: bool = False
    first_ranks: int = 10

    def choose(
        self,
        positives: Any,
        candidates: Any,
        step: int,
        corpus: Corpus,
        graph: NeighborGraph | None,
        rng: np.random.Generator,
    ) -> np.ndarray:
        positive_R = _first_of_each(check_rows(positives, len(corpus)).numpy())
        candidate_R = _first_of_each(_candidate_rows(candidates, len(corpus)))
        near_R = np.zeros(0, dtype=np.int64)
        if self.hops:
            if graph is None:
                raise ValueError("following the graph needs a graph; give one, or set hops to 0")
            start_R = np.concatenate([positive_R, candidate_R]) if self.candidate_neighbors else positive_R
            near_R = graph.neighbors(start_R, self.hops)
        rows_R = _first_of_each(np.concatenate([positive_R, candidate_R, near_R]))
        age_R = step - corpus.steps_N.numpy()[rows_R].astype(np.int64)
        first_R = _first_ranks(candidates, self.first_ranks)
        later_R = np.where(np.isin(rows_R, positive_R), 0, np.where(np.isin(rows_R, first_R), 1, 2))
        # Stable: rows of equal age keep the order they came in.
        order_R = np.lexsort((-age_R, later_R))
        order_R = order_R[age_R[order_R] > 0]
        return rows_R[order_R[: self.budget]]


@dataclass(frozen=True)
class RandomRows:
    """Stale rows drawn evenly from the whole corpus, `budget` of them: what selecting has to beat."""

    budget: int

    def choose(
        self,
        positives: Any,
        candidates: Any,
        step: int,
        corpus: Corpus,
        graph: NeighborGraph | None,
        rng: np.random.Generator,
    ) -> np.ndarray:
        stale_R = _stale(corpus, step)
        return rng.choice(stale_R, size=min(self.budget, len(stale_R)), replace=False)


@dataclass(frozen=True)
class Full:
    """Everything stale, at every `every`-th step; nothing in between."""

    every: int

    def choose(
        self,
        positives: Any,
        candidates: Any,
        step: int,
        corpus: Corpus,
        graph: NeighborGraph | None,
        rng: np.random.Generator,
    ) -> np.ndarray:
        return _stale(corpus, step) if step % self.every == 0 else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Never:
    """Nothing: the corpus stays as the first weights made it."""

    def choose(
        self,
        positives: Any,
        candidates: Any,
        step: int,
        corpus: Corpus,
        graph: NeighborGraph | None,
        rng: np.random.Generator,
    ) -> np.ndarray:
        return np.zeros(0, dtype=np.int64)


POLICIES: dict[str, Callable[[RefreshConfig], RefreshPolicy]] = {
    "selective": lambda config: Selective(config.budget, config.hops, config.candidate_neighbors, config.first_ranks),
    "random": lambda config: RandomRows(config.budget),
    "full": lambda config: Full(config.every),
    "none": lambda config: Never(),
}
"""The policies a recipe may name."""


def refresh_policy(config: RefreshConfig) -> RefreshPolicy:
    """The policy that a recipe asks for; `RefreshConfig` has refused unknown names."""
    return POLICIES[config.policy](config)


def staleness_pool(top_QK: Any, positives: Any, random_rows: int, total: int, rng: np.random.Generator) -> np.ndarray:
    """The rows to re-encode for the gauge: the dev queries' live top rows, their positives, and random others.

    Returns:
        (n,) int64, ascending, each once. One pool serves all queries: re-encoding is what costs.
    """
    known = np.union1d(_candidate_rows(top_QK, total), check_rows(positives, total).numpy())
    others = np.setdiff1d(np.arange(total), known, assume_unique=True)
    return np.sort(np.concatenate([known, rng.choice(others, size=min(random_rows, len(others)), replace=False)]))


@dataclass(frozen=True)
class Staleness:
    """What the stale vectors cost, measured inside a pool of documents ("pooled"): recall is therefore flattering."""

    pooled_recall: float
    """Share of the fresh top k that the stale vectors also rank in their top k, mean over queries."""
    pooled_reward_error: float
    """|reward on stale vectors - reward on fresh ones|, mean over queries."""
    mean_age: float
    """Steps since a row was encoded, mean over the whole corpus."""


def staleness(
    stale_QN: Any, fresh_QN: Any, rel_QN: Any, ages: Any, k: int = 10, reward: Reward = dcg_scaled
) -> Staleness:
    """Compare the live vectors of a pool with the same rows re-encoded now (the gauge of the environment).

        recall = mean_q |top_k(stale_q) & top_k(fresh_q)| / K,    error = mean_q |reward(stale_q) - reward(fresh_q)|

    Args:
        stale_QN: cosines of fixed queries with the live rows of the pool, columns in ascending row order. The queries
            are embedded with the current weights in both matrices, so that only the documents' age differs.
        fresh_QN: the same with the pool re-encoded.
        rel_QN: grades; every positive of a query must be in the pool.
        ages: ages of all rows of the corpus, not of the pool (`corpus.ages(step)`).
        k: ranks compared, K = min(k, N).

    Raises:
        ValueError: shapes differ, a NaN, no queries, no documents or no ages.
    """
    stale_QN, fresh_QN = torch.as_tensor(stale_QN), torch.as_tensor(fresh_QN)
    if stale_QN.shape != fresh_QN.shape or stale_QN.dim() != 2 or stale_QN.numel() == 0:
        raise ValueError(
            f"stale cosines have the shape {tuple(stale_QN.shape)}, fresh ones {tuple(fresh_QN.shape)}; "
            "expected two equal (queries, documents) matrices that are not empty"
        )
    age_N = torch.as_tensor(ages, dtype=torch.float64)
    if age_N.numel() == 0:
        raise ValueError("the gauge needs the ages of the corpus's rows, got none")
    # The rewards refuse NaN, so they come first.
    error_Q = (reward(stale_QN, rel_QN, k=k).double() - reward(fresh_QN, rel_QN, k=k).double()).abs()
    kept_QN = _marks(stale_QN, k) & _marks(fresh_QN, k)
    recall_Q = kept_QN.sum(dim=1).double() / min(k, stale_QN.shape[1])
    return Staleness(float(recall_Q.mean()), float(error_Q.mean()), float(age_N.mean()))


def _marks(scores_QN: Tensor, k: int) -> Tensor:
    """True at each query's top k."""
    return torch.zeros_like(scores_QN, dtype=torch.bool).scatter_(1, top_k(scores_QN, k)[1], True)


def _stale(corpus: Corpus, step: int) -> np.ndarray:
    return np.flatnonzero(corpus.steps_N.numpy() < step)


def _candidate_rows(candidates: Any, total: int) -> np.ndarray:
    """Flat row numbers; of a matrix, all first ranks before all second ranks. -1 (an empty place) is left out."""
    table = np.asarray(candidates.cpu() if isinstance(candidates, Tensor) else candidates)
    flat = table.T.ravel()
    return check_rows(flat[flat != -1], total).numpy()


def _first_ranks(candidates: Any, ranks: int) -> np.ndarray:
    """The rows in the first columns of a matrix of candidates; none of a flat list, which has no ranks."""
    table = np.asarray(candidates.cpu() if isinstance(candidates, Tensor) else candidates)
    return table[:, :ranks].ravel() if table.ndim == 2 else table[:0]


def _first_of_each(rows_R: np.ndarray) -> np.ndarray:
    """Each row once, in the order of first appearance."""
    return rows_R[np.sort(np.unique(rows_R, return_index=True)[1])]

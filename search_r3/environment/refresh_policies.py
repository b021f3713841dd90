"""Refresh policies: which documents to re-encode at a step.

Source: Search-R3 (arXiv 2510.07048) re-encodes selectively, where training has touched; the algorithm is ours. The
other policies are the baselines of that claim.

Shape suffixes: R some rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from search_r3.environment.live_corpus import Corpus, check_rows
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.registry import RecipeRegistry
from search_r3.errors import InputError

DEFAULT_POLICY = "selective"


class RefreshPolicy(ABC):
    """Chooses what to re-encode at a step. A complete example, a package's `my_policies.py`:

        from dataclasses import dataclass
        import numpy as np
        from search_r3.environment.refresh_policies import RefreshPolicy

        @dataclass(frozen=True)
        class Oldest(RefreshPolicy):
            '''The `budget` rows that were encoded longest ago.'''

            budget: int = 256

            def choose(self, positives, candidates, step, corpus, graph, rng):
                age_N = corpus.ages(step).numpy()
                oldest_N = np.argsort(-age_N, kind="stable")
                return oldest_N[age_N[oldest_N] > 0][: self.budget]

    Its pyproject.toml, and a recipe that uses it (the keys beside `policy` are the class's parameters):

        [project.entry-points."search_r3.refresh_policies"]
        oldest = "my_policies:Oldest"

        environment:
          refresh: {policy: oldest, budget: 64}
    """

    needs_graph: bool = False
    """Whether `choose` wants the corpus's neighbor graph; else `graph` is None, and none is built or re-linked."""

    @abstractmethod
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

        Never a row that is fresh at `step` already. Over several processes, all get the same arguments and must return
        the same rows.

        Args:
            positives: rows that are relevant to the batch's queries, with repetitions.
            candidates: rows that the rollouts' searches returned, (rollouts, k) best first, or flat; -1 is no row.
            rng: the only source of randomness.

        Raises:
            ValueError: a row outside the corpus, or no graph where one is needed.
        """


def _require_budget(budget: int) -> None:
    if budget < 1:
        raise InputError(f"budget must be 1 or more, got {budget}; policy 'none' refreshes nothing")


@dataclass(frozen=True)
class Selective(RefreshPolicy):
    """Positives, candidates, and graph neighbors of the positives (and optionally of the candidates).

    Order: positives first; then candidates among the first `first_ranks` of any rollout (a stale one there changes its
    reward now); then all others. Within each the stalest first; of equal age, candidates before neighbors, better ranks
    and nearer neighbors first. The first `budget` of them are taken.

    Candidates without ranks (a flat list) are among the others.
    """

    budget: int = 256
    """The most rows re-encoded in one step."""
    hops: int = 1
    """Edges of the graph to follow from the positives (and the candidates); 0 follows none and needs no graph."""
    candidate_neighbors: bool = False
    """Take the graph neighbors of the candidates too, not of the positives alone."""
    first_ranks: int = 10
    """A search's results up to this rank come before all but the positives, as the reward depends on them; 0 goes by
    age alone."""

    def __post_init__(self) -> None:
        _require_budget(self.budget)
        if self.hops < 0:
            raise InputError(f"hops must be 0 or more, got {self.hops}")
        if self.first_ranks < 0:
            raise InputError(f"first_ranks must be 0 or more, got {self.first_ranks}")

    @property
    def needs_graph(self) -> bool:  # type: ignore[override]
        """True if it follows edges."""
        return self.hops > 0

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
        candidate_R = _first_of_each(candidate_rows(candidates, len(corpus)))
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
class RandomRows(RefreshPolicy):
    """Stale rows drawn uniformly from the whole corpus: the baseline that selecting has to beat."""

    budget: int = 256
    """The most rows re-encoded in one step."""

    def __post_init__(self) -> None:
        _require_budget(self.budget)

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
class Full(RefreshPolicy):
    """Everything stale, at every `every`-th step; nothing in between."""

    every: int = 50
    """Steps between re-encodings of the whole corpus."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"every must be 1 or more, got {self.every}")

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
class Never(RefreshPolicy):
    """Nothing: the corpus stays as the first weights encoded it."""

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


POLICIES: dict[str, type[RefreshPolicy]] = {
    "selective": Selective,
    "random": RandomRows,
    "full": Full,
    "none": Never,
}
"""Name -> policy. Installed packages add theirs."""
REGISTRY = RecipeRegistry("refresh policy", "refresh_policies", POLICIES)
"""The policies that a recipe may name."""


def complete_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's `refresh` section with the policy's name and all its parameters, defaults included.

    Raises:
        InputError: there is no such policy, or it has no such parameter or takes no such value.
    """
    name, parameters = _split(settings)
    REGISTRY.create(name, parameters)  # the policy's own checks
    return {"policy": name, **REGISTRY.parameters_of(name, parameters)}


def refresh_policy(settings: Mapping[str, Any]) -> RefreshPolicy:
    """The policy of a recipe's `refresh` section: {"policy": NAME, parameters}. Errors as `complete_settings`."""
    name, parameters = _split(settings)
    return REGISTRY.create(name, parameters)


def _split(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    parameters = dict(settings)
    return str(parameters.pop("policy", DEFAULT_POLICY)), parameters


def _stale(corpus: Corpus, step: int) -> np.ndarray:
    return np.flatnonzero(corpus.steps_N.numpy() < step)


def candidate_rows(candidates: Any, total: int) -> np.ndarray:
    """Flat row numbers; of a matrix, all first ranks before all second ranks. -1 (no row) is left out."""
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

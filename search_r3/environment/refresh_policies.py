"""Refresh policies: which documents to re-encode at a step.

Source: Search-R3 (arXiv 2510.07048) re-encodes selectively, where training has changed embeddings; the algorithm is
ours. The other policies are baselines for comparison.

Shape suffixes: R selected rows, N rows of the corpus.
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
from search_r3.environment.recipe_registry import RecipeRegistry
from search_r3.errors import InputError

DEFAULT_POLICY = "selective"


class RefreshPolicy(ABC):
    """Chooses what to re-encode at a step. A complete example, the module `my_policies.py` of a package:

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

    The package's pyproject.toml, and a recipe that uses the policy (the other keys are the class's parameters):

        [project.entry-points."search_r3.refresh_policies"]
        oldest = "my_policies:Oldest"

        environment:
          refresh: {policy: oldest, budget: 64}
    """

    needs_graph: bool = False
    """Whether `choose` needs the corpus's neighbor graph. If not, no graph is built or re-linked, and `graph` is
    None."""

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

        Rows that are already fresh at `step` must be left out. With several processes, all get the same arguments and
        must return the same rows.

        Args:
            positives: rows that are relevant to the batch's queries, with repetitions.
            candidates: the rows that the rollouts' searches returned, best first: (rollouts, C), where C is
                `candidates` in the recipe's section `environment`, or a flat list. -1 marks an empty position.
            step: optimizer steps that the current weights have taken.
            corpus: the corpus before the refresh.
            graph: its neighbor graph, if `needs_graph`.
            rng: the only source of randomness.

        Raises:
            ValueError: a row is outside the corpus, or a graph is needed and missing.
        """


def _require_budget(budget: int) -> None:
    if budget < 1:
        raise InputError(f"budget must be 1 or more, got {budget}; policy 'none' refreshes nothing")


@dataclass(frozen=True)
class Selective(RefreshPolicy):
    """Positives, candidates, and graph neighbors of the positives (and optionally of the candidates).

    Order: first positives; then candidates among the first `first_ranks` of any rollout, where a stale vector changes
    the reward; then all others. Within each of these, the stalest come first; among rows of equal age, candidates come
    before neighbors, better ranks before worse and nearer neighbors before farther ones. The first `budget` rows are
    taken.

    Candidates without ranks (a flat list) count as others.
    """

    budget: int = 256
    """Maximum number of rows re-encoded per step."""
    hops: int = 1
    """Number of graph edges to follow from the positives (and the candidates); 0 follows none and needs no graph."""
    candidate_neighbors: bool = False
    """Also take the graph neighbors of the candidates."""
    first_ranks: int = 10
    """Search results up to this rank are refreshed before everything but the positives, because the reward depends on
    them; 0 orders by age alone."""

    def __post_init__(self) -> None:
        _require_budget(self.budget)
        if self.hops < 0:
            raise InputError(f"hops must be 0 or more, got {self.hops}")
        if self.first_ranks < 0:
            raise InputError(f"first_ranks must be 0 or more, got {self.first_ranks}")

    @property
    def needs_graph(self) -> bool:  # type: ignore[override]
        """Whether the policy follows graph edges."""
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
                raise ValueError("hops is above 0, so a graph is needed; give one, or set hops to 0")
            start_R = np.concatenate([positive_R, candidate_R]) if self.candidate_neighbors else positive_R
            near_R = graph.neighbors(start_R, self.hops)
        rows_R = _first_of_each(np.concatenate([positive_R, candidate_R, near_R]))
        age_R = step - corpus.steps_N.numpy()[rows_R].astype(np.int64)
        first_R = _first_ranks(candidates, self.first_ranks)
        later_R = np.where(np.isin(rows_R, positive_R), 0, np.where(np.isin(rows_R, first_R), 1, 2))
        # Stable: rows of equal age keep their order.
        order_R = np.lexsort((-age_R, later_R))
        order_R = order_R[age_R[order_R] > 0]
        return rows_R[order_R[: self.budget]]


@dataclass(frozen=True)
class RandomRows(RefreshPolicy):
    """Stale rows drawn uniformly from the whole corpus: the baseline for `Selective`."""

    budget: int = 256
    """Maximum number of rows re-encoded per step."""

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
    """All stale rows every `every` steps; nothing in between."""

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
    """No rows: the corpus stays as the first weights encoded it."""

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
"""Built-in policies by name."""
REGISTRY = RecipeRegistry("refresh policy", "refresh_policies", POLICIES)
"""All policies that a recipe can name: the built-in ones and those of installed packages."""


def complete_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's `refresh` section, completed with the policy's name and all default parameters.

    Raises:
        InputError: the policy or a parameter is unknown, or a value is invalid.
    """
    name, parameters = _split(settings)
    REGISTRY.create(name, parameters)  # for the policy's own checks
    return {"policy": name, **REGISTRY.parameters_of(name, parameters)}


def refresh_policy(settings: Mapping[str, Any]) -> RefreshPolicy:
    """The policy of a recipe's `refresh` section, {"policy": NAME, parameters}. Raises as `complete_settings`."""
    name, parameters = _split(settings)
    return REGISTRY.create(name, parameters)


def _split(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    parameters = dict(settings)
    return str(parameters.pop("policy", DEFAULT_POLICY)), parameters


def _stale(corpus: Corpus, step: int) -> np.ndarray:
    return np.flatnonzero(corpus.steps_N.numpy() < step)


def candidate_rows(candidates: Any, total: int) -> np.ndarray:
    """Candidates as a flat array without -1; of a matrix, all first ranks come before all second ranks."""
    table = np.asarray(candidates.cpu() if isinstance(candidates, Tensor) else candidates)
    flat = table.T.ravel()
    return check_rows(flat[flat != -1], total).numpy()


def _first_ranks(candidates: Any, ranks: int) -> np.ndarray:
    """The rows in the first `ranks` columns of a candidate matrix; empty for a flat list, which has no ranks."""
    table = np.asarray(candidates.cpu() if isinstance(candidates, Tensor) else candidates)
    return table[:, :ranks].ravel() if table.ndim == 2 else table[:0]


def _first_of_each(rows_R: np.ndarray) -> np.ndarray:
    """Each row once, in the order of first appearance."""
    return rows_R[np.sort(np.unique(rows_R, return_index=True)[1])]

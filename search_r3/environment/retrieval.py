"""RetrievalEnvironment: turns the embeddings of rollouts into rewards, and refreshes the corpus in doing so.

One call of `score` searches the corpus, chooses the rows to refresh, re-encodes them with the current weights, re-links
them, ranks again on the fresh vectors, and computes the rewards. The model is passed in as a function that encodes
rows.
Source: Search-R3 (arXiv 2510.07048), stage 2; the docstrings of `rewards` and `refresh_policies` say what is ours.

Shape suffixes: R rollouts, P probes (rollouts, then direct embeddings), B queries of the batch, N columns (the
documents that affect the batch's rewards), C candidates, D dimensions, K ranks, Q dev queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.environment import rewards
from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.environment.live_corpus import Corpus, check_rows
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.refresh_policies import refresh_policy
from search_r3.environment.reward_protocol import RankedRollouts
from search_r3.environment.reward_terms import WeightedRewards
from search_r3.environment.staleness import Staleness, staleness, staleness_pool
from search_r3.environment.topk import top_k
from search_r3.errors import InputError

Encode = Callable[[np.ndarray], Any]
"""Row numbers (R,) -> unit rows (R, D) encoded by the current weights, without gradient."""
Grades = Mapping[int, float]
"""One query's judgments: row number -> grade; above 0 is relevant."""


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of a batch of rollouts, and what they were computed from."""

    rewards_R: Tensor
    """float32: the rewards that GRPO uses, including shaping and penalties."""
    unshaped_R: Tensor
    """float32: the weighted sum of the configured rewards before shaping, also for forced embeddings."""
    ndcg_R: Tensor
    """float32: nDCG@k, which is always computed because `dcg_scaled` is inflated where all cosines are near 1."""
    scaled_R: Tensor
    """float32: `dcg_scaled`, which is always computed because it is the value that the paper reports."""
    direct_B: Tensor | None
    """float32: the unshaped reward of each query's direct embedding; None if these were not given."""
    rows_RK: Tensor
    """int64: the k best rows for each rollout on the fresh vectors, best first."""
    cosines_RK: Tensor
    """float32: the cosines of `rows_RK`."""
    refreshed: np.ndarray
    """int64: the rows re-encoded at this step, on all processes."""
    seconds: dict[str, float]
    """Wall time by phase: search, choose, encode, update, relink, rank."""


class RetrievalEnvironment:
    """A live corpus with its neighbor graph, refresh policy and rewards.

    With several processes every method is a collective: each process passes its own rollouts, the rows to refresh are
    chosen from all processes' rollouts together, and each process encodes its share of them.

    Shaping (gain, length, missing token) is applied to the sum of the configured rewards, in that order.
    """

    def __init__(
        self, corpus: Corpus, config: EnvironmentConfig, *, graph: NeighborGraph | None = None, seed: int = 0
    ) -> None:
        """Builds the neighbor graph, unless it is given or the refresh policy needs none.

        Raises:
            ValueError: the corpus has rows that were never written, or its size differs from the graph's.
        """
        self.corpus = corpus
        self.config = config
        self.seed = seed
        self.refresh_policy = refresh_policy(config.refresh)
        if graph is None and self.refresh_policy.needs_graph:
            graph = NeighborGraph.build(corpus, width=config.graph_width, links=config.graph_links, seed=seed)
        if graph is not None and len(graph) != len(corpus):
            raise ValueError(f"the corpus has {len(corpus)} rows, the graph {len(graph)}")
        self.graph = graph
        self.reward = WeightedRewards.from_recipe(config.reward_terms)

    def score(
        self,
        embeddings_RD: Any,
        query_R: Any,
        grades_B: Sequence[Grades],
        encode: Encode,
        step: int,
        *,
        emitted_R: Any,
        queries: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        token_ids: Sequence[Sequence[int]] | None = None,
        token_budget: int | None = None,
        direct_BD: Any = None,
    ) -> RewardBatch:
        """Refresh the documents chosen for these rollouts, and compute the rewards on the fresh vectors.

        Args:
            embeddings_RD: unit rows, encoded by the current weights.
            query_R: the number of each rollout's query, integers in [0, B).
            grades_B: the judgments of each query. The rollouts of a query without a positive earn 0.
            encode: encodes rows with the current weights.
            step: optimizer steps that the current weights have taken.
            emitted_R: boolean; False where `missing_token_reward` replaces the reward. In training these are rollouts
                whose embed token was forced or followed fewer than `min_reasoning_tokens` tokens.
            queries: the queries' texts (B), for rewards that read them.
            texts: the rollouts' reasoning traces (R), for rewards that read them.
            token_ids: the same traces as token ids (R); required if `length_weight` is above 0.
            token_budget: the maximum number of reasoning tokens; required if `length_weight` is above 0.
            direct_BD: the queries' direct embeddings; required if `gain_weight` is above 0, else only reported.

        Raises:
            ValueError: shapes do not match, a row is outside the corpus, an argument that the settings require is
                missing, or embeddings do not have length 1. If the latter come from `encode`, the corpus is unchanged.
        """
        embeddings_RD = torch.as_tensor(embeddings_RD).detach()
        query_R = check_rows(query_R, len(grades_B))
        positives = [row for grades in grades_B for row, grade in grades.items() if grade > 0]
        check_rows(positives, len(self.corpus))
        traces = _Traces(queries, texts, token_ids, emitted_R, token_budget)
        self._validate(embeddings_RD, query_R, grades_B, traces, direct_BD)
        clock = _Clock()
        _, candidates_RC = self.corpus.search(embeddings_RD, self.config.candidates)
        clock.lap("search")
        refreshed = self._refresh(positives, candidates_RC, encode, step, clock)

        probes_PD, probe_query_P = embeddings_RD, query_R
        if direct_BD is not None:
            probes_PD = torch.cat([probes_PD, torch.as_tensor(direct_BD).detach().to(embeddings_RD)])
            probe_query_P = torch.cat([probe_query_P, torch.arange(len(grades_B))])
        columns_N, cosines_PN = self._cosines(probes_PD, grades_B)
        grades_PN = _grade_matrix(columns_N, grades_B)[probe_query_P].to(cosines_PN.device)
        ranks_PN = self._ranks(probes_PD, columns_N, cosines_PN, grades_PN) if self.reward.needs_ranks else None
        ranked = traces.ranked(probe_query_P, cosines_PN, grades_PN, self.config.k)
        if ranks_PN is not None:
            ranked = replace(ranked, ranks_RN=ranks_PN, documents=len(self.corpus))
        unshaped_P = self.reward(ranked)

        rollouts, k = len(embeddings_RD), self.config.k
        cosines_RK, positions_RK = top_k(cosines_PN[:rollouts], k)
        batch = RewardBatch(
            rewards_R=self._shaped(unshaped_P, query_R, traces),
            unshaped_R=unshaped_P[:rollouts],
            ndcg_R=rewards.ndcg(cosines_PN[:rollouts], grades_PN[:rollouts], k),
            scaled_R=rewards.dcg_scaled(cosines_PN[:rollouts], grades_PN[:rollouts], k),
            direct_B=None if direct_BD is None else unshaped_P[rollouts:],
            rows_RK=columns_N.to(positions_RK.device)[positions_RK],
            cosines_RK=cosines_RK,
            refreshed=refreshed,
            seconds=clock.seconds,
        )
        clock.lap("rank")
        return batch

    def evaluate_staleness(
        self,
        queries_QD: Any,
        grades_Q: Sequence[Grades],
        encode: Encode,
        step: int,
        *,
        queries: Sequence[str] | None = None,
        top: int = 100,
        random_rows: int = 1000,
    ) -> Staleness:
        """How stale the corpus is for fixed dev queries, without changing it.

        A pool is re-encoded: the queries' live top rows, their positives, and random rows, which depend on the step
        only. All processes must pass the same queries.

        Args:
            queries_QD: the queries' embeddings by the current weights, unit rows.
            grades_Q: the judgments of each query.
            encode, step: see `score`.
            queries: the queries' texts, for rewards that read them.
            top: number of live top rows per query.
            random_rows: number of random rows.

        Raises:
            ValueError: as `score`.
        """
        queries_QD = torch.as_tensor(queries_QD).detach()
        if len(queries_QD) != len(grades_Q):
            raise ValueError(f"{len(queries_QD)} queries but {len(grades_Q)} sets of grades; give one per query")
        positives = [row for grades in grades_Q for row, grade in grades.items() if grade > 0]
        top_QK = self.corpus.search(queries_QD, top)[1]
        pool = staleness_pool(top_QK, positives, random_rows, len(self.corpus), self._rng(step))
        mine = self.corpus.local_rows(pool)
        fresh = self.corpus.all_gather_rows(self._encoded(encode, mine))
        order = self.corpus.all_gather_rows(torch.from_numpy(mine)).argsort().to(fresh.device)
        stale = self.corpus.scores(queries_QD, pool)
        grades = _grade_matrix(torch.from_numpy(pool), grades_Q)
        current = queries_QD.to(fresh) @ fresh[order].T

        def reward(cosines_QN: Tensor, grades_QN: Tensor, k: int) -> Tensor:
            return self.reward(RankedRollouts.without_text(cosines_QN, grades_QN, k, queries))

        return staleness(stale, current.to(stale), grades, self.corpus.ages(step), k=self.config.k, reward=reward)

    def state_dict(self) -> dict[str, Any]:
        """The corpus and the graph, as tensors and JSON values.

        Random draws are a function of (seed, step), so no RNG state is saved.
        """
        return {
            "corpus": self.corpus.state_dict(),
            "graph": None if self.graph is None else self.graph.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the environment from `state`.

        Raises:
            InputError: the state belongs to another corpus or to other graph settings.
        """
        if (self.graph is None) != (state["graph"] is None):
            raise InputError(
                f"the saved environment has {'no' if state['graph'] is None else 'a'} graph, this one "
                f"{'none' if self.graph is None else 'has one'}; use the refresh settings of the run that saved it"
            )
        self.corpus.load_state_dict(state["corpus"])
        if self.graph is not None:
            self.graph.load_state_dict(state["graph"])

    def _validate(
        self, embeddings_RD: Tensor, query_R: Tensor, grades_B: Sequence[Grades], traces: _Traces, direct_BD: Any
    ) -> None:
        """Check the arguments of `score` against each other and against the settings."""
        rollouts = len(embeddings_RD)
        if len(query_R) != rollouts:
            raise ValueError(f"{rollouts} embeddings but {len(query_R)} query numbers; give one per rollout")
        if len(traces.emitted_R) != rollouts:
            raise ValueError(f"{rollouts} embeddings but {len(traces.emitted_R)} values of emitted_R")
        if direct_BD is not None and len(direct_BD) != len(grades_B):
            raise ValueError(f"{len(direct_BD)} direct embeddings but {len(grades_B)} queries")
        if self.config.gain_weight and direct_BD is None:
            raise ValueError("gain_weight is above 0, so the queries' direct embeddings are needed: give direct_BD")
        if self.config.length_weight and (traces.token_ids is None or traces.token_budget is None):
            raise ValueError(
                "length_weight is above 0, so the rollouts' lengths are needed: give token_ids and token_budget"
            )

    def _refresh(
        self, positives: list[int], candidates_RC: Tensor, encode: Encode, step: int, clock: _Clock
    ) -> np.ndarray:
        all_positives = self.corpus.all_gather_rows(torch.tensor(positives, dtype=torch.int64))
        candidates = self.corpus.all_gather_rows(candidates_RC)
        chosen = self.refresh_policy.choose(all_positives, candidates, step, self.corpus, self.graph, self._rng(step))
        clock.lap("choose")
        mine = self.corpus.local_rows(chosen)
        vectors = self._encoded(encode, mine)
        clock.lap("encode")
        self.corpus.update(mine, vectors, step)
        clock.lap("update")
        if self.graph is not None:
            self.graph.relink(chosen, self.corpus)
        clock.lap("relink")
        return chosen

    def _encoded(self, encode: Encode, rows: np.ndarray) -> Tensor:
        return torch.as_tensor(encode(rows)).detach().float() if len(rows) else torch.zeros(0, self.corpus.dimension)

    def _cosines(self, probes: Tensor, grades_B: Sequence[Grades]) -> tuple[Tensor, Tensor]:
        """The rows that rewards need, (N,) ascending, and every probe's cosines with them, (P, N).

        They include every probe's k best rows, and its best negative, because at most all its positives rank above.
        """
        judged_most = max((len(grades) for grades in grades_B), default=0)
        deepest = self.corpus.all_gather_rows(torch.tensor([judged_most])).max()  # the same k on all processes
        top_PK = self.corpus.search(probes, self.config.k + int(deepest))[1]
        judged = check_rows([row for grades in grades_B for row in grades], len(self.corpus))
        columns_N = torch.cat([top_PK.flatten().cpu(), judged]).unique()
        return columns_N, self.corpus.scores(probes, columns_N)

    def _ranks(self, probes_PD: Tensor, columns_N: Tensor, cosines_PN: Tensor, grades_PN: Tensor) -> Tensor:
        """`RankedRollouts.ranks_RN` of the probes."""
        positive_PN = grades_PN > 0
        most = int(positive_PN.sum(dim=1).max()) if len(positive_PN) else 0
        first_PM = positive_PN.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # columns of the positives
        given_PM = positive_PN.gather(1, first_PM)
        cosines_PM = cosines_PN.gather(1, first_PM).masked_fill(~given_PM, torch.inf)
        rows_PM = columns_N.to(first_PM.device)[first_PM].masked_fill(~given_PM, -1)
        above_PM = self.corpus.count_at_least(probes_PD, cosines_PM, rows_PM).to(first_PM.device)
        ranks_PM = torch.where(given_PM, above_PM + 1, 0)
        return torch.zeros_like(positive_PN, dtype=torch.int64).scatter_(1, first_PM, ranks_PM)

    def _shaped(self, unshaped_P: Tensor, query_R: Tensor, traces: _Traces) -> Tensor:
        config, rollouts = self.config, len(query_R)
        shaped_R = unshaped_P[:rollouts]
        if config.gain_weight:
            direct_R = unshaped_P[rollouts:][query_R.to(unshaped_P.device)]
            shaped_R = rewards.gain_over_direct(shaped_R, direct_R, config.gain_weight)
        if config.length_weight:
            assert traces.token_ids is not None  # checked by _validate
            assert traces.token_budget is not None
            tokens_R = torch.tensor([float(len(ids)) for ids in traces.token_ids])
            shaped_R = rewards.length_shaping(
                shaped_R, tokens_R, traces.token_budget, config.length_free, config.length_weight
            )
        return rewards.missing_token_penalty(shaped_R, traces.emitted_R, config.missing_token_reward)

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step])


@dataclass(frozen=True)
class _Traces:
    """The arguments of `score` that describe the rollouts' reasoning."""

    queries: Sequence[str] | None
    texts: Sequence[str] | None
    token_ids: Sequence[Sequence[int]] | None
    emitted_R: Any
    token_budget: int | None

    def ranked(self, query_P: Tensor, cosines_PN: Tensor, grades_PN: Tensor, k: int) -> RankedRollouts:
        """What the rewards see: the R rollouts, followed by the direct embeddings as rollouts with an empty text."""
        rollouts = len(self.emitted_R)
        direct = len(query_P) - rollouts
        emitted_P = torch.ones(len(query_P), dtype=torch.bool)
        emitted_P[:rollouts] = torch.as_tensor(self.emitted_R)
        return RankedRollouts(
            queries=["" if self.queries is None else self.queries[query] for query in query_P.tolist()],
            texts=[*(self.texts or [""] * rollouts), *[""] * direct],
            token_ids=[*(self.token_ids or [()] * rollouts), *[()] * direct],
            emitted_R=emitted_P,
            cosines_RN=cosines_PN,
            grades_RN=grades_PN,
            k=k,
        )


class _Clock:
    """Sums wall time by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def _grade_matrix(columns_N: Tensor, grades_B: Sequence[Grades]) -> Tensor:
    """The grades as (B, N) float32, 0 where a document is not judged. The columns include every judged row."""
    matrix_BN = torch.zeros(len(grades_B), len(columns_N))
    for query, grades in enumerate(grades_B):
        if grades:
            judged = torch.searchsorted(columns_N, torch.tensor(list(grades), dtype=torch.int64))
            matrix_BN[query, judged] = torch.tensor([float(grade) for grade in grades.values()])
    return matrix_BN

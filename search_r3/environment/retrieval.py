"""RetrievalEnvironment: embeddings of rollouts in, rewards out, with the corpus kept current on the way.

One call of `score`: search, choose what to refresh, re-encode it with the current weights, re-link it, rank again on
the fresh vectors, and reward. The model is passed in as a function that encodes rows. Source: Search-R3 (arXiv
2510.07048), stage 2; `rewards` and `refresh_policies` say what is ours.

Shape suffixes: R rollouts, P probes (rollouts, then direct embeddings), B queries of the batch, N columns (documents
that matter to the batch), D dimensions, K ranks, Q dev queries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
"""Row numbers (R,) -> unit rows (R, D) by the current weights, without gradient."""
Grades = Mapping[int, float]
"""Row number -> grade of one query; above 0 is relevant."""


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of one batch of rollouts, and what they were computed from."""

    rewards_R: Tensor
    """float32: the rewards that GRPO uses, shaping and penalties included."""
    unshaped_R: Tensor
    """float32: the weighted sum of the configured rewards before shaping, of forced embeddings too."""
    ndcg_R: Tensor
    """float32: nDCG@k, always computed: where all cosines are near 1, `dcg_scaled` is optimistic."""
    scaled_R: Tensor
    """float32: `dcg_scaled`, always computed: the figure that the paper reports."""
    direct_B: Tensor | None
    """float32: the unshaped reward of each query's direct embedding, if it was given."""
    rows_RK: Tensor
    """int64: the k best rows of each rollout on the fresh vectors, best first."""
    cosines_RK: Tensor
    """float32: their cosines."""
    refreshed: np.ndarray
    """int64: rows re-encoded at this step, by all processes."""
    seconds: dict[str, float]
    """Wall time by part: search, choose, encode, update, relink, rank."""


class RetrievalEnvironment:
    """A live corpus, its graph and its refresh policy.

    Over several processes (a `ShardedCorpus`) every method is a collective: each process passes its own rollouts, the
    refresh set is chosen once from all of theirs, and each process encodes its share of it.

    Shaping (gain, length, missing token) is not one of the listed rewards: it is applied to their sum, in that order.
    """

    def __init__(
        self, corpus: Corpus, config: EnvironmentConfig, *, graph: NeighborGraph | None = None, seed: int = 0
    ) -> None:
        """Links the corpus, unless a graph is given or the refresh policy needs none.

        Raises:
            ValueError: the corpus has rows never written, or another size than the graph.
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
        """Refresh the documents that these rollouts touch, and reward the rollouts on the fresh vectors.

        Args:
            embeddings_RD: unit rows, made by the current weights.
            query_R: for each rollout the number of its query, integers in [0, B).
            grades_B: for each query its judged rows. Without a positive, every rollout of it earns 0.
            encode: encodes rows with the current weights.
            step: optimizer steps that the current weights have taken.
            emitted_R: boolean, False where the embed token had to be forced.
            queries, texts, token_ids: each query's text (B), each rollout's reasoning trace (R) and its token ids (R),
                for rewards that read them; token_ids are needed, with `token_budget`, if length is charged.
            direct_BD: each query's direct embedding; needed if the gain is paid, else only reported.

        Raises:
            ValueError: shapes that do not fit, rows outside the corpus, embeddings that are not unit rows (those of
                `encode` included: then the corpus stays as it was), or a missing argument that the settings need.
        """
        embeddings_RD = torch.as_tensor(embeddings_RD).detach()
        query_R = check_rows(query_R, len(grades_B))
        if len(query_R) != len(embeddings_RD):
            raise ValueError(f"{len(embeddings_RD)} embeddings but {len(query_R)} query numbers; each rollout has one")
        if len(emitted_R) != len(embeddings_RD):
            raise ValueError(f"{len(embeddings_RD)} embeddings but {len(emitted_R)} values of emitted_R")
        if self.config.gain_weight and direct_BD is None:
            raise ValueError("gain_weight is above 0, so the queries' direct embeddings are needed: give direct_BD")
        if self.config.length_weight and (token_ids is None or token_budget is None):
            raise ValueError(
                "length_weight is above 0, so the rollouts' lengths are needed: give token_ids, token_budget"
            )
        clock = _Clock()
        positives = [row for grades in grades_B for row, grade in grades.items() if grade > 0]
        check_rows(positives, len(self.corpus))
        _, candidates_RC = self.corpus.search(embeddings_RD, self.config.candidates)
        clock.lap("search")
        refreshed = self._refresh(positives, candidates_RC, encode, step, clock)

        probes_PD, probe_query_P = embeddings_RD, query_R
        if direct_BD is not None:
            direct_BD = torch.as_tensor(direct_BD).detach().to(embeddings_RD)
            if len(direct_BD) != len(grades_B):
                raise ValueError(f"{len(direct_BD)} direct embeddings but {len(grades_B)} queries")
            probes_PD = torch.cat([probes_PD, direct_BD])
            probe_query_P = torch.cat([probe_query_P, torch.arange(len(grades_B))])
        columns_N, cosines_PN = self._cosines(probes_PD, grades_B)
        grades_PN = _grade_matrix(columns_N, grades_B)[probe_query_P].to(cosines_PN.device)
        rollouts = len(embeddings_RD)
        names = [""] * len(grades_B) if queries is None else queries
        direct = len(probes_PD) - rollouts
        emitted_P = torch.ones(len(probes_PD), dtype=torch.bool)
        emitted_P[:rollouts] = torch.as_tensor(emitted_R)
        unshaped_P = self.reward(
            RankedRollouts(
                queries=[names[query] for query in probe_query_P.tolist()],
                texts=[*(texts or [""] * rollouts), *[""] * direct],
                token_ids=[*(token_ids or [()] * rollouts), *[()] * direct],
                emitted_R=emitted_P,
                cosines_RN=cosines_PN,
                grades_RN=grades_PN,
                k=self.config.k,
            )
        )
        cosines_RK, places_RK = top_k(cosines_PN[:rollouts], self.config.k)
        batch = RewardBatch(
            rewards_R=self._shaped(unshaped_P, query_R, emitted_R, token_ids, token_budget),
            unshaped_R=unshaped_P[:rollouts],
            ndcg_R=rewards.ndcg(cosines_PN[:rollouts], grades_PN[:rollouts], k=self.config.k),
            scaled_R=rewards.dcg_scaled(cosines_PN[:rollouts], grades_PN[:rollouts], k=self.config.k),
            direct_B=None if direct_BD is None else unshaped_P[rollouts:],
            rows_RK=columns_N.to(places_RK.device)[places_RK],
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
        """How stale the corpus is for fixed dev queries (embedded by the current weights); changes nothing.

        It re-encodes a pool: the queries' live top rows, their positives, and random rows, the same at a step. Over
        several processes all pass the same queries. `queries` are their texts. Errors as `score`.
        """
        queries_QD = torch.as_tensor(queries_QD).detach()
        if len(queries_QD) != len(grades_Q):
            raise ValueError(f"{len(queries_QD)} queries but {len(grades_Q)} sets of grades; each query has its own")
        positives = [row for grades in grades_Q for row, grade in grades.items() if grade > 0]
        live = self.corpus.search(queries_QD, top)[1]
        pool = staleness_pool(live, positives, random_rows, len(self.corpus), self._rng(step))
        mine = self.corpus.local_rows(pool)
        fresh = self.corpus.all_gather_rows(self._encoded(encode, mine))
        order = self.corpus.all_gather_rows(torch.from_numpy(mine)).argsort().to(fresh.device)
        stale = self.corpus.scores(queries_QD, pool)
        grades = _grade_matrix(torch.from_numpy(pool), grades_Q)
        now = queries_QD.to(fresh) @ fresh[order].T

        def reward(cosines_QN: Tensor, grades_QN: Tensor, k: int) -> Tensor:
            return self.reward(RankedRollouts.without_text(cosines_QN, grades_QN, k, queries))

        return staleness(stale, now.to(stale), grades, self.corpus.ages(step), k=self.config.k, reward=reward)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values: the corpus and the graph. Chance is a function of (seed, step), so has no state."""
        return {
            "corpus": self.corpus.state_dict(),
            "graph": None if self.graph is None else self.graph.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the environment from `state`.

        Raises:
            InputError: it is of another corpus or of other graph settings.
        """
        if (self.graph is None) != (state["graph"] is None):
            raise InputError(
                f"the saved environment has {'no' if state['graph'] is None else 'a'} graph, this one "
                f"{'none' if self.graph is None else 'has one'}; use the refresh settings of the run that saved it"
            )
        self.corpus.load_state_dict(state["corpus"])
        if self.graph is not None:
            self.graph.load_state_dict(state["graph"])

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
        """(rows (N,) ascending, cosines of every probe with them): all of the corpus that a reward needs.

        Every probe's k best are among them, and its best negative too, as at most all its positives rank above it.
        """
        judged_most = max((len(grades) for grades in grades_B), default=0)
        deepest = self.corpus.all_gather_rows(torch.tensor([judged_most])).max()  # one k for all processes
        deep = self.config.k + int(deepest)
        found = self.corpus.search(probes, deep)[1]
        judged = check_rows([row for grades in grades_B for row in grades], len(self.corpus))
        columns_N = torch.cat([found.flatten().cpu(), judged]).unique()
        return columns_N, self.corpus.scores(probes, columns_N)

    def _shaped(
        self,
        unshaped_P: Tensor,
        query_R: Tensor,
        emitted_R: Any,
        token_ids: Sequence[Sequence[int]] | None,
        token_budget: int | None,
    ) -> Tensor:
        config, rollouts = self.config, len(query_R)
        shaped_R = unshaped_P[:rollouts]
        if config.gain_weight:
            direct_R = unshaped_P[rollouts:][query_R.to(unshaped_P.device)]
            shaped_R = rewards.gain_over_direct(shaped_R, direct_R, config.gain_weight)
        if config.length_weight:
            assert token_ids is not None  # score has checked both
            assert token_budget is not None
            tokens_R = torch.tensor([float(len(ids)) for ids in token_ids])
            shaped_R = rewards.length_shaping(
                shaped_R, tokens_R, token_budget, config.length_free, config.length_weight
            )
        return rewards.missing_token_penalty(shaped_R, emitted_R, config.missing_token_reward)

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step])


class _Clock:
    """Adds up wall time by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def _grade_matrix(columns_N: Tensor, grades_B: Sequence[Grades]) -> Tensor:
    """(B, N) float32 grades, 0 where a document is not judged; every judged row is among the columns."""
    matrix_BN = torch.zeros(len(grades_B), len(columns_N))
    for query, grades in enumerate(grades_B):
        if grades:
            places = torch.searchsorted(columns_N, torch.tensor(list(grades), dtype=torch.int64))
            matrix_BN[query, places] = torch.tensor([float(grade) for grade in grades.values()])
    return matrix_BN

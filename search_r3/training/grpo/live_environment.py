"""The parts of stage 2 that follow the policy's weights: the encoder, and the environment with its corpus.

`LiveEnvironment` creates the environment on first use, which encodes every document; chooses the training queries by
their rank in it; evaluates how stale it has become; and logs rollouts with their ranks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from search_r3.environment.live_corpus import DTYPES, LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.replicated_corpus import ReplicatedCorpus
from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.environment.sharded_corpus import ShardedCorpus
from search_r3.model.searchr3 import SearchR3
from search_r3.ranking import rank_of_best_positive
from search_r3.training.distributed import collectives
from search_r3.training.grpo.dataset import Query, RLDataset, TrainingQueries
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.rollout import ScoredGroups
from search_r3.training.grpo.rollout_metrics import completions_to_log
from search_r3.training.lora.live_encoder import LiveEncoder, encode_rows

ROLLOUTS_FILE = "rollouts.jsonl"
ENCODE_BLOCK = 2048
"""Documents encoded between two progress lines, when the environment is created."""


class LiveEnvironment:
    """The policy as an encoder, and the environment.

    Args:
        dataset: provides the corpus (its documents) and the queries of the staleness evaluation (its held-out ones).
        training_queries: reduced to the recipe's range of ranks when the environment is created.
        encoder: the policy as an encoder.

    Attributes:
        environment: None before the first `open`.
        staleness: the metrics of the last staleness evaluation.
    """

    def __init__(
        self, config: GRPOConfig, dataset: RLDataset, training_queries: TrainingQueries, encoder: LiveEncoder
    ) -> None:
        self.config, self.dataset, self.training_queries, self.encoder = config, dataset, training_queries, encoder
        self.environment: RetrievalEnvironment | None = None
        self.staleness = {"staleness_recall": 1.0, "staleness_error": 0.0}

    @property
    def held_out(self) -> list[Query]:
        """The held-out queries used for the staleness evaluation and for validation in the live corpus."""
        return self.dataset.held_out[: self.config.staleness_eval_queries]

    def open(self, encoder: SearchR3) -> RetrievalEnvironment:
        """The environment; the first call of a run encodes every document with the stage 1 model. A collective."""
        if self.environment is None:
            if collectives.rank() == 0:
                (Path(self.config.output) / ROLLOUTS_FILE).unlink(missing_ok=True)
            corpus = self._empty_corpus()
            encode = encode_rows(encoder, self.dataset.documents, self.config.max_document_tokens)
            for start in range(0, len(corpus), ENCODE_BLOCK):
                rows = corpus.local_rows(np.arange(start, min(start + ENCODE_BLOCK, len(corpus))))
                vectors = encode(rows) if len(rows) else np.zeros((0, corpus.dimension), dtype=np.float32)
                corpus.update(rows, vectors, 0)
                if collectives.rank() == 0 and len(corpus) > ENCODE_BLOCK:
                    done = min(start + ENCODE_BLOCK, len(corpus))
                    print(f"{done:,} of {len(corpus):,} documents encoded", file=sys.stderr, flush=True)
            self.environment = RetrievalEnvironment(corpus, self.config.environment, seed=self.config.loop.seed)
            if self.config.min_positive_rank > 1 or self.config.max_positive_rank is not None:
                self.training_queries.keep(self._within_ranks(encoder, self.environment))
        return self.environment

    def evaluate_staleness(self, encoder: SearchR3, step: int) -> None:
        """Measure `staleness` with the held-out queries' direct embeddings, if that is due at `step`. A collective."""
        config, queries = self.config, self.held_out
        if not is_due(step, config.staleness_eval_every, config.steps_per_generation):
            return
        texts = [query.text for query in queries]
        environment = self.open(encoder)
        result = environment.evaluate_staleness(
            encoder.encode_query(texts, reasoning=False, show_progress_bar=False),
            [query.grades for query in queries],
            encode_rows(encoder, self.dataset.documents, config.max_document_tokens, environment.corpus),
            step,
            queries=texts,
            random_rows=config.staleness_eval_rows,
        )
        self.staleness = {"staleness_recall": result.pooled_recall, "staleness_error": result.pooled_reward_error}

    def log_completions(self, rounds: Sequence[ScoredGroups], step: int) -> None:
        """Append some rollouts of a step's first round to the log, if that is due. A collective.

        Called after every round, because documents that a later round refreshes would change the ranks.
        """
        config = self.config
        if len(rounds) > 1 or not is_due(step, config.log_completions_every, config.steps_per_generation):
            return
        assert self.environment is not None  # it has scored these rollouts
        groups = rounds[0].groups
        shown = completions_to_log(
            [group.rollouts for group in groups], rounds[0].rewards.scaled_R, config.num_completions_to_log
        )
        embeddings = np.array([rollout.embedding for _, rollout, _ in shown], dtype=np.float32)
        queries = [groups[number].query for number, _, _ in shown]
        ranks = rank_of_positive(self.environment, embeddings, queries)
        self.write_rollouts(
            {"step": step + 1, "query": query.text, **record, "rank": rank, "forced": rollout.forced}
            | ({"reads": True} if groups[number].reads else {})
            for (number, rollout, record), query, rank in zip(shown, queries, ranks, strict=True)
        )

    def write_rollouts(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records to the run's `rollouts.jsonl`; only the first process writes."""
        records = list(records)
        if collectives.rank() == 0 and records:
            path = Path(self.config.output) / ROLLOUTS_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def state_dict(self) -> dict[str, Any]:
        """The environment (vectors, versions, graph; None before the first `open`) and the last staleness metrics."""
        environment = None if self.environment is None else self.environment.state_dict()
        return {"environment": environment, "staleness": self.staleness}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InputError: the state belongs to another corpus.
        """
        self.staleness = dict(state["staleness"])
        if state["environment"] is not None:
            settings, graph = self.config.environment, None
            if state["environment"]["graph"] is not None:  # empty: a corpus without vectors cannot be linked
                size = len(self.dataset.documents)
                graph = NeighborGraph(size, width=settings.graph_width, links=settings.graph_links)
            self.environment = RetrievalEnvironment(
                self._empty_corpus(), settings, graph=graph, seed=self.config.loop.seed
            )
            self.environment.load_state_dict(state["environment"])

    def _empty_corpus(self) -> Any:
        device = next(self.encoder.policy.parameters()).device
        kind = self.config.corpus_dtype
        if kind == "auto":
            kind = "float32" if device.type == "cpu" else "bfloat16"
        cls: type[Any] = LiveCorpus
        if collectives.world_size() > 1:
            cls = ShardedCorpus if self.config.shard_corpus else ReplicatedCorpus
        dimension = self.encoder.checkpoint.contract.dimension
        return cls(len(self.dataset.documents), dimension, dtype=DTYPES[kind], device=device)

    def _within_ranks(self, encoder: SearchR3, environment: RetrievalEnvironment) -> list[int]:
        """Indices of the training queries that rank a positive within the recipe's limits; equal on all processes."""
        queries, config = self.dataset.train, self.config
        direct = encoder.encode_query([query.text for query in queries], reasoning=False, show_progress_bar=False)
        lowest = config.max_positive_rank or len(environment.corpus)
        ranks = rank_of_positive(environment, direct, queries)
        mine = [number for number, rank in enumerate(ranks) if config.min_positive_rank <= rank <= lowest]
        kept = collectives.all_gather_object(mine)[0]
        if collectives.rank() == 0:
            print(f"{len(kept):,} of {len(queries):,} queries are within the range of ranks", file=sys.stderr)
        return kept


def rank_of_positive(environment: RetrievalEnvironment, embeddings: np.ndarray, queries: Sequence[Query]) -> list[int]:
    """The rank of each query's best positive in the live corpus, from 1.

    A collective if the corpus is sharded; a process may then pass no query.
    """
    embeddings = embeddings.reshape(-1, environment.corpus.dimension)
    cosine_QN = environment.corpus.scores(embeddings, torch.arange(len(environment.corpus))).cpu().numpy()
    positive_QN = np.zeros(cosine_QN.shape, dtype=bool)
    for index, query in enumerate(queries):
        positive_QN[index, [row for row, grade in query.grades.items() if grade > 0]] = True
    return rank_of_best_positive(cosine_QN, positive_QN).tolist()


def is_due(step: int, every: int, stride: int) -> bool:
    """Whether one of the `stride` steps from `step` on is a multiple of `every`; never if `every` is 0."""
    return every > 0 and step % every < stride

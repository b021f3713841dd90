"""Figures of stage 2 on held-out queries: their rewards in the live corpus, and how stale that corpus has become.

Both use the corpus as it is, refreshed in part. Exact figures need all of it re-encoded: see benchmarks/environment.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from search_r3.environment import rewards
from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.model.searchr3 import SearchR3
from search_r3.training.grpo.collector import encode_rows, rank_of_positive
from search_r3.training.grpo.dataset import Query
from search_r3.training.grpo.grpo_config import GRPOConfig


def live_figures(
    encoder: SearchR3, environment: RetrievalEnvironment, queries: Sequence[Query], config: GRPOConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Mean rewards of greedy reasoning traces and of direct embeddings, and the first few traces to log.

    Returns:
        "live.reward" and "live.dcg" (nDCG@k) with reasoning, "live.reward_direct" without; and records with query,
        text, reward, the positive's rank, and whether the embed token was forced.
    """
    texts = [query.text for query in queries]
    reasoned = encoder.reason(
        texts,
        max_reasoning_tokens=config.max_reasoning_tokens,
        batch_size=config.generation_batch_size,
        show_progress_bar=False,
    )
    reasoned_QD = np.stack([r.embedding for r in reasoned])
    direct_QD = encoder.encode_query(texts, reasoning=False, show_progress_bar=False)
    cosine_QN = environment.corpus.scores(reasoned_QD, torch.arange(len(environment.corpus)))
    grade_QN = torch.zeros_like(cosine_QN)
    for line, query in enumerate(queries):
        grade_QN[line, list(query.grades)] = torch.tensor(list(query.grades.values())).to(grade_QN)
    k = config.environment.k
    scaled_Q = rewards.dcg_scaled(cosine_QN, grade_QN, k)
    figures = {"live.reward": float(scaled_Q.mean()), "live.dcg": float(rewards.dcg(cosine_QN, grade_QN, k).mean())}
    cosine_QN = environment.corpus.scores(direct_QD, torch.arange(len(environment.corpus)))
    figures["live.reward_direct"] = float(rewards.dcg_scaled(cosine_QN, grade_QN, k).mean())
    ranks = rank_of_positive(
        environment, reasoned_QD[: config.num_completions_to_log], queries[: config.num_completions_to_log]
    )
    records = [
        {"query": query.text, "text": r.text, "reward": round(value, 4), "rank": rank, "forced": r.forced}
        for query, r, value, rank in zip(queries, reasoned, scaled_Q.tolist(), ranks, strict=False)
    ]
    return figures, records


def staleness_figures(
    encoder: SearchR3,
    environment: RetrievalEnvironment,
    queries: Sequence[Query],
    documents: Sequence[str],
    step: int,
    config: GRPOConfig,
) -> dict[str, float]:
    """ "staleness_recall" and "staleness_error" of the queries' direct embeddings. A collective."""
    found = environment.evaluate_staleness(
        encoder.encode_query([query.text for query in queries], reasoning=False, show_progress_bar=False),
        [query.grades for query in queries],
        encode_rows(encoder, documents, config.max_document_tokens),
        step,
        queries=[query.text for query in queries],
        random_rows=config.staleness_eval_rows,
    )
    return {"staleness_recall": found.pooled_recall, "staleness_error": found.pooled_reward_error}

"""Validation of stage 2 on held-out queries: the rewards of their reasoning in the live corpus.

The corpus is used as it is, partly refreshed. Exact rewards require all of it re-encoded: see
benchmarks/environment.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from search_r3.environment import rewards
from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.environment.reward_protocol import RankedRollouts
from search_r3.model.searchr3 import SearchR3
from search_r3.training.grpo.dataset import Query
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.live_environment import rank_of_positive


def live_metrics(
    encoder: SearchR3, environment: RetrievalEnvironment, queries: Sequence[Query], config: GRPOConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Mean rewards of greedy reasoning traces and of direct embeddings, and records of the first few traces.

    The reward is the recipe's (`environment.reward`) before shaping: a forced embed token is not penalized.

    Returns:
        "live.reward" and "live.dcg" (nDCG@k) with reasoning, "live.reward_direct" without, and "live.gain", with minus
        without: whether the reasoning is worth writing; and records to log, with the query, the trace's text, its
        reward, the positive's rank, and whether the embed token was forced.
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
    for index, query in enumerate(queries):
        grade_QN[index, list(query.grades)] = torch.tensor(list(query.grades.values())).to(grade_QN)
    k = config.environment.k
    reward_Q = environment.reward(
        RankedRollouts(
            queries=texts,
            texts=[r.text for r in reasoned],
            token_ids=[r.reasoning_ids for r in reasoned],
            emitted_R=torch.tensor([not r.forced and r.num_tokens >= config.min_reasoning_tokens for r in reasoned]),
            cosines_RN=cosine_QN,
            grades_RN=grade_QN,
            k=k,
        )
    )
    metrics = {"live.reward": float(reward_Q.mean()), "live.dcg": float(rewards.ndcg(cosine_QN, grade_QN, k).mean())}
    cosine_QN = environment.corpus.scores(direct_QD, torch.arange(len(environment.corpus)))
    direct_Q = environment.reward(RankedRollouts.without_text(cosine_QN, grade_QN, k, texts))
    metrics["live.reward_direct"] = float(direct_Q.mean())
    metrics["live.gain"] = metrics["live.reward"] - metrics["live.reward_direct"]
    ranks = rank_of_positive(
        environment, reasoned_QD[: config.num_completions_to_log], queries[: config.num_completions_to_log]
    )
    records = [
        {"query": query.text, "text": r.text, "reward": round(value, 4), "rank": rank, "forced": r.forced}
        for query, r, value, rank in zip(queries, reasoned, reward_Q.tolist(), ranks, strict=False)
    ]
    return metrics, records

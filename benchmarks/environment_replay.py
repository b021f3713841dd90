"""One refresh policy through a world: what its rewards and rankings are, beside those of re-encoding everything.

The environment is the trainer's own (`RetrievalEnvironment.score`); only its `encode` looks rows up. Recall is the
share of the true top k that is in the live top k; a reward's error is its distance from the reward on a corpus that was
re-encoded in full with the weights of that step. "rollouts" are the batch's own, right after the refresh: what the
policy gradient is given. "dev" are fixed queries that the refresh knows nothing of.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import rounded, say
from environment_worlds import Moment, World
from torch import Tensor

from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.refresh_policies import refresh_policy
from search_r3.environment.retrieval import RetrievalEnvironment, RewardBatch

SELECTIVE, RANDOM, MATCHED = "selective", "random", "random, as many rows as selective"
STILL = {"policy": "none"}
PARTS = ("search", "choose", "encode", "update", "relink", "rank")


def policies(rows: int, budget: int) -> dict[str, dict[str, Any]]:
    """What is compared; `MATCHED` gets its budget from what `SELECTIVE` re-encoded, so it comes after it."""
    every = max(1, round(rows / budget))
    return {
        SELECTIVE: {"policy": "selective", "budget": budget},
        "selective, by age alone": {"policy": "selective", "budget": budget, "first_ranks": 0},
        "selective, no graph": {"policy": "selective", "budget": budget, "hops": 0},
        "selective, candidates' neighbors too": {"policy": "selective", "budget": budget, "candidate_neighbors": True},
        MATCHED: {"policy": "random", "budget": budget},
        RANDOM: {"policy": "random", "budget": budget},
        f"full every {every}": {"policy": "full", "every": every},
        "none": STILL,
    }


def replay(
    world: World,
    refresh: dict[str, Any],
    *,
    environment: EnvironmentConfig | None = None,
    graph: Callable[[], NeighborGraph] | None = None,
    seed: int = 0,
    label: str = "",
) -> list[dict[str, Any]]:
    """A record a step: age, recall, error, rows re-encoded, seconds by part; of dev queries where it has them."""
    config = replace(environment or EnvironmentConfig(), refresh=refresh)
    live: RetrievalEnvironment | None = None
    records, last = [], time.monotonic()
    for moment in world.moments():
        if live is None:
            own = copy.deepcopy(graph()) if graph and refresh_policy(refresh).needs_graph else None
            live = RetrievalEnvironment(_copy(moment.truth), config, graph=own, seed=seed)
        records.append(_step(live, moment))
        if time.monotonic() - last > 20:
            say(f"  {label}: step {moment.step}")
            last = time.monotonic()
    return records


def _step(live: RetrievalEnvironment, moment: Moment) -> dict[str, Any]:
    truth, step = moment.truth, moment.step
    scores = live.score(
        moment.rollouts_RD,
        moment.query_R,
        moment.grades,
        truth.vectors,
        step,
        emitted_R=torch.ones(len(moment.query_R), dtype=torch.bool),
    )
    exact = score_still(live, truth, moment.rollouts_RD, moment.query_R, moment.grades, step)
    record = {
        "step": step,
        "age": float(live.corpus.ages(step).float().mean()),
        "refreshed": len(scores.refreshed),
        "seconds": scores.seconds,
        **compared(scores, exact),
    }
    if moment.dev_QD is not None:
        number_Q = torch.arange(len(moment.dev_QD))
        both = [
            score_still(live, corpus, moment.dev_QD, number_Q, moment.dev_grades, step)
            for corpus in (live.corpus, truth)
        ]
        record |= {f"dev_{name}": value for name, value in compared(*both).items()}
        staleness = live.evaluate_staleness(moment.dev_QD, moment.dev_grades, truth.vectors, step)
        record |= {"staleness_recall": staleness.pooled_recall, "staleness_error": staleness.pooled_reward_error}
    return record


def score_still(
    live: RetrievalEnvironment, corpus: Any, probes_RD: Tensor, query_R: Tensor, grades: Sequence[Any], step: int
) -> RewardBatch:
    """What these embeddings earn in a corpus as it is."""
    still = RetrievalEnvironment(corpus, replace(live.config, refresh=STILL))
    emitted = torch.ones(len(query_R), dtype=torch.bool)
    return still.score(probes_RD, query_R, grades, corpus.vectors, step, emitted_R=emitted)


def compared(live: RewardBatch, exact: RewardBatch) -> dict[str, float]:
    """Recall of the exact ranking, and the rewards' mean distance: of the configured reward, and of nDCG."""
    same_RK = (live.rows_RK[:, :, None] == exact.rows_RK[:, None, :]).any(dim=2)
    return {
        "recall": float(same_RK.float().mean()),
        "error": float((live.unshaped_R.double() - exact.unshaped_R.double()).abs().mean()),
        "error_ndcg": float((live.ndcg_R.double() - exact.ndcg_R.double()).abs().mean()),
        "reward": float(exact.unshaped_R.mean()),
        "ndcg": float(exact.ndcg_R.mean()),
    }


def summary(records: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Means over the steps after the first, at which every policy's corpus is fresh; and over the last quarter."""
    later = [record for record in records if record["step"] > 0]
    end = later[-max(1, len(later) // 4) :]
    found: dict[str, Any] = {
        "steps": len(records),
        "share_reencoded": float(np.mean([record["refreshed"] for record in later])) / rows,
        "most_reencoded": max(record["refreshed"] for record in later) / rows,
    }
    for name in ("age", "recall", "error", "error_ndcg", "reward", "ndcg"):
        found[name] = _mean(later, name)
        found[f"end_{name}"] = _mean(end, name)
    for name in ("recall", "error", "error_ndcg", "reward", "ndcg"):
        found[f"dev_{name}"] = _mean(later, f"dev_{name}")
    found |= {name: _mean(later, name) for name in ("staleness_recall", "staleness_error")}
    seconds = {part: float(np.mean([record["seconds"][part] for record in later])) for part in PARTS}
    kept = {name: value for name, value in found.items() if not math.isnan(value)}
    return {k: v if isinstance(v, int) else rounded(v) for k, v in kept.items()} | {
        "seconds": {part: rounded(value) for part, value in seconds.items()}
    }


def _mean(records: list[dict[str, Any]], name: str) -> float:
    values = [record[name] for record in records if name in record]
    return float(np.mean(values)) if values else math.nan


def _copy(corpus: LiveCorpus) -> LiveCorpus:
    live = LiveCorpus(len(corpus), corpus.dimension)
    live.load_state_dict(corpus.state_dict())
    return live

"""A disk cache of a model's reasoning traces for a data set's queries, used by every control that needs them.

Like embeddings (`embedding_cache`), traces are stored in shards with a checksum, under a key of everything that
determines them: contract, dtype, budget, temperature, seed and the queries themselves. An interrupted run resumes after
the last finished shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import content_hash, default_folder
from search_r3.evaluation.shard_cache import ShardCache
from search_r3.files import expand_user
from search_r3.progress import progress_bar

SHARD_SIZE = 64
"""Queries in one shard, the most work that an interruption can lose."""
FORMAT = "search-r3-reasoning-1"


@dataclass(frozen=True)
class ReasoningTraces:
    """Reasoning traces of some queries, in the order of the queries.

    Attributes:
        texts: the traces, without the embed token.
        token_ids: the same as token ids, as `SearchR3.encode_with_reasoning` takes them.
        rows: float32 (Q, dim): each query's embedding after its own reasoning.
        forced: whether a trace was cut off at the budget, or ended without the embed token.
        seconds: time to write them, possibly in an earlier run.
    """

    texts: list[str]
    token_ids: list[list[int]]
    rows: np.ndarray
    forced: list[bool]
    seconds: float


class ReasoningCache:
    """A folder of reasoning traces; by default `reasoning` in the cache folder.

    Args:
        folder: where the shards go.
        shard_size: queries in one shard.
    """

    def __init__(self, folder: str | Path | None = None, shard_size: int = SHARD_SIZE) -> None:
        if shard_size < 1:
            raise InputError(f"shard_size is {shard_size}; expected at least 1")
        self.folder = expand_user(folder) if folder is not None else default_folder().parent / "reasoning"
        self.shard_size = shard_size

    def traces(
        self,
        model: Any,
        ids: Sequence[str],
        queries: Sequence[str],
        *,
        budget: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        show_progress: bool | None = None,
    ) -> ReasoningTraces:
        """The reasoning traces of `queries`: from disk if cached, else from `model.reason`.

        Args:
            temperature: 0 is greedy. A sample depends on its batch, so for samples `batch_size` is part of the key, and
                each shard has its own seed.
        """
        if not queries:
            raise InputError("there are no queries to reason about; check the data set's split")
        sampled = {"seed": seed, "batch_size": batch_size} if temperature > 0 else {}
        identity = {
            "contract_hash": model.contract_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "budget": budget,
            "temperature": temperature,
            **sampled,
        }
        about = json.dumps([FORMAT, self.shard_size, identity], sort_keys=True)
        key = hashlib.sha256(f"{about}\n{content_hash(ids, queries)}".encode()).hexdigest()
        parts = [list(queries[start : start + self.shard_size]) for start in range(0, len(queries), self.shard_size)]

        def make(number: int, advance: Callable[[int], None]) -> dict[str, np.ndarray]:
            sampling = {"temperature": temperature, "seed": seed * 1_000_003 + number} if sampled else {}
            reasoned = model.reason(
                parts[number], max_reasoning_tokens=budget, batch_size=batch_size, show_progress_bar=False, **sampling
            )
            advance(len(parts[number]))
            return {
                "rows": np.stack([r.embedding for r in reasoned]).astype(np.float32),
                "texts": np.frombuffer(json.dumps([r.text for r in reasoned]).encode(), dtype=np.uint8),
                "tokens": np.array([token for r in reasoned for token in r.reasoning_ids], dtype=np.int64),
                "lengths": np.array([len(r.reasoning_ids) for r in reasoned], dtype=np.int64),
                "forced": np.array([r.forced for r in reasoned], dtype=np.uint8),
            }

        cache = ShardCache(self.folder, key, list(map(len, parts)))
        shards = cache.complete(
            make, lambda left: progress_bar(f"reasoning traces, at most {budget} tokens", left, show_progress)
        )
        tokens = [
            ids.tolist()
            for shard in shards
            for ids in np.split(shard.tensors["tokens"], np.cumsum(shard.tensors["lengths"])[:-1])
        ]
        return ReasoningTraces(
            [text for shard in shards for text in json.loads(shard.tensors["texts"].tobytes())],
            tokens,
            np.concatenate([shard.tensors["rows"] for shard in shards]),
            [bool(forced) for shard in shards for forced in shard.tensors["forced"]],
            sum(shard.seconds for shard in shards),
        )

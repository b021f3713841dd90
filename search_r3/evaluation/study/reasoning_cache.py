"""A model's reasoning traces for a data set's queries on disk: written once, used by every control that needs them.

Like embeddings (`embedding_cache`), they are kept in shards with a checksum, under a key of everything that decides
them: contract, dtype, budget, temperature, seed and the queries themselves. An interrupted run continues after the last
finished shard.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import content_hash, default_folder, progress_bar
from search_r3.files import atomic_path, expand_user

SHARD_SIZE = 64
"""Queries in one shard: what an interruption can cost."""
FORMAT = "search-r3-reasoning-1"


@dataclass(frozen=True)
class ReasoningTraces:
    """What a model wrote about some queries, in their order.

    Attributes:
        texts: the traces, without the embed token.
        token_ids: the same as written; `SearchR3.encode_behind` takes them.
        rows: float32 (Q, dim): each query's embedding after its own reasoning.
        forced: which were cut off at the budget, or ended without the embed token.
        seconds: how long writing them took, whenever that was.
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
        """The reasoning traces of `queries`: from the disk where they are there, by `model.reason` where they are not.

        Args:
            temperature: 0 is greedy. A sample depends on its batch, so `batch_size` is then part of the key, and each
                shard draws from a seed of its own.
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
        starts = range(0, len(queries), self.shard_size)
        paths = [self.folder / key[:32] / f"shard-{n:05d}-of-{len(starts):05d}.safetensors" for n in range(len(starts))]
        found = [_read(path, key, len(queries[s : s + self.shard_size])) for path, s in zip(paths, starts, strict=True)]
        left = sum(len(queries[s : s + self.shard_size]) for s, part in zip(starts, found, strict=True) if part is None)
        with progress_bar(f"reasoning of at most {budget} tokens", left, show_progress) as advance:
            for number, start in enumerate(starts):
                if found[number] is not None:
                    continue
                members = list(queries[start : start + self.shard_size])
                began = time.perf_counter()
                sampling = {"temperature": temperature, "seed": seed * 1_000_003 + number} if sampled else {}
                reasoned = model.reason(
                    members, max_reasoning_tokens=budget, batch_size=batch_size, show_progress_bar=False, **sampling
                )
                part = ReasoningTraces(
                    [r.text for r in reasoned],
                    [list(r.analysis_ids) for r in reasoned],
                    np.stack([r.embedding for r in reasoned]).astype(np.float32),
                    [bool(r.forced) for r in reasoned],
                    time.perf_counter() - began,
                )
                _write(paths[number], part, key)
                found[number] = part
                advance(len(members))
        parts = [part for part in found if part is not None]
        return ReasoningTraces(
            [text for part in parts for text in part.texts],
            [ids for part in parts for ids in part.token_ids],
            np.concatenate([part.rows for part in parts]),
            [forced for part in parts for forced in part.forced],
            sum(part.seconds for part in parts),
        )


def _write(path: Path, part: ReasoningTraces, key: str) -> None:
    tensors = {
        "rows": part.rows,
        "tokens": np.array([token for ids in part.token_ids for token in ids], dtype=np.int64),
        "lengths": np.array([len(ids) for ids in part.token_ids], dtype=np.int64),
        "forced": np.array(part.forced, dtype=np.uint8),
    }
    texts = json.dumps(part.texts)
    metadata = {"key": key, "sha256": _digest(tensors, texts), "seconds": f"{part.seconds:.3f}", "texts": texts}
    with atomic_path(path) as scratch:
        save_file(tensors, scratch, metadata=metadata)


def _read(path: Path, key: str, expected: int) -> ReasoningTraces | None:
    """A shard, or None if it is missing, damaged or not the one that is asked for."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("rows", "tokens", "lengths", "forced")}
            if metadata["key"] != key or metadata["sha256"] != _digest(tensors, metadata["texts"]):
                return None
            ends = np.cumsum(tensors["lengths"])
            ids = [part.tolist() for part in np.split(tensors["tokens"], ends[:-1])]
            texts, forced = json.loads(metadata["texts"]), [bool(value) for value in tensors["forced"]]
            whole = len(tensors["rows"]) == len(texts) == len(ids) == len(forced) == expected
            return ReasoningTraces(texts, ids, tensors["rows"], forced, float(metadata["seconds"])) if whole else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _digest(tensors: dict[str, np.ndarray], texts: str) -> str:
    digest = hashlib.sha256(texts.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape}\n".encode() + tensors[name].tobytes())
    return digest.hexdigest()

"""Corpus embeddings on disk, in shards: an interrupted encoding resumes after the last finished shard.

Texts are sorted by length and cut into shards (`shard_cache`). The key holds the encoder's identity (contract hash,
dtype, length limit, side) and a hash of all ids and texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.evaluation.shard_cache import Shard, ShardCache
from search_r3.files import atomic_write_text, expand_user
from search_r3.model.resolve import cache_dir
from search_r3.progress import progress_bar

SHARD_SIZE = 512
FORMAT = "search-r3-embeddings-1"


@dataclass(frozen=True)
class Encoded:
    """Embeddings of some texts.

    Attributes:
        rows: float32 (n, dim), in the order of the texts.
        seconds: time to encode them, possibly in an earlier run.
        shards, shards_from_disk: number of shards, and how many of them were read from disk.
    """

    rows: np.ndarray
    seconds: float
    shards: int
    shards_from_disk: int


class EmbeddingCache:
    """A folder of cached embeddings; by default `embeddings` in the cache folder (see `model.resolve.cache_dir`).

    Args:
        folder: where the shards go.
        shard_size: texts in one shard, the most work that an interruption can lose.
    """

    def __init__(self, folder: str | Path | None = None, shard_size: int = SHARD_SIZE) -> None:
        if shard_size < 1:
            raise InputError(f"shard_size is {shard_size}; expected at least 1")
        self.folder = expand_user(folder) if folder is not None else default_folder()
        self.shard_size = shard_size

    def encode(
        self,
        encode: Callable[[list[str]], np.ndarray],
        ids: Sequence[str],
        texts: Sequence[str],
        identity: Mapping[str, Any],
        *,
        label: str = "documents",
        step: int = 64,
        show_progress: bool | None = None,
    ) -> Encoded:
        """Embeddings of `texts`, from disk if cached, else from `encode`.

        Args:
            encode: texts to float rows; one text's row must not depend on the other texts of the call.
            identity: everything that determines an embedding, JSON-serializable.
            label: what the progress bar says is being encoded.
            step: texts passed to `encode` at once; the progress bar is updated after each call.
            show_progress: None shows a bar when standard error is a terminal.

        Raises:
            InputError: `ids` and `texts` differ in length, the disk is full, or the folder cannot be written.
            ValueError: `encode` returned the wrong shape or a value that is not finite.
        """
        if len(ids) != len(texts):
            raise InputError(f"{len(ids)} ids for {len(texts)} texts; there must be one id for each")
        if not texts:
            return Encoded(np.zeros((0, 0), dtype=np.float32), 0.0, 0, 0)
        shards, cache = self._shards(ids, texts, identity)
        if not (cache.folder / "about.json").is_file():
            about = {"format": FORMAT, "key": cache.key, "texts": len(texts), "identity": dict(identity)}
            atomic_write_text(cache.folder / "about.json", json.dumps(about, indent=2, default=str) + "\n")
        made = 0

        def make(number: int, advance: Callable[[int], None]) -> dict[str, np.ndarray]:
            nonlocal made
            made += 1
            members, parts = shards[number], []
            for start in range(0, len(members), step):
                part = members[start : start + step]
                parts.append(_checked(encode([texts[i] for i in part]), len(part)))
                advance(len(part))
            return {"rows": np.concatenate(parts)}

        done = cache.complete(make, lambda left: progress_bar(label, left, show_progress))
        return _assemble(shards, done, len(shards) - made)

    def stored(self, ids: Sequence[str], texts: Sequence[str], identity: Mapping[str, Any]) -> Encoded | None:
        """The embeddings of `texts` from disk; None unless all are cached."""
        shards, cache = self._shards(ids, texts, identity)
        done: list[Shard] = []
        for number in range(len(shards)):
            shard = cache.stored(number)
            if shard is None:
                return None
            done.append(shard)
        return _assemble(shards, done, len(done)) if done else None

    def _shards(
        self, ids: Sequence[str], texts: Sequence[str], identity: Mapping[str, Any]
    ) -> tuple[list[list[int]], ShardCache]:
        """The indices of the texts in each shard, and the shards."""
        # Longest first: a batch that does not fit into memory fails at once, and the remaining time is overestimated.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        shards = [order[start : start + self.shard_size] for start in range(0, len(order), self.shard_size)]
        key = _key(ids, texts, identity, self.shard_size)
        return shards, ShardCache(self.folder, key, list(map(len, shards)))


def _assemble(shards: Sequence[Sequence[int]], done: Sequence[Shard], from_disk: int) -> Encoded:
    rows = np.empty((sum(map(len, shards)), done[0].tensors["rows"].shape[1]), dtype=np.float32)
    for members, shard in zip(shards, done, strict=True):
        rows[list(members)] = shard.tensors["rows"]
    return Encoded(rows, sum(shard.seconds for shard in done), len(shards), from_disk)


def default_folder() -> Path:
    """`embeddings` in the cache folder. Raises InputError if the user has none."""
    return cache_dir() / "embeddings"


def content_hash(*columns: Sequence[str]) -> str:
    """SHA-256 of lists of strings, including their order and boundaries."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(f"{len(column)}\n".encode())
        for text in column:
            data = text.encode("utf-8", errors="surrogatepass")
            digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()


def _key(ids: Sequence[str], texts: Sequence[str], identity: Mapping[str, Any], shard_size: int) -> str:
    about = json.dumps([FORMAT, shard_size, dict(identity)], sort_keys=True, default=str)
    return hashlib.sha256(f"{about}\n{content_hash(ids, texts)}".encode()).hexdigest()


def _checked(rows: np.ndarray, expected: int) -> np.ndarray:
    array = np.asarray(rows, dtype=np.float32)
    if array.ndim != 2 or len(array) != expected:
        raise ValueError(f"the encoder returned shape {array.shape} for {expected} texts; expected (n, dim)")
    if not np.isfinite(array).all():
        raise ValueError("the encoder returned NaN or infinity; its weights or dtype are broken")
    return array

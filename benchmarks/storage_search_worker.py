"""The searching side of `storage_search.py`, of this checkout or an older one: a line of JSON in, a line out."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.index import SearchIndex, SourceDocument, build_index

WORDS, WORDS_A_TEXT = 500, 30
QUERY = "word12 word77 word401"


class RandomVectors:
    """Random unit vectors: nothing here depends on what a vector means."""

    name, source, contract_hash = "random vectors", "random vectors", "a" * 64

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._rng = np.random.default_rng(0)

    def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
        rows = self._rng.standard_normal((len(texts), self.dimension), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    encode_query = encode_document


def make(place: str, rows: int, model: RandomVectors) -> dict[str, Any]:
    rng = random.Random(0)
    texts = (" ".join(f"word{rng.randrange(WORDS)}" for _ in range(WORDS_A_TEXT)) for _ in range(rows))
    build_index(place, [SourceDocument(f"d{i}", "", text) for i, text in enumerate(texts)], model, progress=False)
    return {}


def opened(place: str) -> Any:
    """As the command `search` opens an index, in this version or an older one."""
    return SearchIndex.open_snapshot(place) if hasattr(SearchIndex, "open_snapshot") else SearchIndex.open(place)


def timed(work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    began, started = time.time(), time.perf_counter()
    result = work()
    return {"began": began, "seconds": time.perf_counter() - started, "ended": time.time()}, result


def main() -> None:
    spec = json.loads(sys.argv[1])
    model, handles = RandomVectors(spec["dimension"]), dict[str, Any]()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def search(index: Any) -> list[str]:
        return [hit.id for hit in index.search(QUERY, model, mode="hybrid", reasoning=False).hits]

    def answer(task: str, place: str) -> dict[str, Any]:
        if task == "make":
            return make(place, spec["rows"], model)
        if task == "command":
            return timed(lambda: search(opened(place)))[0]
        if task == "copy":  # the command with --cache-dir
            from search_r3.index.local_copies import LocalCopies
            from search_r3.index.storage.location import Remote

            return timed(lambda: search(LocalCopies(Path(spec["cache"]), 1e9).open(Remote(place))))[0]
        if place not in handles:
            handle: Any = SearchIndex
            with suppress(ImportError):
                from search_r3.index.index_handle import IndexHandle as handle  # type: ignore[no-redef]
            handles[place] = handle(place) if handle is not SearchIndex else SearchIndex.open(place)
        return timed(lambda: search(handles[place]))[0]

    with suppress(ImportError):
        import lance  # noqa: F401
    import lancedb  # noqa: F401

    print(json.dumps({}), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(*line.split())), file=channel, flush=True)


if __name__ == "__main__":
    main()

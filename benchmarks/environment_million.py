"""The environment at a million rows, in a process of its own: time by part and peak memory, no quality.

Rows are made up and "re-encoded" by a small random turn, so encoding costs nothing here: its time is what the model
takes. The refresh set is as large as the budget allows: candidates' neighbors are taken too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import peak_memory, serve

from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.retrieval import RetrievalEnvironment

BLOCK = 16384


@dataclass(frozen=True)
class Spec:
    """What is timed."""

    rows: int = 1_000_000
    dimension: int = 576
    budget: int = 2000
    batch: int = 8
    group: int = 8
    candidates: int = 20
    threads: int | None = None
    seed: int = 0


def load(spec: Spec) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """Fill the corpus and build the graph approximately; then a function from a step's number to its seconds."""
    if spec.threads:
        torch.set_num_threads(spec.threads)
    before = peak_memory("cpu")
    rng = torch.Generator().manual_seed(spec.seed)
    corpus = LiveCorpus(spec.rows, spec.dimension)
    topics_TD = torch.randn(max(2, round(spec.rows**0.5)), spec.dimension, generator=rng) / spec.dimension**0.5
    begun = time.perf_counter()
    for start in range(0, spec.rows, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, spec.rows))
        place = torch.randint(len(topics_TD), (len(rows),), generator=rng)
        noise = torch.randn(len(rows), spec.dimension, generator=rng) / spec.dimension**0.5
        corpus.update(rows, torch.nn.functional.normalize(topics_TD[place] + 0.7 * noise, dim=1), 0)
    filled = time.perf_counter()
    filled_bytes = peak_memory("cpu")
    graph = NeighborGraph.build(corpus, approximate=True, seed=spec.seed)
    built = time.perf_counter()
    refresh = {"policy": "selective", "budget": spec.budget, "candidate_neighbors": True}
    config = EnvironmentConfig(refresh=refresh, candidates=spec.candidates)
    environment = RetrievalEnvironment(corpus, config, graph=graph, seed=spec.seed)
    ready = {
        "rows": spec.rows,
        "dimension": spec.dimension,
        "budget": spec.budget,
        "fill_seconds": round(filled - begun, 2),
        "approximate_build_seconds": round(built - filled, 2),
        "matrix_bytes": spec.rows * spec.dimension * 4,
        "graph_bytes": graph.ids_NM.nbytes + graph.cosines_NM.nbytes,
        "bytes_before": before,
        "peak_bytes_filled": filled_bytes,
        "peak_bytes_built": peak_memory("cpu"),
    }

    def step(line: str) -> dict[str, Any]:
        number = int(line)
        pick = np.random.default_rng([spec.seed, number])
        positives = pick.choice(spec.rows, size=min(spec.batch, spec.rows), replace=False)
        query_R = np.repeat(np.arange(len(positives)), spec.group)

        def turned(rows: np.ndarray) -> torch.Tensor:
            vectors = corpus.vectors(rows)
            noise = torch.from_numpy(pick.standard_normal(vectors.shape, dtype=np.float32)) / spec.dimension**0.5
            return torch.nn.functional.normalize(vectors + 0.02 * noise, dim=1)

        near = corpus.vectors(positives[query_R])
        noise = torch.from_numpy(pick.standard_normal(near.shape, dtype=np.float32)) / spec.dimension**0.5
        rollouts = torch.nn.functional.normalize(near + 0.7 * noise, dim=1)
        scores = environment.score(
            rollouts,
            query_R,
            [{int(row): 1.0} for row in positives],
            turned,
            number,
            emitted_R=torch.ones(len(query_R), dtype=torch.bool),
        )
        return {"refreshed": len(scores.refreshed), "seconds": scores.seconds, "peak_bytes": peak_memory("cpu")}

    return ready, step


def main() -> None:
    """A worker: see `common.Worker`."""
    import json

    spec = Spec(**json.loads(sys.argv[sys.argv.index("--worker") + 1]))
    serve(lambda: load(spec))


if __name__ == "__main__":
    main()

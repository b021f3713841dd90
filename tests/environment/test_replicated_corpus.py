"""ReplicatedCorpus: two gloo processes each encode a part, and both hold what one process would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.replicated_corpus import ReplicatedCorpus
from search_r3.environment.retrieval import RetrievalEnvironment

ROWS, DIMENSION = 17, 6


def unit_rows(seed: int, rows: int = ROWS) -> torch.Tensor:
    made = torch.randn(rows, DIMENSION, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=1)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    first, later, whole = unit_rows(0), unit_rows(1), LiveCorpus.from_vectors(unit_rows(0))
    corpus = ReplicatedCorpus(ROWS, DIMENSION)
    mine = corpus.local_rows(np.arange(ROWS))
    assert len(mine) == (9, 8)[rank]
    corpus.update(mine, first[mine], 0)
    assert torch.equal(corpus.vectors(torch.arange(ROWS)), first)

    corpus.update([3] if rank else [], later[[3] if rank else []], 2)  # one process has nothing
    whole.update([3], later[[3]], 2)
    assert torch.equal(corpus.steps_N, whole.steps_N)
    assert torch.equal(corpus.versions_N, whole.versions_N)
    with pytest.raises(ValueError, match="given twice"):  # on both, so that neither waits for ever
        corpus.update([5], later[[5]], 3)

    config = EnvironmentConfig(k=3, candidates=2, graph_width=4, graph_links=2, refresh={"budget": 7})
    rollouts, grades = unit_rows(2, 4), [{1: 1.0}, {4: 1.0}]
    environment = RetrievalEnvironment(corpus, config)
    alone = RetrievalEnvironment(whole, config)
    asked = []

    def encode(rows: np.ndarray) -> torch.Tensor:
        asked.append(len(rows))
        return later[rows]

    emitted = torch.ones(4, dtype=torch.bool)
    expected = alone.score(rollouts, [0, 0, 1, 1], grades, lambda rows: later[rows], 3, emitted_R=emitted)
    half = slice(2 * rank, 2 * rank + 2)
    got = environment.score(rollouts[half], [0, 0], grades[rank : rank + 1], encode, 3, emitted_R=emitted[half])
    assert got.refreshed.tolist() == expected.refreshed.tolist()
    assert sum(asked) < len(expected.refreshed)  # shared out
    torch.testing.assert_close(got.rewards_R, expected.rewards_R[half])
    torch.testing.assert_close(got.scaled_R, expected.scaled_R[half])
    assert torch.equal(corpus.vectors(torch.arange(ROWS)), whole.vectors(torch.arange(ROWS)))

    saved = corpus.state_dict()  # whole on every process: the main one may save it alone, any number may load it
    restored = LiveCorpus(ROWS, DIMENSION)
    restored.load_state_dict(saved)
    assert torch.equal(restored.vectors(torch.arange(ROWS)), corpus.vectors(torch.arange(ROWS)))
    (Path(folder) / f"done-{rank}").touch()
    dist.destroy_process_group()


def test_two_processes_hold_the_same_corpus(tmp_path: Path) -> None:
    run_processes(work, str(tmp_path))
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()

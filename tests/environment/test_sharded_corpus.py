"""ShardedCorpus: two gloo processes answer, update and save as one process would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.environment.sharded_corpus import ShardedCorpus, shard_of
from search_r3.errors import InputError

TOTAL = 13
CORNERS = torch.tensor(
    [[a, b, c, d] for a in (0.5, -0.5) for b in (0.5, -0.5) for c in (0.5, -0.5) for d in (0.5, -0.5)]
)
VECTORS = CORNERS[[0, 3, 3, 5, 9, 12, 3, 0, 15, 7, 8, 12, 3]]  # with equal rows on both sides of the cut


def test_shards_cover_the_rows_and_differ_by_one_at_most():
    for total in range(1, 40):
        for processes in range(1, total + 1):
            cuts = [shard_of(total, rank, processes) for rank in range(processes)]
            assert [row for cut in cuts for row in range(*cut)] == list(range(total))
            sizes = [stop - start for start, stop in cuts]
            assert max(sizes) - min(sizes) <= 1
    with pytest.raises(InputError, match="fewer processes"):
        shard_of(1, 0, 2)


def judge_together(rank: int) -> None:
    """Each process judges its own rollouts; together they refresh and reward as one process with all of them would."""
    later = CORNERS[(torch.arange(TOTAL) * 5 + 2) % 16]
    grades, query, rollouts = (
        [{2: 1, 8: 2}, {5: 1}, {12: 1, 0: 1, 3: 0}],
        torch.tensor([0, 0, 1, 2]),
        CORNERS[[4, 9, 2, 14]],
    )
    config = EnvironmentConfig(k=3, candidates=2, graph_width=3, graph_links=2, refresh={"budget": 9})
    corpus = ShardedCorpus(TOTAL, 4)
    mine = torch.arange(TOTAL)[rank::2]
    corpus.update(mine, VECTORS[mine], step=0)
    whole = RetrievalEnvironment(LiveCorpus.from_vectors(VECTORS), config)
    shared = RetrievalEnvironment(corpus, config)
    asked = []

    def encode(rows):
        asked.append(len(rows))
        return later[rows]

    emitted = torch.ones(4, dtype=torch.bool)
    expected = whole.score(rollouts, query, grades, lambda rows: later[rows], 1, emitted_R=emitted)
    part, numbers, own = ((slice(0, 3), query[:3], grades[:2]), (slice(3, 4), torch.tensor([0]), grades[2:]))[rank]
    got = shared.score(rollouts[part], numbers, own, encode, 1, emitted_R=emitted[part])
    assert torch.equal(got.rewards_R, expected.rewards_R[part])
    assert torch.equal(got.rows_RK, expected.rows_RK[part])
    assert got.refreshed.tolist() == expected.refreshed.tolist()
    assert asked == [(5, 4)[rank]]  # nine rows, shared
    assert (shared.graph.ids_NM == whole.graph.ids_NM).all()
    probes, grades = CORNERS[:3], [{1: 1}, {4: 1}, {6: 1}]
    assert shared.evaluate_staleness(probes, grades, encode, 2, top=4, random_rows=2) == whole.evaluate_staleness(
        probes, grades, lambda rows: later[rows], 2, top=4, random_rows=2
    )


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    whole = LiveCorpus.from_vectors(VECTORS)
    corpus = ShardedCorpus(TOTAL, 4)
    mine = torch.arange(rank, TOTAL, 2)  # who encodes a row is not who holds it
    corpus.update(mine, VECTORS[mine], step=0)
    assert len(corpus.local) == (6, 7)[rank]
    assert len(corpus) == TOTAL

    queries = CORNERS[: 5 if rank == 0 else 0]  # one process has queries, the other joins in
    for k in (1, 3, 7, TOTAL, 99):
        for got, expected in zip(corpus.search(queries, k), whole.search(queries, k), strict=True):
            assert torch.equal(got, expected), k
    rows = [12, 0, 5] if rank == 0 else [6]
    assert torch.equal(corpus.vectors(rows), whole.vectors(rows))
    assert torch.equal(corpus.scores(queries, rows), whole.scores(queries, rows))
    least, without = torch.full((len(queries), 1 + rank), 0.1), torch.full((len(queries), 2), -1)
    without[:, 0] = 12
    counted = corpus.count_at_least(queries, least, without)
    assert torch.equal(counted, whole.count_at_least(queries, least, without))

    changed = [2, 11] if rank == 0 else [7]
    corpus.update(changed, CORNERS[[14, 13] if rank == 0 else [1]], step=4)
    whole.update([2, 11, 7], CORNERS[[14, 13, 1]], step=4)
    for got, expected in zip(corpus.search(CORNERS, 6), whole.search(CORNERS, 6), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(corpus.versions_N, whole.versions_N)
    assert torch.equal(corpus.steps_N, whole.steps_N)
    assert torch.equal(corpus.ages(6), whole.ages(6))
    assert (
        NeighborGraph.build(corpus, width=6, links=3).ids_NM == NeighborGraph.build(whole, width=6, links=3).ids_NM
    ).all()

    for rows, step, words in (([3], 9, "given twice"), ([2 + rank], 1, "earlier than the last refresh")):
        with pytest.raises(ValueError, match=words):  # both processes raise, so neither waits for ever
            corpus.update(rows, CORNERS[:1], step)

    broken = CORNERS[:1] * (torch.nan if rank == 1 else 1.0)
    with pytest.raises(ValueError, match="norm nan"):
        corpus.update([rank], broken, 9)
    assert int(corpus.steps_N.max()) == 4

    saved, alone = corpus.state_dict(), LiveCorpus(TOTAL, 4)
    alone.load_state_dict(saved)  # one process may go on with what two have saved, and two with what one has
    assert torch.equal(alone.vectors(torch.arange(TOTAL)), whole.vectors(torch.arange(TOTAL)))
    for state in (saved, whole.state_dict()):
        fresh = ShardedCorpus(TOTAL, 4)
        fresh.load_state_dict(state)
        for got, expected in zip(fresh.search(CORNERS, 6), whole.search(CORNERS, 6), strict=True):
            assert torch.equal(got, expected)
    with pytest.raises(InputError, match="has 12 rows, this one 13"):
        fresh.load_state_dict({**saved, "vectors": saved["vectors"][1:]})
    judge_together(rank)
    dist.barrier()
    (Path(folder) / f"done-{rank}").touch()
    dist.destroy_process_group()


def test_two_processes_are_one_corpus(tmp_path):
    run_processes(work, str(tmp_path))
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()

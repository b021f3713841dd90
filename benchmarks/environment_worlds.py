"""What a replay runs in: a corpus as it would be if all of it were re-encoded at every step, and what training asks.

`RecordedWorld` has the rows of a recording. `SimulatedWorld` has as many as one likes, moved as a `Drift` says.

Shape suffixes: N documents, Q queries, R rollouts, B queries of a batch, D dimensions.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from environment_drift import NEAR, QUERY, TOUCHED, Drift, Mover, measure_frames
from environment_recording import Frame, Recording
from torch import Tensor

from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.rewards import ndcg
from search_r3.errors import InputError
from search_r3.training.grpo.dataset import QueryOrder

MADE_UP_NDCG = 0.6
"""How well queries without a recording find their positives."""
LEANS = [0.1 * i for i in range(16)]
BLOCK = 8192
"""Rows that are moved or written at once."""


@dataclass(frozen=True)
class Moment:
    """A step of training.

    Attributes:
        step: 0, 1, ...
        truth: every document by the weights of this step; valid until the next moment.
        rollouts_RD, query_R: unit rows of the batch's rollouts, and the number of each one's query in `grades`.
        grades: of the batch's queries.
        dev_QD, dev_grades: the fixed queries by the weights of this step, or None if it is not measured on them now.
    """

    step: int
    truth: LiveCorpus
    rollouts_RD: Tensor
    query_R: Tensor
    grades: list[dict[int, float]]
    dev_QD: Tensor | None
    dev_grades: list[dict[int, float]]


class World(Protocol):
    """Makes the same moments each time."""

    rows: int

    def moments(self) -> Iterator[Moment]: ...


class RecordedWorld:
    """A recording's checkpoints, one step each; or with steps between them, whose rows lie on the way to the next.

    Args:
        between: steps from one checkpoint to the next: 1 uses nothing but what was recorded. Dev queries are measured
            at checkpoints only.
    """

    def __init__(self, recording: Recording, *, between: int = 1, batch: int = 8, seed: int = 0) -> None:
        if len(recording.steps) < 2:
            raise InputError(f"{recording.folder} has {len(recording.steps)} checkpoints; 2 or more can be replayed")
        self.recording, self.between, self.seed = recording, between, seed
        self.rows = int(recording.facts["documents"])
        self.order = QueryOrder(len(recording.train), min(batch, len(recording.train)), seed)

    def moments(self) -> Iterator[Moment]:
        """One for each step, to the last checkpoint."""
        recording, steps = self.recording, self.recording.steps
        truth: LiveCorpus | None = None
        after = recording.frame(steps[0])
        dev_grades = [recording.grades[number] for number in recording.dev]
        for i in range(len(steps)):
            before = after
            after = recording.frame(steps[i + 1]) if i + 1 < len(steps) else before
            batch = before.batch or [recording.train[number] for number in self.order.batch(i)]
            parts = np.array_split(batch, self.between)
            for j in range(self.between if i + 1 < len(steps) else 1):
                step, share = i * self.between + j, j / self.between
                documents_ND = _between(before.documents_ND, after.documents_ND, share)
                if truth is None:
                    truth = LiveCorpus.from_vectors(documents_ND)
                else:
                    truth.update(torch.arange(len(truth)), documents_ND, step)
                some = [int(number) for number in parts[j]] or [int(batch[0])]
                rollouts_RD, query_R = _rollouts(before, after, some, share)
                yield Moment(
                    step,
                    truth,
                    rollouts_RD,
                    query_R,
                    [recording.grades[number] for number in some],
                    before.queries_QD[recording.dev] if j == 0 and recording.dev else None,
                    dev_grades,
                )


@dataclass(frozen=True)
class Simulation:
    """How large, how long, and what training asks at each step."""

    rows: int
    steps: int
    dimension: int = 576
    """Of a simulation without a recording; else the recording's own."""
    queries: int = 1024
    batch: int = 8
    group: int = 8
    dev: int = 64
    candidates: int = 20
    measure_every: int = 5
    scale: float = 1.0
    """Multiplies the drift."""


class SimulatedWorld:
    """Documents between those of a recording, queries as far from their positives as its queries, moved by a `Mover`.

    A query has one positive, and leans towards one of the positive's neighbors, by as much as makes the first nDCG@10
    that of the recording (or `MADE_UP_NDCG`). Rollouts are as far from their query's direct embedding as the
    recording's. The positives of a batch and what its rollouts find move as "touched", the graph's neighbors of the
    positives as "near", queries as "query". Not simulated: that training pulls a query and its positive together.
    """

    def __init__(
        self, simulation: Simulation, drift: Drift, recording: Recording | None = None, *, seed: int = 0
    ) -> None:
        self.simulation, self.drift, self.seed, self.rows = simulation, drift, seed, simulation.rows
        frame = recording.frame(recording.steps[0]) if recording else None
        grades = recording.grades if recording else []
        self.base_MD = frame.documents_ND if frame else _made_up(min(3000, simulation.rows), simulation.dimension, seed)
        self.apart_QD, self.spread_RD = _apart(self.base_MD, frame, grades, seed)
        self.ndcg = _first_ndcg(frame, grades) if frame else MADE_UP_NDCG
        self.asked = _asked(frame) if frame else (simulation.batch, simulation.group)
        self.lean = 0.0
        self._graph: NeighborGraph | None = None

    def graph(self) -> NeighborGraph:
        """The first step's graph, built once; a policy changes it, so give it a copy."""
        if self._graph is None:
            self._graph = NeighborGraph.build(self._documents())
        return self._graph

    def moments(self) -> Iterator[Moment]:
        """One for each step."""
        simulation, pick = self.simulation, np.random.default_rng([self.seed, 1])
        truth, graph, rows = self._documents(), self.graph(), self.rows
        every = min(simulation.queries + simulation.dev, rows)
        positive_Q = pick.choice(rows, size=every, replace=False)
        residual_QD = self.apart_QD[pick.integers(len(self.apart_QD), size=every)]
        near_Q = graph.ids_NM[positive_Q, pick.integers(min(4, graph.width), size=every)]
        near_Q = np.where(near_Q < 0, positive_Q, near_Q)
        query_QD = self._leaning(truth, positive_Q, near_Q, residual_QD, pick.random(every))
        dev_Q = np.arange(every)[-min(simulation.dev, every // 2) :]
        order = QueryOrder(every - len(dev_Q), min(simulation.batch, every - len(dev_Q)), self.seed)
        sample = np.concatenate([np.arange(min(rows, BLOCK)), rows + np.arange(every)])
        mean_D = truth.vectors(sample[sample < rows]).mean(dim=0)
        mover = Mover(self.drift, rows + every, mean_D, seed=self.seed, scale=simulation.scale)
        for step in range(simulation.steps):
            rng = np.random.default_rng([self.seed, 2, step])
            batch = np.array(order.batch(step))
            number_R = np.repeat(np.arange(len(batch)), simulation.group)
            shift_RD = self.spread_RD[rng.integers(len(self.spread_RD), size=len(number_R))]
            rollouts_RD = _unit(query_QD[batch[number_R]] + shift_RD)
            measured = step % simulation.measure_every == 0 or step == simulation.steps - 1
            yield Moment(
                step,
                truth,
                rollouts_RD,
                torch.from_numpy(number_R),
                [{int(positive_Q[number]): 1.0} for number in batch],
                query_QD[dev_Q] if measured else None,
                [{int(row): 1.0} for row in positive_Q[dev_Q]],
            )
            kind_N = np.zeros(rows + every, dtype=np.int64)
            kind_N[rows:] = QUERY
            kind_N[graph.neighbors(positive_Q[batch])] = NEAR
            kind_N[truth.search(rollouts_RD, simulation.candidates)[1].flatten().numpy()] = TOUCHED
            kind_N[positive_Q[batch]] = TOUCHED
            blocks = ((block, truth.vectors(block)) for block in np.array_split(np.arange(rows), -(-rows // BLOCK)))
            queries = iter([(rows + np.arange(every), query_QD)])
            for block, moved_RD in mover.moves(kind_N, _chain(blocks, queries)):
                if block[0] >= rows:
                    query_QD = moved_RD
                else:
                    truth.update(block, moved_RD, step + 1)

    def check(self, rows: int = 3000) -> Drift:
        """The drift that a simulation of a few rows really has, measured as a recording's is.

        As many queries and rollouts are asked in a step as between two checkpoints of the recording: how drift
        correlates with being touched depends on the share of rows that are touched.
        """
        batch, group = self.asked
        simulation = dataclasses.replace(
            self.simulation,
            **{"rows": min(rows, self.rows), "steps": max(8, len(self.drift.pace) + 1), "batch": batch, "group": group},
            **{"measure_every": 1, "queries": 8 * batch, "dev": 32},
        )
        small = copy.copy(self)
        small.simulation, small.rows, small._graph = simulation, simulation.rows, None
        frames, grades = [], []
        dev = simulation.dev
        for moment in small.moments():
            assert moment.dev_QD is not None  # measured at every step
            dev, first = len(moment.dev_QD), len(grades)
            grades += moment.grades
            frames.append((moment, moment.truth.vectors(torch.arange(simulation.rows)), first))
        whole = [
            Frame(
                moment.step,
                documents_ND,
                torch.cat([moment.dev_QD, torch.zeros(len(grades), documents_ND.shape[1])]),  # type: ignore[list-item]
                [dev + first + i for i in range(len(moment.grades))],
                moment.rollouts_RD,
                moment.query_R,
            )
            for moment, documents_ND, first in frames
        ]
        judged = [*frames[0][0].dev_grades, *grades]
        return measure_frames(whole, judged, list(range(dev)), simulation.candidates, "simulated")

    def facts(self) -> dict[str, Any]:
        """What the simulated geometry is like."""
        return {
            "ndcg_aimed_at": round(self.ndcg, 3),
            "base_documents": len(self.base_MD),
            "mean_cosine_of_documents": round(float(self.base_MD.mean(dim=0).square().sum()), 3),
            "query_to_positive_distance": round(float(self.apart_QD.norm(dim=1).mean()), 3),
            "rollout_to_query_distance": round(float(self.spread_RD.norm(dim=1).mean()), 3),
        }

    def _leaning(
        self, truth: LiveCorpus, positive_Q: np.ndarray, near_Q: np.ndarray, residual_QD: Tensor, share_Q: np.ndarray
    ) -> Tensor:
        """Queries that lean to their positive's neighbor just as much as makes them as hard as is wanted."""
        here_QD, away_QD = truth.vectors(positive_Q), truth.vectors(near_Q) - truth.vectors(positive_Q)
        place_Q1, some = torch.from_numpy(positive_Q)[:, None], slice(0, 256)
        for self.lean in LEANS:
            query_QD = _unit(
                here_QD + 2 * self.lean * torch.from_numpy(share_Q).float()[:, None] * away_QD + residual_QD
            )
            hit_QK = truth.search(query_QD[some], 10)[1] == place_Q1[some]
            if float((hit_QK / torch.arange(2, 2 + hit_QK.shape[1]).log2()).sum(dim=1).mean()) <= self.ndcg:
                break
        return query_QD

    def _documents(self) -> LiveCorpus:
        """The base's rows, then rows between one of them and one of its neighbors, until there are enough."""
        base_MD, rng = self.base_MD, torch.Generator().manual_seed(self.seed + 3)
        count, dimension = base_MD.shape
        corpus = LiveCorpus(self.rows, dimension)
        near_MK = NeighborGraph.build(LiveCorpus.from_vectors(base_MD)).ids_NM[:, :8]
        for start in range(0, self.rows, BLOCK):
            rows = torch.arange(start, min(start + BLOCK, self.rows))
            place = rows % count
            choice = torch.randint(near_MK.shape[1], (len(rows),), generator=rng)
            other = torch.from_numpy(near_MK)[place, choice].long()
            other = torch.where(other < 0, place, other)
            share = 0.5 * torch.rand(len(rows), 1, generator=rng)
            noise = torch.randn(len(rows), dimension, generator=rng) / dimension**0.5
            away = base_MD[other] - base_MD[place]
            made = base_MD[place] + share * away + 0.5 * away.norm(dim=1, keepdim=True) * noise
            corpus.update(rows, torch.where((rows < count)[:, None], base_MD[place], _unit(made)), 0)
        return corpus


def _made_up(rows: int, dimension: int, seed: int) -> Tensor:
    """Unit rows without a recording: topics of about 30 rows around a common mean, two rows of one topic at 0.75."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng) / dimension**0.5

    topics = max(2, rows // 30)
    place = torch.randint(topics, (rows,), generator=rng)
    return _unit(
        0.45 * _unit(normal(1, dimension)) + 0.74 * normal(topics, dimension)[place] + 0.5 * normal(rows, dimension)
    )


def _apart(base_MD: Tensor, frame: Frame | None, grades: list[dict[int, float]], seed: int) -> tuple[Tensor, Tensor]:
    """Queries minus their best positives, and rollouts minus their queries: the recording's, or made up."""
    rng, dimension = torch.Generator().manual_seed(seed + 4), base_MD.shape[1]
    apart = 0.7 * torch.randn(256, dimension, generator=rng) / dimension**0.5
    spread = 0.25 * torch.randn(256, dimension, generator=rng) / dimension**0.5
    if frame is not None:
        best = [(q, max(judged, key=lambda row: judged[row])) for q, judged in enumerate(grades) if judged]
        if best:
            apart = torch.stack([frame.queries_QD[q] - frame.documents_ND[row] for q, row in best])
        if len(frame.rollouts_RD):
            spread = frame.rollouts_RD - frame.queries_QD[frame.rollout_query_R]
    return apart, spread


def _first_ndcg(frame: Frame, grades: list[dict[int, float]]) -> float:
    """Mean nDCG@10 of the queries' direct embeddings."""
    grade_QN = torch.zeros(len(grades), len(frame.documents_ND))
    for number, judged in enumerate(grades):
        grade_QN[number, list(judged)] = torch.tensor(list(judged.values()))
    return float(ndcg((frame.queries_QD @ frame.documents_ND.T).clamp(-1, 1), grade_QN).mean())


def _asked(frame: Frame) -> tuple[int, int]:
    """(queries trained on from this checkpoint to the next, rollouts of each)."""
    batch = max(1, len(frame.batch))
    return batch, max(1, round(len(frame.rollouts_RD) / batch))


def _rollouts(before: Frame, after: Frame, batch: list[int], share: float) -> tuple[Tensor, Tensor]:
    """The batch's rollouts (its direct embeddings where none were recorded), and each one's number in the batch."""
    move_QD = _between(before.queries_QD, after.queries_QD, share) - before.queries_QD
    rows, number = [], []
    for i, query in enumerate(batch):
        own = (before.rollout_query_R == query).nonzero()[:, 0]
        found = before.rollouts_RD[own] if len(own) else before.queries_QD[query][None]
        rows.append(found + move_QD[query])
        number += [i] * len(found)
    return _unit(torch.cat(rows)), torch.tensor(number)


def _between(a: Tensor, b: Tensor, share: float) -> Tensor:
    return a if share == 0 else _unit(torch.lerp(a, b, share))


def _chain(*parts: Iterator[Any]) -> Iterator[Any]:
    for part in parts:
        yield from part


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)

"""How embeddings drift in training: measured from a recording, written down as JSON, and simulated at any size.

Measured for a checkpoint and the next: how far each row moved (1 - cosine), apart for the rows that training touched,
their neighbors and the others; how much of the movement all rows share, and how much neighbors share.

Shape suffixes: N rows, D dimensions, C classes of rows.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment_recording import Frame, Recording
from torch import Tensor

from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.errors import InputError

ASSUMED = Path(__file__).with_name("environment_drift.json")
"""What is simulated without a recording; its "source" says where the figures are from."""
CLASSES = ("other", "near", "touched", "query")
OTHER, NEAR, TOUCHED, QUERY = range(4)
LEVELS = [i / 20 for i in range(21)]
"""Quantiles kept of each distribution."""
SMALLEST = 1e-9
"""A drift below this is float32's rounding."""
LAGS = (1, 2, 4)
Rows = tuple[np.ndarray, Tensor]
"""Row numbers, and their vectors."""
SHARED_RANK = 64
"""Rank of the map that moves neighbors alike, and of the noise."""


@dataclass
class Drift:
    """How rows move in one optimizer step."""

    source: str
    """Where the figures are from."""
    sizes: dict[str, list[float]]
    """Class -> quantiles (`LEVELS`) of 1 - cosine between a row before and after one step of the usual pace."""
    common: float
    """Share of the squared movement that is the same for all rows."""
    neighbors: float
    """Mean cosine between what is left of two nearest neighbors' movements without the common part."""
    direction: float
    """Mean cosine between a row's movements of two successive stretches."""
    rows: float
    """Rank correlation between the sizes of a row's movements in two successive stretches."""
    growth: float
    """Drift over L steps is L to this power times that over one: 1 is a random walk, 2 a straight line."""
    touched_correlation: float
    """Correlation between the logarithm of a document's drift and whether training touched it."""
    centred: float
    """Mean cosine between nearest neighbors, the corpus's mean taken off."""
    pace: list[float] = field(default_factory=lambda: [1.0])
    """How much rows move from each checkpoint to the next, over the geometric mean of all: warm-up, and luck."""
    steps: int = 1
    """Optimizer steps between the checkpoints that were measured; `sizes` are scaled down to one step by `growth`."""
    stretches: int = 0
    """How many were measured."""
    by_lag: dict[str, float] = field(default_factory=dict)
    """Mean drift of documents over so many stretches."""

    def __post_init__(self) -> None:
        if set(self.sizes) != set(CLASSES) or any(len(q) != len(LEVELS) for q in self.sizes.values()):
            raise InputError(f"a drift has {len(LEVELS)} quantiles for each of {', '.join(CLASSES)}")
        if not self.pace or min(self.pace) <= 0:
            raise InputError(f"a drift's pace is one or more positive numbers, not {self.pace}")

    def table_CL(self, scale: float = 1.0) -> np.ndarray:
        """Logarithms of the quantiles by class, sizes multiplied by `scale`."""
        return np.log(np.maximum([self.sizes[name] for name in CLASSES], SMALLEST) * scale)

    def summary(self) -> dict[str, Any]:
        """What is compared between a recording and its simulation."""
        found = {f"median_{name}": self.sizes[name][10] for name in CLASSES}
        found |= {f"p90_{name}": self.sizes[name][18] for name in CLASSES}
        names = ("common", "neighbors", "direction", "rows", "touched_correlation")
        found |= {"slowest": min(self.pace), "fastest": max(self.pace)}
        return {name: float(f"{value:.3g}") for name, value in found.items()} | {
            name: round(getattr(self, name), 3) for name in names
        }


def read_drift(path: Path) -> Drift:
    """What `write_drift` wrote. Raises InputError if it is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Drift(**{f.name: values[f.name] for f in fields(Drift) if f.name in values})
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a measured drift ({error})") from error


def drift_json(drift: Drift) -> dict[str, Any]:
    """JSON values, rounded to four digits."""
    return json.loads(json.dumps(asdict(drift)), parse_float=lambda text: float(f"{float(text):.4g}"))


def measure(recording: Recording, candidates: int = 20, source: str = "") -> Drift:
    """How the rows of a recording drift.

    Touched between two checkpoints are the positives of the queries trained on, and the `candidates` nearest documents
    of their rollouts (or of their direct embeddings); near are the graph neighbors of the positives.
    """
    frames = [recording.frame(step) for step in recording.steps]
    return measure_frames(frames, recording.grades, recording.dev, candidates, source or recording.facts["source"])


def measure_frames(
    frames: list[Frame], grades: list[dict[int, float]], dev: list[int], candidates: int, source: str
) -> Drift:
    """`measure`, of frames in memory."""
    stretches = list(itertools.pairwise(frames))
    if not stretches:
        raise InputError("one checkpoint does not drift; record more")
    gap = max(1, round(float(np.median([b.step - a.step for a, b in stretches]))))
    sizes: dict[str, list[np.ndarray]] = {name: [] for name in CLASSES}
    common, alike, centred, turned, kept, touch, pace = [], [], [], [], [], [], []
    previous: tuple[Tensor, Tensor] | None = None
    for before, after in stretches:
        move_ND = after.documents_ND - before.documents_ND
        size_N = _sizes(before.documents_ND, after.documents_ND)
        pace.append(float(size_N.clamp_min(SMALLEST).log().mean().exp()))
        kind_N, graph = classes(before, grades, candidates)
        for name, value in zip(CLASSES[:3], range(3), strict=True):
            sizes[name].append(size_N[kind_N == value].numpy() / pace[-1])
        sizes["query"].append(_sizes(before.queries_QD[dev], after.queries_QD[dev]).numpy() / pace[-1])
        mean_D = move_ND.mean(dim=0)
        common.append(float(mean_D.square().sum() / move_ND.square().sum(dim=1).mean().clamp_min(SMALLEST)))
        own_ND, nearest_N = move_ND - mean_D, torch.from_numpy(graph.ids_NM[:, 0]).long()
        linked_N = nearest_N >= 0
        alike.append(_mean_cosine(own_ND[linked_N], own_ND[nearest_N[linked_N]]))
        place_ND = before.documents_ND - before.documents_ND.mean(dim=0)
        centred.append(_mean_cosine(place_ND[linked_N], place_ND[nearest_N[linked_N]]))
        touch.append(_correlation(size_N.clamp_min(SMALLEST).log(), (kind_N == TOUCHED).float()))
        if previous is not None:
            turned.append(_mean_cosine(previous[0], move_ND))
            kept.append(_correlation(_ranks(previous[1]), _ranks(size_N)))
        previous = (move_ND, size_N)
    by_lag = {lag: _mean_drift(frames, lag) for lag in LAGS if lag < len(frames)}
    growth = 1.0
    if len(by_lag) > 1:
        slope = np.polyfit(np.log(list(by_lag)), np.log(np.maximum(list(by_lag.values()), SMALLEST)), 1)[0]
        growth = float(np.clip(slope, 0.5, 2.0))
    usual = float(np.exp(np.mean(np.log(pace))))
    whole = np.concatenate([np.concatenate(sizes[name]) for name in CLASSES[:3]])
    quantiles = {}
    for name, parts in sizes.items():
        values = np.concatenate(parts)
        values = usual * (values if len(values) else whole)
        quantiles[name] = (np.quantile(values, LEVELS) / gap**growth).tolist()
    return Drift(
        source=source,
        sizes=quantiles,
        common=float(np.clip(np.mean(common), 0, 1)),
        neighbors=float(np.mean(alike)),
        direction=float(np.mean(turned)) if turned else 0.0,
        rows=float(np.mean(kept)) if kept else 0.0,
        growth=growth,
        touched_correlation=float(np.mean(touch)),
        centred=float(np.mean(centred)),
        pace=[value / usual for value in pace],
        steps=gap,
        stretches=len(stretches),
        by_lag={str(lag): value for lag, value in by_lag.items()},
    )


def classes(frame: Frame, grades: list[dict[int, float]], candidates: int) -> tuple[Tensor, NeighborGraph]:
    """(which of `CLASSES` each document is in, (N,) int64; the graph of the documents)."""
    corpus = LiveCorpus.from_vectors(frame.documents_ND)
    graph = NeighborGraph.build(corpus)
    rollouts_RD = frame.rollouts_RD if len(frame.rollouts_RD) else frame.queries_QD[frame.batch]
    positives = [row for query in frame.batch for row, grade in grades[query].items() if grade > 0]
    kind_N = torch.zeros(len(corpus), dtype=torch.int64)
    kind_N[graph.neighbors(positives)] = NEAR
    if len(rollouts_RD):
        kind_N[corpus.search(rollouts_RD, candidates)[1].flatten()] = TOUCHED
    kind_N[positives] = TOUCHED
    return kind_N, graph


class Mover:
    """Moves the rows of a corpus as a `Drift` says: sizes by class, directions shared by all, by neighbors, by none.

    Every row keeps a tendency to move much or little (`rows`), and every step has a pace, in the order of the
    recording's and then again from its first. The shared directions turn slowly, as much as gives the
    movements the persistence that was measured (`direction`). A function of the seed and of the order of calls.

    Args:
        rows: how many there are.
        mean_D: the corpus's mean.
        scale: multiplies every size.
    """

    def __init__(self, drift: Drift, rows: int, mean_D: Tensor, *, seed: int, scale: float = 1.0) -> None:
        self.drift, self.mean_D, dimension = drift, mean_D, len(mean_D)
        self.random = torch.Generator().manual_seed(seed)
        self.table_CL = drift.table_CL(scale)
        self.step = 0
        self.tendency_N = self._normal(rows).numpy()
        self.common = min(max(drift.common, 0.0), 1.0)
        self.local = min(max(drift.neighbors, 0.0) * (1 - self.common) / max(drift.centred, 0.05), 1 - self.common)
        shared = self.common + self.local
        self.keep = min(1.0, max(0.0, drift.direction) / shared) if shared else 0.0
        self.all_D = self._normal(dimension)
        self.down_DK = self._normal(dimension, SHARED_RANK)
        self.up_KD = self._normal(SHARED_RANK, dimension)

    def moves(self, kind_N: np.ndarray, blocks: Iterator[Rows]) -> Iterator[Rows]:
        """For each (rows, their vectors) where they are after one more step."""
        self.all_D = self._turned(self.all_D)
        self.down_DK, self.up_KD = self._turned(self.down_DK), self._turned(self.up_KD)
        noise_KD = self._normal(SHARED_RANK, len(self.mean_D))
        for rows, vectors_RD in blocks:
            own_RD = _unit_rows(self._normal(len(rows), SHARED_RANK) @ noise_KD)
            local_RD = _unit_rows((vectors_RD - self.mean_D) @ self.down_DK @ self.up_KD)
            way_RD = math.sqrt(max(0.0, 1 - self.common - self.local)) * own_RD + math.sqrt(self.local) * local_RD
            way_RD += math.sqrt(self.common) * self.all_D / self.all_D.norm()
            way_RD -= (way_RD * vectors_RD).sum(dim=1, keepdim=True) * vectors_RD
            cosine_R1 = 1 - torch.from_numpy(self._sizes(kind_N[rows], rows))[:, None].clamp(0, 1)
            moved_RD = cosine_R1 * vectors_RD + (1 - cosine_R1.square()).sqrt() * _unit_rows(way_RD)
            yield rows, _unit_rows(moved_RD)
        self.step += 1

    def _sizes(self, kind_R: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Drift of each row, from the quantiles of its class."""
        keep = min(max(self.drift.rows, 0.0), 1.0)
        normal_R = math.sqrt(keep) * self.tendency_N[rows] + math.sqrt(1 - keep) * self._normal(len(rows)).numpy()
        place_R = torch.special.ndtr(torch.from_numpy(normal_R)).numpy()
        out_R = np.empty(len(rows), dtype=np.float32)
        pace = self.drift.pace[self.step % len(self.drift.pace)]
        for kind in np.unique(kind_R):
            chosen = kind_R == kind
            out_R[chosen] = pace * np.exp(np.interp(place_R[chosen], LEVELS, self.table_CL[kind]))
        return out_R

    def _turned(self, way: Tensor) -> Tensor:
        return self.keep * way + math.sqrt(1 - self.keep**2) * self._normal(*way.shape)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)


def _sizes(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """1 - cosine of unit rows, by their distance: exact where the difference of two numbers near 1 is not."""
    return (after_ND - before_ND).square().sum(dim=1) / 2


def _mean_drift(frames: list[Frame], lag: int) -> float:
    pairs = zip(frames, frames[lag:], strict=False)
    return float(np.mean([float(_sizes(a.documents_ND, b.documents_ND).mean()) for a, b in pairs]))


def _mean_cosine(a_ND: Tensor, b_ND: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a_ND, b_ND, dim=1).mean()) if len(a_ND) else 0.0


def _correlation(a_N: Tensor, b_N: Tensor) -> float:
    a_N, b_N = a_N.double() - a_N.double().mean(), b_N.double() - b_N.double().mean()
    scale = float(a_N.norm() * b_N.norm())
    return float(a_N @ b_N) / scale if scale > 0 else 0.0


def _ranks(values_N: Tensor) -> Tensor:
    return values_N.argsort().argsort()


def _unit_rows(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)

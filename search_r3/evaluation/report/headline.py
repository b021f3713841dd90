"""What a report answers first: the best system, what each kind of reasoning changes, the forest plot's differences.

Averages are over data sets that count equally, with bootstrap intervals over queries (`significance.macro_interval`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_r3.evaluation.given_reasoning import GIVEN_MODES, UPPER_BOUNDS
from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.records import SMALL
from search_r3.evaluation.report.load_results import Results
from search_r3.evaluation.report.system_names import is_control, is_control_model, split_mode
from search_r3.evaluation.significance import RESAMPLES, bootstrap_interval, macro_interval, paired
from search_r3.evaluation.systems import BASELINES

FEW = 100
"""Data sets with fewer queries than this are gray in plots and not part of averages."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Kind:
    """What one mode of a model changes against its direct embeddings, on average over `datasets`.

    Attributes:
        over_control: the mode minus its control (MODE.shuffled) on the same data sets; None if that was not measured.
    """

    model: str
    mode: str
    change: Estimate
    datasets: tuple[str, ...]
    over_control: Estimate | None

    @property
    def helps(self) -> bool:
        """Whether its gain is significant, and so is that over its control, if it has one."""
        return self.change.low > 0 and (self.over_control is None or self.over_control.low > 0)


@dataclass(frozen=True)
class Ranking:
    """The systems that were measured on the same data sets.

    Attributes:
        datasets: those that the means are over.
        means: system -> mean nDCG@10, the best first.
        best: the first of them; `ours` the best SearchR3 system, "" if there is none.
        best_mean: the best mean with its interval.
        against: baseline -> difference of `ours` from it.
        left_out: SearchR3 systems that were measured on too few data sets to be among `means`.
    """

    datasets: tuple[str, ...]
    means: dict[str, float]
    best: str
    ours: str
    best_mean: Estimate
    against: dict[str, Estimate]
    left_out: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The model of `ours`; "" if there is none."""
        return split_mode(self.ours)[0] if self.ours else ""


@dataclass(frozen=True)
class Difference:
    """A system minus a baseline on one data set; `interval` is None where it could not be tested."""

    dataset: str
    baseline: str
    value: float
    interval: Estimate | None
    few: bool


def ranking(loaded: Results) -> Ranking | None:
    """Rank the systems on the data sets that all of them were measured on; None if there is no such data set.

    Left out: controls, `given` reasoning (which no user has), and systems measured on fewer than three quarters as many
    data sets as the most measured one of ours, which would leave too few in common. A fixed part does not count where
    there is its whole data set.
    """
    known = loaded.by_dataset
    whole = [name for name in known if name.removesuffix(SMALL) == name or name.removesuffix(SMALL) not in known]
    measured = {
        system: sum(system in loaded.by_dataset[name].scores for name in whole)
        for system in dict.fromkeys(record["system"] for record in loaded.records)
        if not _left_out(*split_mode(system))
    }
    most = max((count for system, count in measured.items() if split_mode(system)[1]), default=0)
    systems = [system for system, count in measured.items() if count and 4 * count >= 3 * most]
    datasets = _averaged(loaded, systems)
    if not datasets:
        return None
    scores = {system: [loaded.by_dataset[name].scores[system] for name in datasets] for system in systems}
    means = {s: float(np.mean([np.mean(list(one.values())) for one in rows])) for s, rows in scores.items()}
    means = dict(sorted(means.items(), key=lambda item: -item[1]))
    best = next(iter(means))
    ours = next((system for system in means if split_mode(system)[1]), "")
    against = {
        baseline: _mean_difference(loaded, datasets, baseline, ours)
        for baseline in BASELINES
        if ours and baseline in scores
    }
    best_mean = Estimate(*macro_interval([list(one.values()) for one in scores[best]], resamples=RESAMPLES))
    fewer = tuple(system for system in measured if system not in systems and split_mode(system)[1])
    return Ranking(datasets, means, best, ours, best_mean, against, fewer)


def kinds(loaded: Results) -> list[Kind]:
    """Every mode of every model against its direct embeddings, controls included, in the order of the tables.

    Data sets whose given reasoning states the answer (`UPPER_BOUNDS`) are left out of the modes that are given it.
    """
    found = []
    for system in dict.fromkeys(record["system"] for record in loaded.records):
        model, mode = split_mode(system)
        direct = f"{model}.off"
        if mode in ("", "off") or is_control_model(model):
            continue
        datasets = _averaged(loaded, [direct, system], without=UPPER_BOUNDS if mode in GIVEN_MODES else frozenset())
        if datasets:
            control = f"{system}.shuffled"
            compared = all(control in loaded.by_dataset[name].scores for name in datasets)
            over_control = _mean_difference(loaded, datasets, control, system) if compared else None
            change = _mean_difference(loaded, datasets, direct, system)
            found.append(Kind(model, mode, change, datasets, over_control))
    return found


def differences(loaded: Results, system: str, baselines: Sequence[str]) -> list[Difference]:
    """`system` minus each baseline on every data set that it was measured on: whole data sets first, by difference from
    the first baseline, then those of few queries."""
    records = {(r["dataset"], r["system"]): r for r in loaded.records}
    found = []
    for (name, measured), record in records.items():
        for baseline in baselines:
            if measured == system and (name, baseline) in records:
                other = records[name, baseline]
                value = record["measures"][NDCG] - other["measures"][NDCG]
                found.append(Difference(name, baseline, value, _interval(loaded, name, baseline, system), few(record)))
    first = {d.dataset: d.value for d in reversed(found)}
    return sorted(found, key=lambda d: (d.few, -first[d.dataset], d.dataset))


def few(record: Mapping[str, Any]) -> bool:
    """Whether a record's data set has fewer than FEW queries."""
    return bool(record["num_queries"] < FEW)


def _mean_difference(loaded: Results, datasets: Sequence[str], before: str, after: str) -> Estimate:
    scores = [loaded.by_dataset[name].scores for name in datasets]
    return Estimate(*macro_interval([paired(one[before], one[after]) for one in scores], resamples=RESAMPLES))


def _interval(loaded: Results, name: str, baseline: str, system: str) -> Estimate | None:
    scores = loaded.by_dataset[name].scores if name in loaded.by_dataset else {}
    if baseline not in scores or system not in scores:
        return None
    row = paired(scores[baseline], scores[system])
    return Estimate(float(row.mean()), *bootstrap_interval(row, resamples=RESAMPLES))


def _left_out(model: str, mode: str) -> bool:
    return is_control_model(model) or is_control(mode) or mode == GIVEN_MODES[0]


def _averaged(loaded: Results, systems: Sequence[str], without: Collection[str] = ()) -> tuple[str, ...]:
    """The data sets that all of `systems` have scores on: those of FEW queries or more if there are any.

    A fixed part is not counted beside its whole data set.
    """
    if not systems:
        return ()
    common = [name for name, one in loaded.by_dataset.items() if all(system in one.scores for system in systems)]
    common = [name for name in common if name.removesuffix(SMALL) not in without]
    common = [name for name in common if not (name.endswith(SMALL) and name.removesuffix(SMALL) in common)]
    large = [name for name in common if len(loaded.by_dataset[name].scores[systems[0]]) >= FEW]
    return tuple(large or common)

"""Curves of a training run: reads `log.jsonl`, groups its metrics into panels, and smooths them.

`training/plot.py` (pictures), the report's training section and the model cards all use this module, so that they agree
on what a log says and on what is plotted together. `training/training_log.py` writes the logs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from search_r3.errors import InputError

Points = list[tuple[int, float]]
"""(step, value) in the order of the steps."""
Records = list[dict[str, Any]]
LOG_SPAN = 30.0
"""A panel's axis is logarithmic only where its values span more than this factor."""
ERROR = "_se"
"""Ends the name of a dev metric's standard error over its queries: "cosqa.dev.off_se" is that of "cosqa.dev.off"."""
HALF_WIDTH = 1.96
"""Standard errors on each side of a mean that give its 95% interval."""
FEW_POINTS = 3
"""Fewer measured points than this show no trend, so they are not joined by a line."""
WORDS = {"given": "true", "shuffled": "another query's", "on": "its own"}
"""Dev metrics of queries with words before the embed token, and whose words they are."""
NEEDS_ROWS = {"infonce_reasoning": "rows_reasoning", "accuracy_reasoning": "rows_reasoning"}
"""Metrics that mean nothing at a step where this other metric, if it is logged, is 0."""


@dataclass(frozen=True)
class Panel:
    """The metrics that are plotted together."""

    name: str
    title: str
    """What is plotted, in lower case; notes follow in parentheses."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Metrics of the steps and their labels, each in its own color."""
    dev: dict[str, str] = field(default_factory=dict)
    """Last parts of dev metrics' names and their labels: one color per pool, dashes for the second metric."""
    log: bool = False
    """Logarithmic, if the values span more than a factor of `LOG_SPAN`."""
    share: bool = False
    """Values from 0 to 1; the axis shows that whole range."""
    exact: bool = False
    """Free of noise, so drawn as it is rather than as a running mean."""
    from_zero: bool = False
    """Drawn from 0 in the report, on a linear axis."""

    @property
    def short_title(self) -> str:
        """The title without its notes."""
        return self.title.split(" (")[0]

    def title_of(self, label: str) -> str:
        """The title of a plot of the one metric with this label."""
        if self.name == "loss":
            return label
        return f"{self.short_title}, {label}" if label else self.short_title


PANELS = (
    Panel("dev", "dev nDCG@10 (dashed: reasoning on)",
          dev={"off": "off", "on": "on", "latent": "latent", "read": "read"}),
    Panel("words", "dev gain over direct (by the words read)", dev={"given": "given", "shuffled": "shuffled"}),
    Panel("loss", "loss and its terms", {"loss": "loss", "infonce": "InfoNCE", "triplet": "triplet",
          "sft": "cross-entropy", "kl": "KL to the base", "distillation": "KL to the teacher",
          "self_teaching": "KL of changed queries", "view_distillation": "KL to the query with reasoning",
          "trust": "KL of false reasoning to the direct query",
          "in_batch_lm": "in-batch LM"}, log=True),
    Panel("infonce", "InfoNCE", {"infonce_query": "direct", "infonce_reasoning": "reasoning",
                                 "infonce_reading": "reading"}, log=True),
    Panel("accuracy", "in-batch accuracy", {"accuracy_query": "direct", "accuracy_reasoning": "reasoning",
                                               "accuracy_reading": "reading"}),
    Panel("grad-norm", "gradient norm", {"grad_norm": ""}, log=True),
    Panel("lr", "learning rate", {"lr": ""}, exact=True),
    Panel("uniformity", "dev uniformity (lower: more even)", dev={"uniformity": ""}),
    Panel("alignment", "dev alignment (lower: nearer)", dev={"alignment": ""}),
    Panel("dev-emission", "dev reasoning that ends (dashed: distinct)", share=True,
          dev={"emission": "", "distinct": "distinct"}),
    Panel("dev-length", "dev tokens of reasoning", dev={"tokens": ""}, from_zero=True),
    Panel("reward", "reward of rollouts", {"reward": "as trained on", "dcg_scaled": "DCG scaled", "dcg": "nDCG",
                                           "direct": "direct"}),
    Panel("dev-reward", "dev live reward (dashed: direct)",
          dev={"reward": "with reasoning", "reward_direct": "direct"}),
    Panel("gain", "gain over direct reward", {"gain": "rollouts"}, dev={"gain": "held out"}),
    Panel("high-reward", "rollouts above 0.5", {"dcg_scaled_high": "DCG scaled", "dcg_high": "nDCG"}, share=True),
    Panel("emission", "rollouts", {"emission": "with the token", "distinct": "distinct",
                                   "zero_variance": "groups all equal"}, share=True),
    Panel("length", "tokens per rollout", {"length": ""}, from_zero=True),
    Panel("entropy", "entropy, nats per token", {"entropy": ""}),
    Panel("policy", "policy loss", {"policy": ""}),
    Panel("contrastive", "contrastive term", {"contrastive": ""}),
    Panel("kl", "KL to stage 1", {"kl_reference": ""}, log=True, from_zero=True),
    Panel("clipped", "share of tokens clipped", {"clip_low": "below", "clip_high": "above"}),
    Panel("age", "mean age of documents, steps", {"mean_age": ""}, exact=True, from_zero=True),
    Panel("stale", "reward error, stale documents", {"staleness_error": ""}, exact=True, from_zero=True),
    Panel("speed", "tokens per second", {"tokens_per_second": ""}),
    Panel("memory", "peak memory, GiB", {"memory_gib": ""}, exact=True),
)  # fmt: skip


def read_log(path: str | Path) -> tuple[Records, Records]:
    """The step records and the dev records of a `log.jsonl`; a half-written last line is left out.

    Raises:
        InputError: the file cannot be read, or another line is not a record (the message names it).
    """
    steps: Records = []
    dev: Records = []
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            (dev if "dev" in record else steps).append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if not line.endswith("\n"):
                continue
            raise InputError(f"{path}, line {number}: not a record of a training log ({error})") from error
    return steps, dev


def metric_points(steps: Sequence[dict[str, Any]], name: str) -> Points:
    """A metric of the step records, where it is a finite number and means something (see `NEEDS_ROWS`)."""
    points = []
    for record in steps:
        values = record.get("terms", {}) | record
        if name in values and values.get(NEEDS_ROWS.get(name, ""), 1):
            points.append((record["step"], values[name]))
    return finite_points(points)


def finite_points(points: Sequence[tuple[int, Any]]) -> Points:
    """The points whose value is a finite number."""
    return [
        (step, float(value)) for step, value in points if isinstance(value, int | float) and math.isfinite(float(value))
    ]


def running_mean(values: list[float]) -> list[float]:
    """The mean of each value and its neighbors, a twentieth of all values wide; fewer than 40 values are unchanged."""
    half = len(values) // 40
    if half == 0:
        return values
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    return means


def dev_mean(dev: Sequence[dict[str, Any]], ending: str) -> Points:
    """A dev metric as the mean over its pools: as logged ("ndcg@10.off"), else of the pools' own values."""
    points = []
    for record in dev:
        values = {name: value for name, value in record["dev"].items() if name.split(".")[-1] == ending}
        logged = values.get(f"ndcg@10.{ending}", values.get(ending))
        if values:
            points.append((record["step"], sum(values.values()) / len(values) if logged is None else logged))
    return finite_points(points)


def dev_intervals(dev: Sequence[dict[str, Any]], ending: str) -> list[tuple[float, float]]:
    """The 95% intervals of the points of `dev_mean`, over the dev queries; [] unless all of them were logged."""
    means, errors = dict(dev_mean(dev, ending)), dict(dev_mean(dev, ending + ERROR))
    if not means or means.keys() != errors.keys():
        return []
    return [(mean - HALF_WIDTH * errors[step], mean + HALF_WIDTH * errors[step]) for step, mean in means.items()]


def words_gains(dev: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """By how much words before the embed token raise dev nDCG@10 over the direct query: `WORDS` -> points.

    Each is the mean over the pools whose queries have given reasoning; {} if none has.
    """
    gains: dict[str, list[tuple[int, Any]]] = {label: [] for label in WORDS.values()}
    for record in dev:
        values = record["dev"]
        pools = [name.removesuffix(".given") for name in values if name.endswith(".given")]
        for ending, label in WORDS.items():
            found = [(values.get(f"{pool}.{ending}"), values.get(f"{pool}.off")) for pool in pools]
            over = [with_words - direct for with_words, direct in found if None not in (with_words, direct)]
            if over:
                gains[label].append((record["step"], sum(over) / len(over)))
    return {label: points for label, values in gains.items() if (points := finite_points(values))}


def best_dev(steps: Sequence[dict[str, Any]], dev: Sequence[dict[str, Any]]) -> tuple[str, int, float] | None:
    """The evaluation whose weights a run keeps: the mode, the step and its mean nDCG@10.

    Stage 2, which logs rewards, keeps the best with reasoning ("on"), stage 1 the best without ("off").
    """
    ending = "on" if metric_points(steps, "reward") else "off"
    points = dev_mean(dev, ending)
    if not points:
        return None
    step, value = max(points, key=lambda point: point[1])
    return ending, step, value


def constants(steps: Sequence[dict[str, Any]], panel: Panel) -> list[str]:
    """A panel's metrics in words, if none of them ever changed: "share of tokens clipped, below 0"; else []."""
    found = {label: metric_points(steps, name) for name, label in panel.metrics.items()}
    known = {label: [value for _, value in points] for label, points in found.items() if points}
    if panel.dev or not known or any(len(values) < 2 or min(values) != max(values) for values in known.values()):
        return []
    return [f"{panel.title_of(label)} {values[0]:.4g}" for label, values in known.items()]


def all_constants(steps: Sequence[dict[str, Any]]) -> list[str]:
    """The `constants` of all PANELS."""
    return [line for panel in PANELS for line in constants(steps, panel)]


def best_policies(errors: Mapping[str, float]) -> list[str]:
    """The refresh policies to draw: the two of the lowest mean reward error, and "none" if it was measured.

    "full" is left out, since it re-encodes every row; of the variants of a policy ("selective, by age alone") only the
    best is taken.

    Args:
        errors: policy -> mean reward error.
    """
    best: dict[str, str] = {}
    for policy in sorted(errors, key=lambda policy: errors[policy]):
        if policy not in ("none", "full"):
            best.setdefault(policy.partition(",")[0], policy)
    return [*list(best.values())[:2], *(["none"] if "none" in errors else [])]


def resumed_after(steps: Sequence[dict[str, Any]]) -> list[int]:
    """The steps after which a run went on in a new process, which the peak memory, else never lower, gives away."""
    memory = metric_points(steps, "memory_gib")
    return [before for (before, a), (_, b) in pairwise(memory) if b < a]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to `places` as possible, at least `gap` apart and within `low` and `high` where they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [min(max(places[i], low), high) for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    if moved and moved[-1] > high:
        moved[-1] = high
        for i in range(len(moved) - 2, -1, -1):
            moved[i] = min(moved[i], moved[i + 1] - gap)
    found = dict(zip(order, moved, strict=True))
    return [found[i] for i in range(len(places))]

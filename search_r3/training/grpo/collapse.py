"""Detects a policy that collapses: it always writes the same, or next to nothing, or all rollouts earn the same.

Each is compared with the first steps of the run, so that no value needs to be known beforehand.
"""

from __future__ import annotations

from typing import Any

FIRST_STEPS = 5
"""Steps whose mean is the comparison."""
WINDOW = 10
"""Steps whose mean is compared; a run is not judged before it has this many more than `FIRST_STEPS`."""
LEFT = {"entropy": 0.1, "length": 0.25, "group_std": 0.1}
"""Metric -> share of its first value below which the policy has collapsed (our choice)."""
WORDS = {
    "entropy": "entropy of {now:.3g} nats per token, {first:.3g} at the start: it always writes the same; set or raise "
    "entropy_floor, or raise beta",
    "length": "{now:.1f} tokens per rollout, {first:.1f} at the start: it no longer reasons; set min_reasoning_tokens",
    "group_std": "a standard deviation of {now:.3g} within a group's rewards, {first:.3g} at the start: nothing is "
    "left to compare; try zero_variance: replay or resample, or harder queries (min_positive_rank)",
}


class CollapseDetector:
    """Follows a run's metrics, step by step."""

    def __init__(self) -> None:
        self.first: dict[str, list[float]] = {name: [] for name in LEFT}
        self.recent: dict[str, list[float]] = {name: [] for name in LEFT}

    def step(self, metrics: dict[str, float]) -> str | None:
        """Record a step's metrics over all processes (entropy, length, group_std); returns `reason`."""
        for name in LEFT:
            if len(self.first[name]) < FIRST_STEPS:
                self.first[name].append(metrics[name])
            else:
                self.recent[name] = [*self.recent[name], metrics[name]][-WINDOW:]
        return self.reason

    @property
    def reason(self) -> str | None:
        """Why the policy has collapsed over the last `WINDOW` steps; None if it has not."""
        signs = []
        for name, share in LEFT.items():
            first, recent = self.first[name], self.recent[name]
            if len(recent) < WINDOW:
                continue
            start, now = sum(first) / len(first), sum(recent) / len(recent)
            if now < share * start:
                signs.append(WORDS[name].format(now=now, first=start))
        return "the policy has collapsed: " + "; ".join(signs) if signs else None

    def state_dict(self) -> dict[str, Any]:
        """The values, as JSON."""
        return {"first": self.first, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in LEFT:
            self.first[name] = list(state["first"].get(name, []))
            self.recent[name] = list(state["recent"].get(name, []))

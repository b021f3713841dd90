"""Detects a run that has nothing to learn from: warnings while it trains, and a failure at its end.

A step has nothing to learn from if the norm of its gradient is exactly 0, or if the task says so because of its
metrics (GRPO: all rewards are equal within every group, so every advantage is 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WARN_AFTER = (10, 100, 1000)
"""Steps in a row without anything to learn from after which a warning is printed."""


class LearningSignal:
    """Counts the steps of a run that had nothing to learn from.

    Args:
        task: may have a method `nothing_to_learn(metrics) -> str | None`, which returns why a step had nothing to learn
            from, or None. A task whose `must_learn` is false is not watched (a dry run).
        warn: prints a line.
        learned: whether the run learned something before it was resumed.
    """

    def __init__(self, task: Any, warn: Callable[[str], None], learned: bool = False) -> None:
        self._why: Callable[[dict[str, float]], str | None] = getattr(task, "nothing_to_learn", lambda metrics: None)
        self._warn, self._in_a_row, self._reason = warn, 0, ""
        self._watched = getattr(task, "must_learn", True)
        self.learned = learned or not self._watched

    def step(self, number: int, last: bool, grad_norm: float, metrics: dict[str, float]) -> None:
        """Record a finished step.

        Args:
            number: the step's number, from 1.
            last: whether it is the last step of the run.
            metrics: the step's metrics over all processes.
        """
        if not self._watched:
            return
        reason = self._why(metrics) or ("the gradient is 0" if grad_norm == 0 else None)
        if reason is None:
            self._in_a_row, self.learned = 0, True
            return
        self._in_a_row, self._reason = self._in_a_row + 1, reason
        if self._in_a_row in WARN_AFTER or (last and self._in_a_row < WARN_AFTER[0]):
            steps = f"the last {self._in_a_row} steps" if self._in_a_row > 1 else "the last step"
            self._warn(f"warning: step {number}: {steps} had nothing to learn from: {reason}")

    @property
    def failure(self) -> str | None:
        """Why the run failed, if no step had anything to learn from; None if one had."""
        return None if self.learned else f"nothing was learned: {self._reason or 'no step was made'}"

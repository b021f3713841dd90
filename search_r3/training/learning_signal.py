"""Detects a run without anything to learn from: it warns during the run, which then ends as a failure.

A step has nothing to learn from if the norm of its gradient is exactly 0, or if the task says so from its figures
(GRPO: within every group all rewards are equal, so that every advantage is 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WARN_AFTER = (10, 100, 1000)
"""Steps in a row without anything to learn from after which a warning is printed."""


class LearningSignal:
    """Counts the steps of a run that had nothing to learn from.

    Args:
        task: may have a method `nothing_to_learn(figures) -> str | None`: why a step had nothing to learn from, by its
            figures, or None. A task whose `must_learn` is false is not watched (a dry run).
        warn: prints a line.
        learned: whether an earlier part of the run has learned something already.
    """

    def __init__(self, task: Any, warn: Callable[[str], None], learned: bool = False) -> None:
        self._why: Callable[[dict[str, float]], str | None] = getattr(task, "nothing_to_learn", lambda figures: None)
        self._warn, self._in_a_row, self._reason = warn, 0, ""
        self._watched = getattr(task, "must_learn", True)
        self.learned = learned or not self._watched

    def step(self, number: int, last: bool, grad_norm: float, figures: dict[str, float]) -> None:
        """Record the step with the 1-based `number`, by its figures over all processes; `last` of the run."""
        if not self._watched:
            return
        reason = self._why(figures) or ("the gradient is 0" if grad_norm == 0 else None)
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

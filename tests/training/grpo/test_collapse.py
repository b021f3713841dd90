"""Collapse: which metrics show it, that noise and short runs do not, and that a resumed run goes on counting."""

from __future__ import annotations

import json

import pytest

from search_r3.training.grpo.collapse import FIRST_STEPS, WINDOW, CollapseDetector

HEALTHY = {"entropy": 1.2, "length": 16.0, "group_std": 0.1}


def after(detector: CollapseDetector, steps: int, **metrics: float) -> list[str | None]:
    return [detector.step(HEALTHY | metrics) for _ in range(steps)]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"entropy": 0.05}, "entropy of 0.05 nats per token, 1.2 at the start"),
        ({"length": 3.0}, "3.0 tokens per rollout, 16.0 at the start"),
        ({"group_std": 0.0}, "a standard deviation of 0 within a group's rewards, 0.1 at the start"),
    ],
)
def test_each_sign_is_named_after_a_whole_window(metrics: dict[str, float], words: str) -> None:
    detector = CollapseDetector()
    after(detector, FIRST_STEPS)
    told = after(detector, WINDOW, **metrics)
    assert told[:-1] == [None] * (WINDOW - 1)
    assert words in told[-1]
    assert after(detector, WINDOW)[-1] is None, "a policy that recovers has not collapsed"


def test_what_stays_as_it_began_has_not_collapsed() -> None:
    detector = CollapseDetector()
    assert not any(after(detector, 50, entropy=0.01, group_std=0.0))
    assert not any(after(detector, 3, entropy=0.0, length=1.0)), "a few steps are noise"


def test_a_resumed_run_goes_on_counting() -> None:
    whole = CollapseDetector()
    after(whole, FIRST_STEPS + 4, length=16.0)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = CollapseDetector()
    resumed.load_state_dict(state)
    for detector in (whole, resumed):
        assert after(detector, WINDOW, length=2.0)[-1] is not None
    assert whole.state_dict() == resumed.state_dict()

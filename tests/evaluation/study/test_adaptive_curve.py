"""The curve of quality against the share of queries that reason starts at off, ends at on, and lies under the best."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r3.evaluation.study.adaptive_curve import cross_fit, reasoning_curve

QUERY = st.tuples(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 30))


def test_worked_example():
    curve = reasoning_curve([3, 1, 2], off_Q=[0.0, 0.5, 0.5], on_Q=[1.0, 0.2, 0.8], tokens_Q=[10, 20, 10])
    assert curve.shares == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert curve.quality * 3 == pytest.approx([1.0, 2.0, 2.3, 2.0])  # the third gains .3, the second loses it
    assert curve.tokens == pytest.approx([0, 0.25, 0.5, 1])
    assert curve.share_for(0.95) == pytest.approx(1 / 3)
    assert curve.tokens_for(0.95) == pytest.approx(0.25)
    lost = reasoning_curve([1, 2], off_Q=[1.0, 1.0], on_Q=[0.5, 1.0])
    assert lost.share_for() is None
    assert lost.tokens_for() is None


@given(st.lists(QUERY, min_size=1, max_size=40))
def test_every_curve_starts_at_off_ends_at_on_and_lies_under_the_best(rows):
    priority, off, on, tokens = map(np.array, zip(*rows, strict=True))
    curve = reasoning_curve(priority, off, on, tokens)
    assert curve.quality[0] == pytest.approx(off.mean())
    assert curve.quality[-1] == pytest.approx(on.mean()) == pytest.approx(curve.best[-1])
    assert (curve.quality <= curve.best + 1e-9).all()
    oracle = reasoning_curve(on - off, off, on, tokens)
    assert oracle.quality == pytest.approx(curve.best)
    shown = json.loads(json.dumps(curve.to_dict(points=4)))
    assert shown["shares"][0] == 0
    assert shown["shares"][-1] == 1
    assert {len(column) for column in shown.values()} == {len(shown["shares"])}
    assert shown["random"][-1] == pytest.approx(shown["quality"][-1], abs=1e-5)


def test_in_cross_fitting_a_query_is_never_judged_by_a_rule_that_saw_it():
    rng = np.random.default_rng(0)
    scores = np.sort(rng.random((100, 10)), axis=1)[:, ::-1]
    gains = np.where(scores[:, 0] - scores[:, 1] < 0.08, 0.3, -0.1)
    priority, chosen = cross_fit(scores, gains, "a" * 64)
    assert ((priority >= 0) & (priority <= 1)).all()
    assert gains[chosen].mean() > gains.mean()
    flipped = gains.copy()
    flipped[17] = -5 * flipped[17]  # what happened to one query changes the others' rules, not its own
    again, decided = cross_fit(scores, flipped, "a" * 64)
    assert (again[17], decided[17]) == (priority[17], chosen[17])
    assert not np.array_equal(again, priority)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected one"):
        reasoning_curve([1, 2], [1.0], [1.0])

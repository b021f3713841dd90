"""The randomization test, the bootstrap and Holm's correction: the properties of their sources, and scipy's values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.errors import InputError
from search_r3.evaluation.significance import (
    bootstrap_interval,
    compare_family,
    holm,
    paired,
    randomization_test,
    wins_ties_losses,
)

ROWS = st.lists(st.floats(-1, 1, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=11)


def scipy_p(row, **options):
    stats = pytest.importorskip("scipy.stats")
    found = stats.permutation_test(
        (row, np.zeros(len(row))), lambda a, b: np.mean(a - b), permutation_type="samples", **options
    )
    return found.pvalue


@settings(max_examples=30, deadline=None)
@given(ROWS.filter(lambda row: len(row) > 1 and abs(sum(row)) > 1e-6))
def test_few_queries_are_tested_exactly_as_scipy_does(row):
    assert randomization_test(row) == pytest.approx(scipy_p(np.array(row), n_resamples=np.inf), abs=1e-12)


def test_many_queries_agree_with_scipy_within_the_noise_of_drawing():
    row = np.random.default_rng(3).normal(0.05, 0.4, size=120)
    ours = randomization_test(row, permutations=10_000, seed=1)
    theirs = scipy_p(row, n_resamples=4_000, rng=np.random.default_rng(2))
    assert 0.05 < ours < 0.95
    assert abs(ours - theirs) < 0.03  # the standard error of 4,000 draws is at most 0.008


@given(ROWS)
def test_the_sign_of_the_difference_and_the_order_of_queries_do_not_matter(row):
    p = randomization_test(row)
    assert 0 < p <= 1
    assert randomization_test([-x for x in row]) == pytest.approx(p)
    assert randomization_test(row[::-1]) == pytest.approx(p)
    assert randomization_test([*row, 0.0, 0.0]) == p  # a query without a difference tells nothing


def test_worked_example_and_extremes():
    assert randomization_test([1, 1, 1, 1]) == 2 / 16  # only all plus and all minus are as far out
    assert randomization_test([0.1 + 0.2, -0.3]) == 1.0  # 0.30000000000000004: rounding is no difference
    assert randomization_test([0, 0, 0]) == 1.0
    p = randomization_test(np.full(500, 0.1))
    assert p == 1 / 10_001  # never 0: that many permutations cannot tell
    assert randomization_test(np.full(500, 0.1), seed=9) == p


def test_under_the_null_small_p_values_are_as_rare_as_they_say():
    rng = np.random.default_rng(0)
    p = np.array([randomization_test(rng.normal(size=30), permutations=400, seed=i) for i in range(400)])
    assert abs(np.mean(p <= 0.05) - 0.05) < 0.035
    assert abs(np.mean(p <= 0.5) - 0.5) < 0.08


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_bootstrap_intervals_are_scipys(method):
    stats = pytest.importorskip("scipy.stats")
    row = np.random.default_rng(5).exponential(0.3, size=60) - 0.2  # skewed, so that BCa differs from percentile
    low, high = bootstrap_interval(row, method=method, resamples=20_000)
    named = {"bca": "BCa", "percentile": "percentile"}[method]
    theirs = stats.bootstrap(
        (row,), np.mean, n_resamples=20_000, method=named, batch=500, rng=np.random.default_rng(6)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    if method == "bca":
        plain = bootstrap_interval(row, method="percentile", resamples=20_000)
        assert low > plain[0] + 0.002  # the correction is more than the noise of drawing
        assert high > plain[1] + 0.002


def test_bootstrap_intervals_hold_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = 0
    for i in range(200):
        low, high = bootstrap_interval(rng.normal(0.1, 1, size=40), resamples=400, seed=i)
        held += low <= 0.1 <= high
    assert 0.89 <= held / 200 <= 0.99


def test_an_interval_widens_with_the_level_and_vanishes_where_nothing_varies():
    row = np.random.default_rng(2).normal(size=50)
    narrow, wide = bootstrap_interval(row, level=0.5), bootstrap_interval(row, level=0.99)
    assert wide[0] < narrow[0] < row.mean() < narrow[1] < wide[1]
    assert bootstrap_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)
    assert bootstrap_interval([0.5]) == (0.5, 0.5)


def test_holm_on_a_worked_example_keeps_the_order_given():
    # Sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 and .04, which may not be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).shape == (0,)
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_a_family_is_corrected_together_and_each_member_is_drawn_alone():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.2, 0.5, 80), rng.normal(0.0, 0.5, 80)
    both, alone = compare_family([a, b]), compare_family([a])[0]
    assert both[0].p == alone.p == alone.p_corrected
    assert both[0].p_corrected == pytest.approx(2 * both[0].p)
    assert (both[0].low, both[0].high) == (alone.low, alone.high)
    assert both[0].low < both[0].difference < both[0].high
    assert both[0].wins + both[0].ties + both[0].losses == 80
    assert compare_family([]) == []


def test_wins_ties_and_losses_forgive_rounding():
    assert wins_ties_losses([0.1 + 0.2 - 0.3, 0.5, -0.5, -0.1]) == (1, 1, 2)


def test_pairs_are_by_query_and_a_missing_one_is_refused():
    assert paired({"a": 0.5, "b": 0.0}, {"b": 1.0, "a": 0.25}).tolist() == [-0.25, 1.0]
    with pytest.raises(InputError, match="query c was measured for one"):
        paired({"a": 1.0}, {"a": 1.0, "c": 0.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: randomization_test([]), "at least one"),
        (lambda: randomization_test([float("nan")]), "finite"),
        (lambda: randomization_test([1.0], permutations=0), "permutations is 0"),
        (lambda: bootstrap_interval([1.0, 2.0], level=1.0), r"level 1\.0"),
        (lambda: bootstrap_interval([1.0, 2.0], method="magic"), "'magic'"),
        (lambda: holm([1.2]), "from 0 to 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

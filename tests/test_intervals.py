"""Intervals of a share and of a mean: against scipy's, and against published values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from engine.methods.intervals import wilson_interval
from engine.studies.intervals import mean_interval


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_has_the_published_values(successes, total, low, high):
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3, at 95 %."""
    interval = wilson_interval(successes, total)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5.1e-5)
    mirrored = wilson_interval(total - successes, total)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((interval.low, interval.high))


def test_the_t_interval_has_its_textbook_value():
    """Two values with a standard error of one: t of one degree of freedom, 12.7062."""
    interval = mean_interval([2.0, 4.0])
    assert (interval.low, interval.value, interval.high) == pytest.approx((3 - 12.7062, 3, 3 + 12.7062), abs=1e-4)


@given(st.integers(0, 400), st.integers(1, 400), st.floats(0.5, 0.999))
def test_wilson_is_scipys(successes, total, level):
    """An independent implementation agrees, at the ends too; the share lies inside, and inside [0, 1]."""
    successes = min(successes, total)
    ours = wilson_interval(successes, total, level)
    theirs = binomtest(successes, total).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20), st.floats(0.5, 0.999))
@settings(deadline=None)
def test_the_t_interval_is_scipys(values, level):
    """Of differences it is the paired one; equal values, where scipy has no answer, have no width."""
    ours = mean_interval(values, level)
    constant = mean_interval([values[0]] * len(values), level)
    assert constant.low == constant.value == constant.high == values[0]
    if np.std(values) < 1e-9:
        assert ours.high - ours.low < 1e-6
        return
    theirs = ttest_1samp(values, 0).confidence_interval(level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6, abs=1e-9)


def test_intervals_refuse_what_has_none():
    """No trial, or a single seed."""
    with pytest.raises(ValueError, match="0 of 0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="two values"):
        mean_interval([0.3])

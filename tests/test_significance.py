"""Differences of two groups: published intervals, tests by hand, symmetry, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.studies.compare import significance
from engine.studies.compare.significance import holm, median_difference, share_difference


def flags(successes: int, total: int) -> np.ndarray:
    return np.arange(total) < successes


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_unpaired_shares_have_the_published_intervals(first, second, low, high):
    """Newcombe 1998, "Interval estimation for the difference between independent proportions", Table II, method 10.

    And from the second group to the first, all signs change.
    """
    change = share_difference(flags(*second), flags(*first), is_paired=False).change
    assert (change.low, change.high) == pytest.approx((low, high), abs=5.1e-5)
    assert change.value == pytest.approx(first[0] / first[1] - second[0] / second[1])
    reverse = share_difference(flags(*first), flags(*second), is_paired=False).change
    assert (reverse.low, reverse.value, reverse.high) == pytest.approx((-change.high, -change.value, -change.low))


@pytest.mark.parametrize(("successes", "total"), [((7, 12), (40, 50)), ((2, 3), (5, 6)), ((0, 5), (20, 20))])
@pytest.mark.parametrize("is_paired", [True, False])
def test_a_higher_level_gives_wider_intervals(successes, total, is_paired):
    old, new = flags(successes[0], 50), flags(successes[1], 50)[::-1]
    narrow, wide = (share_difference(old, new, is_paired=is_paired, level=level).change for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_paired_shares_have_their_closed_forms():
    """Of 40 pairs, nine fail anew and one no more: McNemar's sum of binomials, Bonett and Price's equation 3."""
    old, new = np.zeros(40, bool), np.zeros(40, bool)
    new[:9], old[9:10], old[10:15], new[10:15] = True, True, True, True
    found = share_difference(old, new, is_paired=True)
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10) and found.test == "McNemar, exact"
    up, down = 10 / 42, 2 / 42
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / 42)
    assert (found.old, found.new, found.change.value) == pytest.approx((6 / 40, 14 / 40, 8 / 40))
    assert (found.change.low, found.change.high) == pytest.approx((up - down - half, up - down + half))
    reverse = share_difference(new, old, is_paired=True)
    assert (reverse.change.low, reverse.change.high) == pytest.approx((-found.change.high, -found.change.low))
    assert reverse.p_value == found.p_value


def test_unpaired_shares_are_tested_by_counts():
    """Fisher's exact test by the lady who tasted tea; chi-squared, uncorrected, from five expected in each cell on."""
    tea = share_difference(flags(1, 4), flags(3, 4), is_paired=False)
    assert tea.test == "Fisher, exact" and tea.p_value == pytest.approx(34 / 70)
    many = share_difference(flags(30, 100), flags(45, 100), is_paired=False)
    statistic = 200 * (30 * 55 - 70 * 45) ** 2 / (100 * 100 * 75 * 125)
    assert many.test == "chi-squared" and many.p_value == pytest.approx(math.erfc(math.sqrt(statistic / 2)))
    # Exactly five expected is enough.
    assert share_difference(flags(4, 10), flags(6, 10), is_paired=False).test == "chi-squared"
    assert share_difference(flags(4, 10), flags(5, 10), is_paired=False).test == "Fisher, exact"


def test_data_that_cannot_reject_have_no_test():
    """All alike: p is one and the test does not count for Holm; one that differs does."""
    for is_paired in (True, False):
        same = share_difference(flags(6, 6), flags(6, 6), is_paired=is_paired)
        assert (same.p_value, same.can_reject) == (1.0, False)
        assert share_difference(flags(5, 6), flags(6, 6), is_paired=is_paired).can_reject
        equal = median_difference(np.ones(9), np.ones(9), is_paired=is_paired)
        assert (equal.p_value, equal.can_reject, equal.change.low, equal.change.high) == (1.0, False, 0.0, 0.0)
        assert median_difference(np.ones(9), np.r_[np.ones(8), 2.0], is_paired=is_paired).can_reject


def test_medians_are_tested_by_ranks():
    """Eight pairs that all grow have p 2 / 2^8; groups of five that do not overlap have 2 / C(10, 5)."""
    old = np.arange(8.0)
    paired = median_difference(old, old + 1 + old / 10, is_paired=True)
    assert paired.p_value == pytest.approx(2 / 2**8) and paired.test == "Wilcoxon"
    groups = median_difference(np.arange(5.0), np.arange(5.0) + 10, is_paired=False)
    assert groups.p_value == pytest.approx(2 / math.comb(10, 5)) and groups.test == "Mann-Whitney"
    assert groups.change.value == 10 and (groups.old, groups.new) == (2, 12)


def test_pairs_are_resampled_together():
    """All pairs grow by three: every resample does too. Resampled apart, they would not."""
    old = np.random.default_rng(0).exponential(size=40)
    paired = median_difference(old, old + 3, is_paired=True).change
    apart = median_difference(old, old + 3, is_paired=False).change
    assert (paired.low, paired.high) == pytest.approx((3, 3)) and apart.high - apart.low > 0.1
    assert apart.low < 3 < apart.high
    wide = median_difference(old, old + 3, is_paired=False, level=0.999).change
    assert wide.low < apart.low and apart.high < wide.high


@pytest.mark.parametrize("is_paired", [True, False])
def test_intervals_hold_what_they_promise(is_paired):
    """Intervals of a difference of shares: at 95 %, near 95 of a hundred hold the truth, also for rare events."""
    rng, held, num_runs = np.random.default_rng(14), 0, 600
    for _ in range(num_runs):
        shared = rng.random(80)
        old = shared < 0.1
        new = (shared if is_paired else rng.random(80)) < 0.2
        new = new ^ (rng.random(80) < 0.05)
        truth = 0.2 * 0.95 + 0.8 * 0.05 - 0.1
        found = share_difference(old, new, is_paired=is_paired).change
        held += found.low <= truth <= found.high
    assert 0.92 <= held / num_runs <= 0.99


@pytest.mark.parametrize("is_paired", [True, False])
def test_intervals_of_medians_hold_what_they_promise(monkeypatch, is_paired):
    """The bootstrap's, for skewed scores."""
    monkeypatch.setattr(significance, "RESAMPLES", (299, 299))
    rng, held, num_runs = np.random.default_rng(15), 0, 200
    for _ in range(num_runs):
        old = rng.exponential(size=60)
        new = (old if is_paired else rng.exponential(size=60)) * 1.5 + rng.normal(0, 0.01, 60)
        found = median_difference(old, new, is_paired=is_paired).change
        held += found.low <= 0.5 * np.log(2) <= found.high
    assert held / num_runs >= 0.89


def test_holm():
    """By hand: 0.01 times 3, then 0.03 times 2, then no less than that."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.9, 0.9]) == [1.0, 1.0]

"""Differences of two groups of samples with intervals and tests: shares and medians, paired or not.

Paired samples began with the same noise in both groups. The tests are scipy's; the intervals of shares are closed forms
that hold for few samples and at 0 and 1, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtri

from engine.methods.intervals import LEVEL, Estimate, wilson_interval

# With a smaller expected count in a cell, Pearson's chi-squared does not hold and Fisher's exact test is used.
MIN_EXPECTED = 5
# Numbers drawn in a bootstrap, at most; many samples need fewer resamples.
MAX_DRAWN = 5 * 10**7
RESAMPLES = (199, 999)
MAX_HELD = 5 * 10**6

Flags = NDArray[np.bool_]
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A share or a median in two groups.

    Attributes:
        old, new: in the two groups.
        change: new less old, with its interval.
        p_value: of no difference; 1 where the data cannot reject it.
        test: its name.
        can_reject: whether the test could have rejected at all; pairs that are all equal cannot (Tarone 1990).
    """

    old: float
    new: float
    change: Estimate
    p_value: float
    test: str
    can_reject: bool = True


def share_difference(old: Flags, new: Flags, *, is_paired: bool, level: float = LEVEL) -> Difference:
    """Shares of True. Pairs: McNemar's exact test and the interval of Bonett and Price (2012); otherwise Pearson's
    chi-squared or Fisher's exact test, and Newcombe's interval (1998, method 10).

    Args:
        old, new: [N] and [M]; of pairs row by row.
    """
    if is_paired:
        return _paired_shares(old, new, level)
    a, b = wilson_interval(int(old.sum()), len(old), level), wilson_interval(int(new.sum()), len(new), level)
    change = b.value - a.value
    low = change - math.hypot(b.value - b.low, a.high - a.value)
    high = change + math.hypot(b.high - b.value, a.value - a.low)
    table = np.array([[old.sum(), (~old).sum()], [new.sum(), (~new).sum()]])
    p_value, test = _independence(table)
    can_reject = bool(table.sum(0).all())
    return Difference(
        old=a.value, new=b.value, change=Estimate(change, low, high), p_value=p_value, test=test, can_reject=can_reject
    )


def _paired_shares(old: Flags, new: Flags, level: float) -> Difference:
    count, gained, lost = len(old), int((new & ~old).sum()), int((old & ~new).sum())
    differing = gained + lost
    p_value = float(stats.binomtest(gained, differing).pvalue) if differing else 1.0
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = float(ndtri(0.5 + level / 2)) * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    change = (gained - lost) / count
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return Difference(
        old=float(old.mean()),
        new=float(new.mean()),
        # The interval's centre is shrunk towards zero; the observed change may lie just outside it.
        change=Estimate(change, min(low, change), max(high, change)),
        p_value=p_value,
        test="McNemar, exact",
        can_reject=differing > 0,
    )


def _independence(table: NDArray[np.int64]) -> tuple[float, str]:
    """The p value of equal shares, from counts [2, 2], and the name of the test."""
    if not table.sum(0).all():
        return 1.0, "Fisher, exact"
    if stats.contingency.expected_freq(table).min() < MIN_EXPECTED:
        return float(stats.fisher_exact(table).pvalue), "Fisher, exact"
    return float(stats.chi2_contingency(table, correction=False).pvalue), "chi-squared"


def median_difference(old: Values, new: Values, *, is_paired: bool, level: float = LEVEL) -> Difference:
    """Medians, with an interval from a bootstrap (percentiles). Pairs: Wilcoxon's signed-rank test, and pairs are drawn
    together; otherwise the test of Mann and Whitney.

    Args:
        old, new: [N] and [M]; of pairs row by row.
    """
    if is_paired:
        order = np.lexsort((new, old))
        old, new = old[order], new[order]
        can_reject = bool((old != new).any())
        p_value = float(stats.wilcoxon(new, old).pvalue) if can_reject else 1.0
    else:
        # Sorted, so that the resamples do not depend on the order of the rows.
        old, new = np.sort(old), np.sort(new)
        can_reject = bool(min(old[0], new[0]) != max(old[-1], new[-1]))
        p_value = float(stats.mannwhitneyu(new, old).pvalue) if can_reject else 1.0
    change = float(np.median(new) - np.median(old))
    low, high = _bootstrap(old, new, is_paired, level) if can_reject else (change, change)
    return Difference(
        old=float(np.median(old)),
        new=float(np.median(new)),
        change=Estimate(change, min(low, change), max(high, change)),
        p_value=p_value,
        test="Wilcoxon" if is_paired else "Mann-Whitney",
        can_reject=can_reject,
    )


def _bootstrap(old: Values, new: Values, is_paired: bool, level: float) -> tuple[float, float]:
    size = max(len(old), len(new))
    fewest, most = RESAMPLES
    drawn = stats.bootstrap(
        (old, new),
        lambda a, b, axis=-1: np.median(b, axis) - np.median(a, axis),
        n_resamples=max(fewest, min(most, MAX_DRAWN // size)),
        batch=max(1, MAX_HELD // size),
        paired=is_paired,
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for many comparisons (Holm 1979): rejecting those below a level has that family-wise error."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [1.0] * len(p_values)
    worst = 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = worst
    return adjusted

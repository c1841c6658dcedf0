"""Confidence intervals: Wilson's of a share, Student's of a mean; at 95 % by default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtri, stdtrit

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def is_degenerate(self) -> bool:
        """Whether the interval has no width, and thus no information."""
        return self.low == self.high


def wilson_interval(successes: int, total: int, level: float = LEVEL) -> Estimate:
    """A share with its score interval (Wilson 1927), which stays inside [0, 1] and has a width at 0 and at 1 too.

    Raises:
        ValueError: there is no trial, or there are more successes than trials.
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"{successes} of {total} is no share")
    share, z = successes / total, float(ndtri(0.5 + level / 2))
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    # At 0 and 1, rounding could leave the share just outside its own interval.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean of independent values with its t interval; for paired data, give the differences.

    Raises:
        ValueError: fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval needs two values or more, not {count}")
    if min(values) == max(values):
        # Rounding in the mean would leave a tiny variance, and with it a width that looks measured.
        return Estimate(values[0], values[0], values[0])
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(stdtrit(count - 1, 0.5 + level / 2)) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)

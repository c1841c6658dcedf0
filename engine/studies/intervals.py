"""The confidence interval of a mean, Student's; at 95 % by default. Wilson's of a share is in `engine.methods`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit

from engine.methods.intervals import LEVEL, Estimate


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

"""The confidence interval of a share, without scipy, whose import is slow; those of means are in `engine.studies`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

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


def wilson_interval(successes: float, total: float, level: float = LEVEL) -> Estimate:
    """A share with its score interval (Wilson 1927), which stays inside [0, 1] and has a width at 0 and at 1 too.

    Args:
        successes: of the trials; a tie may count as half of one.
        total: trials; an effective number of them may be a fraction.
        level: of the interval.

    Raises:
        ValueError: there is no trial, or there are more successes than trials.
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"{successes} of {total} is no share")
    share, z = successes / total, NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    # At 0 and 1, rounding could leave the share just outside its own interval.
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))

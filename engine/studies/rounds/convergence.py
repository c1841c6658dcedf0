"""How fast failures vanish from round to round: an exponential decay of their rate, fitted by likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.methods.intervals import LEVEL, Estimate

# Beyond it, failures of a thousand attempts are gone within a round.
MAX_RATE = 50.0


@dataclass(frozen=True, slots=True)
class FailureCount:
    """Valid failures among the attempts of the run of a round."""

    failures: int
    attempts: int


def decay_rate(counts: Sequence[FailureCount], level: float = LEVEL) -> Estimate | None:
    """k of a failure rate that falls as exp(-k r) with the round r = 0, 1, ..., by maximum likelihood.

    Counts are taken as Poisson with means n_r a exp(-k r). Given their sum they are multinomial, without the unknown a;
    the interval holds all k that the likelihood ratio does not reject (profile likelihood). It is a little wide where
    rates are large, as binomial counts vary less than Poisson ones.

    Args:
        counts: of rounds 0, 1, ...; a round without attempts says nothing.

    Returns:
        k, with infinity where only the first round has failures (minus infinity: the last); None where there is none,
        or only one round has attempts.
    """
    from scipy.optimize import brentq
    from scipy.special import chdtri

    rounds = [(number, count) for number, count in enumerate(counts) if count.attempts]
    total = sum(count.failures for _, count in rounds)
    if not total or len(rounds) < 2:
        return None
    spent = sum(number * count.failures for number, count in rounds)

    def likelihood(rate: float) -> float:
        logs = [math.log(count.attempts) - rate * number for number, count in rounds]
        largest = max(logs)
        return -rate * spent - total * (largest + math.log(math.fsum(math.exp(log - largest) for log in logs)))

    def slope(rate: float) -> float:
        logs = [math.log(count.attempts) - rate * number for number, count in rounds]
        weights = [math.exp(log - max(logs)) for log in logs]
        mean = math.fsum(weight * number for weight, (number, _) in zip(weights, rounds, strict=True)) / sum(weights)
        return total * mean - spent

    first, last = rounds[0][0], rounds[-1][0]
    is_first, is_last = spent == total * first, spent == total * last
    best = MAX_RATE if is_first else -MAX_RATE if is_last else brentq(slope, -MAX_RATE, MAX_RATE)
    threshold = likelihood(best) - float(chdtri(1, 1 - level)) / 2

    def excess(rate: float) -> float:
        return likelihood(rate) - threshold

    low = -math.inf if excess(-MAX_RATE) > 0 else brentq(excess, -MAX_RATE, best)
    high = math.inf if excess(MAX_RATE) > 0 else brentq(excess, best, MAX_RATE)
    value = math.inf if is_first else -math.inf if is_last else float(best)
    return Estimate(value, low, high)


def half_life(rate: Estimate | None) -> str:
    """In words, after how many rounds half of the failures are left."""
    if rate is None:
        return "no failure in any round, so no rate of convergence"
    if rate.value == math.inf:
        return f"failures in the first round alone{_at_least(rate)}"
    if rate.value <= 0:
        return "failures do not become fewer" if rate.high > 0 else "failures become more"
    low, high = (
        math.log(2) / rate.high if rate.high > 0 else math.inf,
        math.log(2) / max(rate.low, 0) if rate.low > 0 else math.inf,
    )
    upper = "no bound" if high == math.inf else f"{high:.1f}"
    return f"failures halve every {math.log(2) / rate.value:.1f} rounds ({low:.1f} to {upper})"


def _at_least(rate: Estimate) -> str:
    return f" (they halve at least every {math.log(2) / rate.low:.1f} rounds)" if rate.low > 0 else ""

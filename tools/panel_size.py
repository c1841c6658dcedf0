"""How large a nightly panel must be, and whether partial pooling of its classes could take the place of size.

    uv run python tools/panel_size.py

Ten classes, of which nine fail at 2 % on both nights and one at 2 % on the first and more often on the second. Printed
are the coverage of 95 % intervals of the classes' error rates on the second night (Wilson; and the posterior of a
beta-binomial model whose prior is fitted to all classes by the method of moments, Kleinman 1973), and how often
`compare` finds the broken class, by samples of a class.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import stats

from engine.methods.intervals import wilson_interval
from engine.studies.compare.significance import holm, share_difference

NUM_CLASSES, RATE, LEVEL, NUM_SIMULATED = 10, 0.02, 0.95, 1000
SIZES = (2, 5, 18, 27, 45, 90)
BROKEN = (0.1, 0.2, 0.3, 0.5)


def pooled_intervals(errors: np.ndarray, size: int) -> Iterator[tuple[float, float]]:
    """Intervals of the classes' rates under a beta prior with the mean and variance of all classes."""
    rates = errors / size
    mean = float(np.clip(rates.mean(), 0.5 / (size * len(errors)), 1 - 0.5 / (size * len(errors))))
    variance = max(float(rates.var(ddof=1)), 1e-12)
    # Var(rate) = m (1 - m) (1 + (n - 1) r) / n with r = 1 / (a + b + 1).
    correlation = (variance * size / (mean * (1 - mean)) - 1) / max(size - 1, 1)
    correlation = min(max(correlation, 1e-3), 0.999)
    strength = 1 / correlation - 1
    for count in errors:
        a, b = count + mean * strength, size - count + (1 - mean) * strength
        yield tuple(stats.beta.ppf(((1 - LEVEL) / 2, (1 + LEVEL) / 2), a, b))


def coverage(rng: np.random.Generator, size: int, broken: float) -> tuple[float, float, float, float]:
    """Shares of intervals that hold the truth: Wilson's of the broken class and of others, then the pooled ones'."""
    truth = np.array([broken] + [RATE] * (NUM_CLASSES - 1))
    held = np.zeros((2, NUM_CLASSES))
    for _ in range(NUM_SIMULATED):
        errors = rng.binomial(size, truth)
        single = [wilson_interval(int(count), size, LEVEL) for count in errors]
        pooled = list(pooled_intervals(errors, size))
        held[0] += [interval.low <= rate <= interval.high for interval, rate in zip(single, truth, strict=True)]
        held[1] += [low <= rate <= high for (low, high), rate in zip(pooled, truth, strict=True)]
    held /= NUM_SIMULATED
    return held[0, 0], held[0, 1:].mean(), held[1, 0], held[1, 1:].mean()


def power(rng: np.random.Generator, size: int, broken: float) -> float:
    """How often the broken class differs after Holm over request and classes (`compare --by request --by class`)."""
    found = 0
    for _ in range(NUM_SIMULATED // 4):
        old = rng.random((NUM_CLASSES, size)) < RATE
        # What fails with the better target fails with the worse one, too.
        new = old | (rng.random((NUM_CLASSES, size)) < np.array([broken] + [0.0] * (NUM_CLASSES - 1))[:, None])
        groups = [(old.ravel(), new.ravel()), *zip(old, new, strict=True)]
        differences = [share_difference(a, b, is_paired=True) for a, b in groups]
        tested = [place for place, difference in enumerate(differences) if difference.can_reject]
        adjusted = holm([differences[place].p_value for place in tested])
        found += any(place == 1 and p_value < 1 - LEVEL for place, p_value in zip(tested, adjusted, strict=True))
    return found / (NUM_SIMULATED // 4)


def main() -> None:
    """Print both tables."""
    rng = np.random.default_rng(0)
    print("coverage of 95 % intervals: samples, broken | Wilson: broken, others | pooled: broken, others")
    for size in SIZES:
        for broken in BROKEN[1:3]:
            print(f"{size:4d} {broken:4.0%} |", *(f"{share:6.1%}" for share in coverage(rng, size, broken)))
    print("power: samples |", *(f"{broken:.0%}" for broken in BROKEN))
    for size in SIZES:
        print(f"{size:4d} |", *(f"{power(rng, size, broken):6.1%}" for broken in BROKEN))


if __name__ == "__main__":
    main()

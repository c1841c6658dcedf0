"""Resamples that all cells of a sweep share: the same noises are drawn again in every cell.

So the difference of two cells, a mean over several, and the frontier all have intervals from the same resamples. Cells
that ask for other classes have other noises and are drawn on their own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import LEVEL, Estimate

Values = NDArray[np.float64]
RESAMPLES = 999
HALVES = 100
# Samples of a class from which on it is resampled on its own.
MIN_GROUP = 8
# Numbers drawn at a time.
_MAX_HELD = 5 * 10**6


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Which noises each resample has.

    Attributes:
        noises: seeds of the noises, [L].
        indices: of the noises in every resample, with repetition, [B, L].
        halves: of half of the noises, without repetition, [H, L // 2].
    """

    noises: tuple[int, ...]
    indices: NDArray[np.int64]
    halves: NDArray[np.int64]

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], seed: int, resamples: int = RESAMPLES, halves: int = HALVES) -> Draws:
        """Draw the resamples.

        Args:
            groups: the noises of each class. Every resample has as many of each, unless a class has fewer than
                `MIN_GROUP`: a bootstrap of two or three values is too narrow, one of all together too wide at worst.
        """
        if min(map(len, groups)) < MIN_GROUP:
            groups = [[noise for group in groups for noise in group]]
        rng, ends = np.random.default_rng(seed), np.cumsum([0, *map(len, groups)])
        parts = [np.arange(start, end) for start, end in itertools.pairwise(ends)]
        drawn = np.concatenate([rng.choice(part, (resamples, len(part))) for part in parts], axis=1)
        half = [np.concatenate([rng.permutation(part)[: len(part) // 2] for part in parts]) for _ in range(halves)]
        return cls(tuple(noise for group in groups for noise in group), drawn, np.stack(half))

    def rows(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """The row of a cell for each noise, [L], by the seeds of its rows; -1 where it has none."""
        row_of = {seed: row for row, seed in enumerate(seeds)}
        return np.array([row_of.get(seed, -1) for seed in self.noises], dtype=np.int64)

    def counts(self, seeds: Sequence[int]) -> Values:
        """How often each row of a cell is in every resample, [B, n]."""
        size = len(self.noises)
        counts = np.zeros((len(self.indices), size))
        np.add.at(counts, (np.arange(len(self.indices))[:, None], self.indices), 1)
        rows = self.rows(seeds)
        weights = np.zeros((len(self.indices), len(seeds)))
        weights[:, rows[rows >= 0]] = counts[:, rows >= 0]
        return weights

    def halves_of(self, seeds: Sequence[int]) -> list[NDArray[np.int64]]:
        """The rows of a cell in every half."""
        rows = self.rows(seeds)
        return [own[own >= 0] for own in rows[self.halves]]

    def medians(self, values: Values, seeds: Sequence[int]) -> Values:
        """The median in every resample, [B], of the values [n] of a cell; NaN where a resample has none of them."""
        rows = self.rows(seeds)
        # Row -1 is the last one.
        of_noise = np.append(values, np.nan)[rows]
        median = np.nanmedian if np.isnan(of_noise).any() else np.median
        block = max(1, _MAX_HELD // len(of_noise))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            parts = [
                median(of_noise[self.indices[start : start + block]], axis=1)
                for start in range(0, len(self.indices), block)
            ]
        return np.concatenate(parts)

    def means(self, values: Values, seeds: Sequence[int]) -> Values:
        """The mean in every resample, [B], of the values [n] of a cell; NaN where a resample has none of them."""
        weights = self.counts(seeds)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(weights @ values / weights.sum(1))


def from_halves(value: float, halves: Values, resamples: int = RESAMPLES) -> Values:
    """A measure that repeated samples would distort, as if it had been resampled, [B].

    The spread of a measure over random halves of the samples is that of the measure itself (delete-half jackknife, Shao
    and Wu 1989); their mean is not used, as the measure may depend on the number of samples.

    Args:
        value: of all samples.
        halves: of every half, [H].
    """
    if not len(halves):
        return np.full(resamples, np.nan)
    return value + np.resize(halves - np.nanmean(halves), resamples)


def interval(value: float, resampled: Values, level: float = LEVEL) -> Estimate:
    """A value with the percentiles of its resamples, [B]; they hold the value."""
    usable = resampled[~np.isnan(resampled)]
    if not len(usable):
        return Estimate(value, value, value)
    low, high = np.quantile(usable, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, min(value, float(low)), max(value, float(high)))

"""Cells as sets of images: kernel distance, recall, coverage and spread in CLIP features, with shared resamples.

The kernel distance and the spread are means over pairs of different images, so that resamples with repetition weigh
pairs. Recall and coverage would take a repeated image for a dense spot: their spread is that over random halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.studies.evaluate.distances import NEIGHBOURS, ManifoldShares, manifold_shares, squared_distances
from engine.studies.sweep.resampling import RESAMPLES, Draws, from_halves

Values = NDArray[np.float64]
# Times that as many real images as samples are drawn for recall and coverage, and for each half.
REAL_DRAWS = 20
HALF_DRAWS = 4
# Fewer images of a side say nothing about a manifold.
MIN_IMAGES = 10
KID_SCALE = 1000.0


@dataclass(frozen=True, slots=True, eq=False)
class RealImages:
    """Real images of the classes that cells ask for, equally many of each.

    Attributes:
        features: of length one, [M, d].
        weights: of the images in every resample, [B, M].
        within: squared distances of the images, [M, M].
    """

    features: Values
    weights: Values
    within: Values

    @classmethod
    def of(cls, by_class: Mapping[int, NDArray[np.float32]], classes: Sequence[int], seed: int) -> RealImages | None:
        """Real images of all the classes; None where one has too few."""
        count = min((len(by_class.get(index, ())) for index in classes), default=0)
        if count * len(classes) < MIN_IMAGES or not count:
            return None
        rng = np.random.default_rng(seed)
        chosen = [by_class[index][np.sort(rng.permutation(len(by_class[index]))[:count])] for index in classes]
        features = np.concatenate(chosen).astype(np.float64)
        weights = [rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) for _ in classes]
        return cls(features, np.concatenate(weights, axis=1).astype(np.float64), squared_distances(features, features))


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A figure of a set, and what it is in every resample, [B]."""

    value: float
    resampled: Values


def kernel_distance(features: Values, weights: Values, real: RealImages) -> Measured:
    """KID x 1,000: the unbiased MMD^2 with the kernel `(x y / d + 1)^3` of features of length sqrt(d).

    Args:
        features: of the samples, of length one, [n, d].
        weights: of the samples in every resample, [B, n].
    """
    own, other = cubic(features, features), cubic(real.features, real.features)
    between = cubic(features, real.features)
    once = [np.ones((1, len(side))) for side in (features, real.features)]
    values = [
        pair_means(own, first) + pair_means(other, second)
        - 2 * ((first @ between) * second).sum(1) / (first.sum(1) * second.sum(1))
        for first, second in (once, (weights, real.weights))
    ]  # fmt: skip
    return Measured(KID_SCALE * float(values[0][0]), KID_SCALE * values[1])


def cubic(first: Values, second: Values) -> Values:
    """The kernel of KID between features of length one, `(cosine + 1)^3`, [N, M]."""
    return np.asarray((first @ second.T + 1) ** 3)


def pair_means(values: Values, weights: Values) -> Values:
    """Weighted means [B] over the pairs of different items: values [N, N], weights [B, N]; NaN without a pair."""
    diagonal = values.diagonal()
    sums = ((weights @ values) * weights).sum(1) - weights**2 @ diagonal
    pairs = weights.sum(1) ** 2 - (weights**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(pairs > 0, sums / pairs, np.nan))


def spread(features: Values, classes: NDArray[np.int64], weights: Values) -> Measured | None:
    """1 less the mean cosine of two samples of one class, mean over the classes; None without two of any class.

    Args:
        classes: of the samples, [n]; of joint prompts all equal.
        weights: of the samples in every resample, [B, n].
    """
    distances = 1 - features @ features.T
    once = np.ones((1, len(features)))
    parts = [
        [pair_means(distances[np.ix_(rows, rows)], side[:, rows]) for side in (once, weights)]
        for rows in (np.flatnonzero(classes == index) for index in np.unique(classes))
        if len(rows) > 1
    ]
    if not parts:
        return None
    values, resampled = (np.stack(side) for side in zip(*parts, strict=True))
    # A class that a resample has fewer than two samples of says nothing there.
    is_there = ~np.isnan(resampled)
    totals = np.where(is_there, resampled, 0).sum(0)
    with np.errstate(invalid="ignore"):
        return Measured(float(values.mean()), totals / is_there.sum(0))


def manifolds(features: Values, draws: Draws, seeds: Sequence[int], real: RealImages) -> dict[str, Measured]:
    """Precision, recall and coverage, each set compared with as many real images; empty where they are too few.

    The figures are means over `REAL_DRAWS` draws of the real images, the same for all cells with as many samples.
    """
    size = min(len(features), len(real.features))
    if size < MIN_IMAGES:
        return {}
    within = squared_distances(features, features)
    between = squared_distances(features, real.features)

    def measured(rows: NDArray[np.int64], times: int, seed: int) -> Values:
        rng = np.random.default_rng(seed)
        shares = [
            _shares(within, real.within, between, rows, rng.permutation(len(real.features))[: len(rows)])
            for _ in range(times)
        ]
        return np.mean([[one.precision, one.recall, one.coverage] for one in shares], axis=0)

    values = measured(np.arange(size), REAL_DRAWS, 0)
    halves = [
        measured(rows[: len(real.features)], HALF_DRAWS, number + 1) if len(rows) > NEIGHBOURS else np.full(3, np.nan)
        for number, rows in enumerate(draws.halves_of(seeds))
    ]
    columns = np.array(halves).T
    return {
        name: Measured(float(values[place]), np.clip(from_halves(float(values[place]), columns[place]), 0, 1))
        for place, name in enumerate(("precision", "recall", "coverage"))
    }


def _shares(
    within: Values, real: Values, between: Values, rows: NDArray[np.int64], others: NDArray[np.int64]
) -> ManifoldShares:
    return manifold_shares(within[np.ix_(rows, rows)], real[np.ix_(others, others)], between[np.ix_(rows, others)])

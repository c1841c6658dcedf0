"""The interval of a difference over two crossed samples: test images, and seeds of training.

Another training would differ, and so would other test images. All trainings are tested on the same images, so that the
values `d[s, i]` of training `s` and image `i` are a two-way layout without replication in which both are random: the
model of readers and cases in studies of diagnostic imaging (Obuchowski and Rockette 1995). The variance of the mean is
estimated by the mean squares, its degrees of freedom by Satterthwaite (1946):

    Var = V_images + V_seeds - V_residual,  df = Var^2 / sum of V^2 / df over the three.

Right and wrong are rare events where accuracies are near 1: without a single difference all mean squares are zero. So a
tenth of an image gained and a tenth of one lost are added, as Bonett and Price (2012) add whole ones for a single
training; with several, ones as large would make the interval far too wide. `tests/test_crossed.py` has the coverage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from engine.methods.intervals import LEVEL, Estimate

ADDED = 0.1


@dataclass(frozen=True, slots=True)
class Crossed:
    """A mean difference.

    Attributes:
        estimate: with its interval over seeds and images.
        p_less: of no difference or a positive one, one-sided.
    """

    estimate: Estimate
    p_less: float


def crossed_difference(
    values: NDArray[np.float64],
    strata: NDArray[np.int64] | None = None,
    units: NDArray[np.int64] | None = None,
    level: float = LEVEL,
) -> Crossed:
    """The mean over seeds and images, where there are strata the mean over the strata of their means.

    Args:
        values: of each seed and image, -1, 0 or 1, [S, N]; of a single seed (S = 1) the interval is over images alone.
        strata: of each column from 0 on, [N], such as contexts; an image of several contexts is several columns.
        units: of each column from 0 on, [N]: columns of a unit are drawn together, such as images of one scan.
    """
    num_seeds, num_columns = values.shape
    strata = np.zeros(num_columns, np.int64) if strata is None else strata
    units = np.arange(num_columns) if units is None else units
    counts = np.bincount(strata)
    weights = 1 / (len(counts) * counts[strata])
    by_seed = values @ weights
    # Rounded, so that differences of equally many images are equal.
    mean = round(math.fsum(by_seed) / num_seeds, 12) + 0.0
    variances = _variances(values, weights, strata, units)
    weight = float((weights**2).sum())
    shrunk = mean / (1 + 2 * ADDED * weight)
    variances[0] += 2 * ADDED * (1 + shrunk**2) * weight**2
    variance = max(variances[0], variances[1], variances[0] + variances[1] - variances[2])
    num_units = len(np.unique(units)) + 2
    freedom = (num_units - 1, max(num_seeds - 1, 1), (num_units - 1) * max(num_seeds - 1, 1))
    degrees = variance**2 / sum(part**2 / each for part, each in zip(variances, freedom, strict=True))
    error = math.sqrt(variance)
    half = float(stdtrit(degrees, 0.5 + level / 2)) * error
    # The centre is shrunk towards zero; the observed difference may lie just outside its interval.
    estimate = Estimate(mean, max(-1.0, min(mean, shrunk - half)), min(1.0, max(mean, shrunk + half)))
    return Crossed(estimate, float(stdtr(degrees, shrunk / error)))


def _variances(
    values: NDArray[np.float64], weights: NDArray[np.float64], strata: NDArray[np.int64], units: NDArray[np.int64]
) -> list[float]:
    """Estimates of the variance of the mean: of images and residual, of seeds and residual, of the residual alone."""
    num_seeds, counts = len(values), np.bincount(strata)
    # [S, C]: of each seed and stratum.
    means = np.stack([np.bincount(strata, row) for row in values]) / counts
    # Deviations from an estimated mean are too small by this.
    corrected = weights * np.sqrt(counts / np.maximum(counts - 1, 1))[strata]
    images = np.bincount(units, corrected * (values.mean(0) - means.mean(0)[strata]))
    if num_seeds == 1:
        return [float((images**2).sum()), 0.0, 0.0]
    residuals = values - values.mean(0) - (means - means.mean(0))[:, strata]
    residual = np.stack([np.bincount(units, corrected * row) for row in residuals])
    pairs = num_seeds * (num_seeds - 1)
    by_seed = values @ weights
    return [
        float((images**2).sum()),
        float(((by_seed - by_seed.mean()) ** 2).sum()) / pairs,
        float((residual**2).sum()) / pairs,
    ]

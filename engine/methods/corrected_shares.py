"""Shares that people would find, from a machine's verdicts on all images and people's on a sample of them.

The prediction-powered estimate (Angelopoulos et al., "Prediction-powered inference", Science 2023), by strata:
`sum_s W_s (mean_N_s(f) + mean_n_s(h - f))`, where f is the machine's verdict, h people's, and W_s the share of a
stratum. It is unbiased whatever the machine is worth, and the narrower the better the machine is.

The normal interval collapses where no verdict in a stratum differs. The ones here hold for few images and for shares
near 0 and 1 (`tests/test_corrected_shares.py` counts how often): rates have Wilson's interval with the effective number
of images of the stratified draw, and their combination is that of Zou and Donner (2008), as Newcombe's of a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import LEVEL, Estimate, wilson_interval

Values = NDArray[np.float64]
# A stratum's rate counts as if this many images of the average rate were drawn in addition: two images that agree do
# not show that all of a stratum do.
PRIOR_IMAGES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """A part of the population, and the images of it that people looked at.

    Attributes:
        size: images in the population.
        human: share of people who say so, of each image that was looked at, [n] in [0, 1].
        machine: the machine's verdict on these, [n] in [0, 1].
    """

    size: float
    human: Values
    machine: Values


def human_share(strata: Sequence[Stratum], level: float = LEVEL) -> Estimate | None:
    """The share by people alone, with its interval; None where nobody looked at an image.

    Strata without an image that was looked at count as the others do on average.
    """
    looked_at = _looked_at(strata)
    if not looked_at:
        return None
    rate = _rate(looked_at, [stratum.human for stratum in looked_at], level)
    # Of so many images from the process itself, all of them looked at.
    process = _process_interval(rate.value, _number(strata), level)
    low = math.hypot(rate.value - rate.low, rate.value - process.low)
    high = math.hypot(rate.high - rate.value, process.high - rate.value)
    return _within(rate.value, low, high)


def corrected_share(machine_mean: float, strata: Sequence[Stratum], level: float = LEVEL) -> Estimate | None:
    """The prediction-powered estimate, with its interval; None where nobody looked at an image.

    The interval is that of the process which made the images: with all of them looked at it is a binomial share's.

    Args:
        machine_mean: mean of the machine's verdicts over the whole population.
    """
    looked_at = _looked_at(strata)
    if not looked_at:
        return None
    number = _number(strata)
    changes = [stratum.human - stratum.machine for stratum in looked_at]
    up = _rate(looked_at, [np.maximum(change, 0) for change in changes], level)
    down = _rate(looked_at, [np.maximum(-change, 0) for change in changes], level)
    value = machine_mean + up.value - down.value
    process = _process_interval(min(1.0, max(0.0, value)), number, level)
    # Of a draw the two rates exclude each other, so that the errors of their difference add up.
    odds = [rate.value / (1 - rate.value) if rate.value < 1 else 0.0 for rate in (up, down)]
    shared = 2 * math.sqrt(odds[0] * odds[1])

    def half(first: float, second: float, third: float) -> float:
        return math.sqrt(first**2 + second**2 + shared * first * second + third**2)

    low = half(up.value - up.low, down.high - down.value, process.value - process.low)
    high = half(up.high - up.value, down.value - down.low, process.high - process.value)
    return _within(value, low, high)


def weighted_share(values: Values, weights: Values, level: float = LEVEL) -> Estimate | None:
    """A share among images that stand for different numbers of others, with Wilson's interval at the effective number
    of images (Kish 1965); None where no weight is positive.

    Args:
        values: of each image, [n] in [0, 1].
        weights: [n].
    """
    total = float(weights.sum())
    if total <= 0:
        return None
    effective = total**2 / float((weights**2).sum())
    share = min(1.0, max(0.0, float((weights * values).sum()) / total))
    return wilson_interval(share * effective, effective, level)


def _looked_at(strata: Sequence[Stratum]) -> list[Stratum]:
    return [stratum for stratum in strata if len(stratum.human)]


def _number(strata: Sequence[Stratum]) -> float:
    return float(sum(stratum.size for stratum in strata))


def _rate(strata: Sequence[Stratum], values: Sequence[Values], level: float) -> Estimate:
    """A mean over the population of what lies in [0, 1], with Wilson's interval at the effective number of images.

    Args:
        strata: of which images were looked at.
        values: of these images, by stratum.
    """
    sizes = np.array([stratum.size for stratum in strata], dtype=float)
    drawn = np.array([len(some) for some in values], dtype=float)
    means = np.array([some.mean() for some in values])
    shares = sizes / sizes.sum()
    average = (float((means * drawn).sum()) + 0.5) / (drawn.sum() + 1)
    smooth = (means * drawn + PRIOR_IMAGES * average) / (drawn + PRIOR_IMAGES)
    unseen = np.maximum(0.0, 1 - drawn / sizes)
    spread = smooth * (1 - smooth) * (drawn + PRIOR_IMAGES) / (drawn + PRIOR_IMAGES - 1)
    variance = float((shares**2 * unseen * spread / drawn).sum())
    value, expected = float((shares * means).sum()), float((shares * smooth).sum())
    value = min(1.0, max(0.0, value))
    if variance <= 0:
        return Estimate(value, value, value)
    effective = max(1.0, expected * (1 - expected) / variance)
    return wilson_interval(value * effective, effective, level)


def _process_interval(share: float, number: float, level: float) -> Estimate:
    return wilson_interval(share * number, max(number, 1.0), level)


def _within(value: float, low: float, high: float) -> Estimate:
    """An estimate in [0, 1]; what was measured may lie a little outside of it."""
    inside = min(1.0, max(0.0, value))
    return Estimate(inside, min(inside, max(0.0, value - low)), max(inside, min(1.0, value + high)))

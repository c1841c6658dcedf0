"""Agreement of raters: Krippendorff's alpha for nominal answers, with answers missing, and its bootstrap interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import LEVEL

MISSING = -2
RESAMPLES = 1000
_MAX_HELD = 2 * 10**7


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Agreement of raters.

    Attributes:
        alpha: 1 where all agree, 0 where they agree as chance would; None where no item has two answers, or all answers
            are one and the same, of which chance agrees as well.
        low, high: percentiles of a bootstrap over items; None without alpha.
        num_items: items with two answers or more, which alone count.
        num_answers: to these items.
    """

    alpha: float | None
    low: float | None
    high: float | None
    num_items: int
    num_answers: int


def krippendorff_alpha(
    answers: NDArray[np.int64], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Agreement:
    """Krippendorff's alpha of nominal data, by the coincidences of answers.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, section D.

    Args:
        answers: category of each item by each rater [items, raters]; `MISSING` where there is none.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    counts = _counts(answers)
    per_item = counts.sum(1)
    counts = counts[per_item >= 2]
    per_item = counts.sum(1)
    if not len(counts):
        return Agreement(alpha=None, low=None, high=None, num_items=0, num_answers=0)
    # Of the pairs of answers to an item, those that agree; each answer has a weight of 1 in all.
    agreeing = (counts * (counts - 1)).sum(1) / (per_item - 1)
    (alpha,) = _alpha(agreeing.sum()[None], counts.sum(0)[None])
    size = {"num_items": len(counts), "num_answers": int(per_item.sum())}
    if np.isnan(alpha):
        return Agreement(alpha=None, low=None, high=None, **size)
    draw = np.random.default_rng(seed)
    drawn: list[NDArray[np.float64]] = []
    batch = max(1, _MAX_HELD // len(counts))
    for start in range(0, resamples, batch):
        times = draw.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), min(batch, resamples - start))
        drawn.append(_alpha(times @ agreeing, times @ counts))
    # A resample in which all answers are one agrees completely.
    alphas = np.nan_to_num(np.concatenate(drawn), nan=1.0)
    low, high = np.quantile(alphas, [0.5 - level / 2, 0.5 + level / 2])
    alpha = float(alpha)
    return Agreement(alpha=alpha, low=min(alpha, float(low)), high=max(alpha, float(high)), **size)


def _counts(answers: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often each item was given each of the categories that occur, [items, categories]."""
    categories = np.unique(answers[answers != MISSING])
    counts = np.zeros((len(answers), len(categories)))
    items, raters = np.nonzero(answers != MISSING)
    np.add.at(counts, (items, np.searchsorted(categories, answers[items, raters])), 1)
    return counts


def _alpha(agreeing: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Alpha of several data sets, [B]; NaN where all answers are one.

    Args:
        agreeing: diagonal of the coincidence matrix, summed, [B].
        totals: answers of each category, [B, categories].
    """
    number = totals.sum(-1)
    by_chance = (totals * (totals - 1)).sum(-1) / (number - 1)
    expected = number - by_chance
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - (number - agreeing) / expected, np.nan)

"""How well a score orders images by what people say of them: the area under the ROC curve, with its interval."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import LEVEL, Estimate

Values = NDArray[np.float64]
RESAMPLES = 400
_MAX_HELD = 2 * 10**7


def weighted_auc(
    scores: Values, human: Values, weights: Values, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate | None:
    """Probability that of two answers, one that says so and one that does not, the image of the first scores higher.

    Args:
        scores: of each image, [n]; equal ones count half.
        human: share of people who say so, [n]: an image on which people differ is on both sides.
        weights: images that each one stands for, [n].
        level: of the interval, percentiles of a bootstrap over images.
        resamples, seed: of the bootstrap.

    Returns:
        None where one of the two sides is empty.
    """
    order = np.argsort(scores, kind="stable")
    _, starts = np.unique(scores[order], return_index=True)
    yes, no = (weights * human)[order], (weights * (1 - human))[order]
    (value,) = _auc(yes[None], no[None], starts)
    if np.isnan(value):
        return None
    draw = np.random.default_rng(seed)
    drawn: list[Values] = []
    batch = max(1, _MAX_HELD // len(scores))
    for start in range(0, resamples, batch):
        times = draw.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), min(batch, resamples - start))
        drawn.append(_auc(times * yes, times * no, starts))
    values = np.concatenate(drawn)
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2]) if len(values) else (0.0, 1.0)
    return Estimate(float(value), min(float(value), float(low)), max(float(value), float(high)))


def _auc(yes: Values, no: Values, starts: NDArray[np.intp]) -> Values:
    """The area of several weightings, [B]; NaN where one side is empty.

    Args:
        yes, no: weights of both sides, in the order of the scores, [B, n].
        starts: where equal scores begin.
    """
    higher, lower = np.add.reduceat(yes, starts, axis=1), np.add.reduceat(no, starts, axis=1)
    below = np.cumsum(lower, axis=1) - lower
    pairs = yes.sum(1) * no.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (higher * (below + lower / 2)).sum(1) / pairs, np.nan)

"""Forgetting: how much worse a network is in a context than it once was (Chaudhry et al. 2018, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import LEVEL, Estimate

RESAMPLES = 1000
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """Forgetting after the last round, as shares; below zero where the last round is the best.

    Attributes:
        contexts: of each context, in their order.
        mean: over the contexts.
        worst: the largest of them, and `worst_context`, its name.
    """

    contexts: dict[str, Estimate]
    mean: Estimate
    worst: Estimate
    worst_context: str


def measure_forgetting(
    right: NDArray[np.bool_],
    rows_of: dict[str, NDArray[np.int64]],
    origins: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Forgetting:
    """Best earlier accuracy less the last, by context.

    Intervals are from a bootstrap (percentiles) that draws seeds and origins of images anew, each with replacement. The
    best of several noisy accuracies is too large on average, so forgetting is above zero without any; compare arms.

    Args:
        right: whether the prediction for an image is right, [S, R + 1, N] of seed, round and image; round 0 is before.
        rows_of: rows of each context.
        origins: of each image, what it was drawn from; images of one origin are drawn together.
    """
    points = _forgotten(_accuracies(right, rows_of, np.ones((1, right.shape[-1])), np.ones((1, len(right)))))[0]
    rng = np.random.default_rng(0)
    names, units = np.unique(np.asarray(origins), return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, units]
    seeds = rng.multinomial(len(right), np.full(len(right), 1 / len(right)), size=resamples)
    draws = _forgotten(_accuracies(right, rows_of, drawn.astype(np.float64), seeds.astype(np.float64)))
    worst = int(points.argmax())

    def estimate(value: float, values: Floats) -> Estimate:
        low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
        return Estimate(float(value), float(min(low, value)), float(max(high, value)))

    return Forgetting(
        contexts={name: estimate(points[place], draws[:, place]) for place, name in enumerate(rows_of)},
        mean=estimate(float(points.mean()), np.nanmean(draws, axis=1)),
        # Of this context: the largest of all resampled ones would be larger than the largest itself.
        worst=estimate(points[worst], draws[:, worst]),
        worst_context=list(rows_of)[worst],
    )


def _accuracies(
    right: NDArray[np.bool_], rows_of: dict[str, NDArray[np.int64]], images: Floats, seeds: Floats
) -> Floats:
    """Weighted accuracies [B, R + 1, C] of contexts, with weights of images [B, N] and of seeds [B, S].

    A context without any image of a draw has NaN.
    """
    found = []
    for rows in rows_of.values():
        weights = images[:, rows]
        with np.errstate(invalid="ignore"):
            of_seeds = np.einsum("srn,bn->bsr", right[..., rows].astype(np.float64), weights, optimize=True)
            of_seeds /= weights.sum(1)[:, None, None]
        found.append(np.einsum("bs,bsr->br", seeds, of_seeds) / seeds.sum(1)[:, None])
    return np.stack(found, axis=-1)


def _forgotten(accuracies: Floats) -> Floats:
    """Best earlier accuracy less the last, [B, C], of accuracies [B, R + 1, C]."""
    return np.asarray(accuracies[:, :-1].max(1) - accuracies[:, -1])

"""How far two sets of images are apart, by their features: kernel and Frechet distance, precision and recall.

Features are arrays [N, d] of any extractor; a distance has a meaning only together with its extractor's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.methods.intervals import Estimate, wilson_interval
from engine.methods.kernel_distance import unbiased_mmd

Features = NDArray[np.float64]

NUM_SUBSETS = 50
SUBSET_SIZE = 200
NUM_BOOTSTRAPS = 20
NEIGHBOURS = 3
_Z = 1.959963984540054
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class ManifoldShares:
    """How two sets lie in each other's manifolds, as shares.

    Attributes:
        precision, recall: as those of `Manifolds`.
        coverage: share of the real images whose ball, which reaches to their k-th nearest neighbour among real images,
            holds a sample.
    """

    precision: float
    recall: float
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifolds:
    """Improved precision and recall, with Wilson's intervals of the two shares.

    Attributes:
        precision: share of the samples that lie within the manifold of the real images.
        recall: share of the real images that lie within the manifold of the samples.
    """

    precision: Estimate
    recall: Estimate


def kernel_distance(
    first: Features, second: Features, *, subsets: int = NUM_SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> Estimate:
    """Kernel inception distance: the mean of the unbiased MMD^2 with the kernel `(x y / d + 1)^3` over random subsets.

    Binkowski et al., "Demystifying MMD GANs" (ICLR 2018), section 4. Zero in expectation for two sets of one
    distribution, and thus negative at times.

    Args:
        first, second: features [N, d], [M, d].
        size: images in each subset of either set; at most half of the smaller set, so that subsets differ.

    Returns:
        The mean, and the range of the middle 95 % of the subsets, which is wider than the error of the mean.

    Raises:
        ValueError: fewer than four features on a side.
    """
    size = min(size, len(first) // 2, len(second) // 2)
    if size < 2:
        raise ValueError(f"a kernel distance needs four features a side, not {len(first)} and {len(second)}")
    rng = np.random.default_rng(seed)
    distances = [
        unbiased_mmd(*(torch.from_numpy(side[rng.choice(len(side), size, replace=False)]) for side in (first, second)))
        for _ in range(subsets)
    ]
    low, high = np.quantile(distances, [0.025, 0.975])
    return Estimate(float(np.mean(distances)), float(low), float(high))


def frechet_distance(first: Features, second: Features) -> float:
    """Frechet distance of the Gaussians with the sets' means and covariances, `|m1-m2|^2 + tr(C1+C2-2(C1 C2)^1/2)`.

    Heusel et al., "GANs trained by a two time-scale update rule" (NeurIPS 2017), equation 6. It is biased upward for
    few images: compare only figures of equal counts. With `C = A'A` the last trace is the sum of the singular values of
    `A1 A2'`, which needs no root of a matrix.
    """
    means = first.mean(0) - second.mean(0)
    factors = [_factor(side) for side in (first, second)]
    own = sum(float((factor**2).sum()) for factor in factors)
    shared = float(np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum())
    return max(0.0, float(means @ means) + own - 2 * shared)


def _factor(features: Features) -> Features:
    """A with `A'A` the covariance, of at most d rows."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred)


def frechet_interval(first: Features, second: Features, *, seed: int = 0) -> Estimate:
    """The Frechet distance, and 1.96 standard deviations of its bootstrap to either side, not below zero.

    A bootstrap repeats images, which enlarges the bias of few images; only its spread is used, not its centre.

    Raises:
        ValueError: fewer than two features on a side.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a Frechet distance needs two features a side, not {len(first)} and {len(second)}")
    value = frechet_distance(first, second)
    half = _Z * _bootstrap_deviation(frechet_distance, first, second, seed)
    return Estimate(value, max(0.0, value - half), value + half)


def _bootstrap_deviation(
    measure: Callable[[Features, Features], float], first: Features, second: Features, seed: int
) -> float:
    rng = np.random.default_rng(seed)
    values = [
        measure(*(side[rng.integers(0, len(side), len(side))] for side in (first, second)))
        for _ in range(NUM_BOOTSTRAPS)
    ]
    return float(np.std(values, ddof=1))


def precision_recall(samples: Features, real: Features, *, neighbours: int = NEIGHBOURS) -> Manifolds:
    """Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019, equation 1).

    The manifold of a set is the union of the balls around its features that reach to their k-th nearest neighbour
    within the set. The intervals are those of the shares and take the manifolds as given.

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    if min(len(samples), len(real)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more features than {len(samples)} and {len(real)}")
    precision = _num_inside(samples, real, neighbours)
    recall = _num_inside(real, samples, neighbours)
    return Manifolds(precision=wilson_interval(precision, len(samples)), recall=wilson_interval(recall, len(real)))


def manifold_shares(
    samples: Features, real: Features, between: Features, *, neighbours: int = NEIGHBOURS
) -> ManifoldShares:
    """Precision and recall (Kynkaanniemi et al. 2019), and coverage (Naeem et al., "Reliable fidelity and diversity
    metrics for generative models", ICML 2020, equation 8).

    Recall takes the manifold of the samples, which single outliers widen; coverage takes that of the real images, which
    do not change from one set of samples to another.

    Args:
        samples, real: squared distances within each set, [N, N] and [M, M].
        between: squared distances of samples to real images, [N, M].

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    if min(len(samples), len(real)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more features than {len(samples)} and {len(real)}")
    radii, real_radii = (np.partition(side, neighbours, axis=1)[:, neighbours] for side in (samples, real))
    is_near = between <= real_radii
    return ManifoldShares(
        precision=float(is_near.any(1).mean()),
        recall=float((between <= radii[:, None]).any(0).mean()),
        coverage=float(is_near.any(0).mean()),
    )


def squared_distances(first: Features, second: Features) -> Features:
    """Squared distances [N, M] of features [N, d] and [M, d]."""
    return np.concatenate(list(_distances(first, second)))


def _num_inside(points: Features, manifold: Features, neighbours: int) -> int:
    """How many points lie in a ball of the manifold."""
    # Copies, because views would keep their blocks in memory.
    radii = np.concatenate(
        [np.partition(block, neighbours, axis=1)[:, neighbours].copy() for block in _distances(manifold, manifold)]
    )
    return sum(int((block <= radii).any(1).sum()) for block in _distances(points, manifold))


def _distances(first: Features, second: Features) -> Iterator[Features]:
    """Squared distances [N, M], a block of rows at a time; rounding errors of equal pairs are set to zero."""
    squares = (second**2).sum(1)
    for start in range(0, len(first), _ROWS):
        rows = first[start : start + _ROWS]
        own = (rows**2).sum(1)[:, None]
        block = own + squares - 2 * rows @ second.T
        block[block < 1e-10 * (own + squares)] = 0.0
        yield block

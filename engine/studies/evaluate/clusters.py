"""Clusters of failures: where in CLIP space they lie, which texts are near, and how often the target errs nearby.

After Eyuboglu et al., "Domino: discovering systematic errors with cross-modal embeddings" (ICLR 2022): a slice is
named by the texts that are nearer to it than to everything else.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import wilson_interval
from engine.report.evaluation import Interval

MIN_FAILURES = 20
MAX_SLICES = 8
# Roughly the smallest number of failures of a slice.
MIN_PER_SLICE = 8
MAX_CLUSTERED = 4000
NUM_TEXTS = 3
NUM_PROTOTYPES = 8
# The radius of a slice: this share of its failures lies nearer to its centre.
REACH = 0.9
ATTRIBUTES = (
    "dark", "bright", "blurry", "sharp", "small", "large", "close-up", "far away", "in the corner", "cropped", "tilted",
    "thin", "thick", "faded", "noisy", "colourful", "black and white", "red", "green", "blue", "yellow", "purple",
    "white background", "black background", "plain background", "cluttered background", "a drawing", "several objects",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """Points [N, d] in clusters.

    Attributes:
        labels: [N], clusters numbered from the largest down.
        centres: [k, d] of length one.
    """

    labels: NDArray[np.int64]
    centres: NDArray[np.float32]
    silhouette: float


def cluster(points: NDArray[np.float32], *, seed: int = 0) -> Clusters:
    """Cluster points of length one by k-means, with the k of the best silhouette (Rousseeuw 1987).

    Raises:
        ValueError: fewer than `MIN_FAILURES` points, or fewer than two distinct ones.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import silhouette_score

    num_distinct = len(np.unique(points, axis=0))
    if len(points) < MIN_FAILURES or num_distinct < 2:
        raise ValueError(f"{len(points)} failures, {num_distinct} of them distinct, are too few for clusters")
    most = max(2, min(MAX_SLICES, len(points) // MIN_PER_SLICE, num_distinct - 1))
    best: tuple[float, NDArray[np.int64]] = (-2.0, np.zeros(len(points), np.int64))
    with warnings.catch_warnings():
        # Fewer distinct points than clusters: a silhouette of fewer clusters then wins.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for count in range(2, most + 1):
            labels = KMeans(count, n_init=4, random_state=seed).fit_predict(points)
            if 2 <= len(np.unique(labels)) < len(points):
                value = float(silhouette_score(points, labels, sample_size=min(2000, len(points)), random_state=seed))
                # Rounded, because a marginally better silhouette does not justify another cluster.
                best = max(best, (round(value, 3), labels), key=lambda candidate: candidate[0])
    return _numbered(points, *best)


def _numbered(points: NDArray[np.float32], silhouette: float, labels: NDArray[np.int64]) -> Clusters:
    distinct, counts = np.unique(labels, return_counts=True)
    order = distinct[np.lexsort((distinct, -counts))]
    renamed = np.empty(int(distinct.max()) + 1, np.int64)
    renamed[order] = np.arange(len(order))
    centres = np.stack([points[labels == label].mean(0) for label in order])
    lengths = np.linalg.norm(centres, axis=1, keepdims=True)
    return Clusters(renamed[labels], np.asarray(centres / np.maximum(lengths, 1e-12), np.float32), silhouette)


def nearest_texts(
    inside: NDArray[np.float32],
    everything: NDArray[np.float32],
    texts: Sequence[str],
    embeds: NDArray[np.float32],
    most: int = NUM_TEXTS,
) -> list[tuple[str, float]]:
    """The texts that points are nearer to than all points are, with the difference of their mean cosines.

    Args:
        inside, everything: points [N, d], [M, d] of length one.
        embeds: of the texts, [T, d], of length one.
    """
    contrast = embeds @ (inside.mean(0) - everything.mean(0))
    order = np.argsort(-contrast, kind="stable")[:most]
    return [(texts[place], float(contrast[place])) for place in order if contrast[place] > 0]


def neighbourhood(
    centre: NDArray[np.float32],
    inside: NDArray[np.float32],
    everything: NDArray[np.float32],
    is_error: NDArray[np.bool_],
) -> tuple[Interval, int]:
    """Error rate, with Wilson's interval, of all samples as near to a centre as nine tenths of its failures are.

    Returns:
        The rate and the number of those samples.
    """
    radius = np.quantile(inside @ centre, 1 - REACH)
    # With a tolerance, so that rounding does not lose the failure that determines the radius.
    near = everything @ centre >= radius - 1e-6
    rate = wilson_interval(int(is_error[near].sum()), int(near.sum()))
    return Interval(value=rate.value, low=rate.low, high=rate.high), int(near.sum())


def prototypes(
    centre: NDArray[np.float32], points: NDArray[np.float32], most: int = NUM_PROTOTYPES
) -> NDArray[np.int64]:
    """Places of the points nearest to a centre, nearest first."""
    return np.asarray(np.argsort(-(points @ centre), kind="stable")[:most])

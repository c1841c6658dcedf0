"""Points that no other point beats in two measures at once, and how far that is luck."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def on_frontier(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each point is on the frontier: no other is as good in both measures and better in one.

    Args:
        points: [..., N, 2], larger is better in both; a point with a value that is not a number is never on it.

    Returns:
        [..., N]; equal points are on it together.
    """
    first, second = points[..., :, None, :], points[..., None, :, :]
    beaten = ((second >= first).all(-1) & (second > first).any(-1)).any(-1)
    return np.asarray(~beaten & ~np.isnan(points).any(-1))


def frontier_shares(resampled: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of resamples in which each point is on the frontier, [N].

    Args:
        resampled: points of every resample, [B, N, 2], larger is better in both.
    """
    # One resample at a time: all pairs of hundreds of points in hundreds of resamples would take gigabytes.
    return np.asarray(np.mean([on_frontier(points) for points in resampled], axis=0))

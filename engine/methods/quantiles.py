"""Quantiles of many groups of values in bounded memory: exact for few values, a sketch of many.

As in a merging digest (Dunning 2019), neighbouring values of a group become one value with their weight; here all are
of about equal weight, as what is asked for are medians and quartiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Values up to which all quantiles of a sketch are exact, and of a group by itself where there are very many groups.
MAX_VALUES = 100_000
MIN_PER_GROUP = 32


class QuantileSketch:
    """Values of groups, as many as there are up to `max_values`, and representatives of them beyond.

    A quantile of a sketch is exact in rank up to about one part in the number of representatives of its group, which is
    at least `max_values / 2` divided by the number of groups.
    """

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self._max_values = self._limit = max_values
        self._num_values = 0
        self._is_sorted = False
        self._chunks: list[tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]] = []

    def add(self, groups: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Take values, [N], none of them NaN, with the numbers of their groups, [N]."""
        if not len(values):
            return
        self._chunks.append((groups.astype(np.int32), values.astype(np.float64), np.ones(len(values))))
        self._num_values += len(values)
        self._is_sorted = False
        if self._num_values > self._limit:
            self._compress()

    def quantiles(self, group: int, at: Sequence[float]) -> list[float] | None:
        """Quantiles of a group, None where it has no value."""
        values, weights = self._of(group)
        if not len(values):
            return None
        if (weights == 1).all():
            return [float(value) for value in np.quantile(values, at)]
        order = np.argsort(values, kind="stable")
        values, weights = values[order], weights[order]
        middles = np.cumsum(weights) - weights / 2
        return [float(value) for value in np.interp(np.array(at) * weights.sum(), middles, values)]

    def median(self, group: int) -> float | None:
        """The median of a group, None where it has no value."""
        values, weights = self._of(group)
        if len(values) and (weights == 1).all():
            return float(np.median(values))
        middle = self.quantiles(group, [0.5])
        return middle[0] if middle else None

    def _of(self, group: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Values and weights of a group."""
        groups, values, weights = self._sorted()
        first, last = np.searchsorted(groups, [group, group + 1])
        return values[first:last], weights[first:last]

    def _sorted(self) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
        """All values by group, kept in that order."""
        if not self._is_sorted:
            groups, values, weights = self._whole()
            order = np.argsort(groups, kind="stable")
            self._chunks, self._is_sorted = [(groups[order], values[order], weights[order])], True
        return self._whole()

    def _whole(self) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
        if len(self._chunks) == 1:
            return self._chunks[0]
        empty = (np.array([], np.int32), np.array([]), np.array([]))
        groups, values, weights = (np.concatenate(parts) for parts in zip(empty, *self._chunks, strict=True))
        return groups, values, weights

    def _compress(self) -> None:
        """Replace neighbours in a group by their mean; groups with few values stay as they are."""
        groups, values, weights = self._whole()
        order = np.lexsort((values, groups))
        groups, values, weights = groups[order], values[order], weights[order]
        starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
        sizes = np.diff(starts, append=len(groups))
        per_group = max(MIN_PER_GROUP, self._max_values // 2 // len(starts))
        totals = np.repeat(np.add.reduceat(weights, starts), sizes)
        cumulated = np.cumsum(weights)
        before = np.repeat(cumulated[starts] - weights[starts], sizes)
        share = (cumulated - weights / 2 - before) / totals
        is_large = np.repeat(sizes > per_group, sizes)
        bucket = np.where(is_large, (share * per_group).astype(np.int64), np.arange(len(groups)))
        is_first = np.ones(len(groups), dtype=bool)
        is_first[1:] = (np.diff(groups) != 0) | (np.diff(bucket) != 0)
        firsts = np.flatnonzero(is_first)
        lasts = np.append(firsts[1:], len(groups)) - 1
        merged = np.add.reduceat(weights, firsts)
        # Of equal values the mean is that value, whatever its rounding.
        means = np.clip(np.add.reduceat(values * weights, firsts) / merged, values[firsts], values[lasts])
        self._chunks = [(groups[firsts], means, merged)]
        self._num_values = len(firsts)
        self._limit = max(self._max_values, 2 * self._num_values)

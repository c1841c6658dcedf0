"""Quantiles in bounded memory: exact for few values, near for many, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest

from engine.methods.quantiles import QuantileSketch

QUARTILES = [0.25, 0.5, 0.75]


def test_few_values_give_numpys_quantiles() -> None:
    """To the last bit, group by group, and nothing for a group without values."""
    random = np.random.default_rng(0)
    groups, values = random.integers(0, 5, 2_000), random.exponential(size=2_000)
    sketch = QuantileSketch(2_000)
    for start in range(0, 2_000, 300):
        sketch.add(groups[start : start + 300], values[start : start + 300])
    for group in range(5):
        own = values[groups == group]
        assert sketch.quantiles(group, QUARTILES) == np.quantile(own, QUARTILES).tolist()
        assert sketch.median(group) == np.median(own)
    assert sketch.quantiles(7, QUARTILES) is None and sketch.median(7) is None
    assert QuantileSketch().median(0) is None


@pytest.mark.parametrize("order", ["shuffled", "rising", "falling"])
def test_many_values_give_quantiles_of_nearly_their_rank(order: str) -> None:
    """A group with a hundred times the values of another; sorted input is the worst case for what was merged early."""
    random = np.random.default_rng(1)
    values, groups = random.lognormal(sigma=2, size=200_000), (random.random(200_000) < 0.01).astype(np.int64)
    if order != "shuffled":
        values = np.sort(values)[:: 1 if order == "rising" else -1]
    sketch = QuantileSketch(4_000)
    for start in range(0, len(values), 5_000):
        sketch.add(groups[start : start + 5_000], values[start : start + 5_000])
    for group in (0, 1):
        own = np.sort(values[groups == group])
        got = sketch.quantiles(group, QUARTILES)
        assert got is not None
        ranks = np.searchsorted(own, got) / len(own)
        assert np.abs(ranks - QUARTILES).max() < 0.003
    assert sum(len(weights) for _, _, weights in sketch._chunks) <= 9_000


def test_equal_values_stay_what_they_are() -> None:
    """A mean of equal values would be off by rounding, and a median that nobody measured would be shown."""
    sketch = QuantileSketch(100)
    for _ in range(50):
        sketch.add(np.zeros(60, dtype=np.int64), np.full(60, 0.1))
    assert sketch.quantiles(0, QUARTILES) == [0.1, 0.1, 0.1]

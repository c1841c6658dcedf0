"""Distances between sets of features, by properties: closed forms, unbiasedness, equal and shifted sets."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from engine.methods.kernel_distance import unbiased_mmd
from engine.studies.evaluate import distances
from engine.studies.evaluate.distances import (
    frechet_distance,
    frechet_interval,
    kernel_distance,
    precision_recall,
)


def normal(count: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, dim))


def mmd(first: np.ndarray, second: np.ndarray) -> float:
    return float(unbiased_mmd(torch.from_numpy(first), torch.from_numpy(second)))


def test_the_kernel_distance_is_unbiased() -> None:
    """Over many draws of one distribution its mean is zero within its error, however few the images; a biased estimate
    would be off by the diagonal."""
    found = [mmd(normal(12, 4, seed), normal(12, 4, seed + 10_000)) for seed in range(800)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3.5 * error
    assert min(found) < 0


def test_the_kernel_distance_is_that_of_its_definition() -> None:
    """Against the double sum, written out; several pairs of sets at once are as good as one by one."""
    x, y = normal(7, 3, 0), normal(5, 3, 1)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [
        sum(k(one[i], one[j]) for i in range(len(one)) for j in range(len(one)) if i != j) / (len(one) * (len(one) - 1))
        for one in (x, y)
    ]
    between = sum(k(a, b) for a in x for b in y) / 35
    assert mmd(x, y) == pytest.approx(sum(within) - 2 * between)
    stacked = [torch.from_numpy(np.stack([one, one + 1])) for one in (x, y)]
    assert unbiased_mmd(*stacked).tolist() == pytest.approx([mmd(x, y), mmd(x + 1, y + 1)])


def test_shifted_sets_separate() -> None:
    """Every distance grows with the shift, and its interval leaves what equal sets have."""
    real, near, far = normal(300, 8, 0), normal(300, 8, 1, 0.3), normal(300, 8, 2, 1.0)
    same = normal(300, 8, 3)
    for measure in (kernel_distance, frechet_interval):
        zero, some, more = (measure(one, real) for one in (same, near, far))
        assert zero.value < some.value < more.value
        assert more.low > zero.high
    assert kernel_distance(same, real).low < 0 < kernel_distance(same, real).high


def test_the_frechet_distance_of_gaussians_has_its_closed_form() -> None:
    """Features with exactly given means and diagonal covariances: the sum over axes of (m1-m2)^2 + (s1-s2)^2."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(500, 5))
    white = np.linalg.qr(raw - raw.mean(0))[0] * np.sqrt(499)
    first_scale, second_scale = np.array([1.0, 2.0, 0.5, 0.1, 3.0]), np.array([2.0, 2.0, 1.5, 0.0, 1.0])
    shift = np.array([0.0, 1.0, -2.0, 0.5, 0.0])
    wanted = float((shift**2).sum() + ((first_scale - second_scale) ** 2).sum())
    assert frechet_distance(white * first_scale, white * second_scale + shift) == pytest.approx(wanted)


def test_the_frechet_distance_does_not_change_with_axes_or_order() -> None:
    """Both paths, fewer and more images than dimensions, are symmetric and know no axes; of equal sets it is zero."""
    for count in (10, 100):
        x, y = normal(count, 20, 0), normal(count, 20, 1, 0.2) * 2
        turn = np.linalg.qr(normal(20, 20, 2))[0]
        assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y))
        assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y))
        assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_averages_subsets() -> None:
    """Against the definition with the same draws: half of the smaller set at most; the range of the middle 95 %."""
    x, y = normal(30, 4, 0), normal(9, 4, 1, 0.5)
    rng = np.random.default_rng(7)
    values = []
    for _ in range(50):
        first, second = x[rng.choice(30, 4, replace=False)], y[rng.choice(9, 4, replace=False)]
        values.append(mmd(first, second))
    estimate = kernel_distance(x, y, seed=7)
    assert estimate.value == pytest.approx(np.mean(values))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert kernel_distance(x, x + 1, size=5, seed=7) == kernel_distance(x, x + 1, size=5, seed=7)
    assert kernel_distance(x, x + 1, size=5, seed=7) != kernel_distance(x, x + 1, size=6, seed=7)


@pytest.mark.parametrize("counts", [(8, 12), (40, 30)])
def test_the_frechet_distance_is_that_of_its_definition(counts: tuple[int, int]) -> None:
    """With a root of the product of numpy's covariances (ddof 1), for fewer and for more images than dimensions."""
    x, y = normal(counts[0], 10, 0), normal(counts[1], 10, 1, 0.4) * np.linspace(0.5, 2, 10)
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # The product has the eigenvalues of a positive semi-definite matrix.
    root = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-5)


def test_the_frechet_interval_has_the_spread_of_its_bootstrap() -> None:
    """1.96 standard deviations (ddof 1) of 20 resamples of both sets, around the distance of the sets themselves."""
    x, y = normal(40, 3, 0), normal(50, 3, 1, 1.0)
    rng = np.random.default_rng(5)
    values = [frechet_distance(x[rng.integers(0, 40, 40)], y[rng.integers(0, 50, 50)]) for _ in range(20)]
    interval = frechet_interval(x, y, seed=5)
    assert interval.value == frechet_distance(x, y)
    half = 1.959963984540054 * np.std(values, ddof=1)
    assert (interval.low, interval.high) == pytest.approx((interval.value - half, interval.value + half))
    assert frechet_interval(x, x.copy()).low == 0.0


def test_precision_and_recall_are_those_of_their_definition() -> None:
    """Against loops over points and balls; the third neighbour, not counting the point itself."""
    samples, real = normal(40, 3, 0, 0.7), normal(60, 3, 1)

    def share(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(manifold - centre, axis=1))[3] for centre in manifold]
        inside = [
            any(np.linalg.norm(point - centre) <= radius for centre, radius in zip(manifold, radii, strict=True))
            for point in points
        ]
        return float(np.mean(inside))

    manifolds = precision_recall(samples, real)
    assert manifolds.precision.value == share(samples, real) != share(real, samples) == manifolds.recall.value
    assert 0 < manifolds.precision.low < manifolds.precision.value < manifolds.precision.high <= 1
    assert manifolds.recall.high - manifolds.recall.low < manifolds.precision.high - manifolds.precision.low


def test_precision_and_recall_of_equal_and_of_distant_sets() -> None:
    x = normal(200, 6, 0)
    equal = precision_recall(x, x.copy())
    assert equal.precision.value == equal.recall.value == 1.0
    apart = precision_recall(x, x + 50)
    assert apart.precision.value == apart.recall.value == 0.0


def test_precision_and_recall_tell_what_is_missing() -> None:
    """Samples of one mode of two are precise and lose half; those of both and of a third are the opposite."""
    real = np.concatenate([normal(150, 4, 0), normal(150, 4, 1, 30.0)])
    collapsed = precision_recall(normal(300, 4, 2), real)
    assert collapsed.precision.value > 0.8 and collapsed.recall.value < 0.6
    spilled = precision_recall(
        np.concatenate([normal(100, 4, 3), normal(100, 4, 4, 30.0), normal(100, 4, 5, -40.0)]), real
    )
    assert spilled.precision.value < 0.75 and spilled.recall.value > 0.8


def test_precision_and_recall_hold_a_block_of_distances_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the whole matrix: of 2,000 images it has 32 MB, and of `--limit 100000` eighty gigabytes."""
    x, y = normal(2000, 4, 0), normal(2000, 4, 1)
    whole = precision_recall(x, y)
    monkeypatch.setattr(distances, "_ROWS", 64)
    tracemalloc.start()
    found = precision_recall(x, y)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == whole and peak < 8 * 2**20


def test_too_few_features_are_refused() -> None:
    few, many = normal(3, 4, 0), normal(30, 4, 1)
    for measure in (kernel_distance, precision_recall):
        with pytest.raises(ValueError, match="3"):
            measure(few, many)
    with pytest.raises(ValueError, match="1"):
        frechet_interval(few[:1], many)


def test_equal_sets_give_equal_figures() -> None:
    x, y = normal(60, 4, 0), normal(60, 4, 1)
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert frechet_interval(x, y) == frechet_interval(x, y)

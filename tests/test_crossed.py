"""Intervals over seeds and images: closed forms, invariances, and coverage where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from engine.studies.crossed import ADDED, crossed_difference

NUM_RUNS = 500


def draw(
    rng: np.random.Generator, num_seeds: int, shape: tuple[int, ...], base: float, new: float, spread: tuple[float, ...]
) -> np.ndarray:
    """Differences of two arms, [S, *shape], whose accuracies over all seeds and images are `base` and `new`.

    An image is as hard for both arms, and a little more for one of them; a training is good or bad for all images.

    Args:
        spread: deviations of images, of trainings and of the rest.
    """
    images, trainings, rest = spread
    total = math.sqrt(images**2 * 1.25 + trainings**2 + rest**2)
    hard = images * rng.normal(size=shape)

    def right(accuracy: float) -> np.ndarray:
        own, of_seed = images / 2 * rng.normal(size=shape), trainings * rng.normal(size=(num_seeds, *[1] * len(shape)))
        return ndtri(accuracy) * total + hard + own + of_seed + rest * rng.normal(size=(num_seeds, *shape)) > 0

    return right(new).astype(float) - right(base)


SPREADS = [(1.0, 0.1, 0.5), (1.0, 0.3, 0.2)]
# Trainings that are all equally good: one of the two components is zero, and its estimate cut off there.
EQUAL_TRAININGS = (1.0, 0.0, 1.0)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    ("num_seeds", "num_images", "base", "new"),
    [(5, 30, 0.7, 0.8), (5, 50, 0.95, 0.92), (5, 250, 0.98, 0.97), (10, 50, 0.9, 0.93)],
)
def test_intervals_hold_what_they_promise(num_seeds, num_images, base, new, spread):
    """At 95 %, near 95 of a hundred hold the truth: few seeds, small contexts, accuracies near one."""
    rng, held = np.random.default_rng(num_images), 0
    for _ in range(NUM_RUNS):
        found = crossed_difference(draw(rng, num_seeds, (num_images,), base, new, spread)).estimate
        held += found.low <= new - base <= found.high
    assert 0.92 <= held / NUM_RUNS <= 0.98


@pytest.mark.parametrize(
    ("num_images", "base", "new", "spread"),
    [(20, 0.98, 0.97, SPREADS[0]), (50, 0.99, 0.99, SPREADS[1]), (200, 0.995, 0.99, SPREADS[0]),
     (50, 0.9, 0.93, EQUAL_TRAININGS)],
)  # fmt: skip
def test_elsewhere_intervals_are_cautious(num_images, base, new, spread):
    """Where hardly an image ever differs no interval can hold just 95 %: it never holds fewer, has a width always, and
    is no wider than six images."""
    rng, held, widths = np.random.default_rng(3), 0, []
    for _ in range(NUM_RUNS):
        found = crossed_difference(draw(rng, 5, (num_images,), base, new, spread)).estimate
        held += found.low <= new - base <= found.high
        widths.append(found.high - found.low)
    assert held / NUM_RUNS >= 0.94 and min(widths) > 0 and np.median(widths) < 8 / num_images


def test_intervals_of_means_over_contexts_of_the_same_scans_hold_what_they_promise():
    """Six contexts of 40 scans each: taken for 240 images, their interval would be too narrow."""
    rng, held, naive = np.random.default_rng(8), 0, 0
    strata, units = np.repeat(np.arange(6), 40), np.tile(np.arange(40), 6)
    for _ in range(NUM_RUNS):
        values = draw(rng, 5, (40,), 0.85, 0.8, SPREADS[0])
        values = np.concatenate([np.where(rng.random(values.shape) < 0.8, values, 0) for _ in range(6)], 1)
        found, other = (crossed_difference(values, strata, each).estimate for each in (units, None))
        held, naive = held + (found.low <= -0.04 <= found.high), naive + (other.low <= -0.04 <= other.high)
    assert 0.92 <= held / NUM_RUNS <= 0.98 and naive / NUM_RUNS < 0.9


@pytest.mark.parametrize("base", [0.7, 0.97])
def test_a_loss_is_found_by_chance_no_more_than_it_may(base):
    """One-sided at 5 %, where there is no loss; nearly always where there is one of ten points."""
    rng, false, true = np.random.default_rng(5), 0, 0
    for _ in range(NUM_RUNS):
        false += crossed_difference(draw(rng, 5, (100,), base, base, SPREADS[0])).p_less < 0.05
        true += crossed_difference(draw(rng, 5, (100,), base, base - 0.15, SPREADS[0])).p_less < 0.05
    assert false / NUM_RUNS <= 0.07 and true / NUM_RUNS > 0.7


def test_of_one_kind_of_variation_alone_it_is_students_interval():
    """Values that only the images move have the t interval over images; only the seeds, that over seeds."""
    steps = np.linspace(-0.9, 0.9, 400)
    rng = np.random.default_rng(0)
    of_images = np.tile(rng.choice(steps, 400), (5, 1))
    found = crossed_difference(of_images).estimate
    expected = stats.t.interval(0.95, 399, of_images[0].mean(), stats.sem(of_images[0]))
    assert (found.low, found.high) == pytest.approx(expected, abs=2e-3)
    of_seeds = np.tile(np.array([[0.1], [0.2], [0.4], [0.3]]), (1, 4000))
    found = crossed_difference(of_seeds).estimate
    expected = stats.t.interval(0.95, 3, 0.25, stats.sem([0.1, 0.2, 0.4, 0.3]))
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-3)


def test_variances_of_both_kinds_are_added():
    """Values that are a sum of both, without a rest; degrees of freedom by Satterthwaite's formula."""
    rng = np.random.default_rng(1)
    images, seeds = rng.normal(0, 0.3, 500), np.array([0.02, 0.05, 0.0, 0.03])
    found = crossed_difference(images + seeds[:, None]).estimate
    of_images, of_seeds = images.var(ddof=1) / 500, seeds.var(ddof=1) / 4
    degrees = (of_images + of_seeds) ** 2 / (of_images**2 / 499 + of_seeds**2 / 3)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(of_images + of_seeds)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-2)


def test_one_seed_has_the_interval_over_images():
    """A tenth of an image is added on either side; the centre moves by as little."""
    values = np.r_[np.ones(9), -np.ones(3), np.zeros(88)][None]
    found = crossed_difference(values)
    centre = 0.06 / (1 + 2 * ADDED / 100)
    error = math.sqrt(values.var(ddof=1) / 100 + 2 * ADDED * (1 + centre**2) / 100**2)
    assert found.estimate.value == 0.06
    assert found.estimate.high == pytest.approx(centre + stats.t.ppf(0.975, 101) * error)
    assert found.p_less == pytest.approx(stats.t.cdf(centre / error, 101))


def test_signs_orders_and_levels():
    """Both arms exchanged, all signs change; the order of seeds and images does not matter; higher levels are wider."""
    rng = np.random.default_rng(4)
    values = draw(rng, 4, (60,), 0.8, 0.7, SPREADS[0])
    strata, units = rng.integers(0, 3, 60), rng.integers(0, 30, 60)
    units = np.unique(units, return_inverse=True)[1]
    found = crossed_difference(values, strata, units)
    reverse = crossed_difference(-values, strata, units)
    ours, theirs = found.estimate, reverse.estimate
    assert (ours.low, ours.value, ours.high) == pytest.approx((-theirs.high, -theirs.value, -theirs.low))
    assert found.p_less == pytest.approx(1 - reverse.p_less)
    order, seeds = rng.permutation(60), rng.permutation(4)
    same = crossed_difference(values[seeds][:, order], strata[order], units[order])
    assert same.estimate.low == pytest.approx(ours.low) and same.p_less == pytest.approx(found.p_less)
    wide = crossed_difference(values, strata, units, level=0.99).estimate
    assert wide.low < ours.low < ours.high < wide.high
    means = [values[:, strata == each].mean() for each in range(3)]
    assert ours.value == pytest.approx(np.mean(means))


def test_two_equal_columns_of_a_unit_count_once():
    """A unit that is in the data twice says no more than once: the interval of the doubled data is the same."""
    values = draw(np.random.default_rng(6), 5, (80,), 0.8, 0.75, SPREADS[0])
    once = crossed_difference(values).estimate
    doubled = crossed_difference(np.tile(values, 2), units=np.tile(np.arange(80), 2)).estimate
    assert (doubled.low, doubled.high) == pytest.approx((once.low, once.high), abs=2e-3)
    apart = crossed_difference(np.tile(values, 2)).estimate
    assert apart.high - apart.low < 0.9 * (once.high - once.low)


def test_equal_arms_have_a_width():
    """No difference in any image of any training: a width all the same, and no loss."""
    found = crossed_difference(np.zeros((5, 30)))
    assert found.estimate.value == 0 and found.p_less == 0.5
    assert found.estimate.high == pytest.approx(-found.estimate.low) and 0.01 < found.estimate.high < 0.1
    single = crossed_difference(np.zeros((2, 1)))
    assert single.estimate.low < 0 < single.estimate.high

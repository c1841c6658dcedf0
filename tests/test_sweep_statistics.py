"""Frontiers, shared resamples and figures of image sets, on synthetic data where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.methods.kernel_distance import unbiased_mmd
from engine.studies.evaluate.distances import manifold_shares, precision_recall, squared_distances
from engine.studies.sweep.cells import SweepCell
from engine.studies.sweep.image_sets import RealImages, kernel_distance, manifolds, spread
from engine.studies.sweep.measures import CellSamples, measures_of
from engine.studies.sweep.pareto import frontier_shares, on_frontier
from engine.studies.sweep.resampling import MIN_GROUP, Draws, interval
from engine.studies.sweep.results import Axes, CellResult, cell_figures, changes, draw_noise, effects, frontiers

SEEDS = tuple(range(1000, 1024))


def drawn(size: int, seed: int, resamples: int = 199, halves: int = 20) -> Draws:
    return Draws.of([range(size)], seed, resamples, halves)


def beaten_by_hand(points: np.ndarray) -> list[bool]:
    return [
        not any(all(q >= p) and any(q > p) for other, q in enumerate(points) if other != place)
        for place, p in enumerate(points)
    ]


def test_the_frontier_is_that_of_its_definition():
    """Against the double loop, on grids where points tie in one measure or both; also several sets at once."""
    rng = np.random.default_rng(0)
    sets = rng.integers(0, 5, (60, 9, 2)).astype(float)
    assert on_frontier(sets).tolist() == [beaten_by_hand(points) for points in sets]
    corner = np.array([[0, 1], [1, 0], [0.5, 0.5], [0.4, 0.4], [1, 0], [np.nan, 9]])
    assert on_frontier(corner).tolist() == [True, True, True, False, True, False]


def test_the_share_of_resamples_tells_luck_from_a_point_that_is_on_the_frontier():
    """One point is better than all by many deviations; of two equal ones each is ahead half of the time in each
    measure, so that it is beaten in both in a quarter of the resamples."""
    rng = np.random.default_rng(1)
    best, equal, behind = [9, 9], [0, 0], [-9, -9]
    clear = frontier_shares(np.array([best, equal, behind]) + rng.normal(size=(400, 3, 2)))
    assert clear.tolist() == [1, 0, 0]
    tied = frontier_shares(np.array([equal, equal, behind]) + rng.normal(size=(2000, 3, 2)))
    assert tied[:2] == pytest.approx([0.75, 0.75], abs=0.04) and tied[2] == 0


def test_intervals_of_medians_and_of_differences_hold_the_truth():
    """Of 300 sets of 24 samples from known distributions, with a true difference of 1 between the cells. Shared noise
    makes the interval of the difference narrower than those of the cells."""
    rng = np.random.default_rng(2)
    hits, widths = np.zeros(2), np.zeros(2)
    for trial in range(300):
        noise = rng.normal(size=24)
        first, second = np.exp(noise), np.exp(noise) + 1 + 0.2 * rng.normal(size=24)
        draws = drawn(24, trial)
        medians = [draws.medians(values, range(24)) for values in (first, second)]
        of_first = interval(float(np.median(first)), medians[0])
        change = interval(float(np.median(second) - np.median(first)), medians[1] - medians[0])
        hits += [of_first.low <= 1 <= of_first.high, change.low <= 1 <= change.high]
        widths += [of_first.high - of_first.low, change.high - change.low]
    assert (hits / 300 > 0.91).all() and hits[0] < 300
    assert widths[1] < 0.8 * widths[0]


def test_resamples_of_classes_keep_their_numbers_where_a_class_is_large_enough():
    large = Draws.of([range(MIN_GROUP), range(100, 100 + MIN_GROUP)], 0, 50, 10)
    assert ((large.indices < MIN_GROUP).sum(1) == MIN_GROUP).all() and large.halves.shape == (10, MIN_GROUP)
    small = Draws.of([range(3), range(100, 103)], 0, 50, 10)
    assert len(np.unique((small.indices < 3).sum(1))) > 1


def test_samples_that_failed_are_left_out_of_the_resamples_that_drew_them():
    """A cell without some of the noises: its means and medians are over what it has, whatever order its rows have."""
    draws = drawn(24, 3)
    seeds = [7, 3, 11]
    values = np.array([1.0, 0.0, 1.0])
    counts = draws.counts(seeds)
    own = [np.repeat(values, row.astype(int)) for row in counts]
    wanted = [np.median(one) if len(one) else np.nan for one in own]
    assert draws.medians(values, seeds) == pytest.approx(wanted, nan_ok=True)
    assert draws.means(values, seeds) == pytest.approx([one.mean() if len(one) else np.nan for one in own], nan_ok=True)
    assert [(draws.indices == seed).sum() for seed in seeds] == counts.sum(0).tolist()


def directions(rng: np.random.Generator, count: int, shift: float) -> np.ndarray:
    points = rng.normal(size=(count, 12))
    points[:, 0] += shift
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_the_kernel_distance_is_the_unbiased_one_and_its_interval_holds_the_truth():
    """The truth is that of many thousands of points; repeated samples must not count as near pairs."""
    rng = np.random.default_rng(4)
    many = [torch.from_numpy(directions(rng, 3000, shift) * np.sqrt(12)) for shift in (0.0, 1.0)]
    truth = 1000 * float(unbiased_mmd(*many))
    hits, biases = 0, []
    for trial in range(40):
        samples, photographs = directions(rng, 30, 0.0), directions(rng, 60, 1.0).astype(np.float32)
        real = RealImages.of({0: photographs}, [0], trial)
        draws = drawn(30, trial, resamples=999, halves=2)
        measured = kernel_distance(samples, draws.counts(range(30)), real)
        whole = [torch.from_numpy(side * np.sqrt(12)) for side in (samples, photographs.astype(float))]
        assert measured.value == pytest.approx(1000 * float(unbiased_mmd(*whole)), rel=1e-4)
        estimate = interval(measured.value, measured.resampled)
        hits += estimate.low <= truth <= estimate.high
        biases.append((measured.resampled.mean() - measured.value) / measured.resampled.std())
    assert hits >= 35 and abs(np.mean(biases)) < 0.3


def test_shares_of_manifolds_are_those_of_the_evaluation_and_coverage_that_of_its_definition():
    rng = np.random.default_rng(5)
    samples, real = rng.normal(size=(40, 5)), rng.normal(0.4, 1, size=(50, 5))
    within, others = squared_distances(samples, samples), squared_distances(real, real)
    between = squared_distances(samples, real)
    shares, known = manifold_shares(within, others, between), precision_recall(samples, real)
    assert (shares.precision, shares.recall) == (known.precision.value, known.recall.value)
    radii = np.sort(others, axis=1)[:, 3]
    assert shares.coverage == np.mean([(between[:, place] <= radius).any() for place, radius in enumerate(radii)])
    with pytest.raises(ValueError, match="3 neighbours need more"):
        manifold_shares(within[:3, :3], others, between[:3])


def test_a_cell_with_less_variety_has_less_coverage_recall_and_spread():
    """Samples of one of two kinds of real images; precision stays high. What halves of the samples differ by is about
    what new samples would."""
    rng = np.random.default_rng(6)
    both = np.concatenate([directions(rng, 100, 2.0), directions(rng, 100, -2.0)])
    real = RealImages.of({0: both.astype(np.float32)}, [0], 0)
    classes, values = np.zeros(60, int), {"wide": [], "narrow": []}
    deviations = []
    for trial in range(12):
        wide = np.concatenate([directions(rng, 30, 2.0), directions(rng, 30, -2.0)])
        narrow = directions(rng, 60, 2.0)
        draws = Draws.of([range(60)], trial, 99, 60)
        for name, points in (("wide", wide), ("narrow", narrow)):
            found = manifolds(points, draws, range(60), real)
            found["spread"] = spread(points, classes, draws.counts(range(60)))
            values[name].append([found[key].value for key in ("precision", "recall", "coverage", "spread")])
            deviations.append(found["coverage"].resampled.std())
    wide, narrow = (np.mean(values[name], axis=0) for name in ("wide", "narrow"))
    assert (narrow[1:] < wide[1:] - 0.05).all() and narrow[0] > wide[0] - 0.05
    true = np.mean([np.std(np.array(values[name])[:, 2], ddof=1) for name in values])
    assert 0.5 < np.mean(deviations) / true < 2.5


def synthetic(name: str, values: dict, errs: float, risk: float, seed: int, request: str = "risky") -> CellResult:
    """A cell of 24 samples with a share of errors and a risk, on noise that all cells share."""
    noise = np.random.default_rng(0).normal(size=24)
    own = np.random.default_rng(seed).normal(size=24)
    columns = {
        "target_errs": (np.arange(24) < errs * 24).astype(float),
        "risk": risk + noise + 0.1 * own,
        "conformity": 0.5 - 0.1 * risk + 0.01 * own,
    }
    keys = tuple(f"job-000-003-{index:08d}" for index in range(24))
    samples = CellSamples(keys, SEEDS, np.zeros(24, int), columns, 0)
    measures = measures_of(False, transfer=(), has_oracle=False, has_judge=False, has_rule=False)
    draws = draw_noise([samples], 0)
    cell = SweepCell(
        name=name, request=request, values=values, texts={key: str(one) for key, one in values.items()}, asked="x"
    )
    return CellResult(cell, samples, cell_figures(samples, measures, draws, np.empty((0, 1)), None))


@pytest.fixture(scope="module")
def grid() -> list[CellResult]:
    """Two fields: the first adds 1 to the risk, the second nothing but noise."""
    return [
        synthetic(f"s{s}-l{weight}", {"s": s, "l": weight}, 0.5, float(s), 10 * s + weight)
        for s in (1, 2)
        for weight in (0, 1)
    ]


def test_effects_are_means_over_pairs_that_differ_in_one_field(grid):
    by_field = {effect.field: effect for effect in effects(grid, {"s": (1, 2), "l": (0, 1)})}
    risk = {field: effect.changes["risk"] for field, effect in by_field.items()}
    assert by_field["s"].num_pairs == by_field["l"].num_pairs == 2
    assert risk["s"].low < 1 < risk["s"].high and risk["s"].low > 0.8
    assert risk["l"].low < 0 < risk["l"].high
    assert by_field["s"].changes["target_errs"].is_degenerate
    # Cells without a partner, and fields that change the classes, have no effect.
    assert [effect.num_pairs for effect in effects(grid[:3], {"s": (1, 2)})] == [1]


def test_figures_of_cells_are_wilson_quartiles_and_changes_on_shared_noise(grid):
    first, last = grid[0], grid[-1]
    assert (first.figures["target_errs"].shown.value, first.figures["risk"].shown.value) == (
        0.5, pytest.approx(np.median(first.samples.values["risk"])),
    )  # fmt: skip
    assert first.figures["target_errs"].shown.low == pytest.approx(0.314, abs=1e-3)
    quartiles = np.quantile(first.samples.values["risk"], (0.25, 0.75))
    assert (first.figures["risk"].shown.low, first.figures["risk"].shown.high) == pytest.approx(tuple(quartiles))
    change = changes(last, first)["risk"]
    assert change.low < 1 < change.high and change.high - change.low < 0.5
    estimate = first.figures["risk"].estimate
    assert estimate.high - estimate.low > 2 * (change.high - change.low)


def test_frontiers_mark_the_cells_that_no_other_beats(grid):
    measures = {
        one.name: one for one in measures_of(False, transfer=(), has_oracle=False, has_judge=False, has_rule=False)
    }
    worse = synthetic("worse", {"s": 0, "l": 0}, 0.1, 0.0, 99)
    worse.samples.values["conformity"] -= 5
    bad = CellResult(
        worse.cell, worse.samples,
        cell_figures(worse.samples, list(measures.values()), draw_noise([worse.samples], 0), np.empty((0, 1)), None),
    )  # fmt: skip
    [frontier] = frontiers([*grid, bad], [Axes(measures["conformity"], measures["risk"])])
    assert not frontier.is_on[-1] and frontier.shares[-1] == 0
    # Risk rises by 1 and conformity falls by 0.1 in half of the cells, so that a cell of either half is on it.
    assert frontier.is_on[:2].any() and frontier.is_on[2:4].any() and 0 < frontier.shares[:4].min() < 1

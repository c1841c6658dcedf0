"""From the samples of all cells to figures with shared resamples: values, changes, effects and frontiers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.job.spec import JobSpec
from engine.methods.intervals import Estimate, wilson_interval
from engine.studies.sweep.cells import CrossedJob, SweepCell
from engine.studies.sweep.fields import canonical
from engine.studies.sweep.image_sets import Measured, RealImages, kernel_distance, manifolds, spread
from engine.studies.sweep.measures import CellSamples, Measure
from engine.studies.sweep.pareto import frontier_shares, on_frontier
from engine.studies.sweep.resampling import Draws, interval

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A measure of a cell.

    Attributes:
        shown: with Wilson's interval of a share, the quartiles of a median, or the interval of a set's figure.
        resampled: what it is in every resample, [B].
    """

    shown: Estimate
    resampled: Values

    @property
    def estimate(self) -> Estimate:
        """The value with its 95 % interval from the resamples."""
        return interval(self.shown.value, self.resampled)


@dataclass(frozen=True, slots=True, eq=False)
class CellResult:
    """A cell and its figures, by the name of the measure."""

    cell: SweepCell
    samples: CellSamples
    figures: dict[str, Figure]


@dataclass(frozen=True, slots=True)
class Axes:
    """The two measures of a frontier; the first is drawn across."""

    across: Measure
    up: Measure


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """The cells of one set of classes in two measures.

    Attributes:
        results: those that have both.
        is_on: whether each is on the frontier.
        shares: the share of resamples in which it is.
    """

    axes: Axes
    results: tuple[CellResult, ...]
    is_on: NDArray[np.bool_]
    shares: Values


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """What a field changes on average, over pairs of cells that differ in it alone.

    Attributes:
        request: whose cells they are.
        changes: by measure.
    """

    request: str
    field: str
    old: Any
    new: Any
    num_pairs: int
    changes: dict[str, Estimate]


def draw_noise(asked: Sequence[CellSamples], seed: int) -> Draws:
    """The resamples of cells that ask for the same classes.

    Args:
        asked: the samples of these cells.
    """
    groups: dict[str, dict[int, None]] = {}
    for samples in asked:
        for key, noise in zip(samples.keys, samples.seeds, strict=True):
            groups.setdefault(key.rsplit("-", 2)[1], {})[noise] = None
    return Draws.of([list(noises) for noises in groups.values()] or [[]], seed)


def cell_figures(
    samples: CellSamples, measures: Sequence[Measure], draws: Draws, features: Values, real: RealImages | None
) -> dict[str, Figure]:
    """The figures of a cell.

    Args:
        features: CLIP embeddings of its samples, of length one, [n, d]; NaN in rows without a stored image.
    """
    figures: dict[str, Figure] = {}
    for measure in measures:
        column = samples.values.get(measure.name)
        if column is None or not len(column):
            continue
        seeds, column = _there(samples.seeds, column)
        if not len(column):
            continue
        if measure.kind == "share":
            figures[measure.name] = Figure(wilson_interval(int(column.sum()), len(column)), draws.means(column, seeds))
        else:
            low, median, high = np.quantile(column, (0.25, 0.5, 0.75)).tolist()
            figures[measure.name] = Figure(Estimate(median, low, high), draws.medians(column, seeds))
    return figures | _set_figures(samples, draws, features, real)


def _there(seeds: Sequence[int], column: Values) -> tuple[list[int], Values]:
    """The seeds and values of the samples that have one."""
    rows = np.flatnonzero(~np.isnan(column))
    return [seeds[row] for row in rows.tolist()], column[rows]


def _set_figures(samples: CellSamples, draws: Draws, features: Values, real: RealImages | None) -> dict[str, Figure]:
    """The figures of the stored images as a set."""
    rows = np.flatnonzero(~np.isnan(features).any(1)) if len(features) else np.arange(0)
    if len(rows) < 2:
        return {}
    own, seeds = features[rows], [samples.seeds[row] for row in rows]
    weights = draws.counts(seeds)
    is_joint = samples.keys[0].rsplit("-", 2)[1] == "mix"
    classes = np.zeros(len(rows), np.int64) if is_joint else samples.classes[rows]
    found: dict[str, Measured] = {}
    if real is not None:
        found["kid"] = kernel_distance(own, weights, real)
        found |= manifolds(own, draws, seeds, real)
    if (own_spread := spread(own, classes, weights)) is not None:
        found["spread"] = own_spread
    return {
        name: Figure(interval(measured.value, measured.resampled), measured.resampled)
        for name, measured in found.items()
    }


def baseline_of(
    result: CellResult, results: Sequence[CellResult], crossed: CrossedJob, named: str | None
) -> CellResult:
    """The cell that another is compared with: of the same classes, and equal in as many fields as can be.

    Args:
        named: a request or a cell; None for an unguided request, or else the first cell.
    """
    same = [one for one in results if one.cell.asked == result.cell.asked]
    if named is not None:
        chosen = [one for one in same if named in (one.cell.name, one.cell.request)]
    else:
        unguided = _unguided(crossed.job)
        chosen = [one for one in same if one.cell.name in unguided]
    # The first of those that agree in most fields.
    return max(chosen or same[:1], key=lambda one: _num_equal(one.cell, result.cell))


def _unguided(job: JobSpec) -> set[str]:
    """Names of the cells that nothing guides: by prompt alone, or with a step of no length."""
    names = set()
    for request in job.requests:
        parameters = job.parameters_of(request).in_effect()
        step = "scale" if parameters.get("step") == "paper" and "scale" in parameters else "alpha"
        if not request.method_record.is_guided or parameters.get(step) == 0:
            names.add(request.name)
    return names


def _num_equal(first: SweepCell, second: SweepCell) -> int:
    """In how many fields two cells agree."""
    fields = first.values.keys() & second.values.keys()
    return sum(canonical(first.values[field]) == canonical(second.values[field]) for field in fields)


def changes(result: CellResult, baseline: CellResult) -> dict[str, Estimate]:
    """How much each measure differs from the baseline's, with intervals on shared noise."""
    return {
        name: interval(
            figure.shown.value - baseline.figures[name].shown.value,
            figure.resampled - baseline.figures[name].resampled,
        )
        for name, figure in result.figures.items()
        if name in baseline.figures
    }


def effects(results: Sequence[CellResult], fields: Mapping[str, Sequence[Any]]) -> Iterator[Effect]:
    """What each field changes between its first value and each other one, on average over the other fields.

    Cells with other classes have no noise in common; a field that changes the classes has no effect of this kind.
    """
    requests = list(dict.fromkeys(result.cell.request for result in results))
    for request, (field, values) in itertools.product(requests, fields.items()):
        own = [result for result in results if result.cell.request == request and field in result.cell.values]
        for new in values[1:]:
            pairs = [pair for pair in _pairs(own, field, values[0], new) if pair[0].cell.asked == pair[1].cell.asked]
            if pairs:
                yield Effect(request, field, values[0], new, len(pairs), _mean_changes(pairs))


def _pairs(results: Sequence[CellResult], field: str, old: Any, new: Any) -> Iterator[tuple[CellResult, CellResult]]:
    """Cells that differ in a field alone."""
    first, second = ({_others(one, field): one for one in results if _has(one, field, value)} for value in (old, new))
    yield from ((first[key], second[key]) for key in first if key in second)


def _others(result: CellResult, field: str) -> str:
    return canonical({name: value for name, value in result.cell.values.items() if name != field})


def _has(result: CellResult, field: str, value: Any) -> bool:
    return canonical(result.cell.values[field]) == canonical(value)


def _mean_changes(pairs: Sequence[tuple[CellResult, CellResult]]) -> dict[str, Estimate]:
    names = [name for name in pairs[0][0].figures if all(name in one.figures for pair in pairs for one in pair)]
    found = {}
    for name in names:
        sides = [(old.figures[name], new.figures[name]) for old, new in pairs]
        value = float(np.mean([new.shown.value - old.shown.value for old, new in sides]))
        found[name] = interval(value, np.mean([new.resampled - old.resampled for old, new in sides], axis=0))
    return found


def frontiers(results: Sequence[CellResult], axes: Sequence[Axes]) -> Iterator[Frontier]:
    """The frontier in each pair of measures, of each set of classes that has two cells or more with both."""
    for asked, pair in itertools.product(dict.fromkeys(result.cell.asked for result in results), axes):
        names = (pair.across.name, pair.up.name)
        own = tuple(one for one in results if one.cell.asked == asked and all(name in one.figures for name in names))
        if len(own) > 1:
            signs = np.array([pair.across.better, pair.up.better])
            points = np.array([[one.figures[name].shown.value for name in names] for one in own]) * signs
            resampled = np.stack([np.stack([one.figures[name].resampled for name in names], -1) for one in own], axis=1)
            yield Frontier(pair, own, on_frontier(points), frontier_shares(resampled * signs))

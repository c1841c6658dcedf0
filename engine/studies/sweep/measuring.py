"""The figures of all cells of a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec
from engine.studies.samples import StudiedRun, read_attempts
from engine.studies.sweep.cells import CrossedJob
from engine.studies.sweep.image_sets import MIN_IMAGES, RealImages
from engine.studies.sweep.measures import COLUMNS, IMAGE_MEASURES, CellSamples, Measure, measures_of, read_cell
from engine.studies.sweep.results import Axes, CellResult, cell_figures, draw_noise
from engine.studies.sweep.scores import Rescorer, unpacked
from engine.studies.sweep.spec import SweepSpec

if TYPE_CHECKING:
    from engine.studies.experiments.program import StudyContext


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCells:
    """The figures of all cells.

    Attributes:
        measures: in the order of the table.
        axes: of the frontiers, the main pair first.
        drawn: measures of the figure over a field of numbers.
        notes: what could not be measured, and what limits the figures.
    """

    results: tuple[CellResult, ...]
    measures: tuple[Measure, ...]
    axes: tuple[Axes, ...]
    drawn: tuple[Measure, ...]
    notes: tuple[str, ...]


def measure_cells(
    spec: SweepSpec, crossed: CrossedJob, run: StudiedRun, labels: Sequence[str], context: StudyContext
) -> MeasuredCells:
    """Read the samples of every cell, score their stored images, and measure them.

    Raises:
        RiskforgeError: a shard is damaged, or a model or an image cannot be used.
    """
    job = crossed.job
    rescorer = Rescorer(run, labels, context)
    classes = [
        sorted({index for cell in plan.cells for index in cell.classes}) for plan in resolve_requests(job, list(labels))
    ]
    real = _real_images(spec, rescorer, classes)
    samples, features = [], []
    for number, cell in enumerate(crossed.cells):
        context.display.advance(f"scoring cell {number + 1} of {len(crossed.cells)}")
        scores = rescorer.cell(cell.name)
        samples.append(read_cell(read_attempts(run, [cell.name], COLUMNS), scores))
        features.append(_aligned(samples[-1], scores))
    measures = _measures(job)
    results = []
    draws: dict[str, Any] = {}
    for number, cell in enumerate(crossed.cells):
        context.display.advance(f"measuring cell {number + 1} of {len(crossed.cells)}")
        if cell.asked not in draws:
            own = [one for one, other in zip(samples, crossed.cells, strict=True) if other.asked == cell.asked]
            draws[cell.asked] = draw_noise(own, len(draws))
        figures = cell_figures(
            samples[number], measures, draws[cell.asked], features[number], real.get(tuple(classes[number]))
        )
        results.append(CellResult(cell, samples[number], figures))
    there = {name for one in results for name in one.figures}
    axes = tuple(pair for pair in _axes(measures) if {pair.across.name, pair.up.name} <= there)
    return MeasuredCells(
        results=tuple(results),
        measures=measures,
        axes=axes,
        drawn=_drawn(measures, there),
        notes=tuple(_notes(spec, job, rescorer, measures, there)),
    )


def _real_images(
    spec: SweepSpec, rescorer: Rescorer, classes: Sequence[list[int]]
) -> Mapping[tuple[int, ...], RealImages | None]:
    """Real images of each set of classes; none without `spec.real`."""
    if spec.real is None:
        return {}
    features = rescorer.real(spec.real, sorted({index for own in classes for index in own}))
    return {own: RealImages.of(features, own, 0) for own in dict.fromkeys(map(tuple, classes))}


def _aligned(samples: CellSamples, scores: Mapping[str, Any]) -> np.ndarray:
    """Embeddings in the order of the samples, [n, d]; NaN where no image is stored."""
    features = unpacked(scores["features"]).astype(np.float64)
    place = {key: number for number, key in enumerate(scores["keys"])}
    missing = np.full((1, features.shape[1]), np.nan)
    return np.concatenate([features, missing])[[place.get(key, -1) for key in samples.keys]]


def _measures(job: JobSpec) -> tuple[Measure, ...]:
    models = job.models
    kinds = sorted({request.boundary is not None for request in job.requests})
    found = {
        measure.name: measure
        for is_joint in kinds
        for measure in measures_of(
            is_joint,
            transfer=models.transfer,
            has_oracle=bool(models.all_oracles),
            has_judge=models.judge is not None,
            has_rule=any(request.accept for request in job.requests),
        )
    }
    return (*found.values(), *IMAGE_MEASURES)


def _axes(measures: Sequence[Measure]) -> list[Axes]:
    """The pairs of measures of the frontiers: risk against conformity, KLDB against the distance to real images."""
    by_name = {measure.name: measure for measure in measures}
    pairs = [
        ("conformity", "risk"), ("conformity", "valid_failures"), ("kid", "kldb"), ("kid", "transfer_kldb"),
    ]  # fmt: skip
    return [Axes(by_name[across], by_name[up]) for across, up in pairs if across in by_name and up in by_name]


def _drawn(measures: Sequence[Measure], there: set[str]) -> tuple[Measure, ...]:
    names = (
        ("kldb", "kid", "coverage", "spread", "transfer_kldb", "entropy")
        if "kldb" in {measure.name for measure in measures} & there
        else ("target_errs", "conformity", "valid_failures", "kid", "coverage", "spread")
    )
    by_name = {measure.name: measure for measure in measures}
    return tuple(by_name[name] for name in names if name in by_name and name in there)


def _notes(
    spec: SweepSpec, job: JobSpec, rescorer: Rescorer, measures: Sequence[Measure], there: set[str]
) -> Iterator[str]:
    names = {measure.name for measure in measures}
    if spec.real is None:
        yield "without real images (`--real DATA`) there is no kernel distance, recall and coverage"
    elif "coverage" not in there:
        yield f"recall and coverage need {MIN_IMAGES} images a cell, and real ones of every class"
    if not job.models.transfer:
        yield "no classifier guided nothing: name one in models.transfer of the job to see whether results carry over"
    if "risk" in names and not job.models.all_oracles:
        yield "without an oracle (models.oracle of the job) nobody says which failures are valid"
    if rescorer.clip_address == job.models.clip and any(
        request.method_record.measures_conformity for request in job.requests
    ):
        yield (
            f"conformity and the features of images are of {job.models.clip}, which may guide: circular; name a second"
            " CLIP model in models.judge"
        )
    yield "every interval is for a figure on its own: of a hundred of them about five miss"

"""`study sweep`: the run of all cells, their stored images scored again, and what the figures say.

The samples of a cell are those of one request: `count` of them, rounded up to equally many of each class and context.
All cells have the same noise, so that their differences and the frontier have intervals from shared resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import JobError
from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec
from engine.job.spec_messages import nearest
from engine.models.artefacts import missing_artefacts
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels, target_labels
from engine.studies.sweep.cells import CrossedJob, cross
from engine.studies.sweep.fields import field_problems
from engine.studies.sweep.spec import SweepSpec

if TYPE_CHECKING:
    from engine.studies.experiments.program import StudyContext, StudyOutcome
    from engine.studies.sweep.results import CellResult

RUN = "cells"


def check_sweep(spec: SweepSpec, job: JobSpec) -> str:
    """Check every cell, and the real images, before anything starts.

    Raises:
        JobError: all problems that were found; those of a cell name it.
    """
    check_addresses(job)
    crossed, labels = _crossed(spec, job)
    try:
        _check_cells(crossed.job, labels)
    except JobError as error:
        raise JobError(crossed.named(error.problems)) from None
    if spec.real is not None and labels is not None:
        from engine.data.images import open_images

        open_images(spec.real, tuple(labels), "--real")
    samples = crossed.samples_of(labels or [])
    counts = sorted(set(samples.values()))
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = f"{_many(len(samples), 'cell')} of {each} samples, {sum(samples.values())} in all"
    if labels is None:
        text += f"; the classes are not checked: {job.models.target} is not on this machine yet"
    left = f"; requests that use no field are left out: {', '.join(crossed.left_out)}" if crossed.left_out else ""
    return text + left


def _crossed(spec: SweepSpec, job: JobSpec) -> tuple[CrossedJob, list[str] | None]:
    if problems := list(field_problems(spec.values)):
        raise JobError(problems)
    labels = read_labels(job.models.target)
    crossed = cross(job, spec.values, spec.texts, spec.requests, spec.count, len(labels or ()))
    if spec.baseline is not None:
        names = list(dict.fromkeys(name for cell in crossed.cells for name in (cell.name, cell.request)))
        if spec.baseline not in names:
            raise JobError(
                f"--baseline: there is no request or cell '{spec.baseline}'{nearest(spec.baseline, names)}; there are"
                f" {', '.join(names[:20])}"
            )
    return crossed, labels


def _check_cells(job: JobSpec, labels: list[str] | None) -> None:
    from engine.driver.checks import find_images

    check_addresses(job)
    if missing := missing_artefacts(job):
        raise JobError(missing)
    if labels is not None:
        find_images(job, resolve_requests(job, labels), labels)


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def sweep(spec: SweepSpec, job: JobSpec, context: StudyContext) -> StudyOutcome:
    """Make the run of all cells, and measure it."""
    from engine.studies.experiments.program import StudyOutcome
    from engine.studies.sweep.drawing import frontier_figure, profile_figure
    from engine.studies.sweep.findings import findings
    from engine.studies.sweep.measuring import measure_cells
    from engine.studies.sweep.results import baseline_of, changes, effects, frontiers
    from engine.studies.sweep.tables import changes_table, effects_table, frontier_table, main_table

    labels = target_labels(job)
    crossed, _ = _crossed(spec, job)
    run = context.make_run(RUN, crossed.job)
    measured = measure_cells(spec, crossed, run, labels, context)
    results, measures = measured.results, measured.measures
    context.display.phase("comparing cells")
    baselines = [(one, baseline_of(one, results, crossed, spec.baseline)) for one in results]
    changed = [(one, base, changes(one, base)) for one, base in baselines if one is not base]
    found = list(effects(results, spec.values))
    fronts = list(frontiers(results, measured.axes))
    tables = [
        main_table(crossed, results, measures, fronts),
        *[changes_table(crossed, changed, measures)] * bool(changed),
        *[effects_table(crossed, found, measures, spec.texts)] * bool(found),
        *[frontier_table(crossed, fronts)] * bool(fronts),
    ]
    figures = (frontier_figure(crossed, fronts), profile_figure(crossed, results, measured.drawn))
    return StudyOutcome(
        tables=tuple(tables),
        figures=tuple(figure for figure in figures if figure is not None),
        findings=tuple(findings(crossed, spec.texts, measures, changed, found, fronts)),
        notes=(*_notes(spec, crossed, results, labels), *measured.notes),
    )


def _notes(spec: SweepSpec, crossed: CrossedJob, results: Sequence[CellResult], labels: Sequence[str]) -> Iterator[str]:
    """What limits the figures."""
    counts = sorted(set(crossed.samples_of(labels).values()))
    if counts != [spec.count]:
        each = " or ".join(map(str, counts))
        yield f"{spec.count} samples a cell are rounded up to equally many of each class and context: {each}"
    if crossed.left_out:
        yield f"requests that use no field are left out: {', '.join(crossed.left_out)}"
    if counts[0] < 100:
        yield (
            f"with {counts[0]} samples a cell only large differences show; `--count 500`, as in the papers, extends the"
            " same run"
        )
    yield from _equal_cells(crossed, results)


def _equal_cells(crossed: CrossedJob, results: Sequence[CellResult]) -> Iterator[str]:
    """Cells whose samples are the same in every respect: a field does nothing there."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for one in results:
        columns = tuple((name, values.tobytes()) for name, values in sorted(one.samples.values.items()))
        groups.setdefault((one.cell.asked, one.samples.seeds, columns), []).append(crossed.label(one.cell))
    for labels in groups.values():
        if len(labels) > 1:
            more = f" and {len(labels) - 4} more" if len(labels) > 4 else ""
            named = "; ".join(labels[:4])
            yield f"these cells have equal samples, so that their fields made no difference: {named}{more}"

"""`riskforge study transfer`: a run for each row of the matrix, then the matrix by the scores that they recorded."""

from __future__ import annotations

from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec
from engine.models.labels import read_labels
from engine.studies.experiments.program import StudyContext, StudyOutcome
from engine.studies.transfer.checks import check_design, sharing_notes
from engine.studies.transfer.findings import findings_of
from engine.studies.transfer.jobs import left_out_notes, row_job
from engine.studies.transfer.matrix import Aligned, cells_by_request, matrix_of
from engine.studies.transfer.rows import Design, design_of
from engine.studies.transfer.samples import Judges, RowSamples, judges_of, read_row
from engine.studies.transfer.sets import SetScores, score_sets
from engine.studies.transfer.spec import TransferSpec
from engine.studies.transfer.tables import study_figures, study_tables


def check_transfer(spec: TransferSpec, job: JobSpec) -> str:
    """Check what files can tell, and say what will be made.

    Raises:
        JobError: all problems, a line each.
    """
    design = design_of(spec, job)
    check_design(spec, job, design)
    num_singles = len(design.guided) - len(design.ensembles)
    parts = [f"against {num_singles} classifier{'s' * (num_singles > 1)}"]
    if design.ensembles:
        parts.append(f"against {len(design.ensembles)} ensemble{'s' * (len(design.ensembles) > 1)}")
    text = f"{len(design.rows)} runs of {_size(spec, job, design)}: unguided, {', '.join(parts)};"
    text += f" evaluated by {len(design.classifiers)} classifiers"
    return f"{text}, which also classify {len(spec.sets)} image sets" if spec.sets else text


def _size(spec: TransferSpec, job: JobSpec, design: Design) -> str:
    made = row_job(job, design, design.rows[0], spec.count)
    labels = read_labels(made.models.target)
    if labels is None:
        return f"{spec.count} samples a class and context"
    return f"{sum(request.total for request in resolve_requests(made, labels))} samples"


def transfer(spec: TransferSpec, job: JobSpec, context: StudyContext) -> StudyOutcome:
    """Make all rows, and find out what carries over."""
    design = design_of(spec, job)
    samples: list[RowSamples] = []
    for row in design.rows:
        run = context.make_run(row.run, row_job(job, design, row, spec.count))
        samples.append(read_row(run, row, design, job.independent_oracles))
    judges = judges_of(job, design)
    sets = score_sets(spec, row_job(job, design, design.rows[0], spec.count), design, context)
    cells = matrix_of(samples, design, judges)
    aligned = Aligned.of(samples, design, judges)
    return StudyOutcome(
        tables=study_tables(cells, cells_by_request(samples, design, judges), sets, design),
        figures=study_figures(cells, sets, design),
        findings=findings_of(aligned, cells, sets),
        notes=(
            *left_out_notes(job),
            *sharing_notes(design),
            *_oracle_notes(job, judges),
            *_row_notes(samples, aligned, sets),
        ),
    )


def _oracle_notes(job: JobSpec, judges: Judges) -> list[str]:
    oracles = job.independent_oracles
    if not oracles:
        return ["no oracle says which failures are valid: name some in models.oracles of the job"]
    none = [name for name, own in judges.items() if not own]
    fewer = [name for name, own in judges.items() if own and len(own) < len(oracles)]
    notes = []
    if none:
        notes.append(f"{', '.join(none)}: is the only oracle itself, so that it has no valid failures")
    if fewer:
        notes.append(f"{', '.join(fewer)}: is an oracle itself; the others alone say which of its failures are valid")
    return notes


def _row_notes(samples: list[RowSamples], aligned: Aligned, sets: list[SetScores]) -> list[str]:
    notes = [f"{one.row.title}: {one.num_failed} samples failed and are left out" for one in samples if one.num_failed]
    if (num := len({request for request, _, _ in samples[0].noise})) > 1:
        notes.append(f"the {num} requests of the job are pooled; the table by request has them apart")
    num_common = len(aligned.samples[0])
    if num_common < min(map(len, samples)):
        notes.append(f"means are over the {num_common} noises of which all rows have a sample")
    return notes + [note for one in sets for note in one.notes]

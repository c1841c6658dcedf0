"""Retrain a target on its failures, find failures of the retrained one, and again: what is fixed, lost and left."""

from __future__ import annotations

from engine.driver.checks import find_images
from engine.errors import JobError
from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec
from engine.models.artefacts import missing_artefacts
from engine.models.job_checks import check_addresses
from engine.models.labels import target_labels
from engine.models.trainability import untrainable
from engine.studies.experiments.program import StudyContext, StudyOutcome
from engine.studies.loop.parsing import renamed
from engine.studies.retrain.arm_records import ArmChoice
from engine.studies.rounds.design import Design, make_design
from engine.studies.rounds.sources import open_sources
from engine.studies.rounds.spec import RoundsSpec

# Options that messages of retraining name, and fields.
_FIELDS = {"--learning-rate": "learning_rate", "--batch-size": "batch_size"}


def check_rounds(spec: RoundsSpec, job: JobSpec) -> str:
    """Check what files can tell, and say what will be made.

    Raises:
        JobError: all problems of the first step that has some, a line each.
    """
    design = make_design(spec, job)
    check_addresses(job)
    if missing := missing_artefacts(job):
        raise JobError(missing)
    if problem := untrainable(job.models.target):
        raise JobError(
            f"models.target: '{job.models.target}' is {problem}, which cannot be fine-tuned; name a folder or a factory"
        )
    open_sources(design)
    labels = target_labels(job)
    find_images(job, resolve_requests(job, labels), labels)
    return described(design)


def described(design: Design) -> str:
    """What a study makes, in a line."""
    spec = design.spec
    counts = {"run": design.num_runs, "training": design.num_trainings}
    made = " and ".join(f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts.items())
    arms = ", ".join(arm.label for arm in design.arms)
    attempts = _num_attempts(design)
    text = f"{spec.rounds} rounds of the arms {arms} with {spec.seeds} seeds: {made}"
    if attempts:
        text += f", {attempts} samples at most"
    return f"{text}; {spec.steps} steps a training, protection {spec.protect}"


def _num_attempts(design: Design) -> int:
    """Samples that all runs make at most."""
    if not design.sampled:
        return 0
    labels, later = target_labels(design.job), design.spec.rounds - 1 + design.spec.last_run
    runs: dict[ArmChoice | None, int] = {None: 1, **dict.fromkeys(design.sampled, later)}
    jobs = {arm: design.job_of(1, arm, design.job.models.target) for arm in runs}
    return sum(runs[arm] * request.limit for arm, job in jobs.items() for request in resolve_requests(job, labels))


def rounds(spec: RoundsSpec, job: JobSpec, context: StudyContext) -> StudyOutcome:
    """Play all rounds, and measure them.

    Raises:
        RiskforgeError: a run, a training or an image source is not as it must be.
    """
    import torch

    from engine.studies.rounds.findings import findings, notes
    from engine.studies.rounds.material import check_contexts, read_material
    from engine.studies.rounds.measures import Figures
    from engine.studies.rounds.player import Player
    from engine.studies.rounds.tables import (
        contexts_table,
        failures_table,
        forgetting_table,
        rounds_figure,
        rounds_table,
    )

    design = make_design(spec, job)
    material = read_material(design, context.display)
    check_contexts(spec.weak, "weak", {tag for tags in material.test.contexts[: material.num_plain] for tag in tags})
    try:
        with renamed(_FIELDS):
            played = Player(design, material, context).play()
    except torch.OutOfMemoryError:
        raise JobError(
            f"batch_size: batches of {spec.batch_size} do not fit the GPU's memory; give a smaller size"
        ) from None
    context.display.phase("comparing")
    figures = Figures(design=design, material=material, played=played)
    tables = [rounds_table(figures), contexts_table(figures), forgetting_table(figures)]
    if design.sampled:
        tables.append(failures_table(figures))
    return StudyOutcome(
        tables=tuple(tables),
        figures=(rounds_figure(figures),),
        findings=tuple(findings(figures)),
        notes=tuple(notes(figures)),
    )

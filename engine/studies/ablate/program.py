"""The ablation: one run of all arms with the same noise, then tables, figures and findings."""

from __future__ import annotations

from engine.driver.checks import find_images
from engine.errors import JobError
from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec
from engine.models.artefacts import missing_artefacts
from engine.models.job_checks import check_addresses
from engine.models.labels import target_labels
from engine.studies.ablate.arms import Design, design, named
from engine.studies.ablate.spec import AblateSpec
from engine.studies.experiments.program import StudyContext, StudyOutcome

RUN = "ablation"


def check_ablate(spec: AblateSpec, job: JobSpec) -> str:
    """Check what files can tell, and say what will be made.

    Raises:
        JobError: with all problems of the first step that has some.
    """
    check_addresses(job)
    if missing := missing_artefacts(job):
        raise JobError(missing)
    made = design(spec, job)
    labels = target_labels(job)
    try:
        check_addresses(made.job)
        find_images(made.job, resolve_requests(made.job, labels), labels)
    except JobError as error:
        raise named(error, made.arms, made.request) from None
    if spec.data is not None:
        from engine.data.images import open_images

        open_images(spec.data, tuple(labels), "data")
    return _will_make(spec, made)


def _will_make(spec: AblateSpec, made: Design) -> str:
    artefacts = (spec.predictor_steps or 0) + len(spec.components) + any(arm.part == "mixture" for arm in made.arms)
    also = f", and {artefacts} artefact{'s' * (artefacts > 1)}" if artefacts else ""
    num_arms = len(made.arms)
    return f"1 run of {num_arms} rows, {made.num_samples} samples each ({num_arms * made.num_samples}){also}"


def ablate(spec: AblateSpec, job: JobSpec, context: StudyContext) -> StudyOutcome:
    """Make the artefacts and the run, and compare its arms.

    Raises:
        RiskforgeError: data, models or store are not as they must be.
    """
    from engine.studies.ablate.artefacts import make_artefacts
    from engine.studies.ablate.measures import read_samples_of
    from engine.studies.ablate.outcome import outcome_of
    from engine.studies.ablate.results import Results

    planned = design(spec, job)
    artefacts = make_artefacts(spec, planned, context)
    made = design(spec, job, artefacts.addresses)
    run = context.make_run(RUN, made.job)
    samples = {
        arm.name: read_samples_of(run, arm.name, is_drawn=bool((arm.raw["conditioning"] or {}).get("artefact")))
        for arm in made.arms
    }
    results = Results(design=made, samples=samples, predictors=artefacts.predictors)
    return outcome_of(results, artefacts.notes)

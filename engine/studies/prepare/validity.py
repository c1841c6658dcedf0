"""The validity artefact: `p_valid` fitted on people's answers, in a folder that is named by its content."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.review.answers import answer_schema
from engine.data.stores.artefact_folders import publish_artefact
from engine.data.stores.base import Store
from engine.driver.progress import Display
from engine.errors import JobError
from engine.job.spec import JobSpec
from engine.methods.validity_fitting import ValidityFit, fit_validity
from engine.models.artefact_documents import document_bytes, kind_of, read_document, sealed
from engine.models.configurations import VALIDITY_DOCUMENT as DOCUMENT
from engine.models.job_checks import check_oracles
from engine.models.labels import target_labels
from engine.studies.prepare.answer_tables import has_columns, read_answer_table
from engine.studies.prepare.answered import AnsweredImages
from engine.studies.prepare.answered_runs import answers_of_run
from engine.studies.prepare.folders import artefact_address, open_home


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedValidity:
    """A stored artefact.

    Attributes:
        fit: usable or not.
        answered: what it is fitted on.
        path: its folder; of an artefact at an address a copy, which this process removes in the end.
        address: where it is.
        was_there: whether an equal artefact was there already.
        seconds: time from the start.
    """

    fit: ValidityFit
    answered: AnsweredImages
    path: Path
    address: str
    was_there: bool
    seconds: float


def prepare_validity(
    job: JobSpec, answers: str, data: str | None, *, display: Display, folder: str | None = None
) -> PreparedValidity:
    """Fit `p_valid` of a job's oracles on people's answers, and store it.

    Args:
        answers: a run with answers under `_review/`; a parquet file of such records, about the run of this job; or a
            table about the images of `data` (`engine.studies.prepare.answer_tables`).
        data: a path or a named set, as in `engine.data.images.open_images`; with a table alone.
        folder: where the artefact goes; `artefact_folder(job, "validity")` where not given.

    Raises:
        RiskforgeError: models, answers, data or folder are invalid, or no answer can be used.
    """
    started = time.monotonic()
    try:
        display.phase("checking models and answers")
        check_oracles(job)
        home = open_home(job, folder, kind_of(DOCUMENT))
        labels = tuple(target_labels(job))
        answered = _answered(job, answers, data, labels, display)
        display.phase("fitting")
        fit = fit_validity(answered.answers)
        path, was_there = save_validity(fit, answered, labels, home)
    finally:
        display.close()
    return PreparedValidity(
        fit=fit,
        answered=answered,
        path=path,
        address=artefact_address(home, path),
        was_there=was_there,
        seconds=time.monotonic() - started,
    )


def _answered(
    job: JobSpec, answers: str, data: str | None, labels: tuple[str, ...], display: Display
) -> AnsweredImages:
    path = Path(answers).expanduser()
    are_records = has_columns(path, answer_schema().names)
    if "://" in answers or path.is_dir() or are_records:
        if data is not None:
            raise JobError(f"--data: is for tables, and '{answers}' is about the samples of a run; omit it")
        run = job.output.uri if are_records else answers
        return answers_of_run(job, run, labels, path if are_records else None)
    table = read_answer_table(path, labels)
    if data is None:
        raise JobError(f"--data: has to name the images that the keys of '{answers}' are of; give it, or a run")
    from engine.studies.prepare.answered_images import answers_of_images

    return answers_of_images(job, data, table, path, labels, display)


def save_validity(
    fit: ValidityFit, answered: AnsweredImages, labels: tuple[str, ...], folder: Path | Store
) -> tuple[Path, bool]:
    """Store an artefact as `folder/validity-DIGEST12`.

    Returns:
        Its folder, and whether an equal artefact was there already.

    Raises:
        OutputError: it cannot be written, or a folder of that name is damaged.
    """
    fields = sealed(
        {
            "classes": list(labels),
            "models": {
                "oracles": [oracle._asdict() for oracle in answered.oracles],
                "target": answered.target._asdict(),
            },
            "model": None if fit.model is None else _model_fields(fit),
            "verdict": fit.verdict,
            "num_images": fit.num_images,
            "num_answers": fit.num_answers,
            "num_raters": answered.num_raters,
            "is_balanced": fit.is_balanced,
            "evaluation": {
                "nll": fit.nll,
                "constant_nll": fit.constant_nll,
                "groups": [dataclasses.asdict(group) for group in fit.quality],
            },
            "answers_digest": answered.digest,
            "unused": [dataclasses.asdict(item) for item in answered.unused],
        }
    )
    files = {DOCUMENT: document_bytes(fields)}
    return publish_artefact(folder, kind_of(DOCUMENT), fields["digest"], files, _digest_in)


def _model_fields(fit: ValidityFit) -> dict[str, Any]:
    assert fit.model is not None
    return {"intercept": fit.model.intercept, "weights": list(fit.model.weights)}


def _digest_in(folder: Path) -> str:
    return str(read_document(folder, DOCUMENT)["digest"])

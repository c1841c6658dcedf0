"""Checks of all models of a job by their files: the right kinds, which fit each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.errors import JobError
from engine.job.spec import JobSpec
from engine.models.addresses import locate
from engine.models.artefacts import artefact_problems
from engine.models.classifier_checks import check_classifier
from engine.models.clip_checks import check_clip
from engine.models.custom_methods import method_problems
from engine.models.independence import check_independent
from engine.models.labels import read_labels
from engine.models.pipelines import (
    check_decoder,
    check_decoder_weights,
    check_pipeline,
    check_pipeline_weights,
    decoder_problem,
    has_configurations,
    request_problems,
)
from engine.models.program_description import check_program
from engine.models.programs import is_program


def _independence_problems(job: JobSpec) -> list[str]:
    try:
        check_independent(job.models)
    except JobError as error:
        return list(error.problems)
    return []


def check_addresses(job: JobSpec, *, with_artefacts: bool = True) -> None:
    """Check that every model of a job can be found and is of the right kind, without loading one.

    Args:
        with_artefacts: look at its conditioning artefacts and at methods of the user's own too; whoever makes
            artefacts does not.

    Raises:
        JobError: all problems, a line each, by field.
    """
    problems: list[str] = []
    if job.models.judge == job.models.clip:
        problems.append(f"models.judge: '{job.models.judge}' is models.clip too; name another CLIP model, or none")
    for field, address, check in _roles(job):
        try:
            if check is _check_classifier and is_program(address):
                check_program(address)
                continue
            source = locate(address)
            if source.folder is not None:
                check(source.folder, address)
        except JobError as error:
            problems += [f"{field}: {problem}" for problem in error.problems]
    if not problems:
        problems += _label_problems(job) or [
            *_independence_problems(job),
            *_request_problems(job),
            *_decoder_problems(job),
        ]
    problems = problems or _weights_problems(job)
    if not problems and with_artefacts:
        problems += method_problems(job)
        labels = read_labels(job.models.target)
        for number, request in enumerate(job.requests):
            problems += artefact_problems(number, request, labels)
    if problems:
        raise JobError(problems)


def _check_classifier(folder: Path, address: str) -> None:
    check_classifier(folder, address, is_whole=not locate(address).is_hub)


def _check_clip(folder: Path, address: str) -> None:
    check_clip(folder, address, is_whole=not locate(address).is_hub)


def _check_diffusion(folder: Path, address: str, *, checks_safety: bool) -> None:
    # Of the hub it may be here in part: `resolve` checks what it downloads.
    if has_configurations(folder) or not locate(address).is_hub:
        check_pipeline(folder, address, checks_safety=checks_safety)


def _weights_problems(job: JobSpec) -> list[str]:
    """Pipelines and decoders without weights that can be loaded; of the hub they are not here yet."""
    checks_safety = job.models.safety_checker != "off"
    check_weights = partial(check_pipeline_weights, checks_safety=checks_safety)
    roles: list[tuple[str, str | None, Callable[[Path, str], None]]] = [
        ("models.diffusion", job.models.diffusion, check_weights),
        ("models.guidance_decoder", job.models.guidance_decoder, check_decoder_weights),
        *((f"requests.{place}.diffusion", one.diffusion, check_weights) for place, one in enumerate(job.requests)),
    ]
    problems = []
    for field, address, check in roles:
        source = locate(address) if address else None
        try:
            if source is not None and source.folder is not None and not source.is_hub:
                check(source.folder, source.address)
        except JobError as error:
            problems += [f"{field}: {problem}" for problem in error.problems]
    return problems


def _roles(job: JobSpec) -> list[tuple[str, str, Callable[[Path, str], None]]]:
    models = job.models
    check_diffusion = partial(_check_diffusion, checks_safety=models.safety_checker != "off")
    roles: list[tuple[str, str, Callable[[Path, str], None]]] = [
        ("models.diffusion", models.diffusion, check_diffusion),
        ("models.clip", models.clip, _check_clip),
        ("models.target", models.target, _check_classifier),
    ]
    roles += [(f"models.transfer.{place}", one, _check_classifier) for place, one in enumerate(models.transfer)]
    if models.oracle:
        roles.append(("models.oracle", models.oracle, _check_classifier))
    if models.judge:
        roles.append(("models.judge", models.judge, _check_clip))
    if models.guidance_decoder:
        roles.append(("models.guidance_decoder", models.guidance_decoder, check_decoder))
    for number, request in enumerate(job.requests):
        if request.diffusion:
            roles.append((f"requests.{number}.diffusion", request.diffusion, check_diffusion))
    return roles


def _pipeline_folder(address: str) -> Path | None:
    """The folder of a pipeline, if all of its configurations are here."""
    source = locate(address)
    if source.folder is None or (source.is_hub and not has_configurations(source.folder)):
        return None
    return source.folder


def _request_problems(job: JobSpec) -> list[str]:
    """Requests that do not go with their diffusion model."""
    problems = []
    for number, request in enumerate(job.requests):
        address = request.diffusion or job.models.diffusion
        if folder := _pipeline_folder(address):
            found = request_problems(job, request, folder, address)
            problems += [f"requests.{number}.{problem}" for problem in found]
    return problems


def _decoder_problems(job: JobSpec) -> list[str]:
    """Guided pipelines whose latents or images the guidance decoder does not have."""
    address = job.models.guidance_decoder
    decoder = locate(address).folder if address else None
    if decoder is None:
        return []
    guided = {one.diffusion or job.models.diffusion for one in job.requests if one.method != "prompt"}
    problems = []
    for pipeline in sorted(guided):
        folder = _pipeline_folder(pipeline)
        if folder and (problem := decoder_problem(address or "", decoder, folder, pipeline)):
            problems.append(f"models.guidance_decoder: {problem}")
    return problems


def _label_problems(job: JobSpec) -> list[str]:
    """Classifiers that are compared must have the same classes in the same order."""
    problems: list[str] = []
    others = [(f"models.transfer.{place}", one) for place, one in enumerate(job.models.transfer)]
    others += [("models.oracle", job.models.oracle)] if job.models.oracle else []
    try:
        wanted = read_labels(job.models.target)
    except JobError as error:
        return [f"models.target: {error}"]
    for field, address in others:
        try:
            labels = read_labels(address)
        except JobError as error:
            problems.append(f"{field}: {error}")
            continue
        if wanted and labels and labels != wanted:
            problems.append(f"{field}: '{address}' has other classes than the target; names and order must be the same")
    return problems

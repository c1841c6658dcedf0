"""Checks of all models of a job by their files: the right kinds, which fit each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from engine.errors import JobError
from engine.job.oracles import oracle_fields
from engine.job.spec import JobSpec, ModelsSpec
from engine.models.adapters import adapter_problems
from engine.models.addresses import locate
from engine.models.artefacts import artefact_problems
from engine.models.calibration import calibration_problems
from engine.models.classifier_checks import check_classifier
from engine.models.clip_checks import check_clip
from engine.models.custom_methods import method_problems
from engine.models.decoder_checks import check_decoder, check_decoder_weights, decoder_problem, float16_problem
from engine.models.independence import check_independent
from engine.models.job_label_maps import label_problems
from engine.models.labels import read_labels
from engine.models.oracle_checks import check_oracle
from engine.models.pipelines.lookup import check_pipeline, check_pipeline_weights, request_problems
from engine.models.pipelines.parts import has_configurations
from engine.models.program_description import check_program
from engine.models.programs import is_program
from engine.models.single_files import single_file_problem
from engine.models.vae_checks import check_vae, check_vae_weights, vae_problem
from engine.models.validity import validity_problems

# Field of the job, address of the model, and the check of its folder: `check(folder, address)`.
_Role = tuple[str, str, Callable[[Path, str], None]]


def check_addresses(job: JobSpec, *, with_artefacts: bool = True, with_weights: bool = True) -> None:
    """Check that every model of a job exists and is of the right kind, without loading it.

    Args:
        with_artefacts: whether to check artefacts and custom methods too; not when artefacts are made.
        with_weights: whether pipelines in folders must have weights; not where only their configurations are read.

    Raises:
        JobError: all problems of the first step that has some, one line each, by field.
    """
    # Each step presupposes those before it.
    steps: list[Callable[[JobSpec], list[str]]] = [_role_problems, _label_problems, _pair_problems]
    if with_weights:
        steps.append(_weights_problems)
    if with_artefacts:
        steps.append(_preparation_problems)
    for step in steps:
        if problems := step(job):
            raise JobError(problems)


def check_target(job: JobSpec) -> None:
    """As `check_addresses`, of the target alone.

    Raises:
        JobError: all of its problems.
    """
    if problems := _problems("models.target", job.models.target, _check_classifier):
        raise JobError(problems)


def classifier_problems(addresses: Mapping[str, str]) -> list[str]:
    """Classifiers that do not exist or cannot be scored with, a line each.

    Args:
        addresses: by the field that names each.
    """
    return [problem for field, address in addresses.items() for problem in _problems(field, address, _check_classifier)]


def check_oracles(job: JobSpec) -> None:
    """As `check_addresses`, of the target and the oracles alone, of which there must be one.

    Raises:
        JobError: all problems of the first step that has some.
    """
    roles: list[_Role] = [("models.target", job.models.target, _check_classifier)]
    roles += [(field, address, check_oracle) for field, address in oracle_fields(job.models)]
    problems = [problem for role in roles for problem in _problems(*role)]
    if len(roles) == 1:
        problems.append("models.oracle: there is none; name the oracles whose probabilities are to be weighed")
    if problems := problems or _label_problems(job):
        raise JobError(problems)


def _role_problems(job: JobSpec) -> list[str]:
    """Models that do not exist or are of the wrong kind."""
    problems: list[str] = []
    if job.models.judge == job.models.clip:
        problems.append(f"models.judge: '{job.models.judge}' is models.clip too; name another CLIP model, or none")
    return problems + [problem for field, address, check in _roles(job) for problem in _problems(field, address, check)]


def _problems(field: str, address: str, check: Callable[[Path, str], None]) -> list[str]:
    try:
        if check in (_check_classifier, check_oracle) and is_program(address):
            check_program(address)
        elif (folder := locate(address).folder) is not None:
            check(folder, address)
    except JobError as error:
        if field.endswith("diffusion") and (problem := single_file_problem(address)):
            return [f"{field}: {problem}"]
        return [f"{field}: {problem}" for problem in error.problems]
    return []


def _roles(job: JobSpec) -> Iterator[_Role]:
    models = job.models
    check_diffusion = partial(_check_diffusion, checks_safety=models.safety_checker != "off")
    yield "models.diffusion", models.diffusion, check_diffusion
    yield "models.clip", models.clip, _check_clip
    yield "models.target", models.target, _check_classifier
    for field, address in _compared_classifiers(models):
        yield field, address, _check_classifier
    for field, address in oracle_fields(models):
        yield field, address, check_oracle
    if models.judge:
        yield "models.judge", models.judge, _check_clip
    if models.guidance_decoder:
        yield "models.guidance_decoder", models.guidance_decoder, check_decoder
    if models.vae:
        yield "models.vae", models.vae, check_vae
    for number, request in enumerate(job.requests):
        if request.diffusion:
            yield f"{job.where(number)}.diffusion", request.diffusion, check_diffusion


def _compared_classifiers(models: ModelsSpec) -> Iterator[tuple[str, str]]:
    """Field and address of further targets, whose fields are those of a list, and of transfer classifiers."""
    for number, address in enumerate(models.further_targets, 1):
        yield f"models.target.{number}", address
    for number, address in enumerate(models.transfer):
        yield f"models.transfer.{number}", address


def _check_classifier(folder: Path, address: str) -> None:
    check_classifier(folder, address, is_complete=not locate(address).is_hub)


def _check_clip(folder: Path, address: str) -> None:
    check_clip(folder, address, is_complete=not locate(address).is_hub)


def _check_diffusion(folder: Path, address: str, *, checks_safety: bool) -> None:
    # A hub id may be cached in part: `resolve` checks what it downloads.
    if has_configurations(folder) or not locate(address).is_hub:
        check_pipeline(folder, address, checks_safety=checks_safety)


def _label_problems(job: JobSpec) -> list[str]:
    """Models whose classes cannot be read as the target's."""
    try:
        wanted = read_labels(job.models.target)
    except JobError as error:
        return [f"models.target: {error}"]
    return label_problems(job.models, wanted)


def _pair_problems(job: JobSpec) -> list[str]:
    """Models that are not independent, and requests or decoders that do not fit their pipelines."""
    return [
        *_independence_problems(job),
        *_request_problems(job),
        *_decoder_problems(job),
        *_replacement_problems(job),
        *_decoder_precision_problems(job),
    ]


def _independence_problems(job: JobSpec) -> list[str]:
    try:
        check_independent(job.models, oracle_guides=job.oracle_guides)
    except JobError as error:
        return list(error.problems)
    return []


def _request_problems(job: JobSpec) -> list[str]:
    """Requests that their diffusion model cannot serve."""
    problems = []
    for number, request in enumerate(job.requests):
        address = request.diffusion or job.models.diffusion
        if folder := _pipeline_folder(address):
            problems += [
                f"{job.where(number)}.{problem}" for problem in request_problems(job, request, folder, address)
            ]
    return problems


def _decoder_problems(job: JobSpec) -> list[str]:
    """Guided pipelines whose latents or images do not fit the guidance decoder."""
    address = job.models.guidance_decoder
    decoder = locate(address).folder if address else None
    if decoder is None:
        return []
    problems = []
    for pipeline in _guided_pipelines(job):
        folder = _pipeline_folder(pipeline)
        if folder and (problem := decoder_problem(address or "", decoder, folder, pipeline)):
            problems.append(f"models.guidance_decoder: {problem}")
    return problems


def _replacement_problems(job: JobSpec) -> list[str]:
    """Adapters and a VAE that do not go with every diffusion model."""
    models, problems = job.models, list[str]()
    vae = locate(models.vae).folder if models.vae else None
    for pipeline in sorted({request.diffusion or models.diffusion for request in job.requests}):
        if folder := _pipeline_folder(pipeline):
            problems += [f"models.{problem}" for problem in adapter_problems(models.adapters, folder, pipeline)]
            if vae and (problem := vae_problem(models.vae or "", vae, folder, pipeline)):
                problems.append(f"models.vae: {problem}")
    return list(dict.fromkeys(problems))


def _decoder_precision_problems(job: JobSpec) -> list[str]:
    """Decoders that guidance would differentiate in float16, where their values overflow."""
    if job.runtime.decoder_precision != "fp16":
        return []
    if (address := job.models.guidance_decoder) or (address := job.models.vae):
        decoders = {address: locate(address).folder}
    else:
        folders = {pipeline: _pipeline_folder(pipeline) for pipeline in _guided_pipelines(job)}
        decoders = {pipeline: folder and folder / "vae" for pipeline, folder in folders.items()}
    return [
        f"runtime.decoder_precision: the decoder of '{address}' {problem}"
        for address, folder in decoders.items()
        if folder and (problem := float16_problem(folder))
    ]


def _guided_pipelines(job: JobSpec) -> list[str]:
    requests = [request for request in job.requests if request.method_record.is_guided]
    return sorted({request.diffusion or job.models.diffusion for request in requests})


def _pipeline_folder(address: str) -> Path | None:
    """The folder of a pipeline, if all of its configurations are on this machine."""
    location = locate(address)
    if location.folder is None or (location.is_hub and not has_configurations(location.folder)):
        return None
    return location.folder


def _weights_problems(job: JobSpec) -> list[str]:
    """Pipelines and decoders without weights that can be loaded; those of the hub are not downloaded yet."""
    check = partial(check_pipeline_weights, checks_safety=job.models.safety_checker != "off")
    roles: list[_Role] = [("models.diffusion", job.models.diffusion, check)]
    if job.models.guidance_decoder:
        roles.append(("models.guidance_decoder", job.models.guidance_decoder, check_decoder_weights))
    if job.models.vae:
        roles.append(("models.vae", job.models.vae, check_vae_weights))
    roles += [
        (f"{job.where(number)}.diffusion", request.diffusion, check)
        for number, request in enumerate(job.requests)
        if request.diffusion
    ]
    local = [role for role in roles if not locate(role[1]).is_hub]
    return [problem for role in local for problem in _problems(*role)]


def _preparation_problems(job: JobSpec) -> list[str]:
    """Custom methods and artefacts that cannot be used."""
    problems = [*method_problems(job), *calibration_problems(job), *validity_problems(job)]
    labels = read_labels(job.models.target)
    for number, request in enumerate(job.requests):
        problems += artefact_problems(job.where(number), request, labels)
    return problems

"""The family of a pipeline's folder, and its checks before anything is loaded; without torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from engine.errors import JobError
from engine.job.spec import JobSpec, RequestSpec
from engine.models.configurations import PIPELINE_INDEX, need_file, read_config, reading_configuration
from engine.models.pipelines.base import Pipeline
from engine.models.pipelines.parts import SAFETY_CHECKER
from engine.models.pipelines.registry import FAMILIES, class_problem, what_runs
from engine.models.weight_files import conversion_line, weighted_parts, weights_problem


def family_of(folder: Path, address: str) -> type[Pipeline]:
    """The family of a pipeline's folder, by the class that its index names.

    Raises:
        JobError: it is no pipeline, or one of a class that does not run.
    """
    need_file(folder, PIPELINE_INDEX, address, "a diffusers pipeline folder")
    class_name = read_config(folder / PIPELINE_INDEX).get("_class_name", "pipeline without a class")
    if problem := class_problem(class_name):
        raise JobError(f"'{address}' {problem}; {what_runs()}")
    module, name = FAMILIES[class_name].split(":")
    family: type[Pipeline] = getattr(importlib.import_module(module), name)
    return family


def takes_image_embeddings(folder: Path | None) -> bool:
    """Whether a folder holds a pipeline that is conditioned on image embeddings."""
    if folder is None or not (folder / PIPELINE_INDEX).is_file():
        return False
    is_known = not class_problem(read_config(folder / PIPELINE_INDEX).get("_class_name"))
    return is_known and bool(family_of(folder, str(folder)).embedding_parts)


def check_pipeline(folder: Path, address: str, *, checks_safety: bool = True) -> None:
    """Check by its configurations that a pipeline is one of those that are sampled here as diffusers samples them.

    Args:
        checks_safety: whether its safety checker is to be loaded, where it has one.

    Raises:
        JobError: saying what it is instead, and what runs.
    """
    family_of(folder, address).check(folder, address, checks_safety=checks_safety)


def check_pipeline_weights(folder: Path, address: str, *, checks_safety: bool = True) -> None:
    """Check by their names that a pipeline's weights are there, as safetensors.

    Raises:
        JobError: naming the parts, with the command that converts them.
    """
    parts = [part for part in weighted_parts(folder) if checks_safety or part != SAFETY_CHECKER]
    conversion = conversion_line("diffusers.DiffusionPipeline", address, folder)
    problems = [weights_problem(folder / part, address, conversion) for part in parts]
    if lines := list(dict.fromkeys(filter(None, problems))):
        raise JobError(lines)


def request_image_size(job: JobSpec, request: RequestSpec, folder: Path, address: str) -> tuple[int, int]:
    """Height and width of the images of a request in pixels; the arguments are those of `request_problems`."""
    return job.sampling_of(request).image_size(family_of(folder, address).image_size(folder))


def request_problems(job: JobSpec, request: RequestSpec, folder: Path, address: str) -> list[str]:
    """What of a request does not go with its pipeline; lines that go on after `requests.NUMBER.`.

    Args:
        folder: where the pipeline at `address` is; `check_pipeline` lets it through.
    """
    family, sampling = family_of(folder, address), job.sampling_of(request)
    try:
        with reading_configuration(address):
            problems = family.sampling_problems(folder, sampling, is_guided=request.method_record.is_guided)
            problems += family.size_problems(folder, sampling)
    except JobError as error:
        return [f"diffusion: {error}"]
    conditioning = family.conditioning_problems(folder, address, request.conditioning)
    return [
        *(f"sampling{problem}" for problem in problems),
        *(f"conditioning{problem}" for problem in conditioning),
        *_guidance_problems(job, request, family),
    ]


def _guidance_problems(job: JobSpec, request: RequestSpec, family: type[Pipeline]) -> Iterator[str]:
    """Guidance that nothing is left of where there is no signal."""
    num_steps, parameters = job.sampling_of(request).num_inference_steps, job.parameters_of(request)
    guided = [index for index in request.steps_taken(num_steps) if parameters.is_guided(index, num_steps)]
    if request.method_record.is_guided and family.begins_without_signal and guided == [1]:
        remedy = f"{parameters.schedule_remedy} or add steps" if num_steps > 1 else "add steps"
        yield (
            f"guidance.{request.method_record.name}: moves the first of {num_steps} steps alone, at which the latents"
            f" of a {family.class_name} hold nothing to move; {remedy}"
        )

"""Checks of a job before any worker starts: addresses, labels, conditioning, hardware; and its plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.run.file_names import SUCCESS
from engine.data.run.output_folder import check_output
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.progress import Display
from engine.errors import JobError
from engine.job.plan import TEMPERATURE, Plan, RequestPlan, build_plan, resolve_requests
from engine.job.spec import JobSpec
from engine.models.artefacts import missing_artefacts
from engine.models.calibration import Calibration, describe_temperature, job_calibration
from engine.models.custom_methods import method_digests
from engine.models.digests import model_digests
from engine.models.hardware import hardware_problems
from engine.models.job_checks import check_addresses
from engine.models.job_label_maps import label_map_identity
from engine.models.labels import describe_head, target_labels
from engine.models.licences import licence_of
from engine.models.training_lineage import training_of
from engine.models.validity import Validity, job_validity

# Device files of NVIDIA and AMD GPUs, and of GPUs under WSL: visible without loading torch.
GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedJob:
    """A job whose models and output were checked.

    Attributes:
        job: the job, with the absolute address of its output.
        plan: its plan as a single stage.
        models: the description of its models for the manifest, by role.
    """

    store: Store
    job: JobSpec
    plan: Plan
    models: dict[str, Any]


def check_job(job: JobSpec, display: Display, prepare_workers: Callable[[], None]) -> CheckedJob:
    """Check a job against its models and its output, and plan it.

    Args:
        prepare_workers: called once the job's classes are known, if the run is not complete; downloads and digests
            of models then go on while it works in the background.

    Raises:
        JobError: a model, a class, an artefact or the output is not as it must be.
    """
    check_addresses(job)
    store = open_store(job.output.uri)
    check_output(store)
    job = job.model_copy(update={"output": job.output.model_copy(update={"uri": store.uri})})
    labels = target_labels(job)
    requests = resolve_requests(job, labels)
    digests: dict[str, Any] = dict(_image_digests(job, requests, labels, display))
    if not store.exists(SUCCESS):
        prepare_workers()
    digests |= model_digests(job) | method_digests(job)
    # Again, because models of the hub are on this machine only now.
    check_addresses(job)
    calibration = job_calibration(job)
    validity = job_validity(job)
    digests |= _temperature_identity(calibration) | _validity_identity(validity)
    digests |= label_map_identity(job.models, labels)
    models = describe_models(job, digests, labels, calibration, validity)
    return CheckedJob(store=store, job=job, plan=build_plan(job, labels, digests), models=models)


def _temperature_identity(calibration: Calibration | None) -> dict[str, float]:
    """The part of a plan's identity that a calibration decides; none where the target has its own temperature."""
    return {} if calibration is None else {TEMPERATURE: calibration.temperature}


def _validity_identity(validity: Validity | None) -> dict[str, Any]:
    """The part of a plan's identity that an estimate of validity decides; none without one."""
    return {} if validity is None else validity.identity


def _image_digests(
    job: JobSpec, requests: tuple[RequestPlan, ...], labels: list[str], display: Display
) -> dict[str, dict[str, str]]:
    """Digests by address of what samples are conditioned on and start from; torch is loaded only where there is some.

    Raises:
        JobError: an artefact is missing, a line each; or what is there cannot be used.
    """
    if missing := missing_artefacts(job):
        raise JobError(missing)
    digests: dict[str, dict[str, str]] = {"conditioning": {}, "starts": {}, "given": {}}
    if not any(one.conditioning or one.used_start or job.criterion_images(one) for one in job.requests):
        return digests
    from engine.generation.criterion_images import given_digests
    from engine.generation.given_images import CheckedImages
    from engine.generation.starts import start_digests

    images = CheckedImages(labels, display.advance, display.notice)
    if any(request.conditioning for request in job.requests):
        from engine.generation.conditioner import conditioning_digests

        digests["conditioning"] = conditioning_digests(job, requests, images, display.notice)
    return digests | {"starts": start_digests(requests, images), "given": given_digests(job, requests, images)}


def find_images(job: JobSpec, requests: Sequence[RequestPlan], labels: list[str]) -> None:
    """Look for the images that requests start from, and that their criteria see, without reading them.

    Raises:
        JobError: there are none of a kind that can be read, a line each.
    """
    problems: list[str] = []
    for request in requests:
        start, seen = request.spec.used_start, job.criterion_images(request.spec)
        named = [(start.images, "start.images")] if start else []
        for address, field in named + ([(seen, "guidance.custom.images")] if seen else []):
            from engine.data.images import open_images

            try:
                open_images(address, tuple(labels), f"{request.where}.{field}")
            except JobError as error:
                problems += error.problems
    if problems:
        raise JobError(problems)


def plan_job(job: JobSpec, display: Display | None = None) -> Plan:
    """The shards of a job: models must exist, but are not read.

    Args:
        display: given if samples are to be made from the plan: then artefacts and given images are read. It is closed
            at the end.

    Raises:
        JobError: models or classes do not exist.
    """
    check_addresses(job)
    addresses = {job.models.diffusion, *(request.diffusion for request in job.requests if request.diffusion)}
    labels = target_labels(job)
    images = {
        "conditioning": {spec.artefact or spec.images or "": "" for one in job.requests if (spec := one.conditioning)},
        "starts": {start.images: "" for one in job.requests if (start := one.used_start)},
        "given": {address: "" for one in job.requests if (address := job.criterion_images(one))},
    }
    if display is not None:
        with contextlib.closing(display):
            images = _image_digests(job, resolve_requests(job, labels), labels, display)
    unknown = images | {
        "diffusion": dict.fromkeys(addresses, ""),
        "clip": "",
        "target": "",
        "transfer": [],
        "oracle": "",
        **_temperature_identity(job_calibration(job, with_digest=False)),
        **_validity_identity(job_validity(job, with_digests=False)),
    }
    return build_plan(job, labels, unknown)


def check_hardware(job: JobSpec, *, is_local: bool) -> None:
    """Refuse settings of `runtime` that the hardware cannot satisfy.

    Args:
        is_local: whether the workers run on this machine; of other machines nothing is known.

    Raises:
        JobError: all problems, a line each.
    """
    has_gpu = not is_local or any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES)
    if problems := hardware_problems(job.runtime, has_gpu):
        raise JobError(problems)


def describe_models(
    job: JobSpec,
    digests: dict[str, Any],
    labels: list[str],
    calibration: Calibration | None = None,
    validity: Validity | None = None,
) -> dict[str, Any]:
    """Address, digest and licence of every model by role; of the target also what its scores depend on.

    Args:
        labels: the target's, which class indices name.
        calibration: that the job names; without one the target's own temperature is described.
        validity: that the job names.
    """
    models = job.models
    described: dict[str, Any] = {
        "diffusion": [_describe_pipeline(address, digest) for address, digest in digests["diffusion"].items()],
        "clip": _describe(models.clip, digests["clip"]),
        "target": _describe(models.target, digests["target"])
        | describe_temperature(models.target, calibration)
        | describe_head(models.target)
        | {"labels": labels},
    }
    if models.further_targets:
        pairs = zip(models.further_targets, digests["further_targets"], strict=True)
        described["further_targets"] = [
            _describe(address, digest) | describe_temperature(address, None) | describe_head(address)
            for address, digest in pairs
        ]
    if models.transfer:
        pairs = zip(models.transfer, digests["transfer"], strict=True)
        described["transfer"] = [_describe(address, digest) for address, digest in pairs]
    if models.oracles:
        pairs = zip(models.oracles, digests["oracles"], strict=True)
        described["oracles"] = [_describe(address, digest) for address, digest in pairs]
    for role in ("oracle", "judge", "guidance_decoder", "vae"):
        if address := getattr(models, role):
            described[role] = _describe(address, digests[role])
    if models.adapters:
        described["adapters"] = [
            _describe(adapter.address, "") | identity
            for adapter, identity in zip(models.adapters, digests["adapters"], strict=True)
        ]
    if job.oracle_guides:
        (described["oracles"][-1] if models.oracles else described["oracle"])["guides"] = True
    if validity is not None:
        described["validity"] = validity.described
    for role in ("conditioning", "starts", "given", "methods"):
        if used := digests.get(role):
            described[role] = [{"address": address, "digest": digest} for address, digest in used.items()]
    return described


def _describe_pipeline(address: str, digest: str) -> dict[str, Any]:
    """As `_describe`, with what it was fine-tuned on where its folder says so."""
    trained_on = training_of(address)
    return _describe(address, digest) | ({"trained_on": trained_on} if trained_on else {})


def _describe(address: str, digest: str) -> dict[str, Any]:
    return {"address": address, "digest": digest, "license": licence_of(address)}

"""The calibration temperature of a job's target: of an artefact that the job names, or the target's own.

Logits are divided by it, for guidance and for scores (`engine.methods.temperature` fits it). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import JobError
from engine.job.plan import TEMPERATURE, usable_temperature
from engine.job.spec import JobSpec
from engine.methods.config_values import is_integer, is_number
from engine.models.addresses import locate
from engine.models.artefact_documents import malformed, read_document
from engine.models.artefacts import WITH_CALIBRATION, find_artefact
from engine.models.classifier_checks import read_temperature
from engine.models.configurations import read_config
from engine.models.digests import model_digest
from engine.models.labels import HEAD, read_labels
from engine.models.program_description import program_temperature
from engine.models.programs import is_program
from engine.models.training_lineage import training_text

FIELD = "models.calibration"
# In the description of a target, beside its temperature: the artefact that this is of.
CALIBRATION = "calibration"
# In the description of a model, what is a sentence of its own.
NOTED = ("trained_on", TEMPERATURE, CALIBRATION, HEAD)
UNCALIBRATED = "1, not calibrated (riskforge prepare fits one)"
_BOUNDS = {
    "lower": "the target is right on every image that it was fitted on; add images on which it errs",
    "upper": "the target is no better than chance on the images that it was fitted on",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A target's temperature as an artefact has it.

    Attributes:
        address: of the artefact, as it was given.
        temperature: the fitted T.
        bound: `lower` or `upper` where the fit has no minimum, and so no temperature to use; else empty.
        num_images: images that it is fitted on.
        target: address of the target that it is of.
        target_digest: that target's digest at the time.
        labels: that target's class names.
    """

    address: str
    temperature: float
    bound: str
    num_images: int
    target: str
    target_digest: str
    labels: tuple[str, ...]

    @property
    def described(self) -> dict[str, Any]:
        """For the description of the target in a manifest."""
        return {
            TEMPERATURE: self.temperature,
            CALIBRATION: {"address": self.address, "num_images": self.num_images},
        }


def read_calibration(address: str) -> Calibration | None:
    """The calibration in an artefact, or None where there is no artefact yet.

    Raises:
        JobError: no such address, or the artefact is damaged or of another version.
    """
    folder = find_artefact(address, WITH_CALIBRATION)
    if folder is None:
        return None
    name = next(name for name in WITH_CALIBRATION if (folder / name).is_file())
    fields = read_document(folder, name)
    try:
        return _calibration_of(fields, address)
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(folder, error) from None


def job_calibration(job: JobSpec, *, with_digest: bool = True) -> Calibration | None:
    """The calibration that a job names, checked; None where it names none, or one that is not made yet.

    Args:
        with_digest: whether to check that it is of the target as it is now, which reads the target's files.

    Raises:
        JobError: it cannot be read, or is not one of the job's target.
    """
    address = job.models.calibration
    return checked_calibration(address, job.models.target, FIELD, with_digest=with_digest) if address else None


def checked_calibration(address: str, target: str, where: str, *, with_digest: bool = True) -> Calibration | None:
    """A calibration that can be used for a target; None where there is no artefact yet.

    Args:
        where: field or option that names it, for messages.

    Raises:
        JobError: it cannot be read, is of another target or other classes, or has no minimum.
    """
    try:
        calibration = read_calibration(address)
    except JobError as error:
        raise JobError([f"{where}: {problem}" for problem in error.problems]) from None
    if calibration is not None and (problem := _problem(calibration, target, with_digest=with_digest)):
        raise JobError(f"{where}: '{address}' {problem}")
    return calibration


def _problem(calibration: Calibration, target: str, *, with_digest: bool) -> str:
    """Why a calibration cannot be used for a target; empty where it can."""
    remedy = "`riskforge prepare JOB --data PATH --only calibration` makes another"
    labels = read_labels(target)
    if labels is not None and tuple(labels) != calibration.labels:
        return f"was fitted with other classes than those of '{target}'; {remedy}"
    if with_digest and (digest := model_digest(target)) != calibration.target_digest:
        return (
            f"is the calibration of another target, '{calibration.target}' with digest {calibration.target_digest}; the"
            f" digest of '{target}' is {digest}; {remedy}"
        )
    if calibration.bound:
        return (
            f"has no temperature: its fit ends at the {calibration.bound} bound, because {_BOUNDS[calibration.bound]}"
        )
    return ""


def calibration_problems(job: JobSpec) -> list[str]:
    """What files tell of the calibration that a job names, before anything is downloaded, a line each."""
    # A target of the hub may be on this machine in part, and its digest would download the rest.
    target = job.models.target
    with_digest = is_program(target) or not locate(target).is_hub
    try:
        job_calibration(job, with_digest=with_digest)
    except JobError as error:
        return list(error.problems)
    return []


def own_temperature(target: str) -> float | None:
    """The temperature of a target's own configuration, 1 without one; None for a hub id that is not on this machine.

    Raises:
        JobError: it cannot be read.
    """
    if is_program(target):
        return program_temperature(target)
    folder = locate(target).folder
    if folder is None or not (folder / "config.json").is_file():
        return None
    return read_temperature(read_config(folder / "config.json"), target)


def describe_temperature(target: str, calibration: Calibration | None) -> dict[str, Any]:
    """The temperature of a target, and what it is from: the part of the target's description in a manifest."""
    if calibration is not None:
        return calibration.described
    temperature = own_temperature(target)
    return {} if temperature is None else {TEMPERATURE: temperature}


def noted_temperature(described: Any) -> float | None:
    """The temperature of a calibration by a target's description in a manifest; None for the target's own.

    Raises:
        ValueError: it is of another kind than `describe_temperature` gives.
    """
    if not isinstance(described, dict) or described.get(CALIBRATION) is None:
        return None
    return usable_temperature(described.get(TEMPERATURE))


def temperature_text(described: Any) -> str:
    """The temperature of a target's description in words, with an address that is to be escaped.

    Empty where a run did not note it, or not as `describe_temperature` gives it.
    """
    if not isinstance(described, dict) or not is_number(temperature := described.get(TEMPERATURE)):
        return ""
    calibration = described.get(CALIBRATION)
    if not isinstance(calibration, dict):
        return UNCALIBRATED if temperature == 1 else f"{temperature:.4g}, of the target's own configuration"
    # Before a run has a manifest, the number of images is in the artefact alone.
    num_images = calibration.get("num_images")
    on = f" on {num_images:,} images" if is_integer(num_images) else ""
    return f"{temperature:.4g}, fitted{on} ({calibration.get('address')})"


def model_notes(described: Mapping[str, Any]) -> list[str]:
    """What a model's description has under `NOTED`, in words that are to be escaped.

    Raises:
        ValueError: its `trained_on` is not that of a model.
    """
    temperature, head = temperature_text(described), described.get(HEAD)
    notes = (
        training_text(described.get("trained_on")),
        temperature and f"temperature {temperature}",
        head if isinstance(head, str) else "",
    )
    return [note for note in notes if note]


def _calibration_of(fields: dict[str, Any], address: str) -> Calibration:
    """The calibration in a document.

    Raises:
        ValueError: a value is not what this version writes.
    """
    fit, target, labels = fields["temperature"], fields["models"]["target"], fields["classes"]
    num_images, bound = fit["num_images"], fit["bound"]
    if not is_integer(num_images) or num_images < 1 or bound not in ("", *_BOUNDS):
        raise ValueError("its fit is not one of a temperature")
    texts = [target["address"], target["digest"], *labels]
    if not isinstance(labels, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its target or its classes are no texts")
    return Calibration(
        address=address,
        temperature=usable_temperature(fit["fitted"]),
        bound=bound,
        num_images=num_images,
        target=target["address"],
        target_digest=target["digest"],
        labels=tuple(labels),
    )

"""The estimate of the share of people who agree with a label, of an artefact that a job names. Imports no torch.

`riskforge prepare JOB --answers FILE` makes it (`engine.studies.prepare.validity`); it is of certain oracles, in their
order, whose probabilities it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.errors import JobError
from engine.job.plan import VALIDITY, usable_validity
from engine.job.spec import JobSpec
from engine.methods.config_values import is_integer
from engine.methods.validity import ValidityModel
from engine.models.addresses import locate
from engine.models.artefact_documents import malformed, read_document
from engine.models.artefacts import can_become, find_artefact
from engine.models.configurations import VALIDITY_DOCUMENT as DOCUMENT
from engine.models.digests import oracle_digest
from engine.models.labels import read_labels
from engine.models.programs import is_program

FIELD = "models.validity"
_REMEDY = "`riskforge prepare JOB --answers FILE` makes another"


class ModelIdentity(NamedTuple):
    """A model as it was when the artefact was made."""

    address: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """An estimate as an artefact has it.

    Attributes:
        address: of the artefact, as it was given.
        digest: of its content.
        labels: class names of the target.
        oracles: in the order of the model's weights.
        model: None where the fit cannot be used.
        verdict: on the fit, for a reader.
        num_images, num_answers: that it is fitted on.
    """

    address: str
    digest: str
    labels: tuple[str, ...]
    oracles: tuple[ModelIdentity, ...]
    model: ValidityModel | None
    verdict: str
    num_images: int
    num_answers: int

    @property
    def identity(self) -> dict[str, Any]:
        """The part of a plan's identity that the estimate decides; `engine.job.plan.planned_validity` reads it."""
        assert self.model is not None, "a fit that cannot be used is refused before"
        coefficients = {"intercept": self.model.intercept, "weights": list(self.model.weights)}
        return {VALIDITY: {"digest": self.digest, **coefficients}}

    @property
    def described(self) -> dict[str, Any]:
        """For the description of models in a manifest."""
        sizes = {"num_images": self.num_images, "num_answers": self.num_answers}
        return {"address": self.address, "digest": self.digest, **sizes, "verdict": self.verdict}


def job_validity(job: JobSpec, *, with_digests: bool = True) -> Validity | None:
    """The estimate that a job names, checked; None where it names none, or one that is not made yet.

    Args:
        with_digests: whether to check that it is of the oracles as they are now, which reads their files.

    Raises:
        JobError: it cannot be read, has no usable fit, or is of other oracles or classes than the job's.
    """
    address = job.models.validity
    if address is None:
        return None
    try:
        validity = read_validity(address)
    except JobError as error:
        raise JobError([f"{FIELD}: {problem}" for problem in error.problems]) from None
    if validity is not None and (problem := _problem(validity, job, with_digests=with_digests)):
        raise JobError(f"{FIELD}: '{address}' {problem}")
    return validity


def validity_problems(job: JobSpec) -> list[str]:
    """What files tell of the estimate that a job names, before anything is downloaded, a line each."""
    # As of a calibration: the digest of an oracle of the hub would download it.
    with_digests = all(is_program(address) or not locate(address).is_hub for address in job.independent_oracles)
    try:
        job_validity(job, with_digests=with_digests)
    except JobError as error:
        return list(error.problems)
    return []


def read_validity(address: str) -> Validity | None:
    """The estimate in an artefact, usable or not; None where there is no artefact yet.

    Raises:
        JobError: no such address, or the artefact is damaged or of another version.
    """
    folder = find_artefact(address, (DOCUMENT,))
    if folder is None and not can_become(address):
        raise JobError(
            f"'{address}' holds other files and no artefact; give the folder that `riskforge prepare JOB --answers"
            " FILE` made, or a new one for it to make"
        )
    if folder is None:
        return None
    fields = read_document(folder, DOCUMENT)
    try:
        return _validity_of(fields, address)
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(folder, error) from None


def _problem(validity: Validity, job: JobSpec, *, with_digests: bool) -> str:
    """Why an estimate cannot be used in a job; empty where it can."""
    if validity.model is None:
        return f"has {validity.verdict}; collect more answers, and {_REMEDY}"
    labels = read_labels(job.models.target)
    if labels is not None and tuple(labels) != validity.labels:
        return f"was fitted with other classes than those of '{job.models.target}'; {_REMEDY}"
    addresses = job.independent_oracles
    if len(addresses) != len(validity.oracles):
        return (
            f"is of {_several(validity.oracles)}, and the job has {len(addresses)} that guide nothing; name the same,"
            f" in this order, or {_REMEDY}"
        )
    for address, oracle in zip(addresses, validity.oracles, strict=True) if with_digests else ():
        if (digest := oracle_digest(address)) != oracle.digest:
            return (
                f"is of {_several(validity.oracles)}, in this order; where the job has '{address}', with digest"
                f" {digest}, it is of '{oracle.address}', with digest {oracle.digest}; {_REMEDY}"
            )
    return ""


def _several(oracles: Sequence[ModelIdentity]) -> str:
    names = ", ".join(f"'{oracle.address}'" for oracle in oracles)
    return f"{len(oracles)} oracle{'s' if len(oracles) > 1 else ''} ({names})"


def _validity_of(fields: dict[str, Any], address: str) -> Validity:
    """The estimate in a document.

    Raises:
        ValueError: a value is not what this version writes.
    """
    oracles = tuple(ModelIdentity(oracle["address"], oracle["digest"]) for oracle in fields["models"]["oracles"])
    model = None if fields["model"] is None else usable_validity(fields["model"])
    texts = [fields["verdict"], *fields["classes"], *(text for oracle in oracles for text in oracle)]
    if not all(isinstance(text, str) for text in texts) or not oracles:
        raise ValueError("its classes, its oracles or its verdict are no texts")
    if model is not None and len(model.weights) != len(oracles):
        raise ValueError("its weights are not those of its oracles")
    sizes = {name: fields[name] for name in ("num_images", "num_answers")}
    if not all(is_integer(size) and size >= 0 for size in sizes.values()):
        raise ValueError("it does not say how many answers it is fitted on")
    return Validity(
        address=address,
        digest=fields["digest"],
        labels=tuple(fields["classes"]),
        oracles=oracles,
        model=model,
        verdict=fields["verdict"],
        **sizes,
    )

"""Artefacts that a job names: where they are, and whether they fit its target and its requests."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from engine.errors import JobError
from engine.job.spec import JobSpec, RequestSpec
from engine.methods.conditioning.predictor_advice import advice_in
from engine.models.addresses import inaccessible, zoo_folder
from engine.models.artefact_documents import kind_of
from engine.models.configurations import (
    ARTEFACT_DOCUMENT,
    CALIBRATION_DOCUMENT,
    NEIGHBOURS_DOCUMENT,
    VALIDITY_DOCUMENT,
    read_config,
)

# What holds a calibration: an artefact of its own, and every conditioning artefact.
WITH_CALIBRATION = (CALIBRATION_DOCUMENT, ARTEFACT_DOCUMENT)
_ALL_DOCUMENTS = (ARTEFACT_DOCUMENT, CALIBRATION_DOCUMENT, VALIDITY_DOCUMENT, NEIGHBOURS_DOCUMENT)


def find_artefact(address: str, documents: Sequence[str] = (ARTEFACT_DOCUMENT,)) -> Path | None:
    """The folder of an artefact, or None where there is none yet.

    Args:
        address: the artefact, a folder that holds one as `riskforge prepare` leaves it, or `zoo:NAME/PART`.
        documents: names of documents, one of which it has.

    Raises:
        JobError: no such zoo part, a folder with several artefacts, or a path that cannot be accessed.
    """
    if address.startswith("zoo:"):
        folder = zoo_folder(address)
        if not _is_artefact(folder, documents):
            wanted = f"{kind_of(documents[0])} artefact"
            if _is_artefact(folder, _ALL_DOCUMENTS):
                raise JobError(f"'{address}' is an artefact of another kind; give the folder of a {wanted}")
            example = " such as zoo:digits/conditioning" if ARTEFACT_DOCUMENT in documents else ""
            raise JobError(f"'{address}' is a model, not a {wanted}{example}")
        return folder
    if "://" in address:
        raise JobError(f"'{address}' is not on this machine; an artefact is read from a folder: copy it here first")
    try:
        folder = Path(address).expanduser()
        if folder.exists() and not folder.is_dir():
            raise JobError(f"'{address}' is a file; give the folder of an artefact, or one that holds it")
        if _is_artefact(folder, documents):
            return folder
        folders = sorted(path.parent for name in documents for path in folder.glob(f"{kind_of(name)}-*/{name}"))
    except (OSError, RuntimeError, ValueError) as error:
        raise inaccessible(address, error) from None
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise JobError(f"'{address}' holds {len(folders)} artefacts; name one of {names}")
    return folders[0] if folders else None


def can_become(address: str) -> bool:
    """Whether artefacts can be made in a folder: there is none yet, it is empty, or it holds other artefacts.

    Raises:
        JobError: it cannot be accessed.
    """
    folder = Path(address).expanduser()
    try:
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
        return not names or any(any(folder.glob(f"{kind_of(name)}-*/{name}")) for name in _ALL_DOCUMENTS)
    except (OSError, RuntimeError, ValueError) as error:
        raise inaccessible(address, error) from None


def _is_artefact(folder: Path, documents: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in documents)


def missing_artefacts(job: JobSpec) -> list[str]:
    """What has to be prepared before a job can run, one line each.

    Raises:
        JobError: as `find_artefact`.
    """
    missing: dict[str, list[str]] = {}
    for request in job.requests:
        spec = request.conditioning
        if spec and spec.artefact and find_artefact(spec.artefact) is None:
            missing.setdefault(spec.artefact, []).append(request.name)
    lines = [
        f"conditioning: there is no artefact at '{address}' yet (request {', '.join(names)}); make it with `riskforge"
        f" prepare JOB --data PATH --output {address}`"
        for address, names in missing.items()
    ]
    calibration = job.models.calibration
    if calibration and calibration not in missing and find_artefact(calibration, WITH_CALIBRATION) is None:
        lines.append(
            f"models.calibration: there is no artefact at '{calibration}' yet; make it with `riskforge prepare JOB"
            f" --data PATH --only calibration --output {calibration}`"
        )
    validity = job.models.validity
    if validity and find_artefact(validity, (VALIDITY_DOCUMENT,)) is None:
        lines.append(
            f"models.validity: there is no artefact at '{validity}' yet; make it from people's answers with `riskforge"
            f" prepare JOB --answers FILE --output {validity}`"
        )
    return lines


def artefact_problems(place: str, request: RequestSpec, labels: list[str] | None) -> list[str]:
    """Why the existing artefact of a request cannot be used for it; labels are those of the target."""
    spec, where = request.conditioning, f"{place}.conditioning.artefact"
    if spec is None or spec.artefact is None:
        return []
    try:
        folder = find_artefact(spec.artefact)
        fields = read_config(folder / ARTEFACT_DOCUMENT) if folder else {}
    except JobError as error:
        return [f"{where}: {error}"]
    if fields and labels and fields.get("classes") != labels:
        return [f"{where}: '{spec.artefact}' was prepared for other classes than the target's; prepare it again"]
    predictor = fields.get("predictor")
    if spec.is_screened and isinstance(predictor, dict) and predictor.get("trained") is False:
        return [
            f"{where}: '{spec.artefact}' has no error predictor ({predictor.get('verdict')}); set screening: false, use"
            " method: risky without conditioning, or prepare it from more images"
        ]
    return []


def artefact_warnings(job: JobSpec) -> list[str]:
    """Artefacts that requests are screened by although nothing shows that their error predictor is of use."""
    lines = []
    for number, request in enumerate(job.requests):
        spec = request.conditioning
        if spec is None or spec.artefact is None or not spec.is_screened:
            continue
        with contextlib.suppress(JobError, KeyError, TypeError):
            folder = find_artefact(spec.artefact)
            document = read_config(folder / ARTEFACT_DOCUMENT) if folder else {}
            if advice := advice_in(document):
                verdict = document["predictor"]["verdict"]
                where = f"{job.where(number)}.conditioning.artefact"
                lines.append(f"{where}: the error predictor of '{spec.artefact}': {verdict}; {advice}")
    return lines

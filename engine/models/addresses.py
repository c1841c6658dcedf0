"""Addresses of models: `zoo:NAME/PART`, a folder, or a hub id. Imports no torch.

Classifiers may also be files or factories: `engine.models.programs`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import JobError, first_line
from engine.job.spec_messages import nearest
from engine.models.configurations import ARTEFACT_DOCUMENT, NEIGHBOURS_DOCUMENT, PIPELINE_INDEX
from engine.models.hub import cached_snapshot, download

ZOO = Path(__file__).parents[1] / "zoo"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Where a model is.

    Attributes:
        address: as in the job.
        folder: the local folder, or None for a hub id that is not on this machine.
        is_hub: whether it is a hub id; its local folder need not be complete.
    """

    address: str
    folder: Path | None
    is_hub: bool = False


def locate(address: str) -> ModelLocation:
    """Find a model without downloading anything.

    Raises:
        JobError: no zoo part of that name (the nearest is offered), or neither a folder nor a hub id.
    """
    if address.startswith("zoo:"):
        return ModelLocation(address, zoo_folder(address))
    try:
        folder = Path(address).expanduser()
        if folder.is_dir():
            return ModelLocation(address, folder)
        if folder.is_file():
            raise JobError(f"'{address}' is a file; give the folder of the model")
    except (OSError, RuntimeError, ValueError) as error:
        raise inaccessible(address, error) from None
    if not _HUB_ID.fullmatch(address):
        raise JobError(f"'{address}' is neither a folder nor a hub id (owner/name) nor a zoo part (zoo:NAME/PART)")
    return ModelLocation(address, cached_snapshot(address), is_hub=True)


def inaccessible(address: str, error: Exception) -> JobError:
    """The error for a path that the file system or Python refuses."""
    return JobError(f"'{address}' cannot be accessed ({getattr(error, 'strerror', None) or error})")


def resolve(address: str) -> Path:
    """The local folder of a model; of a hub id, what is missing is downloaded (`engine.models.hub.download`).

    Raises:
        JobError: as `locate`, the hub cannot be reached, or it has a pipeline that does not run here.
    """
    location = locate(address)
    if location.folder is not None and not location.is_hub:
        return location.folder
    try:
        return download(address)
    except JobError:
        raise
    except Exception as error:
        raise JobError(
            f"'{address}' is not a folder here and could not be downloaded from the model hub ({first_line(error)})"
        ) from None


def zoo_folder(address: str) -> Path:
    """The folder of `zoo:NAME/PART`: a model, a pipeline or an artefact.

    Raises:
        JobError: the zoo has no such part; its parts are named, and the nearest is offered.
    """
    part = address.removeprefix("zoo:").rstrip("/")
    # Addresses are looked up hundreds of times by the checks of a job.
    if re.fullmatch(r"[\w-]+/[\w-]+", part) and _is_part(ZOO / part):
        return ZOO / part
    folders = {path.parent for path in ZOO.glob("*/*/*.json") if path.is_file()}
    known = sorted(folder.relative_to(ZOO).as_posix() for folder in folders if _is_part(folder))
    raise JobError(f"'zoo:{part}' is not in the zoo; it has {', '.join(known) or 'nothing'}" + nearest(part, known))


def _is_part(folder: Path) -> bool:
    names = ("config.json", PIPELINE_INDEX, ARTEFACT_DOCUMENT, NEIGHBOURS_DOCUMENT)
    return any((folder / name).is_file() for name in names)

"""Whether a worker's copy of a model is the one that the driver planned with, on whichever machine it is.

Files with equal names, sizes and times are taken to be equal: on one machine or a shared file system nothing is read.
Other copies, such as hub caches of several machines, are read once by each worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.models.adapters import adapter_digest, adapter_file
from engine.models.addresses import resolve
from engine.models.digests import loaded_files, model_digest, oracle_digest
from engine.models.program_settings import side_file, side_names
from engine.models.programs import as_file, is_program

# Roles of the description of a job's models that are not models.
_OTHER_ROLES = ("conditioning", "starts", "given", "methods", "validity")
_ADAPTERS = "adapters"
_ORACLES = ("oracle", "oracles")

Stamps = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class ModelCopy:
    """A model where the run was started.

    Attributes:
        digest: of everything that is loaded of it.
        stamps: name, bytes and time of change of each file.
        is_oracle: whether its digest is that of `oracle_digest`.
        is_adapter: whether its digest is that of `adapter_digest`.
    """

    address: str
    digest: str
    stamps: Stamps
    is_oracle: bool = False
    is_adapter: bool = False


def model_copies(described: Mapping[str, Any]) -> tuple[ModelCopy, ...]:
    """The models of a job on this machine, but for factories, which are called.

    Args:
        described: the models by role, each with `address` and `digest`, or a list of these.
    """
    copies: dict[str, ModelCopy] = {}
    for role, entries in described.items():
        for entry in entries if isinstance(entries, list) else [entries]:
            address = entry.get("address", "")
            if role == _ADAPTERS:
                copies[address] = ModelCopy(address, entry["digest"], _adapter_stamps(address), is_adapter=True)
                continue
            if role in _OTHER_ROLES or not address or (is_program(address) and as_file(address) is None):
                continue
            copies.setdefault(address, ModelCopy(address, entry["digest"], _stamps(address), role in _ORACLES))
    return tuple(copies.values())


def check_copies(copies: Sequence[ModelCopy], machine: str) -> None:
    """Compare this machine's models with those where the run was started.

    Args:
        machine: name of this machine, for messages.

    Raises:
        JobError: a model is another one here, or is missing; a line each.
    """
    problems = []
    for copy in copies:
        if (_adapter_stamps if copy.is_adapter else _stamps)(copy.address) == copy.stamps:
            continue
        digest = _digest(copy)
        if digest != copy.digest:
            problems.append(
                f"'{copy.address}' on machine {machine} has the digest {digest}, and {copy.digest} where the run was"
                " started; let all machines use the same files, such as those of a shared folder"
            )
    if problems:
        raise JobError(problems)


def _stamps(address: str) -> Stamps:
    if path := as_file(address) if is_program(address) else None:
        root, files = path.parent, [*filter(None, (path, side_file(path), side_names(path)))]
    else:
        root = resolve(address)
        files = loaded_files(root)
    return tuple(sorted(_stamp(root, file) for file in files if file.is_file()))


def _digest(copy: ModelCopy) -> str:
    if copy.is_adapter:
        return adapter_digest(copy.address)
    return (oracle_digest if copy.is_oracle else model_digest)(copy.address)


def _adapter_stamps(address: str) -> Stamps:
    path = adapter_file(address)
    return (_stamp(path.parent, path),)


def _stamp(root: Path, file: Path) -> tuple[str, int, int]:
    status = file.stat()
    # The file of class names may be elsewhere.
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
    return name, status.st_size, status.st_mtime_ns

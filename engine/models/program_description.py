"""Settings and digest of a classifier that is a program: a file is read, a factory is called.

A factory is called once for as long as nothing changes that it depends on (`engine.models.factory_cache`). Imports
torch only where one is called.
"""

from __future__ import annotations

import hashlib

from engine.models.factory_cache import Description, cached_description, keep_description
from engine.models.factory_files import traced
from engine.models.program_settings import TargetSettings, side_file, side_names, side_settings
from engine.models.programs import archive_kind, as_file

# The factories that were described in this process, by address.
_KNOWN: dict[str, Description] = {}


def check_program(address: str) -> None:
    """Check a file by its table of contents and its side file; a factory by calling it and trying its network.

    Raises:
        JobError: the file is not a model that can be opened without unpickling; or the factory fails, or its network
            does not give logits.
    """
    if path := as_file(address):
        archive_kind(path, address)
        side_settings(path, address)
    else:
        _described(address)


def program_labels(address: str) -> list[str]:
    """Class names of a file or factory in index order.

    Raises:
        JobError: as `check_program`.
    """
    return list(_settings(address).labels)


def program_temperature(address: str) -> float:
    """The temperature in the settings of a file or factory.

    Raises:
        JobError: as `check_program`.
    """
    return _settings(address).temperature


def program_is_binary(address: str) -> bool:
    """Whether the network of a file or factory has one logit z, which is read as [0, z].

    Raises:
        JobError: as `check_program`.
    """
    return _settings(address).is_binary


def program_digest(address: str) -> str:
    """Digest of a file, its side file, and one of class names; of a factory, of its address, settings and tensors.

    Raises:
        JobError: as `check_program`.
    """
    path = as_file(address)
    if path is None:
        return _described(address).digest
    side_settings(path, address)
    digest = hashlib.sha256()
    for part in filter(None, (path, side_file(path), side_names(path))):
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _settings(address: str) -> TargetSettings:
    path = as_file(address)
    return side_settings(path, address) if path else _described(address).settings


def program_untrainable(address: str) -> str:
    """Why `retrain` cannot train a file or factory; empty where it can.

    Raises:
        JobError: as `check_program`.
    """
    if path := as_file(address):
        return "a TorchScript file" if archive_kind(path, address) == "torchscript" else "a torch.export file"
    return _described(address).untrainable


def _described(address: str) -> Description:
    """A factory's network; called once in a process, as modules are imported once."""
    if address not in _KNOWN:
        description = cached_description(address)
        if description is None:
            from engine.models.program_loading import describe_factory

            with traced() as opened:
                description = describe_factory(address)
            keep_description(address, description, opened)
        _KNOWN[address] = description
    return _KNOWN[address]

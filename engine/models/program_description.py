"""Settings and digest of a classifier that is a program: a file is read, a factory is called.

Imports torch only where a factory is called.
"""

from __future__ import annotations

import hashlib

from engine.models.program_settings import TargetSettings, side_file, side_settings
from engine.models.programs import archive_kind, as_file

# Settings and digest of the factories that were called in this process, by address.
_KNOWN: dict[str, tuple[TargetSettings, str]] = {}


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


def program_digest(address: str) -> str:
    """Digest of a file and its side file; of a factory, of its address, settings and tensors.

    Raises:
        JobError: as `check_program`.
    """
    path = as_file(address)
    if path is None:
        return _described(address)[1]
    side_settings(path, address)
    digest = hashlib.sha256()
    for part in (path, side_file(path)):
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _settings(address: str) -> TargetSettings:
    path = as_file(address)
    return side_settings(path, address) if path else _described(address)[0]


def _described(address: str) -> tuple[TargetSettings, str]:
    """Settings and digest of a factory's network; called once in a process, as modules are imported once."""
    if address not in _KNOWN:
        from engine.models.program_loading import describe_factory

        _KNOWN[address] = describe_factory(address)
    return _KNOWN[address]

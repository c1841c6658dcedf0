"""Labels and digest of a model that is a file or a factory: of a file by reading it, of a factory by calling it."""

from __future__ import annotations

import hashlib

from engine.models.program_settings import side_file, side_settings
from engine.models.programs import archive_kind, as_file

_KNOWN: dict[str, tuple[tuple[str, ...], str]] = {}


def check_program(address: str) -> None:
    """Check a file by its table of contents and its side file; of a factory, everything.

    Raises:
        JobError: it is not a model, or not such as can be opened without unpickling; or the factory does not do what it
            should.
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
    path = as_file(address)
    return list(side_settings(path, address).labels) if path else list(_described(address)[0])


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
    for one in (path, side_file(path)):
        with one.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _described(address: str) -> tuple[tuple[str, ...], str]:
    """Labels and digest of what a factory gives; it is asked once in a process, as its modules are imported once."""
    if address not in _KNOWN:
        from engine.models.program_loading import describe_factory

        _KNOWN[address] = describe_factory(address)
    return _KNOWN[address]

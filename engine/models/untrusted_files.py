"""Files from outside that are read in one piece: only regular files, up to a limit of bytes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Manifests, plans, evaluations, statistics of a conditioning artefact: they grow with classes and shards.
MAX_DOCUMENT_BYTES = 64 * 2**20
# Commit records, leases, notes of the quarantine, settings of a model.
MAX_RECORD_BYTES = 4 * 2**20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class UnsuitableFileError(OSError):
    """A path that is not a regular file, or a file that is larger than its limit."""


def check_regular(path: Path) -> None:
    """Refuse what cannot be opened and read to an end: folders, pipes, devices, sockets, and links to them.

    Raises:
        UnsuitableFileError: it is one of these.
        OSError: there is no such file.
    """
    _check_mode(path.stat().st_mode)


def read_whole(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file, without blocking and without using more memory than the limit.

    Raises:
        UnsuitableFileError: it is a pipe, a device or the like, or larger than `max_bytes`.
        OSError: it cannot be read.
    """
    # Before the file is opened, since opening alone affects some devices; and after, since it may have been replaced.
    _check_mode(path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_mode(status.st_mode)
        if status.st_size > max_bytes:
            raise too_large(status.st_size, max_bytes)
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_large(len(data), max_bytes)
    return data


def too_large(num_bytes: int, max_bytes: int) -> UnsuitableFileError:
    """The error for a file that is larger than its limit."""
    return UnsuitableFileError(
        f"has {num_bytes:,} bytes, more than the {max_bytes:,} that are read of such a file; move it away or restore it"
    )


def _check_mode(mode: int) -> None:
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise UnsuitableFileError(f"is {name}, not a file; move it away or restore the file")

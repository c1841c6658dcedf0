"""Errors of file systems: explained with the remedy, and retried where a retry may help."""

from __future__ import annotations

import contextlib
import errno
import functools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from engine.errors import OutputError, StoreLostError
from engine.models.untrusted_files import UnsuitableFileError

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

_KEPT = "what is committed is kept, and the same command continues from there"
_REMEDIES: dict[int, str] = {
    errno.ENOSPC: f"the disk is full; free some space and run again ({_KEPT})",
    errno.EDQUOT: f"the disk quota is used up; free some space and run again ({_KEPT})",
    errno.EFBIG: "the file is larger than this file system or the limit of the process allows; use fewer "
    "samples_per_shard",
    errno.EROFS: "the file system is read-only; make it writable or choose another --output",
    errno.EACCES: "no permission; change the permissions or choose another --output",
    errno.EPERM: "not permitted; the folder must be writable and its file system must have hard links, "
    "otherwise choose another --output",
    errno.EOPNOTSUPP: "the file system has no hard links, which publishing needs; choose another --output",
    errno.EXDEV: "lies on another file system than the rest of the output; an output must be on one",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another --output",
    errno.EEXIST: "a file has the name of a folder; choose another --output",
    errno.EISDIR: "a folder has the name of a file; move it away or choose another --output",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter --output",
    errno.ENOENT: "there is no such file or folder",
    errno.ELOOP: "a link leads to itself; remove it or choose another --output",
}
# Of a shared file system that is temporarily unavailable, so that a retry may succeed.
_LOST = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENETRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN,
    errno.EREMOTEIO,
}  # fmt: skip


# Pauses between retries on such a file system.
LOST_WAITS = (0.2, 1.0, 3.0, 8.0)

# Folders of this process with copies of objects, each with the address that its files are copies of.
COPIES: dict[Path, str] = {}


def shown_path(path: Path | str) -> str:
    """A path for messages: of a copy, the address of the object."""
    if isinstance(path, Path):
        for folder, uri in list(COPIES.items()):
            if path.is_relative_to(folder):
                return f"{uri}/{path.relative_to(folder).as_posix()}"
    return str(path)


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn an error of the operating system into an `OutputError` that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        kind = StoreLostError if error.errno in _LOST else OutputError
        raise kind(f"{shown_path(path)}: {remedy_of(error)}") from error


def is_no_file(error: OutputError) -> bool:
    """Whether an error means that the name of a file belongs to something else: a pipe, a device, a link to itself."""
    cause = error.__cause__
    return isinstance(cause, UnsuitableFileError) or (isinstance(cause, OSError) and cause.errno == errno.ELOOP)


def remedy_of(error: OSError) -> str:
    """The remedy for an error of the operating system."""
    if error.errno in _LOST:
        return f"the file system does not answer ({error.strerror}); see to its mount ({_KEPT})"
    return _REMEDIES.get(error.errno or 0) or error.strerror or str(error)


def pause(seconds: float) -> None:
    """Wait for about this time; jitter keeps processes that failed together from retrying together."""
    time.sleep(seconds * (0.75 + random.random() / 2))


def patient(method: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """Make a method of a store retry while the file system is temporarily unavailable.

    Such a method is idempotent: a failed try leaves the state as it was or as it should be.
    """

    @functools.wraps(method)
    def again(*arguments: Parameters.args, **options: Parameters.kwargs) -> Answer:
        for wait in LOST_WAITS:
            try:
                return method(*arguments, **options)
            except StoreLostError:
                pause(wait)
        return method(*arguments, **options)

    return again

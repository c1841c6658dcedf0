"""Locks between processes by `flock` on files; each ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from engine.data.stores.base import MAX_HOLDER_BYTES
from engine.data.stores.file_errors import explained


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, as `Store.lock`.

    Raises:
        OutputError: the file cannot be made.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def try_lock(path: Path, holder: str) -> Iterator[str]:
    """Hold the lock of a file if it is free, as `Store.try_lock`.

    Raises:
        OutputError: the file cannot be made or written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, is_free = _open_lock(path)
    try:
        if not is_free:
            yield _holder(descriptor) or "another process"
            return
        with explained(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, holder.encode()[:MAX_HOLDER_BYTES])
        try:
            yield ""
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def flock(descriptor: int, operation: int, *, or_raise: bool = False) -> bool:
    """Take a lock; False where it is held (or `BlockingIOError`), or where the file system has none."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        if or_raise and error.errno == errno.EWOULDBLOCK:
            raise
        return False
    return True


def _open_lock(path: Path) -> tuple[int, bool]:
    """The descriptor of a lock's file, and whether this process holds it (or there are no locks)."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, or_raise=True)
        except BlockingIOError:
            return descriptor, False
        if os.fstat(descriptor).st_nlink:
            return descriptor, True
        os.close(descriptor)  # Its last holder removed it after it was opened here.


def _holder(descriptor: int) -> str:
    """The text that the holder of a lock wrote into its file."""
    with contextlib.suppress(OSError):
        return os.read(descriptor, MAX_HOLDER_BYTES).decode(errors="replace")
    return ""

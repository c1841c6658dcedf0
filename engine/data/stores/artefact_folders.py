"""Artefacts in folders that are named by their content, published atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained
from engine.errors import JobError, OutputError


def publish_artefact(
    home: Path | Store, kind: str, digest: str, files: Mapping[str, bytes], digest_in: Callable[[Path], str]
) -> tuple[Path, bool]:
    """Store an artefact as `home/KIND-DIGEST12`.

    Args:
        home: a folder, or the store of an address.
        digest: of its content, hexadecimal.
        files: bytes by name, that of the document last.
        digest_in: the digest of the artefact in a folder; raises `JobError` for a damaged one.

    Returns:
        Its folder, of an address that of a copy of it, and whether an equal artefact was there already.

    Raises:
        OutputError: it cannot be written, or a folder of that name is damaged.
    """
    name = f"{kind}-{digest[:12]}"
    if isinstance(home, Store):
        return _upload(home, name, digest, files, digest_in)
    target = home / name
    staged = home / f".{target.name}-{secrets.token_hex(4)}"
    try:
        with explained(target):
            staged.mkdir(parents=True)
            for name, data in files.items():
                _write(staged / name, data)
            _sync(staged)
            was_there = not _publish(staged, target)
            _sync(home)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if was_there:
        _check_equal(target, str(target), digest, digest_in)
    return target, was_there


def _upload(
    store: Store, name: str, digest: str, files: Mapping[str, bytes], digest_in: Callable[[Path], str]
) -> tuple[Path, bool]:
    """As `publish_artefact`, at an address: the document last, so that an interrupted upload is no artefact."""
    was_there = store.exists(f"{name}/{list(files)[-1]}")
    for file, data in () if was_there else files.items():
        if not store.publish(f"{name}/{file}", data):
            where = store.address(f"{name}/{file}")
            raise OutputError(f"{where}: is there with other content; remove it and run again")
    path = store.fetch(name, keep=True)
    _check_equal(path, store.address(name), digest, digest_in)
    return path, was_there


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, target: Path) -> bool:
    """Rename a staged folder; False where a folder has the name already."""
    try:
        staged.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def _check_equal(target: Path, shown: str, digest: str, digest_in: Callable[[Path], str]) -> None:
    try:
        present = digest_in(target)
    except JobError as error:
        raise OutputError(f"{shown}: is there and damaged; remove it and run again ({error})") from None
    if present != digest:
        raise OutputError(f"{shown}: is there with other content (digest {present}); move it away and run again")

"""Folders of unfinished files, each with the lock of the process that it belongs to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path

from engine.data.stores.file_locks import flock


def claim_folder(staging: Path) -> tuple[Path, int]:
    """A new folder and the descriptor of its lock, which stays open as long as the process lives.

    The lock is taken before the folder is made, and its file is removed after the folder: a folder is dead exactly
    when its lock is free.
    """
    staging.mkdir(parents=True, exist_ok=True)
    while True:
        folder = staging / f"{os.getpid()}-{secrets.token_hex(6)}"
        descriptor = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT, 0o666)
        flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            folder.mkdir()
            return folder, descriptor
        os.close(descriptor)  # A cleaning process was faster than the lock.


def release_folder(folder: Path, descriptor: int, owner: int) -> None:
    """Remove the folder at a regular exit; a forked child does not touch its parent's folder."""
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            remove_path(folder)
            _lock_of(folder).unlink(missing_ok=True)
        os.close(descriptor)


def remove_if_dead(folder: Path) -> None:
    """Remove a folder of `claim_folder` whose process has ended."""
    lock = _lock_of(folder)
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        remove_path(folder)
        return
    try:
        if flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            remove_path(folder)
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def remove_path(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")

"""The local folder of a process under `TMPDIR`, for unfinished files and copies of the objects of a store."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
import weakref
from pathlib import Path

from engine.data.stores.file_errors import COPIES, explained
from engine.data.stores.staging import claim_folder, release_folder, remove_if_dead
from engine.errors import OutputError

COPIES_FOLDER = "copies"


class ProcessFolder:
    """A folder that is made when it is first needed, and again after it was removed. Thread-safe.

    Attributes:
        generation: how often the folder was made; what refers to files of an earlier one is void.
    """

    def __init__(self, uri: str) -> None:
        self.generation = 0
        self._uri = uri
        self._lock = threading.RLock()
        self._path: Path | None = None
        self._release: weakref.finalize[..., type[ProcessFolder]] | None = None

    def path(self) -> Path:
        """The folder.

        Raises:
            OutputError: it cannot be made, or the folder above it is not this user's alone.
        """
        with self._lock:
            if self._path is None or not self._path.is_dir():
                base = _base()
                # Not every process begins or repairs a run, and a killed one leaves copies of some gigabytes.
                clean_folders()
                with explained(base):
                    self._path, descriptor = claim_folder(base)
                self.generation += 1
                # Lives as long as the process, not the store: a reader of a copy may outlive it.
                self._release = weakref.finalize(ProcessFolder, _release, self._path, descriptor, os.getpid())
                COPIES[self._path / COPIES_FOLDER] = self._uri
            return self._path

    def release(self) -> None:
        """Remove the folder."""
        if self._release is not None:
            self._release()

    def after_fork(self) -> None:
        """Drop the lock of the parent in a forked process; its folder can be shared."""
        self._lock = threading.RLock()


def clean_folders() -> None:
    """Remove the folders of processes of this user and machine that have ended."""
    base = _base()
    with explained(base):
        for name in {entry.name.removesuffix(".lock") for entry in base.iterdir()}:
            remove_if_dead(base / name)


def _base() -> Path:
    """The folder of this user's processes, which no other user can read."""
    base = Path(tempfile.gettempdir()) / f"riskforge-{os.getuid()}"
    with explained(base):
        base.mkdir(mode=0o700, exist_ok=True)
        status = base.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise OutputError(f"{base}: is not a folder of this user alone; remove it, or set TMPDIR to another folder")
    return base


def _release(folder: Path, descriptor: int, owner: int) -> None:
    COPIES.pop(folder / COPIES_FOLDER, None)
    release_folder(folder, descriptor, owner)

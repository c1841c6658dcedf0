"""Appending to objects: text is collected in a local file, which is uploaded whole now and then."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.data.stores.file_errors import explained
from engine.data.stores.process_folder import ProcessFolder
from engine.errors import OutputError

# Appended text is uploaded after so long for each megabyte of its object: an object is always written whole.
APPEND_SECONDS = 5.0


@dataclass
class _AppendedFile:
    """The local file with all that was appended to an object.

    Attributes:
        is_waiting: whether it has text that is not uploaded yet.
        uploaded: when it was uploaded last, by the monotonic clock.
    """

    path: Path
    is_waiting: bool = False
    uploaded: float = field(default_factory=time.monotonic)

    def is_due(self) -> bool:
        """Whether its text has waited long enough for its size."""
        if not self.is_waiting:
            return False
        with explained(self.path):
            num_megabytes = 1 + self.path.stat().st_size // 2**20
        return time.monotonic() - self.uploaded >= APPEND_SECONDS * num_megabytes


class AppendedObjects:
    """The objects that this process appends to.

    Args:
        upload: replaces an object.
    """

    def __init__(self, folder: ProcessFolder, upload: Callable[[str, bytes], None]) -> None:
        self._folder, self._upload = folder, upload
        self._files: dict[str, _AppendedFile] = {}
        self._generation = 0
        self._flushing = threading.Lock()

    def after_fork(self) -> None:
        """Drop the lock of the parent in a forked process."""
        self._flushing = threading.Lock()

    def append(self, name: str, text: str) -> None:
        """Add text to the local file of an object.

        Raises:
            OutputError: the local file cannot be written.
        """
        self._forget_removed()
        file = self._files.get(name)
        if file is None:
            path = self._folder.path() / f"{secrets.token_hex(8)}.appended"
            self._forget_removed()
            file = self._files[name] = _AppendedFile(path)
        with explained(file.path), file.path.open("a", encoding="utf-8") as stream:
            stream.write(text)
        file.is_waiting = True

    def flush(self, *, if_due: bool = False) -> None:
        """Upload appended text; text that is due in the background, as the driver must not wait for a network.

        What could not be uploaded stays due.

        Raises:
            OutputError: the store refuses; not with `if_due`.
        """
        self._forget_removed()
        if not if_due:
            with self._flushing:
                self._upload_files([item for item in self._files.items() if item[1].is_waiting])
        elif not self._flushing.locked() and (due := [item for item in self._files.items() if item[1].is_due()]):
            threading.Thread(target=self._flush_due, args=(due,), name="flush", daemon=True).start()

    def _forget_removed(self) -> None:
        """Forget the files of an earlier local folder."""
        if self._generation != self._folder.generation:
            self._files.clear()
            self._generation = self._folder.generation

    def _flush_due(self, due: Sequence[tuple[str, _AppendedFile]]) -> None:
        with self._flushing, contextlib.suppress(OutputError):
            self._upload_files(due)

    def _upload_files(self, files: Sequence[tuple[str, _AppendedFile]]) -> None:
        for name, file in files:
            file.uploaded, file.is_waiting = time.monotonic(), False
            try:
                with explained(file.path):
                    text = file.path.read_bytes()
                self._upload(name, text)
            except OutputError:
                file.is_waiting = True
                raise

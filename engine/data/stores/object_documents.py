"""Small objects that are read again and again, such as commit records: each is read once, while listings show it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from engine.data.stores.object_copies import object_version

# What is beyond is read each time.
MAX_KNOWN_BYTES = 64 * 2**20
MAX_NOTED = 100_000


class ListedDocuments:
    """Objects as they were read, each with the version that the latest listing of its folder states. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[str, int] = {}
        self._documents: dict[str, tuple[int, bytes]] = {}
        self._num_bytes = 0

    def after_fork(self) -> None:
        """Drop the lock of the parent in a forked process."""
        self._lock = threading.Lock()

    def note(self, folder: str, entries: Sequence[dict[str, Any]], name_of: Callable[[str], str]) -> None:
        """Note the versions in a listing, in place of those of the folder's last one; forget what has changed."""
        prefix = f"{folder}/" if folder else ""
        few = entries if len(entries) <= MAX_NOTED else ()
        files = ((name_of(entry["name"]), entry) for entry in few if entry["type"] == "file")
        noted = {name: hash(object_version(entry)) for name, entry in files}
        with self._lock:
            kept = {name: version for name, version in self._versions.items() if not name.startswith(prefix)}
            self._versions = kept | noted if len(kept) + len(noted) <= MAX_NOTED else kept
            for name in [name for name, one in self._documents.items() if one[0] != self._versions.get(name)]:
                self._drop(name)

    def get(self, name: str) -> bytes | None:
        """A document that is unchanged in the latest listing; None where it has to be read."""
        with self._lock:
            return self._documents.get(name, (0, None))[1]

    def add(self, name: str, data: bytes) -> None:
        """Keep a document that was read after the latest listing; the next one shows whether it had changed by then."""
        with self._lock:
            version = self._versions.get(name)
            if version is None or name in self._documents or self._num_bytes + len(data) > MAX_KNOWN_BYTES:
                return
            self._documents[name] = version, data
            self._num_bytes += len(data)

    def forget(self, name: str) -> None:
        """Forget a document that this process changes."""
        with self._lock:
            self._versions.pop(name, None)
            self._drop(name)

    def _drop(self, name: str) -> None:
        self._num_bytes -= len(self._documents.pop(name, (0, b""))[1])

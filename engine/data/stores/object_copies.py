"""Local copies of objects, made once for each version of an object and limited in size."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from engine.data.stores.file_errors import explained
from engine.data.stores.object_client import ObjectClient
from engine.data.stores.process_folder import COPIES_FOLDER, ProcessFolder
from engine.data.stores.staging import remove_path

# Copies beyond so many bytes are removed, the least recently used first, but never the latest ones.
MAX_COPIED_BYTES = 4 * 2**30
MIN_COPIES = 64
NUM_THREADS = 16

# The version of an object that does not exist.
_ABSENT = ""


@dataclass
class _Copy:
    """A local copy of an object."""

    version: str
    num_bytes: int
    is_kept: bool


class ObjectCopies:
    """The local copies of a store's objects. Thread-safe."""

    def __init__(self, client: ObjectClient, folder: ProcessFolder) -> None:
        self._client, self._folder = client, folder
        self._lock = threading.RLock()
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._generation = 0

    def after_fork(self) -> None:
        """Drop the lock of the parent in a forked process; its copies can be shared."""
        self._lock = threading.RLock()

    def version_of(self, name: str) -> str | None:
        """The version of an object that was copied last; None where none was."""
        copy = self._copies.get(name)
        return None if copy is None else copy.version

    def fetch(self, name: str, *, keep: bool = False) -> Path:
        """As `Store.fetch`: an up-to-date copy; of a folder copies of the objects in it."""
        path = self._path_of(name)
        info = self._client.request(name, lambda: self._client.info(name))
        if info is None:
            remove_path(path)
            with self._lock:
                self._copies[name] = _Copy(_ABSENT, 0, is_kept=False)
            return path
        if info["type"] == "directory":
            return self._fetch_folder(name, path)
        version = object_version(info)
        with self._lock:
            copy = self._copies.get(name)
            if copy is not None and copy.version == version and path.is_file():
                copy.is_kept |= keep
                self._copies.move_to_end(name)
                return path
        self._download(name, path)
        with self._lock:
            self._copies[name] = _Copy(version, int(info["size"]), keep or (copy is not None and copy.is_kept))
            self._copies.move_to_end(name)
            self._remove_excess()
        return path

    def fetch_each(self, names: Iterable[str], *, keep: bool = False) -> Iterator[Path]:
        """As `fetch` for many names, in their order; some copies are made ahead of time."""
        _ = self._client.fs, self._folder.path()  # Once, before there are threads.
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            ahead: deque[Future[Path]] = deque()
            try:
                for name in names:
                    ahead.append(pool.submit(self.fetch, name, keep=keep))
                    if len(ahead) > NUM_THREADS:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _path_of(self, name: str) -> Path:
        """Where the copy of an object is; copies of an earlier local folder are forgotten."""
        path = self._folder.path() / COPIES_FOLDER / PurePosixPath(name)
        with self._lock:
            if self._generation != self._folder.generation:
                self._copies.clear()
                self._generation = self._folder.generation
        return path

    def _fetch_folder(self, name: str, path: Path) -> Path:
        if path.is_file():
            remove_path(path)
        entries = self._client.request(name, lambda: self._client.entries(name))
        keys = {entry["name"].rstrip("/") for entry in entries} - {self._client.key(name)}
        fetched = set(self.fetch_each(sorted(map(self._client.name_of, keys)), keep=True))
        with contextlib.suppress(FileNotFoundError):
            for outdated in set(path.iterdir()) - fetched:
                remove_path(outdated)
        return path

    def _download(self, name: str, path: Path) -> None:
        part = self._folder.path() / f"{secrets.token_hex(8)}.part"
        try:
            self._client.request(name, lambda: self._client.fs.get_file(self._client.key(name), str(part)))
            with explained(part):
                if path.is_dir():
                    remove_path(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _remove_excess(self) -> None:
        """Remove the least recently used copies where all together are too large."""
        loose = [(name, copy) for name, copy in self._copies.items() if not copy.is_kept]
        num_bytes = sum(copy.num_bytes for _, copy in loose)
        for name, copy in loose[:-MIN_COPIES]:
            if num_bytes <= MAX_COPIED_BYTES:
                return
            remove_path(self._path_of(name))
            # A vanished local folder takes all copies with it.
            self._copies.pop(name, None)
            num_bytes -= copy.num_bytes


def object_version(info: dict[str, Any]) -> str:
    """What changes when an object is written: the generation on GCS; on S3 the ETag, or the time for equal bytes."""
    return str(info.get("generation") or (info.get("ETag"), info.get("LastModified"), info.get("size")))

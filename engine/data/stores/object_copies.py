"""Local copies of objects, made once for each version of an object and limited in size."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
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

# The version of an object that does not exist, and of one that this process wrote.
_ABSENT = ""
_UNKNOWN = "written here"


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
        with self._lock:
            is_known = name in self._copies and path.is_file()
        if not is_known and (info := self._download(name, path, self._client.download)):
            return self._keep(name, path, info, keep=keep)
        info = self._client.request(name, lambda: self._client.info(name))
        if info is None:
            remove_path(path)
            with self._lock:
                self._copies[name] = _Copy(_ABSENT, 0, is_kept=False)
            return path
        if info["type"] == "directory":
            return self._fetch_folder(name, path)
        with self._lock:
            copy = self._copies.get(name)
        is_current = copy is not None and path.is_file() and _is_current(copy, info, path)
        if not is_current:
            self._download(name, path, self._get)
        return self._keep(name, path, info, keep=keep)

    def add(self, name: str, path: Path) -> None:
        """Move a local file that has just become an object to where the copy of that is, instead of reading it back.

        `fetch` compares its checksum with that of the store: another process may have written the object since.
        """
        target = self._path_of(name)
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            num_bytes = target.stat().st_size
        with self._lock:
            self._copies[name] = _Copy(_UNKNOWN, num_bytes, is_kept=False)
            self._remove_excess()

    def _keep(self, name: str, path: Path, info: dict[str, Any], *, keep: bool) -> Path:
        """Note that a copy is up to date."""
        with self._lock:
            earlier = self._copies.get(name)
            is_kept = keep or (earlier is not None and earlier.is_kept)
            self._copies[name] = _Copy(object_version(info), int(info["size"]), is_kept)
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

    def _get(self, name: str, path: Path) -> dict[str, Any] | None:
        self._client.fs.get_file(self._client.key(name), str(path))
        return {}

    def _download(
        self, name: str, path: Path, get: Callable[[str, Path], dict[str, Any] | None]
    ) -> dict[str, Any] | None:
        """Get an object, and make it the local copy; None where `get` gives None and nothing has changed."""
        part = self._folder.path() / f"{secrets.token_hex(8)}.part"
        try:
            info = self._client.request(name, lambda: get(name, part))
            if info is not None:
                with explained(part):
                    if path.is_dir():
                        remove_path(path)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return info

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


def _is_current(copy: _Copy, info: dict[str, Any], path: Path) -> bool:
    """Whether a copy has the bytes of the object with these attributes; a checksum is computed where it was written."""
    if copy.version != _UNKNOWN:
        return copy.version == object_version(info)
    return copy.num_bytes == info["size"] and _has_checksum(path, info)


def _has_checksum(path: Path, info: dict[str, Any]) -> bool:
    """Whether a file has the MD5 that a store states; False where it states another checksum, or none."""
    etag = str(info.get("ETag", "")).strip('"')
    if info.get("md5Hash"):
        return base64.b64encode(_md5(path).digest()).decode() == info["md5Hash"]
    if "-" not in etag:
        return _md5(path).hexdigest() == etag
    from s3fs import core

    # Of an upload in parts: the MD5 of those of the parts, whose size s3fs chooses.
    part_bytes, sums = int(core.calculate_chunksize(path.stat().st_size)), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while part := file.read(part_bytes):
            sums.update(hashlib.md5(part, usedforsecurity=False).digest())
    return etag.startswith(f"{sums.hexdigest()}-")


def _md5(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))

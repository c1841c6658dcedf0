"""Runs on object stores: S3 and what speaks its protocol by s3fs, GCS by gcsfs.

A file is published by a conditional PUT (`conditional_put`). There are no locks: the lease alone keeps a second driver
away, and creating files only where they are absent keeps two workers apart. Files are made in, and read from, a local
folder of the process.

Credentials and endpoint come from the environment of each machine, as the libraries read them.
"""

from __future__ import annotations

import contextlib
import filecmp
import importlib.util
import itertools
import os
import re
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from engine.data.stores.base import TORN, Store
from engine.data.stores.conditional_put import ConditionalPut, data_size
from engine.data.stores.object_appends import AppendedObjects
from engine.data.stores.object_client import ObjectClient
from engine.data.stores.object_copies import ObjectCopies, object_version
from engine.data.stores.object_documents import ListedDocuments
from engine.data.stores.object_errors import is_empty_range
from engine.data.stores.process_folder import ProcessFolder, clean_folders
from engine.errors import OutputError, StoreLostError
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES, too_large

READ_TOGETHER = 128

_ADDRESS = re.compile(r"(?P<scheme>s3|gs|gcs)://(?P<bucket>[A-Za-z0-9._-]+)(?P<prefix>(?:/[^/]+)*)/*", re.IGNORECASE)
# Patterns of fsspec, and what no part of an address is.
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f*?\[\]\\#]|(^|/)\.{1,2}(/|$)")
_LIBRARIES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}


def open_object_store(uri: str) -> ObjectStore:
    """The store of an address such as `s3://BUCKET/NAME`. No request is made yet.

    Raises:
        OutputError: the address is malformed, or the library for it is not installed.
    """
    match = _ADDRESS.fullmatch(uri)
    if match is None or not match["prefix"]:
        raise OutputError(f"output {uri!r}: is not of the form SCHEME://BUCKET/NAME; name a folder in a bucket")
    if _UNUSABLE.search(match["prefix"]):
        raise OutputError(f"output {uri!r}: holds one of * ? [ ] \\ #, a control character, or a part . or ..")
    scheme = {"gcs": "gs"}.get(match["scheme"].lower(), match["scheme"].lower())
    library, extra = _LIBRARIES[scheme]
    if importlib.util.find_spec(library) is None:
        raise OutputError(f"output {uri}: needs {library}, which is not installed; pip install 'riskforge[{extra}]'")
    return ObjectStore(scheme, match["bucket"], match["prefix"].strip("/"))


class ObjectStore(Store):
    """A folder of a bucket.

    Attributes:
        client: its requests.

    Args:
        scheme: `s3` or `gs`.
    """

    def __init__(self, scheme: str, bucket: str, prefix: str) -> None:
        self.client = ObjectClient(scheme, bucket, prefix)
        self.uri = self.client.uri
        self._folder = ProcessFolder(self.uri)
        self._copies = ObjectCopies(self.client, self._folder)
        self._appended = AppendedObjects(self._folder, self.replace)
        self._conditional = ConditionalPut(self.client, self._holds)
        self._documents = ListedDocuments()
        _STORES.add(self)

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return open_object_store, (self.uri,)

    def after_fork(self) -> None:
        """Drop connections and locks in a forked process: they belong to the parent."""
        for part in (self.client, self._folder, self._copies, self._appended, self._conditional, self._documents):
            part.after_fork()

    # Names ---------------------------------------------------------------------------------------------------------

    @property
    def place(self) -> PurePosixPath:
        """The address as a path."""
        return PurePosixPath(f"{self.client.scheme}:", self.client.root)

    def address(self, name: str = "") -> str:
        """The address of a name."""
        return self.client.address(name)

    def absolute_address(self, address: str) -> str:
        """The address itself where it has a scheme or is an absolute path, else relative to this folder."""
        if "://" in address or address.startswith("/"):
            return address
        return f"{self.client.scheme}://{os.path.normpath(f'{self.client.root}/{address}')}"

    # Reading -------------------------------------------------------------------------------------------------------

    def is_there(self) -> bool:
        """Whether any object is in the folder."""
        return self.exists("")

    def exists(self, name: str) -> bool:
        """Whether an object has this name, or any lies below it."""
        return self._info(name) is not None

    def is_folder(self, name: str) -> bool:
        """Whether objects lie below this name."""
        info = self._info(name)
        return info is not None and info["type"] == "directory"

    def _info(self, name: str) -> dict[str, Any] | None:
        return self.client.request(name, lambda: self.client.info(name))

    def read(self, name: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
        """The bytes of an object."""
        return self.client.request(name, lambda: self._read(name, max_bytes))

    def _read(self, name: str, max_bytes: int) -> bytes:
        try:
            data: bytes = self.client.fs.cat_file(self.client.key(name), start=0, end=max_bytes + 1)
        except Exception as error:
            if not is_empty_range(error):
                raise
            return b""
        if len(data) > max_bytes:
            raise OutputError(f"{self.address(name)}: {too_large(len(data), max_bytes)}")
        return data

    def read_each(
        self, names: Iterable[str], max_bytes: int = MAX_RECORD_BYTES, *, listed: bool = False
    ) -> Iterator[tuple[str, bytes | OutputError]]:
        """Names and bytes of the objects that are there, many at a time."""
        rest = iter(names)
        while batch := list(itertools.islice(rest, READ_TOGETHER)):
            known = {name: data for name in batch if listed and (data := self._documents.get(name)) is not None}
            read = dict(self._read_together([name for name in batch if name not in known], max_bytes))
            for name in batch:
                result = known.get(name, read.get(name))
                if isinstance(result, bytes) and listed:
                    self._documents.add(name, result)
                if result is not None:
                    yield name, result

    def _read_together(self, names: Sequence[str], max_bytes: int) -> Iterator[tuple[str, bytes | OutputError | None]]:
        if not names:
            return
        keys, ends = [self.client.key(name) for name in names], [max_bytes + 1] * len(names)
        read = partial(self.client.fs.cat_ranges, keys, [0] * len(names), ends, on_error="return")
        for name, data in zip(names, self.client.request("", read), strict=True):
            # By itself, with the retries and messages of `read`, where it was not read whole.
            is_whole = isinstance(data, bytes) and len(data) <= max_bytes
            yield name, data if is_whole else self._read_or_error(name, max_bytes)

    def _read_or_error(self, name: str, max_bytes: int) -> bytes | OutputError | None:
        """An object's bytes, or why they cannot be read, or None where there is no such object."""
        try:
            return self.read(name, max_bytes)
        except StoreLostError:
            raise
        except OutputError as error:
            return None if isinstance(error.__cause__, FileNotFoundError) else error

    def tail(self, name: str, max_bytes: int) -> bytes:
        """The end of an object."""
        return self.client.request(name, lambda: self._tail(name, max_bytes))

    def _tail(self, name: str, max_bytes: int) -> bytes:
        fs, key = self.client.fs, self.client.key(name)
        size = int(fs.info(key)["size"])
        if not size:
            return b""
        data: bytes = fs.cat_file(key, start=max(0, size - max_bytes), end=size)
        return data

    def fetch(self, name: str, *, keep: bool = False) -> Path:
        """A local copy, made once for each version of the object."""
        return self._copies.fetch(name, keep=keep)

    def fetch_each(self, names: Iterable[str], *, keep: bool = False) -> Iterator[Path]:
        """Local copies in the order of the names, of which some are made ahead."""
        return self._copies.fetch_each(names, keep=keep)

    def list(self, folder: str = "") -> list[str]:
        """Names in a folder, sorted; of folders that have something in them, too."""
        entries = self._entries(folder)
        keys = {entry["name"].rstrip("/") for entry in entries} - {self.client.key(folder)}
        self._documents.note(folder, entries, self.client.name_of)
        return sorted(map(self.client.name_of, keys))

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the objects in a folder by name."""
        files = [entry for entry in self._entries(folder) if entry["type"] == "file"]
        return {self.client.name_of(entry["name"]): int(entry["size"]) for entry in files}

    def _entries(self, folder: str) -> Sequence[dict[str, Any]]:
        return self.client.request(folder, lambda: self.client.entries(folder))

    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of objects, from a listing of all."""
        sizes = self._sizes()
        return sum(sizes.get(self.client.key(name), 0) for name in names)

    def total_size(self) -> int:
        """Bytes of all objects."""
        return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        entries = self.client.request("", lambda: self.client.fs.find(self.client.root, detail=True))
        return {key: int(entry["size"]) for key, entry in entries.items()}

    # Writing -------------------------------------------------------------------------------------------------------

    def publish(self, name: str, data: bytes | Path) -> bool:
        """Create an object if the name is free."""
        return self._conditional.publish(name, data)

    def _holds(self, name: str, data: bytes | Path) -> bool:
        """Whether an object has exactly these bytes; one try for what the store says of it."""
        info = self.client.info(name)
        if info is None or info["size"] != data_size(data):
            return False
        if isinstance(data, bytes):
            return self.read(name, len(data)) == data
        return filecmp.cmp(self.fetch(name), data, shallow=False)

    def replace(self, name: str, data: bytes | Path) -> None:
        """Create or overwrite an object; a file from `staging()` becomes its local copy."""
        self._documents.forget(name)
        self.client.request(name, lambda: self.client.put(name, data, mode="overwrite"))
        if isinstance(data, Path) and data.parent == self.staging():
            self._copies.add(name, data)

    def append(self, name: str, text: str) -> None:
        """Add to a local file, which becomes the object now and then."""
        self._appended.append(name, text)

    def flush(self, *, if_due: bool = False) -> None:
        """Upload what was appended; what is due in the background, as the driver must not wait for a network."""
        self._appended.flush(if_due=if_due)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        self._documents.forget(name)
        self.client.request(name, lambda: self.client.remove([name]))

    def remove_all(self, names: Iterable[str]) -> None:
        """Remove objects, many with one request."""
        self.client.remove_many(list(names))

    def remove_tree(self, name: str) -> None:
        """Remove all objects below a name, and the one that has it."""
        keys = self.client.request(name, lambda: self.client.fs.find(self.client.key(name)))
        self.remove_all(self.client.name_of(key) for key in keys if key.startswith(f"{self.client.key(name)}/"))
        self.remove(name)

    def set_aside(self, name: str) -> None:
        """Copy an object under `_state/torn`, then remove it; not if it is another than was last copied.

        Without locks, another process may have published a whole file there in the meantime.
        """
        target = f"{TORN}/{PurePosixPath(name).name}.{secrets.token_hex(4)}"
        self.client.request(name, lambda: self._move(name, target))

    def _move(self, name: str, target: str) -> None:
        info, copied = self.client.info(name), self._copies.version_of(name)
        if info is None or (copied is not None and copied != object_version(info)):
            return
        self.client.fs.cp_file(self.client.key(name), self.client.key(target))
        self.client.remove([name])

    # Processes -----------------------------------------------------------------------------------------------------

    def staging(self) -> Path:
        """This process's local folder, under `TMPDIR`."""
        return self._folder.path()

    def leave(self) -> None:
        """Remove the local folder; object stores have no empty ones."""
        self._folder.release()

    def clean_staging(self) -> None:
        """Remove the local folders of processes of this machine that have ended."""
        clean_folders()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """No lock."""
        yield

    @contextlib.contextmanager
    def try_lock(self, name: str, holder: str) -> Iterator[str]:
        """No lock, which is always free."""
        yield ""


_STORES: weakref.WeakSet[ObjectStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_STORES):
        store.after_fork()


os.register_at_fork(after_in_child=_after_fork)

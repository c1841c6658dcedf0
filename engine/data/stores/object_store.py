"""Runs on object stores: S3 and what speaks its protocol by s3fs, GCS by gcsfs.

A file is published by a PUT that the store itself refuses where the name is taken: `If-None-Match: *` on S3 (with the
last request of an upload in parts), `ifGenerationMatch=0` on GCS. An answer that got lost and was asked for again
looks like a refusal; the bytes tell the two apart. There are no locks: the lease alone keeps a second driver away,
and what is created if absent keeps two workers apart. Files are made in, and read from, a local folder of the
process.

Credentials and endpoint come from the environment of each machine, as the libraries read them.
"""

from __future__ import annotations

import contextlib
import filecmp
import importlib.util
import itertools
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from engine.data.stores.base import STATE, TORN, Store
from engine.data.stores.file_errors import COPIES, explained, pause
from engine.data.stores.object_errors import (
    NO_BUCKET,
    is_empty_range,
    is_foreign,
    is_taken,
    is_too_large,
    is_unknown_condition,
    max_size_of,
    may_pass,
    remedy,
    status_of,
)
from engine.data.stores.staging import claim_folder, release_folder, remove_if_dead
from engine.errors import OutputError, StoreLostError
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES, too_large

Answer = TypeVar("Answer")

# Copies beyond so many bytes are removed, the longest unused first, but never the latest ones.
MAX_COPIED_BYTES = 4 * 2**30
MIN_COPIES = 64
NUM_THREADS = 16
READ_TOGETHER = 128
# What S3 takes in one request.
DELETE_TOGETHER = 1000
# What is appended is put in place after so long for each megabyte of it: an object is always written whole.
APPEND_SECONDS = 5.0
# Whether the store honours the condition is tried out with a file of at most this size.
MAX_TRIED_BYTES = 2**16
# What may pass is tried again after these pauses, on top of the libraries' own; no more once so much time is gone, so
# that a network that swallows everything is seen before the worker that waits for it is taken for one that hangs.
RETRY_WAITS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
MAX_RETRY_SECONDS = 30.0
# From this size on gcsfs uploads files resumably.
RESUMABLE_BYTES = 5 * 2**20
# What a store takes in one request, as those of Amazon and Google do.
MAX_REQUEST_BYTES = 5 * 2**30
PROBES = f"{STATE}/probes"
CONNECT_SECONDS = 5
# Of s3fs, each of which has five of botocore; ours come on top.
S3_TRIES = 1

_ADDRESS = re.compile(r"(?P<scheme>s3|gs|gcs)://(?P<bucket>[A-Za-z0-9._-]+)(?P<prefix>(?:/[^/]+)*)/*", re.IGNORECASE)
# Patterns of fsspec, and what no part of an address is.
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f*?\[\]\\#]|(^|/)\.{1,2}(/|$)")
_LIBRARIES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}

# The version of what was looked for and not there.
_ABSENT = ""
_NOT_CONDITIONAL = (
    "this store overwrites where it was asked to create if absent (If-None-Match: *), so that shards would not be safe"
    " from a second writer; use a store that honours it, or a folder"
)


def open_object_store(uri: str) -> ObjectStore:
    """The store of an address such as `s3://BUCKET/NAME`. Nothing is asked of the network yet.

    Raises:
        OutputError: the address cannot be one, or the library for it is not installed.
    """
    found = _ADDRESS.fullmatch(uri)
    if found is None or not found["prefix"]:
        raise OutputError(f"output {uri!r}: is not of the form SCHEME://BUCKET/NAME; name a folder in a bucket")
    if _UNUSABLE.search(found["prefix"]):
        raise OutputError(f"output {uri!r}: holds one of * ? [ ] \\ #, a control character, or a part . or ..")
    scheme = {"gcs": "gs"}.get(found["scheme"].lower(), found["scheme"].lower())
    library, extra = _LIBRARIES[scheme]
    if importlib.util.find_spec(library) is None:
        raise OutputError(f"output {uri}: needs {library}, which is not installed; pip install 'riskforge[{extra}]'")
    return ObjectStore(scheme, found["bucket"], found["prefix"].strip("/"))


@dataclass
class _Copy:
    """A local copy of an object."""

    version: str
    num_bytes: int
    is_kept: bool


@dataclass
class _Appended:
    """Text that was appended to a file, locally."""

    path: Path
    is_waiting: bool = False
    put: float = field(default_factory=time.monotonic)

    def is_due(self) -> bool:
        """Whether it has waited for long, as long as it is large."""
        if not self.is_waiting:
            return False
        with explained(self.path):
            num_megabytes = 1 + self.path.stat().st_size // 2**20
        return time.monotonic() - self.put >= APPEND_SECONDS * num_megabytes


class ObjectStore(Store):
    """A folder of a bucket.

    Args:
        scheme: `s3` or `gs`.
    """

    def __init__(self, scheme: str, bucket: str, prefix: str) -> None:
        self.uri = f"{scheme}://{bucket}/{prefix}"
        self._scheme, self._bucket, self._root = scheme, bucket, f"{bucket}/{prefix}"
        self._connection: Any = None
        self._lock = threading.RLock()
        self._home: Path | None = None
        self._release: weakref.finalize[..., type[ObjectStore]] | None = None
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._appended: dict[str, _Appended] = {}
        self._flushing = threading.Lock()
        self._is_conditional = False
        self._are_parts_conditional: bool | None = None
        _STORES.add(self)

    # Names ---------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return open_object_store, (self.uri,)

    @property
    def place(self) -> PurePosixPath:
        """The address as a path."""
        return PurePosixPath(f"{self._scheme}:", self._root)

    def address(self, name: str = "") -> str:
        """The address of a name."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError(f"{name!r} is not a name inside the store")
        return f"{self.uri}/{pure}" if pure.parts else self.uri

    def beside(self, address: str) -> str:
        """The address itself where it has a scheme or is an absolute path, else as it is seen from here."""
        if "://" in address or address.startswith("/"):
            return address
        return f"{self._scheme}://{os.path.normpath(f'{self._root}/{address}')}"

    def _key(self, name: str) -> str:
        return self.address(name).partition("://")[2]

    # The library ---------------------------------------------------------------------------------------------------

    @property
    def _fs(self) -> Any:
        """The file system, made when it is first needed."""
        with self._lock:
            if self._connection is None:
                self._connection = _connect(self._scheme)
            return self._connection

    def after_fork(self) -> None:
        """In a forked process: connections and locks are those of the parent; its local folder can be shared."""
        self._lock, self._flushing, self._connection = threading.RLock(), threading.Lock(), None

    def _ask(self, name: str, action: Callable[[], Answer]) -> Answer:
        """What an action on the store gives, which is done again, after a pause, where what fails may pass.

        Raises:
            StoreLostError: it does not pass.
            OutputError: the store refuses; with address and remedy.
        """
        started = time.monotonic()
        for wait in (*RETRY_WAITS, None):
            try:
                return action()
            except OutputError:
                raise
            except Exception as error:
                if wait is None or not may_pass(error) or time.monotonic() - started > MAX_RETRY_SECONDS:
                    if isinstance(error, OSError) or may_pass(error) or is_foreign(error):
                        raise self._error(name, error) from error
                    raise
            pause(wait)
        raise AssertionError("the last try gives or raises")

    def _error(self, name: str, error: Exception) -> OutputError:
        """What to raise where the libraries raise this."""
        kind = StoreLostError if may_pass(error) else OutputError
        return kind(f"{self.address(name)}: {remedy(error, self._scheme)}")

    def _info(self, name: str) -> dict[str, Any] | None:
        """What the store says of a name; None where there is nothing."""
        try:
            found: dict[str, Any] = self._fs.info(self._key(name))
        except FileNotFoundError as error:
            self._check_bucket(error)
            return None
        return found

    def _check_bucket(self, error: FileNotFoundError) -> None:
        """Tell a bucket that is not there from a name that is not: of the second S3 gives an empty listing.

        Raises:
            FileNotFoundError: there is no bucket.
        """
        is_known = status_of(error) != 404 if self._scheme == "s3" else self._fs.exists(self._bucket)
        if not is_known:
            raise FileNotFoundError(NO_BUCKET) from error

    # Reading -------------------------------------------------------------------------------------------------------

    def is_there(self) -> bool:
        """Whether any object is in the folder."""
        return self.exists("")

    def exists(self, name: str) -> bool:
        """Whether an object has this name, or any lies below it."""
        return self._ask(name, lambda: self._info(name)) is not None

    def is_folder(self, name: str) -> bool:
        """Whether objects lie below this name."""
        found = self._ask(name, lambda: self._info(name))
        return found is not None and found["type"] == "directory"

    def read(self, name: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
        """The bytes of an object."""
        return self._ask(name, lambda: self._read(name, max_bytes))

    def _read(self, name: str, max_bytes: int) -> bytes:
        try:
            data: bytes = self._fs.cat_file(self._key(name), start=0, end=max_bytes + 1)
        except Exception as error:
            if not is_empty_range(error):
                raise
            return b""
        if len(data) > max_bytes:
            raise OutputError(f"{self.address(name)}: {too_large(len(data), max_bytes)}")
        return data

    def read_each(
        self, names: Iterable[str], max_bytes: int = MAX_RECORD_BYTES
    ) -> Iterator[tuple[str, bytes | OutputError]]:
        """Names and bytes of the objects that are there, many at a time."""
        rest = iter(names)
        while some := list(itertools.islice(rest, READ_TOGETHER)):
            keys, ends = [self._key(name) for name in some], [max_bytes + 1] * len(some)
            ask = partial(self._fs.cat_ranges, keys, [0] * len(some), ends, on_error="return")
            for name, data in zip(some, self._ask("", ask), strict=True):
                # Alone, with the patience and the messages of `read`, where it did not come in one piece.
                is_whole = isinstance(data, bytes) and len(data) <= max_bytes
                read = data if is_whole else self._read_or_error(name, max_bytes)
                if read is not None:
                    yield name, read

    def _read_or_error(self, name: str, max_bytes: int) -> bytes | OutputError | None:
        """An object's bytes, or why they cannot be had, or None where there is no such object."""
        try:
            return self.read(name, max_bytes)
        except StoreLostError:
            raise
        except OutputError as error:
            return None if isinstance(error.__cause__, FileNotFoundError) else error

    def tail(self, name: str, max_bytes: int) -> bytes:
        """The end of an object."""
        return self._ask(name, lambda: self._tail(name, max_bytes))

    def _tail(self, name: str, max_bytes: int) -> bytes:
        size = int(self._fs.info(self._key(name))["size"])
        if not size:
            return b""
        data: bytes = self._fs.cat_file(self._key(name), start=max(0, size - max_bytes), end=size)
        return data

    def fetch(self, name: str, *, keep: bool = False) -> Path:
        """A local copy, made once for each version of the object."""
        path = self._copy_of(name)
        found = self._ask(name, lambda: self._info(name))
        if found is None:
            _remove(path)
            with self._lock:
                self._copies[name] = _Copy(_ABSENT, 0, is_kept=False)
            return path
        if found["type"] == "directory":
            return self._fetch_folder(name, path)
        version = _version(found)
        with self._lock:
            held = self._copies.get(name)
            if held is not None and held.version == version and path.is_file():
                held.is_kept |= keep
                self._copies.move_to_end(name)
                return path
        self._download(name, path)
        with self._lock:
            self._copies[name] = _Copy(version, int(found["size"]), keep or (held is not None and held.is_kept))
            self._copies.move_to_end(name)
            self._forget_copies()
        return path

    def _fetch_folder(self, name: str, path: Path) -> Path:
        if path.is_file():
            _remove(path)
        names = self.list(name)
        fetched = set(self.fetch_each(names, keep=True))
        with contextlib.suppress(FileNotFoundError):
            for left in set(path.iterdir()) - fetched:
                _remove(left)
        return path

    def _download(self, name: str, path: Path) -> None:
        part = self.staging() / f"{secrets.token_hex(8)}.part"
        try:
            self._ask(name, lambda: self._fs.get_file(self._key(name), str(part)))
            with explained(part):
                if path.is_dir():
                    _remove(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _forget_copies(self) -> None:
        """Remove the copies that were not asked for for longest, where there is too much of them."""
        loose = [(name, copy) for name, copy in self._copies.items() if not copy.is_kept]
        num_bytes = sum(copy.num_bytes for _, copy in loose)
        for name, copy in loose[:-MIN_COPIES]:
            if num_bytes <= MAX_COPIED_BYTES:
                return
            _remove(self._copy_of(name))
            del self._copies[name]
            num_bytes -= copy.num_bytes

    def fetch_each(self, names: Iterable[str], *, keep: bool = False) -> Iterator[Path]:
        """Local copies in the order of the names, of which some are made ahead."""
        _ = self._fs, self.staging()  # Once, before there are threads.
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
                for one in ahead:
                    one.cancel()

    def list(self, folder: str = "") -> list[str]:
        """Names in a folder, sorted; of folders that have something in them, too."""
        keys = {one["name"].rstrip("/") for one in self._listed(folder)} - {self._key(folder)}
        return sorted(key.removeprefix(f"{self._root}/") for key in keys)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the objects in a folder by name."""
        found = [one for one in self._listed(folder) if one["type"] == "file"]
        return {one["name"].removeprefix(f"{self._root}/"): int(one["size"]) for one in found}

    def _listed(self, folder: str) -> Sequence[dict[str, Any]]:
        return self._ask(folder, lambda: self._list(folder))

    def _list(self, folder: str) -> Sequence[dict[str, Any]]:
        try:
            found: Sequence[dict[str, Any]] = self._fs.ls(self._key(folder), detail=True)
        except FileNotFoundError as error:
            self._check_bucket(error)
            return []
        return found

    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of objects, from a listing of all."""
        sizes = self._sizes()
        return sum(sizes.get(self._key(name), 0) for name in names)

    def total_size(self) -> int:
        """Bytes of all objects."""
        return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        found = self._ask("", lambda: self._fs.find(self._root, detail=True))
        return {key: int(one["size"]) for key, one in found.items()}

    # Writing -------------------------------------------------------------------------------------------------------

    def publish(self, name: str, data: bytes | Path) -> bool:
        """Create an object if the name is free."""
        if not self._ask(name, lambda: self._create(name, data)):
            return False
        self._ask(name, lambda: self._try_condition(name, data))
        return True

    def _create(self, name: str, data: bytes | Path) -> bool:
        """As `publish`, once."""
        is_in_parts = _size(data) >= _parts_from(self._scheme, _size(data))
        try:
            if not is_in_parts or self._refuses_parts():
                self._put(name, data, mode="create")
            else:
                self._create_at_once(name, data)
        except Exception as error:
            if is_unknown_condition(error) and not is_in_parts:
                raise OutputError(f"{self.uri}: {_NOT_CONDITIONAL}") from error
            # The answer to an earlier try may have been lost; an upload in parts is then not found any more.
            if not is_taken(error) and not isinstance(error, FileNotFoundError):
                raise
            is_own = self._holds(name, data)
            if not is_own and not is_taken(error):
                raise
            return is_own
        return True

    def _put(self, name: str, data: bytes | Path, *, mode: str) -> None:
        if isinstance(data, Path):
            self._fs.put_file(str(data), self._key(name), mode=mode)
        else:
            self._fs.pipe_file(self._key(name), data, mode=mode)

    def _create_at_once(self, name: str, data: bytes | Path) -> None:
        """Create a large object with one request, the only kind whose condition the store honours.

        Raises:
            OutputError: the object is larger than the store takes in one request.
        """
        size = _size(data)
        if size > MAX_REQUEST_BYTES:
            raise OutputError(_too_large(self.address(name), size, MAX_REQUEST_BYTES))
        try:
            if self._scheme == "s3":
                with _opened(data) as body:
                    about = {"Bucket": self._bucket, "Key": self._key(name).partition("/")[2]}
                    self._fs.call_s3("put_object", Body=body, IfNoneMatch="*", **about)
            else:
                whole = data.read_bytes() if isinstance(data, Path) else data
                self._fs.pipe_file(self._key(name), whole, mode="create", chunksize=size + 1)
        except Exception as error:
            if not is_too_large(error):
                raise
            raise OutputError(_too_large(self.address(name), size, max_size_of(error))) from error

    def _try_condition(self, name: str, data: bytes | Path) -> None:
        """Once, see that a name is refused that is taken: a store that does not know the condition passes over it.

        Args:
            data: what has the name, so that nothing is lost where it is taken once more.

        Raises:
            OutputError: it is not refused.
        """
        if self._is_conditional or _size(data) > MAX_TRIED_BYTES:
            return
        if not _is_refused(lambda: self._put(name, data, mode="create")):
            raise OutputError(f"{self.uri}: {_NOT_CONDITIONAL}")
        self._is_conditional = True

    def _refuses_parts(self) -> bool:
        """Whether a name that is taken is refused to an upload in parts, too; tried out once.

        Some stores look at the condition of a single request alone (Ceph's RADOS Gateway), and would overwrite.
        """
        with self._lock:
            if self._are_parts_conditional is None:
                probe = f"{PROBES}/{secrets.token_hex(8)}"
                self._put(probe, b"taken", mode="overwrite")
                try:
                    are_refused = _is_refused(lambda: self._create_in_parts(probe, b"other"))
                    if not are_refused:
                        self._try_condition(probe, b"another")
                finally:
                    self._remove([self._key(probe)])
                self._are_parts_conditional = are_refused
            return self._are_parts_conditional

    def _create_in_parts(self, name: str, data: bytes) -> None:
        """Create a small object by an upload in parts, which the libraries use for large ones."""
        if self._scheme != "s3":
            self._fs.pipe_file(self._key(name), data, mode="create", chunksize=len(data))
            return
        about = {"Bucket": self._bucket, "Key": self._key(name).partition("/")[2]}
        upload = self._fs.call_s3("create_multipart_upload", **about)["UploadId"]
        try:
            part = self._fs.call_s3("upload_part", PartNumber=1, UploadId=upload, Body=data, **about)
            parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
            self._fs.call_s3(
                "complete_multipart_upload", UploadId=upload, MultipartUpload=parts, IfNoneMatch="*", **about
            )
        except Exception:
            with contextlib.suppress(Exception):
                self._fs.call_s3("abort_multipart_upload", UploadId=upload, **about)
            raise

    def _holds(self, name: str, data: bytes | Path) -> bool:
        """Whether an object has these very bytes."""
        found = self._info(name)
        if found is None or found["size"] != _size(data):
            return False
        if isinstance(data, bytes):
            return self.read(name, len(data)) == data
        return filecmp.cmp(self.fetch(name), data, shallow=False)

    def replace(self, name: str, data: bytes | Path) -> None:
        """Put an object in the place of whatever has its name."""
        self._ask(name, lambda: self._put(name, data, mode="overwrite"))

    def append(self, name: str, text: str) -> None:
        """Add to a local file, which becomes the object now and then."""
        one = self._appended.get(name)
        if one is None:
            one = self._appended[name] = _Appended(self.staging() / f"{secrets.token_hex(8)}.appended")
        with explained(one.path), one.path.open("a", encoding="utf-8") as file:
            file.write(text)
        one.is_waiting = True

    def flush(self, *, if_due: bool = False) -> None:
        """Put what was appended in its place; what is due in the background, as the driver must not wait for a network.

        What could not be put there stays due.
        """
        if not if_due:
            with self._flushing:
                self._put_appended([one for one in self._appended.items() if one[1].is_waiting])
        elif not self._flushing.locked() and (due := [one for one in self._appended.items() if one[1].is_due()]):
            threading.Thread(target=self._flush_due, args=(due,), name="flush", daemon=True).start()

    def _flush_due(self, due: Sequence[tuple[str, _Appended]]) -> None:
        with self._flushing, contextlib.suppress(OutputError):
            self._put_appended(due)

    def _put_appended(self, some: Sequence[tuple[str, _Appended]]) -> None:
        for name, one in some:
            one.put, one.is_waiting = time.monotonic(), False
            try:
                with explained(one.path):
                    text = one.path.read_bytes()
                self.replace(name, text)
            except OutputError:
                one.is_waiting = True
                raise

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        self._ask(name, lambda: self._remove([self._key(name)]))

    def remove_all(self, names: Iterable[str]) -> None:
        """Remove objects, many with one request."""
        keys = [self._key(name) for name in names]
        if keys and self._scheme != "s3":
            self._ask("", lambda: self._remove(keys))
        elif keys:
            self._delete_objects(keys)

    def _remove(self, keys: Sequence[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            if len(keys) == 1:
                self._fs.rm_file(keys[0])
            else:
                self._fs.rm(keys)

    def _delete_objects(self, keys: Sequence[str]) -> None:
        """Remove objects of S3, of which the library passes over those that S3 refuses to remove in a good answer."""
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        for first in range(0, len(keys), DELETE_TOGETHER):
            some = [{"Key": key.partition("/")[2]} for key in keys[first : first + DELETE_TOGETHER]]
            wanted = {"Objects": some, "Quiet": True}
            ask = partial(self._fs.call_s3, "delete_objects", Bucket=self._bucket, Delete=wanted)
            for refused in self._ask("", ask).get("Errors", ()):
                name = refused["Key"].removeprefix(f"{self._root.partition('/')[2]}/")
                error = translate_boto_error(ClientError({"Error": refused}, "DeleteObjects"))
                if not may_pass(error):
                    raise self._error(name, error) from error
                self.remove(name)

    def remove_tree(self, name: str) -> None:
        """Remove all objects below a name, and the one that has it."""
        found = self._ask(name, lambda: self._fs.find(self._key(name)))
        below = [key.removeprefix(f"{self._root}/") for key in found if key.startswith(f"{self._key(name)}/")]
        self.remove_all(below)
        self.remove(name)

    def set_aside(self, name: str) -> None:
        """Copy an object under `_state/torn`, then remove it; not if it is another than was looked at.

        Without locks, another process may have put a whole file there in the meantime.
        """
        target = f"{TORN}/{PurePosixPath(name).name}.{secrets.token_hex(4)}"
        self._ask(name, lambda: self._move(name, target))

    def _move(self, name: str, target: str) -> None:
        found, looked_at = self._info(name), self._copies.get(name)
        if found is None or (looked_at is not None and looked_at.version != _version(found)):
            return
        self._fs.cp_file(self._key(name), self._key(target))
        self._remove([self._key(name)])

    # Processes -----------------------------------------------------------------------------------------------------

    def staging(self) -> Path:
        """This process's local folder, under `TMPDIR`."""
        with self._lock:
            if self._home is None or not self._home.is_dir():
                base = _base()
                # Not every process begins or mends a run, and a killed one leaves copies of some gigabytes.
                self.clean_staging()
                with explained(base):
                    self._home, descriptor = claim_folder(base)
                self._copies.clear()
                self._appended.clear()
                # With the process, not with the store: what reads a copy may live longer.
                self._release = weakref.finalize(ObjectStore, _release, self._home, descriptor, os.getpid())
                COPIES[self._home / "copies"] = self.uri
            return self._home

    def _copy_of(self, name: str) -> Path:
        return self.staging() / "copies" / PurePosixPath(name)

    def leave(self) -> None:
        """Remove the local folder; object stores have no empty ones."""
        if self._release is not None:
            self._release()

    def clean_staging(self) -> None:
        """Remove what processes of this machine left that are no more."""
        base = _base()
        with explained(base):
            for name in {entry.name.removesuffix(".lock") for entry in base.iterdir()}:
                remove_if_dead(base / name)

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


def _is_refused(create: Callable[[], object]) -> bool:
    """Whether a request to create an object whose name is taken is refused for that; not where it is done all the same,
    or where the store does not know the condition.
    """
    try:
        create()
    except Exception as error:
        if not is_taken(error) and not is_unknown_condition(error):
            raise
        return is_taken(error)
    return False


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


def _parts_from(scheme: str, size: int) -> int:
    """From how many bytes on the library would upload an object of this size in parts, or resumably."""
    if scheme != "s3":
        return RESUMABLE_BYTES
    from s3fs import core

    return min(MAX_REQUEST_BYTES, 2 * int(core.calculate_chunksize(size)))


def _opened(data: bytes | Path) -> contextlib.AbstractContextManager[Any]:
    return data.open("rb") if isinstance(data, Path) else contextlib.nullcontext(data)


def _too_large(where: str, size: int, max_bytes: int | None) -> str:
    limit = "" if max_bytes is None else f" of {max_bytes / 2**20:,.0f} MiB"
    return (
        f"{where}: has {size / 2**20:,.0f} MiB, more than the one request{limit} in which this store creates an object"
        " if absent (it overwrites by uploads in parts); use a smaller output.samples_per_shard"
    )


def _connect(scheme: str) -> Any:
    """The file system of a scheme, which remembers no listing: other processes write, too."""
    # It logs what it raises with a traceback, and tells it to us as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        import s3fs

        found = s3fs.S3FileSystem(config_kwargs={"connect_timeout": CONNECT_SECONDS}, **options)
        found.retries = S3_TRIES
        return found
    # The package's own name may stand for experimental support of other kinds of buckets.
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem(**options)


def _base() -> Path:
    """The folder of this user's processes, which nobody else can look into."""
    base = Path(tempfile.gettempdir()) / f"riskforge-{os.getuid()}"
    with explained(base):
        base.mkdir(mode=0o700, exist_ok=True)
        about = base.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise OutputError(f"{base}: is not a folder of this user alone; remove it, or set TMPDIR to another folder")
    return base


def _release(home: Path, descriptor: int, owner: int) -> None:
    COPIES.pop(home / "copies", None)
    release_folder(home, descriptor, owner)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _version(info: dict[str, Any]) -> str:
    """What changes when an object is written: the generation on GCS; on S3 the ETag, or the time for equal bytes."""
    return str(info.get("generation") or (info.get("ETag"), info.get("LastModified"), info.get("size")))

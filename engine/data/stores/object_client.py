"""Requests to an object store: the connection, names and keys, retries and errors."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from engine.data.stores.file_errors import pause
from engine.data.stores.object_errors import NO_BUCKET, is_foreign, may_pass, remedy, status_of
from engine.errors import OutputError, StoreLostError

Answer = TypeVar("Answer")

# Requests whose error may be transient are retried after these pauses, on top of the libraries' own retries; no more
# once so much time has passed, so that a network that drops everything is noticed before the waiting worker is judged
# to hang.
RETRY_WAITS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
MAX_RETRY_SECONDS = 30.0
CONNECT_SECONDS = 5
# Tries of s3fs, each of which makes five of botocore; ours come on top.
S3_TRIES = 1
CHUNK_BYTES = 2**20
# What S3 takes in one request.
DELETE_TOGETHER = 1000


class ObjectClient:
    """A folder of a bucket, by requests. Thread-safe.

    Attributes:
        scheme: `s3` or `gs`.
        root: bucket and prefix.
    """

    def __init__(self, scheme: str, bucket: str, prefix: str) -> None:
        self.scheme, self.bucket, self.root = scheme, bucket, f"{bucket}/{prefix}"
        self.uri = f"{scheme}://{self.root}"
        self._lock = threading.Lock()
        self._connection: Any = None

    @property
    def fs(self) -> Any:
        """The `fsspec` file system, made when it is first needed."""
        with self._lock:
            if self._connection is None:
                self._connection = connect(self.scheme)
            return self._connection

    def after_fork(self) -> None:
        """Drop connection and lock in a forked process: they belong to the parent."""
        self._lock, self._connection = threading.Lock(), None

    # Names ---------------------------------------------------------------------------------------------------------

    def address(self, name: str = "") -> str:
        """The address of a name.

        Raises:
            ValueError: the name leads out of the folder.
        """
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError(f"{name!r} is not a name inside the store")
        return f"{self.uri}/{pure}" if pure.parts else self.uri

    def key(self, name: str) -> str:
        """Bucket and key of a name, as `fsspec` takes them."""
        return self.address(name).partition("://")[2]

    def name_of(self, key: str) -> str:
        """The name of an object by bucket and key."""
        return key.removeprefix(f"{self.root}/")

    def s3_address(self, name: str) -> dict[str, str]:
        """Bucket and key of a name, as requests of S3 take them."""
        return {"Bucket": self.bucket, "Key": self.key(name).partition("/")[2]}

    # Requests ------------------------------------------------------------------------------------------------------

    def request(self, name: str, action: Callable[[], Answer]) -> Answer:
        """The result of an action on the store, which is retried after a pause where its error may be transient.

        Args:
            name: of the object, for messages.

        Raises:
            StoreLostError: the error persists.
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
                        raise self.error(name, error) from error
                    raise
            pause(wait)
        raise AssertionError("the last try returns or raises")

    def error(self, name: str, error: Exception) -> OutputError:
        """The error to raise in place of one of the libraries."""
        kind = StoreLostError if may_pass(error) else OutputError
        return kind(f"{self.address(name)}: {remedy(error, self.scheme)}")

    def info(self, name: str) -> dict[str, Any] | None:
        """Attributes of an object, or None where there is none; one try."""
        try:
            info: dict[str, Any] = self.fs.info(self.key(name))
        except FileNotFoundError as error:
            self._check_bucket(error)
            return None
        return info

    def entries(self, folder: str) -> Sequence[dict[str, Any]]:
        """Attributes of what is in a folder; one try."""
        try:
            entries: Sequence[dict[str, Any]] = self.fs.ls(self.key(folder), detail=True)
        except FileNotFoundError as error:
            self._check_bucket(error)
            return []
        return entries

    def download(self, name: str, path: Path) -> dict[str, Any] | None:
        """Write an object into a local file, and return its attributes as `info` does; one try.

        On S3 one request does both. None where there is no such object, which may be a folder, or it is a large one;
        nothing is of use at the path then.
        """
        fs = self.fs
        if self.scheme != "s3":
            return None
        from fsspec.asyn import sync

        with contextlib.suppress(FileNotFoundError):
            attributes: dict[str, Any] | None = sync(fs.loop, _download, fs, self.s3_address(name), path)
            return attributes
        return None

    def _check_bucket(self, error: FileNotFoundError) -> None:
        """Distinguish a missing bucket from a missing name: for the latter S3 returns an empty listing.

        Raises:
            FileNotFoundError: there is no bucket.
        """
        has_bucket = status_of(error) != 404 if self.scheme == "s3" else self.fs.exists(self.bucket)
        if not has_bucket:
            raise FileNotFoundError(NO_BUCKET) from error

    def put(self, name: str, data: bytes | Path, *, mode: str) -> None:
        """Write an object; one try.

        Args:
            mode: `create` with the condition that the name is free, or `overwrite`.
        """
        if isinstance(data, Path):
            self.fs.put_file(str(data), self.key(name), mode=mode)
        else:
            self.fs.pipe_file(self.key(name), data, mode=mode)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, if they are there; one try."""
        keys = [self.key(name) for name in names]
        with contextlib.suppress(FileNotFoundError):
            if len(keys) == 1:
                self.fs.rm_file(keys[0])
            else:
                self.fs.rm(keys)

    def remove_many(self, names: Sequence[str]) -> None:
        """Remove objects, many with one request, with retries."""
        if names and self.scheme != "s3":
            self.request("", lambda: self.remove(names))
        elif names:
            self._delete_objects([self.key(name) for name in names])

    def _delete_objects(self, keys: Sequence[str]) -> None:
        """Remove objects of S3, whose answer of status 200 may list refusals; s3fs ignores them."""
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        for first in range(0, len(keys), DELETE_TOGETHER):
            batch = [{"Key": key.partition("/")[2]} for key in keys[first : first + DELETE_TOGETHER]]
            wanted = {"Objects": batch, "Quiet": True}
            delete = partial(self.fs.call_s3, "delete_objects", Bucket=self.bucket, Delete=wanted)
            for refused in self.request("", delete).get("Errors", ()):
                name = self.name_of(f"{self.bucket}/{refused['Key']}")
                error = translate_boto_error(ClientError({"Error": refused}, "DeleteObjects"))
                if not may_pass(error):
                    raise self.error(name, error) from error
                self.request(name, partial(self.remove, [name]))


async def _download(fs: Any, address: dict[str, str], path: Path) -> dict[str, Any] | None:
    """As `ObjectClient.download`, of S3: a large object is left to s3fs, which asks for its parts side by side."""
    answer = await fs._call_s3("get_object", **address)
    body = answer["Body"]
    try:
        if answer["ContentLength"] > fs.default_block_size:
            return None
        with path.open("wb") as file:
            while chunk := await body.read(CHUNK_BYTES):
                file.write(chunk)
    finally:
        body.close()
    known = {name: answer.get(name, "") for name in ("ETag", "LastModified")}
    return known | {"size": answer["ContentLength"], "type": "file"}


def connect(scheme: str) -> Any:
    """The file system of a scheme, without a cache of listings: other processes write, too."""
    # gcsfs logs errors with a traceback before it raises them.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        import s3fs

        file_system = s3fs.S3FileSystem(config_kwargs={"connect_timeout": CONNECT_SECONDS}, **options)
        file_system.retries = S3_TRIES
        return file_system
    # The package's own name may stand for experimental support of other kinds of buckets.
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem(**options)

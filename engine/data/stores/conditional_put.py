"""Creating an object if its name is free: by a condition that the store itself checks, and is tested to check.

The condition is `If-None-Match: *` on S3 (with the last request of an upload in parts), `ifGenerationMatch=0` on GCS.
After a lost answer the retry looks like a refusal; the bytes distinguish the two.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.data.stores.base import STATE
from engine.data.stores.object_client import ObjectClient
from engine.data.stores.object_errors import is_taken, is_too_large, is_unknown_condition, max_size_of
from engine.errors import OutputError

# Whether the store checks the condition is tested with a file of at most this size.
MAX_TRIED_BYTES = 2**16
# From this size on gcsfs uploads files resumably.
RESUMABLE_BYTES = 5 * 2**20
# What a store takes in one request, as those of Amazon and Google do.
MAX_REQUEST_BYTES = 5 * 2**30
PROBES = f"{STATE}/probes"

_NOT_CONDITIONAL = (
    "this store overwrites where it was asked to create if absent (If-None-Match: *), so that shards would not be safe"
    " from a second writer; use a store that honours it, or a folder"
)


class ConditionalPut:
    """Creates objects of a store.

    Args:
        holds: whether an object has the given bytes.
    """

    def __init__(self, client: ObjectClient, holds: Callable[[str, bytes | Path], bool]) -> None:
        self._client, self._holds = client, holds
        self._lock = threading.RLock()
        self._is_conditional = False
        self.are_parts_conditional: bool | None = None

    def after_fork(self) -> None:
        """Drop the lock of the parent in a forked process."""
        self._lock = threading.RLock()

    def publish(self, name: str, data: bytes | Path) -> bool:
        """As `Store.publish`.

        Raises:
            OutputError: the store refuses, does not check the condition, or takes no object of this size.
        """
        if not self._client.request(name, lambda: self._create(name, data)):
            return False
        self._client.request(name, lambda: self._try_condition(name, data))
        return True

    def _create(self, name: str, data: bytes | Path) -> bool:
        """As `publish`, once."""
        size = data_size(data)
        is_in_parts = size >= _parts_from(self._client.scheme, size)
        try:
            if not is_in_parts or self._refuses_parts():
                self._client.put(name, data, mode="create")
            else:
                self._create_at_once(name, data)
        except Exception as error:
            if is_unknown_condition(error) and not is_in_parts:
                raise OutputError(f"{self._client.uri}: {_NOT_CONDITIONAL}") from error
            # The answer to an earlier try may have been lost; an upload in parts is then gone.
            if not is_taken(error) and not isinstance(error, FileNotFoundError):
                raise
            is_own = self._holds(name, data)
            if not is_own and not is_taken(error):
                raise
            return is_own
        return True

    def _create_at_once(self, name: str, data: bytes | Path) -> None:
        """Create a large object with one request, the only kind whose condition the store checks.

        Raises:
            OutputError: the object is larger than the store takes in one request.
        """
        client, size = self._client, data_size(data)
        if size > MAX_REQUEST_BYTES:
            raise OutputError(_too_large(client.address(name), size, MAX_REQUEST_BYTES))
        try:
            if client.scheme == "s3":
                with _opened(data) as body:
                    client.fs.call_s3("put_object", Body=body, IfNoneMatch="*", **client.s3_address(name))
            else:
                whole = data.read_bytes() if isinstance(data, Path) else data
                client.fs.pipe_file(client.key(name), whole, mode="create", chunksize=size + 1)
        except Exception as error:
            if not is_too_large(error):
                raise
            raise OutputError(_too_large(client.address(name), size, max_size_of(error))) from error

    def _try_condition(self, name: str, data: bytes | Path) -> None:
        """Test once that creating a taken name is refused: a store that does not know the condition ignores it.

        Args:
            data: what has the name, so that nothing is lost where it is overwritten.

        Raises:
            OutputError: it is not refused.
        """
        if data_size(data) > MAX_TRIED_BYTES:
            return
        with self._lock:
            if self._is_conditional:
                return
            if not _is_refused(lambda: self._client.put(name, data, mode="create")):
                raise OutputError(f"{self._client.uri}: {_NOT_CONDITIONAL}")
            self._is_conditional = True

    def _refuses_parts(self) -> bool:
        """Whether a taken name is refused to an upload in parts, too; tested once.

        Some stores check the condition of a single request only (Ceph's RADOS Gateway), and would overwrite.
        """
        with self._lock:
            if self.are_parts_conditional is None:
                probe = f"{PROBES}/{secrets.token_hex(8)}"
                self._client.put(probe, b"taken", mode="overwrite")
                try:
                    are_refused = _is_refused(lambda: self._create_in_parts(probe, b"other"))
                    if not are_refused:
                        self._try_condition(probe, b"another")
                finally:
                    self._client.remove([probe])
                self.are_parts_conditional = are_refused
            return self.are_parts_conditional

    def _create_in_parts(self, name: str, data: bytes) -> None:
        """Create a small object by an upload in parts, which the libraries use for large ones."""
        fs = self._client.fs
        if self._client.scheme != "s3":
            fs.pipe_file(self._client.key(name), data, mode="create", chunksize=len(data))
            return
        target = self._client.s3_address(name)
        upload = fs.call_s3("create_multipart_upload", **target)["UploadId"]
        try:
            part = fs.call_s3("upload_part", PartNumber=1, UploadId=upload, Body=data, **target)
            parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
            fs.call_s3("complete_multipart_upload", UploadId=upload, MultipartUpload=parts, IfNoneMatch="*", **target)
        except Exception:
            with contextlib.suppress(Exception):
                fs.call_s3("abort_multipart_upload", UploadId=upload, **target)
            raise


def data_size(data: bytes | Path) -> int:
    """Bytes of data, or of a file with it."""
    return data.stat().st_size if isinstance(data, Path) else len(data)


def _is_refused(create: Callable[[], object]) -> bool:
    """Whether a request to create an object under a taken name is refused for that reason.

    False where it is done all the same, or where the store does not know the condition.
    """
    try:
        create()
    except Exception as error:
        if not is_taken(error) and not is_unknown_condition(error):
            raise
        return is_taken(error)
    return False


def _parts_from(scheme: str, size: int) -> int:
    """From how many bytes on the library would upload an object of this size in parts, or resumably."""
    if scheme != "s3":
        return RESUMABLE_BYTES
    from s3fs import core

    return min(MAX_REQUEST_BYTES, 2 * int(core.calculate_chunksize(size)))


def _opened(data: bytes | Path) -> contextlib.AbstractContextManager[Any]:
    return data.open("rb") if isinstance(data, Path) else contextlib.nullcontext(data)


def _too_large(address: str, size: int, max_bytes: int | None) -> str:
    limit = "" if max_bytes is None else f" of {max_bytes / 2**20:,.0f} MiB"
    return (
        f"{address}: has {size / 2**20:,.0f} MiB, more than the one request{limit} in which this store creates an"
        " object if absent (it overwrites by uploads in parts); use a smaller output.samples_per_shard"
    )

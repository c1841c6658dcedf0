"""Which errors of the system and of the libraries are transient, and which need a change by the user."""

from __future__ import annotations

import errno
import inspect
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp.client_exceptions
import botocore.exceptions
import pytest
import requests.exceptions
import urllib3.exceptions
from fsspec.exceptions import FSTimeoutError
from gcsfs.retry import ChecksumError, HttpError

from engine.data.stores import file_errors
from engine.data.stores.folder import FolderStore
from engine.data.stores.object_errors import may_pass, remedy
from engine.data.stores.opening import open_store
from engine.errors import EXIT_DRAINED, EXIT_USER, OutputError, StoreLostError

# By name, as the system has them: a shared file system that is temporarily unavailable. All others need a change by
# the user.
AWAY = {
    "EIO", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ECONNABORTED",
    "ECONNREFUSED", "ECONNRESET", "ENOTCONN", "ESHUTDOWN", "EREMOTEIO",
}  # fmt: skip
NUMBERS = sorted(errno.errorcode)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: errno.errorcode[number])
def test_an_error_of_the_system_is_transient_or_to_be_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Every error number, from the call that publishes: its exit code, and one sentence with the path."""
    monkeypatch.setattr(file_errors, "LOST_WAITS", (0.0,))
    store = open_store(str(tmp_path / "run"))
    store.publish("there", b"")
    calls = failing(monkeypatch, "link", number, times=10)
    if number == errno.EEXIST:
        return  # The name is taken: no error.
    with pytest.raises(OutputError) as caught:
        store.publish("x", b"x")
    is_away = errno.errorcode[number] in AWAY
    assert isinstance(caught.value, StoreLostError) == is_away
    assert caught.value.exit_code == (EXIT_DRAINED if is_away else EXIT_USER)
    # Where the folder lacks, it is made, and the link tried once more.
    assert len(calls) == (2 if is_away or number == errno.ENOENT else 1)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, *, times: int) -> list[Any]:
    """Let a call of the system fail so often; what it was called with."""
    calls: list[Any] = []
    inner = getattr(os, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return inner(*arguments, **options)

    monkeypatch.setattr(os, name, fail)
    return calls


ACTIONS: dict[str, tuple[str, Callable[[FolderStore], Any], Any]] = {
    "publish": ("link", lambda store: (store.publish("new", b"1"), store.read("new")), (True, b"1")),
    "replace": ("fsync", lambda store: (store.replace("there", b"1"), store.read("there")), (None, b"1")),
    "exists": ("stat", lambda store: store.exists("there"), True),
    "is_folder": ("stat", lambda store: store.is_folder("there"), False),
    "read": ("open", lambda store: store.read("there"), b"0"),
    "tail": ("stat", lambda store: store.tail("there", 1), b"0"),
    "fetch": ("stat", lambda store: store.fetch("there").read_bytes(), b"0"),
    "list": ("scandir", lambda store: store.list(), ["there"]),
    "remove": ("unlink", lambda store: (store.remove("there"), store.exists("there")), (None, False)),
    "remove_tree": ("unlink", lambda store: (store.remove_tree("there"), store.exists("there")), (None, False)),
    "set_aside": ("rename", lambda store: (store.set_aside("there"), store.exists("there")), (None, False)),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_file_system_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """Each method does what it would, and none takes what it cannot look at for what is not there."""
    monkeypatch.setattr(file_errors, "LOST_WAITS", (0.0,) * 4)
    store = open_store(str(tmp_path))
    assert isinstance(store, FolderStore)
    (tmp_path / "there").write_bytes(b"0")
    name, act, expected = ACTIONS[action]
    with monkeypatch.context() as patch:
        calls = failing(patch, name, errno.ESTALE, times=3)
        assert act(store) == expected
    assert len(calls) > 3
    (tmp_path / "there").write_bytes(b"0")
    (tmp_path / "new").unlink(missing_ok=True)
    with monkeypatch.context() as patch, pytest.raises(StoreLostError, match="the file system does not answer"):
        failing(patch, name, errno.ESTALE, times=1000)
        act(store)


# Libraries ------------------------------------------------------------------------------------------------------------


def kinds(module: ModuleType, base: type[BaseException]) -> list[type[BaseException]]:
    """The exceptions of a module that are of a kind."""
    return [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, base)]


def raised(kind: type[BaseException]) -> BaseException:
    """An exception, made without what its constructor and its text ask for: its kind is what counts."""
    plain = type(kind.__name__, (kind,), {"__str__": lambda self: "of the test", "__module__": kind.__module__})
    error = plain.__new__(plain)
    assert isinstance(error, kind)
    return error


OF_BOTOCORE = {
    *kinds(botocore.exceptions, botocore.exceptions.HTTPClientError),
    botocore.exceptions.IncompleteReadError, botocore.exceptions.FlexibleChecksumError,
    *[one for one in [getattr(botocore.exceptions, "ResponseStreamingError", None)] if one],
}  # fmt: skip
OF_REQUESTS = {
    *kinds(requests.exceptions, requests.exceptions.ConnectionError), requests.exceptions.ReadTimeout,
    requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError,
}  # fmt: skip
OF_AIOHTTP = {
    *kinds(aiohttp.client_exceptions, aiohttp.client_exceptions.ClientConnectionError),
    aiohttp.client_exceptions.ClientPayloadError,
}
PASSING = [
    *OF_BOTOCORE, *OF_REQUESTS, *OF_AIOHTTP, urllib3.exceptions.IncompleteRead, urllib3.exceptions.ProtocolError,
    FSTimeoutError, ChecksumError, TimeoutError, ConnectionResetError, ConnectionRefusedError, BrokenPipeError,
    socket.gaierror, json.JSONDecodeError,
]  # fmt: skip
STAYING = [
    botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.ProfileNotFound, botocore.exceptions.ParamValidationError, PermissionError, FileNotFoundError,
    FileExistsError, IsADirectoryError, ValueError, KeyError, OSError,
]  # fmt: skip


# In an order that two processes agree on: the kinds are sets.
@pytest.mark.parametrize("kind", sorted(PASSING, key=repr), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_errors_of_the_network_may_pass(kind: type[BaseException]) -> None:
    """Of every library, alone and as the cause of another; the remedy says that the run can be continued."""
    error = raised(kind)
    outer = OSError(errno.EIO, "of s3fs")
    outer.__cause__ = error
    for one in (error, outer):
        assert may_pass(one)
        for scheme in ("s3", "gs"):
            assert "the same command continues" in remedy(one, scheme)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", STAYING, ids=lambda kind: kind.__name__)
def test_errors_of_settings_and_permissions_stay(kind: type[BaseException]) -> None:
    """Another try would fare no better."""
    assert not may_pass(raised(kind))


@pytest.mark.parametrize("status", range(400, 530))
def test_states_of_http_pass_or_stay(status: int) -> None:
    """As Google's library raises them, and as Amazon's does."""
    passing = {408, 409, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 525), 529}
    answer = {"Error": {"Code": str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}
    for error in (
        HttpError({"code": status, "message": "of the test"}),
        botocore.exceptions.ClientError(answer, "GetObject"),  # type: ignore[arg-type]
    ):
        assert may_pass(error) == (status in passing)

"""Files of others that are read whole: regular ones alone, up to a limit each. And JSON that can be relied on."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

# Manifests, plans, evaluations, statistics of a conditioning artefact: what grows with classes and shards.
MAX_DOCUMENT_BYTES = 64 * 2**20
# Commit records, leases, notes of the quarantine, settings of a model.
MAX_RECORD_BYTES = 4 * 2**20
MAX_INTEGER = 2**63
# An object nests no deeper in any file of a run; far below where Python's own parser gives up.
MAX_DEPTH = 60

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class UnsuitableFileError(OSError):
    """Something that is no file of bytes, or a file larger than anything in its place may be."""


def check_regular(path: Path) -> None:
    """Refuse what cannot be opened and read to an end: pipes, devices, sockets, and links to them.

    Raises:
        UnsuitableFileError: it is one.
        OSError: nothing is there.
    """
    _check_mode(path.stat().st_mode)


def read_whole(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file, without waiting and without taking more memory than the limit.

    Raises:
        UnsuitableFileError: it is a pipe, a device or the like, or larger than `max_bytes`.
        OSError: it cannot be read.
    """
    # Before it is opened, which alone has effects on some devices; and after, as it may have been replaced.
    _check_mode(path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        _check_mode(about.st_mode)
        if about.st_size > max_bytes:
            raise too_large(about.st_size, max_bytes)
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_large(len(data), max_bytes)
    return data


def too_large(num_bytes: int, max_bytes: int) -> UnsuitableFileError:
    """What to raise about a file that is larger than its limit."""
    return UnsuitableFileError(
        f"has {num_bytes:,} bytes, more than the {max_bytes:,} that are read of such a file; move it away or restore it"
    )


def _check_mode(mode: int) -> None:
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise UnsuitableFileError(f"is {name}, not a file; move it away or restore the file")


def parse_json(data: bytes | str) -> Any:
    """A document in JSON as every reader understands it: finite numbers, whole ones of 64 bits, valid Unicode.

    Raises:
        ValueError: it is none, with the reason.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_tree(value, MAX_DEPTH)
    return value


def _check_tree(value: Any, depth: int) -> None:
    if depth < 0:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_text(key)
            _check_tree(inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            _check_tree(inner, depth - 1)
    elif isinstance(value, str):
        _check_text(value)


def _check_text(text: str) -> None:
    """Refuse halves of characters, which JSON can hold and no file or terminal takes.

    Raises:
        UnicodeEncodeError: there is one; it is a `ValueError`.
    """
    if not text.isascii():
        text.encode()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:40]}, which is too large")
    return value


def _whole(text: str) -> int:
    # Of the text: Python refuses to convert some thousand digits.
    if len(text) > 20 or not -MAX_INTEGER <= (value := int(text)) < MAX_INTEGER:
        raise ValueError(f"it holds the whole number {text[:40]}, which is too large")
    return value

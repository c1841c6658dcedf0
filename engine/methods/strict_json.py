"""Strict JSON: only what all readers parse alike."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_INTEGER = 2**63
# No file of a run nests deeper; far below the limit of Python's own parser.
MAX_DEPTH = 60


def parse_json(data: bytes | str, max_depth: int = MAX_DEPTH) -> Any:
    """A document in JSON as all readers parse it: finite numbers, whole ones of 64 bits, valid Unicode, no name
    twice in an object.

    Args:
        max_depth: how deep objects and lists may nest.

    Raises:
        ValueError: it is not; the message has the reason.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_once,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_tree(value, max_depth)
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a name that it has twice some readers take the first value, and others the last."""
    value: dict[str, Any] = {}
    for name, inner in pairs:
        if name in value:
            raise ValueError(f"it holds {name[:40]!r} twice")
        value[name] = inner
    return value


def _check_text(text: str) -> None:
    """Refuse lone surrogates, which JSON can hold but no file or terminal accepts.

    Raises:
        UnicodeEncodeError: there is one; a subclass of `ValueError`.
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
    # The length first: Python refuses to convert thousands of digits.
    if len(text) > 20 or not -MAX_INTEGER <= (value := int(text)) < MAX_INTEGER:
        raise ValueError(f"it holds the whole number {text[:40]}, which is too large")
    return value

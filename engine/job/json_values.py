"""Digests of JSON values, and the differences between two."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any


def digest_of(value: Any) -> str:
    """Hexadecimal digest of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def difference(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines `path: old -> new` for every place where two JSON values differ."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in difference(old.get(key), new.get(key), _join(where, key))]
    if isinstance(old, list) and isinstance(new, list):
        pairs = itertools.zip_longest(old, new)
        return [
            line
            for place, (first, second) in enumerate(pairs)
            for line in difference(first, second, _join(where, str(place)))
        ]
    return [f"{where}: {_brief(old)} -> {_brief(new)}"]


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _brief(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."

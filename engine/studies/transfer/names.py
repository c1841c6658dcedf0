"""Short names of classifiers by their addresses, for tables and for folders of runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

MAX_CHARS = 24


def named(addresses: Sequence[str]) -> dict[str, str]:
    """Addresses by names: the last part of each, with the part before it where that is not unique."""
    names = [_name(address, 1) for address in addresses]
    counts = Counter(names)
    names = [_name(address, 2) if counts[name] > 1 else name for name, address in zip(names, addresses, strict=True)]
    taken: dict[str, str] = {}
    for name, address in zip(names, addresses, strict=True):
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name}-{number}", number + 1
        taken[unique] = address
    return taken


def _name(address: str, num_parts: int) -> str:
    """The last parts of an address in lower case letters, digits and inner hyphens."""
    parts = [part for part in re.split(r"[/\\:]+", address.strip()) if part]
    # Files of programs have an extension.
    parts = [re.sub(r"\.(pt2?|pth|onnx)$", "", part.lower()) for part in parts[-num_parts:]]
    text = re.sub(r"[^a-z0-9]+", "-", "-".join(parts)).strip("-")
    return text[-MAX_CHARS:].strip("-") or "classifier"

"""Numbers and texts as the report shows them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

ABSENT = "n/a"


def number(value: float) -> str:
    """A score: three decimals below ten, one above."""
    if math.isnan(value):
        return ABSENT
    if 0 < abs(value) < 0.0005:
        return "<0.001" if value > 0 else ">-0.001"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def signed(value: float) -> str:
    """A difference: a score with its sign."""
    text = number(value)
    return text if value <= 0 or text == ABSENT else f"+{text}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return ABSENT if math.isnan(share) else f"{share * 100:.1f} %"


def clip(text: str, most: int) -> str:
    """A text of at most `most` characters; what is cut ends in an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def joined(items: Iterable[str], most: int, separator: str = ", ") -> str:
    """The first `most` items joined, with an ellipsis where there are more."""
    first = list(itertools.islice(items, most + 1))
    return separator.join(first[:most]) + (f"{separator}…" if len(first) > most else "")


def many(count: int, noun: str) -> str:
    """A count with its noun: "1 image", "2 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

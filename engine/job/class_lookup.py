"""Which class a text names: one way for job files, folders, tars and tables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

_INDEX = re.compile(r"[0-9]{1,9}")
_NUMBERED = re.compile(r"(.+) \(([0-9]{1,9})\)", re.DOTALL)


def find_class(word: str, labels: Sequence[str]) -> list[int]:
    """Indices of the classes that a text names: one, none, or several where it is not unique.

    A name as it is written comes first, then without regard to the form of its Unicode, then of its case. ImageNet's
    labels with synonyms ("Chihuahua, dog") are found by any of them. Last, underscores, blanks and compatible
    characters (full width, ligatures) are equal. `crane (134)` is the class of that name and index.
    """
    if not folded(word):
        return []
    for key in (_as_written, _composed, _caseless):
        if found := _equal(word, labels, key):
            return found
    return (
        _synonymous(word, labels, _caseless)
        or _equal(word, labels, folded)
        or _synonymous(word, labels, folded)
        or _numbered(word, labels)
    )


def has_numeric_names(labels: Sequence[str]) -> bool:
    """Whether a class is called by a number, so that a number alone may be its name or an index."""
    return any(_is_number(folded(part)) for label in labels for part in (label, *label.split(",")))


def is_index(text: str) -> bool:
    """Whether a text could be a class index."""
    return _INDEX.fullmatch(text) is not None


def _is_number(text: str) -> bool:
    """Whether a text has digits and no word, such as 7, -1, 0.5, 1e3 or 10-20, in any script."""
    letters = "".join(one for one in text if one.isalpha())
    return any(one.isdigit() for one in text) and letters in ("", "e")


def folded(text: str) -> str:
    """A text without what case, Unicode forms, underscores and blanks make different."""
    return " ".join(unicodedata.normalize("NFKC", _caseless(text)).casefold().replace("_", " ").split())


def _as_written(text: str) -> str:
    return text


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _caseless(text: str) -> str:
    return _composed(_composed(text).casefold())


def _equal(word: str, labels: Sequence[str], key: Callable[[str], str]) -> list[int]:
    wanted = key(word)
    return [index for index, label in enumerate(labels) if key(label) == wanted]


def _synonymous(word: str, labels: Sequence[str], key: Callable[[str], str]) -> list[int]:
    wanted = key(word)
    return [index for index, label in enumerate(labels) if wanted in [key(part.strip()) for part in label.split(",")]]


def _numbered(word: str, labels: Sequence[str]) -> list[int]:
    """The class of a name with its index, as the engine writes two classes of one name."""
    match = _NUMBERED.fullmatch(word)
    index = int(match[2]) if match else len(labels)
    return [index] if match and index < len(labels) and _composed(labels[index]) == _composed(match[1]) else []

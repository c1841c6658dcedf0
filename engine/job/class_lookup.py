"""The class that a text names, looked up in the same way for job files, folders, tars and tables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

_INDEX = re.compile(r"[0-9]{1,9}")
_NUMBERED = re.compile(r"(.+) \(([0-9]{1,9})\)", re.DOTALL)


def find_class(word: str, labels: Sequence[str]) -> list[int]:
    """Indices of the classes that a text names: one, none, or several where it is not unique.

    Exact names are tried first, then names in another Unicode normalisation form, then in another case. ImageNet's
    labels with synonyms ("Chihuahua, dog") are matched by each of them. Last, underscores, blanks and compatible
    characters (full width, ligatures) count as equal. `crane (134)` is the class of that name and index.
    """
    if not folded(word):
        return []
    for key in (_as_written, _composed, _caseless):
        if indices := _equal(word, labels, key):
            return indices
    return (
        _synonymous(word, labels, _caseless)
        or _equal(word, labels, folded)
        or _synonymous(word, labels, folded)
        or _numbered(word, labels)
    )


def has_numeric_names(labels: Sequence[str]) -> bool:
    """Whether a class has a number for a name, so that a number alone may be its name or an index."""
    return any(_is_number(folded(part)) for label in labels for part in (label, *label.split(",")))


def is_index(text: str) -> bool:
    """Whether a text could be a class index."""
    return _INDEX.fullmatch(text) is not None


def _is_number(text: str) -> bool:
    """Whether a text has digits and no word, such as 7, -1, 0.5, 1e3 or 10-20, in any script."""
    letters = "".join(character for character in text if character.isalpha())
    return any(character.isdigit() for character in text) and letters in ("", "e")


def folded(text: str) -> str:
    """A text without differences of case, Unicode form, underscores and blanks."""
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
    """The class of a name with its index, as the engine writes two classes of the same name."""
    match = _NUMBERED.fullmatch(word)
    index = int(match[2]) if match else len(labels)
    return [index] if match and index < len(labels) and _composed(labels[index]) == _composed(match[1]) else []

"""Class names that can be used in a prompt: `a photo of a NAME`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from engine.errors import JobError

# What to do about a head with one output.
SINGLE_LOGIT = (
    "a head with a single logit z is read as the two logits [0, z] once both classes have a name: put a file"
    " class_names.txt into the folder, with the class of z < 0 in its first line and that of z > 0 in its second"
)
REMEDY = "give every class its own name in words, as in 'a photo of a ...'"
# Of names in a model's folder.
FOLDER_REMEDY = f"{REMEDY}, or put a file class_names.txt into the folder, one name a line"
# Of an index; Python converts no numeral of thousands of digits.
_INDEX = re.compile(r"\d{1,9}")
_MAX_SHOWN_CHARS = 60
_NO_NAME = re.compile(r"(?i:label|class)[ _-]?\d+|n\d{8}")


def check_names(names: Sequence[Any], where: str, remedy: str = REMEDY) -> list[str]:
    """Class names, if each can be used in a prompt; some may be equal, as ImageNet's two cranes.

    Args:
        where: the model and the field, for messages.
        remedy: what to do about a name that cannot be used.

    Raises:
        JobError: for the first name that cannot be used.
    """
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise JobError(f"{where}: class {index} has no name ({name!r}); {remedy}")
        if name != name.strip():
            raise JobError(f"{where}: the name of class {index}, {name!r}, begins or ends with a space; {remedy}")
        if (unprintable := next(filter(_is_unprintable, name), None)) is not None:
            raise JobError(
                f"{where}: the name of class {index}, {_clipped(name)}, has the character {unprintable!a}, which"
                f" cannot be printed; {remedy}"
            )
        if _NO_NAME.fullmatch(name):
            raise JobError(
                f"{where}: class {index} is called {name!r}, a number instead of a name: the prompt of CLIP and the"
                f" diffusion model would be 'a photo of a {name}'; {remedy}"
            )
    if len(set(names)) < min(2, len(names)):
        raise JobError(f"{where}: all classes are called {names[0]!r}; {remedy}")
    return list(names)


def _is_unprintable(character: str) -> bool:
    """Whether a character is a control character, ends a line or is half a surrogate pair."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _clipped(name: str) -> str:
    return ascii(name if len(name) <= _MAX_SHOWN_CHARS else f"{name[:_MAX_SHOWN_CHARS]}...")


def in_index_order(labels: dict[str, Any], where: str) -> list[Any]:
    """The values of a mapping from indices to names, by index.

    Raises:
        JobError: an index is missing.
    """
    by_index = {int(key): value for key, value in labels.items() if _INDEX.fullmatch(str(key))}
    lacking = next((index for index in range(len(labels)) if index not in by_index), None)
    if lacking is not None:
        raise JobError(f"{where} has no class {lacking}; number the {len(labels)} classes from 0, without gaps")
    return [by_index[index] for index in range(len(labels))]

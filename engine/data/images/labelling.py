"""Labels of a set of images: each is read in one way, which is settled for the whole set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.data.images.decode import UnusableImageError
from engine.data.images.label_files import LABEL_MAP, LEFT_OUT, as_json
from engine.job.class_lookup import find_class, folded, has_numeric_names, is_index
from engine.job.label_maps import listed, offered_map
from engine.job.spec_messages import nearest

# ImageNet's folders and labels.
_WORDNET = re.compile(r"n[0-9]{8}")
_WORDNET_REMEDY = ", which names none by its WordNet id; use class names or indices"
_NUMERIC = "the target's classes are called by numbers"
_REMEDY = "give names, such as `class_name` in .json, a column of texts, or a column with class names"


class Labelling:
    """Classes of a target as the labels of one set of images name them.

    A text is a class name; where it is a number, it is an index, unless classes are called by numbers or other labels
    of the set are names. So no label is read in two ways, and none by trying one after the other.

    Args:
        labels: class names of the target in index order.
        names: the label map of the set (`engine.data.images.label_files`), which goes before everything else.
        folder: where a label map of the set would be, for messages.
    """

    def __init__(
        self, labels: tuple[str, ...], names: Mapping[str, int] | None = None, folder: Path | None = None
    ) -> None:
        self.labels = labels
        self._names, self._folder = names or {}, folder
        self._is_numeric = has_numeric_names(labels)
        self._has_names = self._is_numeric
        self._found: dict[str, list[int]] = {}
        # A set may have one unknown label for thousands of images.
        self._remedies: dict[str, str] = {}

    def settle(self, texts: Iterable[str]) -> None:
        """Settle whether numbers are indices, by all labels of a set: not where one of them is a class name."""
        self._has_names = self._is_numeric or any(self._find(text) for text in set(texts) if not is_index(text))

    def settle_by_first(self, texts: Iterable[str]) -> None:
        """Settle it by the first label that is a class, where a look at all would be a pass over the set."""
        for text in map(str.strip, texts):
            if is_index(text) and int(text) < len(self.labels):
                return
            if self._find(text):
                self._has_names = True
                return

    def of_text(self, text: str) -> int:
        """Class of a label that is a text: of a folder, or in a column of texts.

        Raises:
            UnusableImageError: no such class, or no way to know which.
        """
        text = text.strip()
        if not text:
            raise UnusableImageError("has no label")
        if not is_index(text) or self._find(text):
            return self.of_name(text)
        if self._is_numeric:
            raise UnusableImageError(f"has the label {text!r}: {_NUMERIC}, so labels are names, and it is none of them")
        index = self.of_index(int(text))
        if self._has_names:
            raise UnusableImageError(f"has the label {text!r}, a number, where other labels of the set are class names")
        return index

    def of_written(self, text: str) -> int:
        """Class of a text that by convention is an index and may be a name, as `.cls` has it.

        Raises:
            UnusableImageError: no such class, or no way to know which.
        """
        text = text.strip()
        if self._is_mapped(text):
            return self.of_name(text)
        index = int(text) if is_index(text) else len(self.labels)
        if self._is_numeric and index < len(self.labels) and self._find(text) not in ([], [index]):
            raise UnusableImageError(f"has the label {text!r}: {_NUMERIC}, so it may be a name or an index; {_REMEDY}")
        return self.of_text(text)

    def of_name(self, name: str) -> int:
        """Class of a name, which is never an index.

        Raises:
            UnusableImageError: no such class, or several.
        """
        classes = self._find(name)
        if len(classes) > 1:
            raise UnusableImageError(f"{name!r} is the name of classes {', '.join(map(str, classes))}; give the index")
        if not classes:
            raise UnusableImageError(f"{name!r} is not a class of the target" + self._remedy(name))
        if classes[0] == LEFT_OUT:
            raise UnusableImageError(f"{name!r} is left out by {LABEL_MAP}")
        return classes[0]

    def of_named_index(self, name: str, index: int) -> int:
        """Class of a name with its index, which distinguishes two classes of one name.

        Raises:
            UnusableImageError: as `of_name`.
        """
        return index if index in self._find(name) else self.of_name(name)

    def of_index(self, index: int) -> int:
        """A class index, checked.

        Raises:
            UnusableImageError: there is no such class.
        """
        if 0 <= index < len(self.labels):
            return index
        last = len(self.labels) - 1
        raise UnusableImageError(
            f"has the label {index}: {index} is not a class index of the target; it has 0 to {last}"
        )

    def of_value(self, value: Any) -> int:
        """Class of a value in a column without class names of its own: a text, or an index.

        Raises:
            UnusableImageError: no such class, or no way to know which.
        """
        if isinstance(value, str):
            return self.of_text(value)
        check_label(value)
        if self._is_mapped(str(value)):
            return self.of_name(str(value))
        if self._is_numeric and self._find(str(value)) != [value]:
            raise UnusableImageError(f"has the label {value}: {_NUMERIC}, so it may be a name or an index; {_REMEDY}")
        if self._has_names and not self._is_numeric:
            raise UnusableImageError(f"has the label {value}, a number, where other labels of the set are class names")
        return self.of_index(value)

    def is_class(self, text: str) -> bool:
        """Whether a text names one class or several."""
        return bool(self._find(text))

    def classes_of(self, name: str) -> list[int]:
        """Classes of a name: one, none, or several of one name."""
        return self._find(name)

    def is_label(self, text: str) -> bool:
        """Whether a text is read as a label of a class, be it a name or an index."""
        text = text.strip()
        if self._find(text):
            return True
        is_number = is_index(text) and not self._is_numeric and not self._has_names
        return is_number and int(text) < len(self.labels)

    def _remedy(self, name: str) -> str:
        """What to do about a name of no class, or nothing."""
        if name not in self._remedies:
            is_wordnet = _WORDNET.fullmatch(name) is not None
            self._remedies[name] = _WORDNET_REMEDY if is_wordnet else nearest(name, list(self.labels))
        return self._remedies[name]

    def advice(self) -> str:
        """Which of the labels that were read are no classes, and the map that would say which they are; or nothing."""
        unknown = list(self._remedies)
        if not unknown:
            return ""
        known = {index for classes in self._found.values() for index in classes}
        missing = [label for index, label in enumerate(self.labels) if index not in known]
        place = f"'{self._folder / LABEL_MAP}'" if self._folder else LABEL_MAP
        shown = f", whose {listed(missing)} no label names" if missing else ""
        return (
            f"the labels {listed(unknown)} are no classes of the target{shown}; say which are which in {place}:"
            f" {offered_map(unknown, missing, as_json)}; null leaves a label out"
        )

    def unused(self, texts: Iterable[str]) -> list[str]:
        """Labels of the label map that none of some labels is."""
        known = set(map(folded, texts))
        return [text for text in self._names if text not in known]

    def refuse_unknown(self, texts: Sequence[str]) -> str:
        """Why none of several names can be used; nothing where one can, or where numbers have messages of their own."""
        are_names = all(any(character.isalpha() for character in text) for text in texts)
        if len(texts) < 2 or not are_names or any(self.is_label(text) for text in texts):
            return ""
        for text in texts:
            self._remedy(text)
        return self.advice()

    def _is_mapped(self, text: str) -> bool:
        return bool(self._names) and folded(text) in self._names

    def _find(self, name: str) -> list[int]:
        if name not in self._found:
            self._found[name] = [self._names[folded(name)]] if self._is_mapped(name) else find_class(name, self.labels)
        return self._found[name]


def check_label(value: Any) -> None:
    """Refuse a label that is neither a text nor a whole number.

    Raises:
        UnusableImageError: it is missing, or of another type.
    """
    if value is None or value == "":
        raise UnusableImageError("has no label")
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UnusableImageError(f"has the label {value!r}, which is neither a class name nor an index")


def are_same_classes(names: Sequence[str], labels: tuple[str, ...]) -> bool:
    """Whether class names are those of the target in its order; equal names may be followed by their index."""
    return len(names) == len(labels) and all(
        name in (label, f"{label} ({index})") for index, (name, label) in enumerate(zip(names, labels, strict=True))
    )


def is_enumeration(names: Sequence[str], labels: tuple[str, ...]) -> bool:
    """Whether the class names of a file are the numbers of the target's classes, and so name nothing."""
    return len(names) == len(labels) and all(name == str(index) for index, name in enumerate(names))

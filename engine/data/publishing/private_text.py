"""Documents without the folders and buckets of the machines that a run was made on: `…/classifier`."""

from __future__ import annotations

import html
import re
from typing import Any

from engine.terminal import ELLIPSIS, redacted

# Absolute paths of two parts or more, and addresses in buckets, within a text.
_PART = r"[^\s/\"'`<>|,;:()\[\]{}]+"
_PATHS = re.compile(rf"(?<![\w.:/~+=*-])(?:(?:file://)?~?(?:/{_PART}){{2,}}/?|(?:s3|gs|gcs)://{_PART}(?:/{_PART})*/?)")
_PLACE = re.compile(r"(?:file://|s3://|gs://|gcs://|~?/|(?:\.\./)+|[A-Za-z]:\\)[^\n]*")
_SEPARATORS = re.compile(r"[/\\]")
# What is written there is content: names of classes (some begin with `/`), prompts, rules.
_CONTENT = frozenset(
    ["labels", "class", "classes", "boundary", "name", "prompt", "context", "contexts", "accept", "filter", "license"]
)


class PrivatePlaces:
    """Replaces places by their last part, and remembers them for documents that are not JSON."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def document(self, value: Any, key: str = "") -> Any:
        """A document of JSON without places."""
        if key in _CONTENT:
            return value
        if isinstance(value, dict):
            return {name: self.document(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [self.document(part, key) for part in value]
        return self._value(value) if isinstance(value, str) else value

    def _value(self, text: str) -> str:
        text = redacted(text)
        if _PLACE.fullmatch(text):
            return self._replaced(text)
        return _PATHS.sub(lambda match: self._replaced(match[0]), text)

    def _replaced(self, place: str) -> str:
        shown = last_part(place)
        self._places[place] = shown
        return shown

    def text(self, text: str) -> str:
        """A text without the places that were in documents."""
        for place in sorted(self._places, key=len, reverse=True):
            for written in {place, html.escape(place), place.replace("|", "\\|")}:
                text = text.replace(written, self._places[place])
        return text

    @staticmethod
    def message(text: str) -> str:
        """A message of an error without places."""
        return _PATHS.sub(lambda match: last_part(match[0]), redacted(text))


def last_part(place: str) -> str:
    """The last part of a path or address, with an ellipsis for what was before it."""
    return f"{ELLIPSIS}/{_SEPARATORS.split(place.rstrip('/'))[-1]}"

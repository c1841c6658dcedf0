"""Reading the images of class folders: `CLASS/CONTEXT/NAME`, or `CLASS/NAME`.

A listing next to the images may give labels in place of the folders' names, and contexts in place of the second.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.data.images.decode import EXTENSIONS, UnusableImageError, check_bytes, open_image
from engine.data.images.file_tree import Entry
from engine.data.images.image_source import ReadResult, in_context, make_result, unusable
from engine.data.images.labelling import Labelling
from engine.data.images.listings import Listings, key_of


@dataclass(frozen=True, slots=True)
class ClassReader:
    """Reads the files of class folders.

    Attributes:
        home: names of the folders that hold the class folders.
        has_contexts: whether some image has a context, so that one without has none.
    """

    root: Path
    home: tuple[str, ...]
    labelling: Labelling
    listings: Listings
    has_contexts: bool

    def read(self, entry: Entry) -> ReadResult:
        """A file as an image with its class, or why it is none."""
        if problem := self.listings.problems.get(entry.place, ""):
            return unusable(entry.place, problem)
        data = partial(_file_bytes, self.root / entry.place)
        if entry.extension not in EXTENSIONS and (problem := _why_no_image(data)):
            return unusable(entry.place, problem)
        result = make_result(entry.place, partial(self._class_of, entry), data)
        return in_context(result, self._context_of(entry)) if self.has_contexts else result

    def _context_of(self, entry: Entry) -> str:
        """The context that a listing gives, else the name of the folder below that of the class."""
        return self.listings.contexts.get(key_of(entry.place), context_folder(entry, self.home))

    def _class_of(self, entry: Entry) -> int:
        folders = _folders(entry, self.home)
        if self.listings.listed:
            return self._listed_class(entry, folders)
        if not folders:
            raise UnusableImageError("has no label: it lies in no class folder")
        index = self._first_class(folders)
        for folder in folders[1:]:
            self._check_same(index, folder, f"lies in folders of two classes, '{folders[0]}' and '{folder}'")
        return index

    def _first_class(self, folders: Sequence[str]) -> int:
        """The class of the outermost folder."""
        try:
            return self.labelling.of_text(folders[0])
        except UnusableImageError:
            if len(folders) > 1 and self.labelling.is_class(folders[1]) and not self.labelling.is_class(folders[0]):
                raise UnusableImageError(
                    f"lies in '{'/'.join(folders[:2])}', and the class comes first: CLASS/CONTEXT/NAME"
                ) from None
            raise

    def _listed_class(self, entry: Entry, folders: Sequence[str]) -> int:
        """The class that a listing gives; a folder that names another class makes it doubtful."""
        if key_of(entry.place) not in self.listings.listed:
            raise UnusableImageError("has no label: it is not in the list of labels next to it (metadata)")
        index = self.listings.class_of(entry.place, self.labelling)
        for folder in folders:
            self._check_same(index, folder, f"has two labels: that of its list, and its folder '{folder}'")
        return index

    def _check_same(self, index: int, folder: str, reason: str) -> None:
        if self.labelling.is_class(folder) and index not in self.labelling.classes_of(folder):
            raise UnusableImageError(reason)


def context_folder(entry: Entry, home: Sequence[str]) -> str:
    """The name of the folder below the class folder that a file lies in; empty where it lies in none."""
    folders = _folders(entry, home)
    return unicodedata.normalize("NFC", folders[1]) if len(folders) > 1 else ""


def _folders(entry: Entry, home: Sequence[str]) -> Sequence[str]:
    """The folders of a file below those that hold the class folders."""
    return entry.parts[len(home) : -1] if entry.parts[: len(home)] == tuple(home) else ()


def _why_no_image(data: Callable[[], bytes]) -> str:
    """Why a file of any name is no image; empty where it is one, or where reading it will show why."""
    try:
        with open_image(data()):
            return ""
    except UnusableImageError as error:
        return str(error)
    except OSError:
        return ""


def _file_bytes(file: Path) -> bytes:
    check_bytes(file.stat().st_size)
    return file.read_bytes()

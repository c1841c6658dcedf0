"""Every file under a folder, in order: links are followed, each folder is listed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.data.images.decode import brief


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, or what cannot be read as one: a folder that is not listed, a pipe, a broken link.

    Attributes:
        place: path in the folder, with slashes.
        problem: why it cannot be read; empty for files.
    """

    place: str
    problem: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its folders, and its own."""
        return tuple(self.place.split("/"))

    @property
    def name(self) -> str:
        """Its own name."""
        return self.place.rpartition("/")[2]

    @property
    def extension(self) -> str:
        """In lower case, without a dot."""
        return self.name.rpartition(".")[2].lower() if "." in self.name else ""


def list_files(root: Path) -> list[Entry]:
    """All files under a folder, hidden ones too, in the order of their paths.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    return sorted(_Walk(root).entries(), key=lambda entry: entry.parts)


class _Walk:
    """A walk over a folder that ends whatever links there are in it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: set[tuple[int, int]] = set()

    def entries(self) -> Iterator[Entry]:
        """Files, and folders that are not listed; those that are reached by links last."""
        status = self._root.stat()
        self._seen.add((status.st_dev, status.st_ino))
        waiting, links = [""], list[str]()
        yield from self._below(waiting, links, must=True)
        while links:
            waiting, links = sorted(links, reverse=True), []
            yield from self._below(waiting, links)

    def _below(self, waiting: list[str], links: list[str], must: bool = False) -> Iterator[Entry]:
        """Files in some folders and their folders; folders behind links are put into `links`."""
        while waiting:
            folder = waiting.pop()
            if folder and (problem := self._enter(folder)):
                yield Entry(folder, problem)
                continue
            try:
                with os.scandir(self._root / folder) as listing:
                    children = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                if must and not folder:
                    raise
                yield Entry(folder, f"cannot be listed ({brief(error)})")
                continue
            for entry in children:
                place = f"{folder}/{entry.name}" if folder else entry.name
                if not _is_folder(entry):
                    yield Entry(place, _why_no_file(entry))
                elif entry.is_symlink():
                    links.append(place)
                else:
                    waiting.append(place)

    def _enter(self, folder: str) -> str:
        """Note a folder; or why it is not listed."""
        try:
            status = (self._root / folder).stat()
        except OSError as error:
            return f"cannot be listed ({brief(error)})"
        key = (status.st_dev, status.st_ino)
        if key in self._seen:
            return "is a link to a folder that is read already, or that holds it"
        self._seen.add(key)
        return ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _why_no_file(entry: os.DirEntry[str]) -> str:
    """Why something that is no folder is no file either: opening a pipe may never end."""
    try:
        if entry.is_file():
            return ""
        return "is not a file" if Path(entry).exists() else "there is no such file"
    except OSError as error:
        return f"cannot be read ({brief(error)})"

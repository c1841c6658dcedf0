"""Labels of the images of a folder in a file next to them: `metadata.csv`, `.jsonl` or `.parquet`.

As in Hugging Face's `imagefolder`: a column `file_name`, relative to the folder of the file, and a column `label`.
"""

from __future__ import annotations

import csv
import json
import posixpath
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.images.decode import UnusableImageError, brief
from engine.data.images.image_source import REJECTED
from engine.data.images.labelling import Labelling, is_enumeration
from engine.data.images.parquet_files import ACCEPTED, LABEL, LabelColumn, accepted_column, class_names_of
from engine.models.untrusted_files import check_regular

NAMES = ("metadata.parquet", "metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
MAX_TEXT_BYTES = 2**30


class Listings:
    """The labels that listings in a folder give to its images.

    Attributes:
        problems: why a listing is not used, by its path in the folder.
        listed: label and listing of the images that are listed, by `key_of` their path in the folder.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.listed: dict[str, tuple[Any, str]] = {}
        self._class_names: dict[str, tuple[str, ...]] = {}
        self._is_unknown = False

    def add(self, root: Path, place: str, class_names: tuple[str, ...] | None) -> None:
        """Add a listing.

        Args:
            place: its path in the folder.
            class_names: those of a data set's card, for listings that name none; None where it has several lists.
        """
        folder = posixpath.dirname(place)
        try:
            rows = list(_rows(root / place))
        except UnusableImageError as error:
            self.problems[place] = str(error)
            return
        self._class_names[place] = class_names_of(root / place) or class_names or ()
        self._is_unknown = self._is_unknown or class_names is None
        for name, label in rows:
            # A name that leads out of the folder is the name of no file in it.
            listed = key_of(posixpath.join(folder, name))
            if listed in self.listed and self.listed[listed][0] != label:
                lists = " and ".join(dict.fromkeys((self.listed[listed][1], place)))
                label = UnusableImageError(f"has two labels in {lists}")
            self.listed[listed] = (label, place)

    def texts(self) -> Iterator[str]:
        """Labels that are texts and not the names of a listing's own classes."""
        return (
            label for label, place in self.listed.values() if isinstance(label, str) and not self._class_names[place]
        )

    def class_of(self, place: str, labelling: Labelling) -> int:
        """Class of a listed image.

        Raises:
            UnusableImageError: no such class, or two labels.
        """
        label, listing = self.listed[key_of(place)]
        if isinstance(label, UnusableImageError):
            raise label
        names = self._class_names[listing]
        own_names = () if is_enumeration(names, labelling.labels) else names
        is_named_elsewhere = not own_names and (self._is_unknown or any(self._class_names.values()))
        return LabelColumn(own_names, is_named_elsewhere, labelling).class_of(label)


def key_of(place: str) -> str:
    """A path for comparisons: listings and file systems may have names in different forms of Unicode."""
    return unicodedata.normalize("NFC", posixpath.normpath(place))


def _rows(path: Path) -> list[tuple[str, Any]]:
    """Names of files with their labels.

    Raises:
        UnusableImageError: it cannot be read, or has other columns.
    """
    try:
        check_regular(path)
        if path.suffix != ".parquet" and path.stat().st_size > MAX_TEXT_BYTES:
            raise UnusableImageError(f"is larger than {MAX_TEXT_BYTES // 2**20} MB")
        read = {".parquet": _parquet_rows, ".jsonl": _json_rows, ".csv": _csv_rows}[path.suffix]
        return read(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UnusableImageError(f"cannot be read as a list of labels ({brief(error)})") from None


def _check_columns(names: list[str]) -> None:
    if missing := [name for name in (FILE_NAME, LABEL) if name not in names]:
        raise UnusableImageError(f"gives no labels, it has no column {' and '.join(missing)}; folders name the classes")


def _csv_rows(path: Path) -> list[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _check_columns(list(reader.fieldnames or []))
        return [(row[FILE_NAME] or "", row[LABEL]) for row in reader]


def _json_rows(path: Path) -> list[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    _check_columns(list({name: 0 for row in rows for name in row}))
    return [(str(row.get(FILE_NAME, "")), row.get(LABEL)) for row in rows]


def _parquet_rows(path: Path) -> list[tuple[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names)
        accepted = accepted_column(file.schema_arrow.names)
        rows = file.read(columns=[FILE_NAME, LABEL, *accepted]).to_pylist()
    return [
        (str(row[FILE_NAME]), UnusableImageError(REJECTED) if row.get(ACCEPTED[0]) is False else row[LABEL])
        for row in rows
    ]

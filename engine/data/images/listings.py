"""Labels and contexts of the images of a folder in a file next to them: `metadata.csv`, `.jsonl` or `.parquet`.

As in Hugging Face's `imagefolder`: a column `file_name`, relative to the folder of the file, and a column `label`,
`context`, or both. Without `label` the folders name the classes.
"""

from __future__ import annotations

import csv
import json
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.images.decode import UnusableImageError, brief
from engine.data.images.image_source import REJECTED
from engine.data.images.labelling import Labelling, is_enumeration
from engine.data.images.parquet_files import ACCEPTED, CONTEXT, LABEL, LabelColumn, accepted_column, class_names_of
from engine.models.untrusted_files import check_regular

NAMES = ("metadata.parquet", "metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
MAX_TEXT_BYTES = 2**30


class Listings:
    """The labels and contexts that listings in a folder give to its images.

    Attributes:
        problems: why a listing is not used, by its path in the folder.
        contexts: of the images for which a listing has one, by `key_of` their path in the folder.
        listed: label and listing of the images that are listed, by `key_of` their path in the folder.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.contexts: dict[str, str] = {}
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
        self.contexts |= {
            key_of(posixpath.join(folder, row.file)): row.context for row in rows if row.context is not None
        }
        labelled = [row for row in rows if row.has_label]
        if not labelled:
            return
        self._class_names[place] = class_names_of(root / place) or class_names or ()
        self._is_unknown = self._is_unknown or class_names is None
        for row in labelled:
            # A name that leads out of the folder is the name of no file in it.
            listed, label = key_of(posixpath.join(folder, row.file)), row.label
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


class _Row(NamedTuple):
    """A line of a listing.

    Attributes:
        has_label: whether the listing has a column of labels.
        context: None where the listing has no column of contexts.
    """

    file: str
    label: Any
    has_label: bool
    context: str | None


def _rows(path: Path) -> list[_Row]:
    """Names of files with their labels and contexts.

    Raises:
        UnusableImageError: it cannot be read, or has other columns.
    """
    try:
        check_regular(path)
        if path.suffix != ".parquet" and path.stat().st_size > MAX_TEXT_BYTES:
            raise UnusableImageError(f"is larger than {MAX_TEXT_BYTES // 2**20} MB")
        read = {".parquet": _parquet_rows, ".jsonl": _json_rows, ".csv": _csv_rows}[path.suffix]
        names, rows = read(path)
        _check_columns(names)
        return [_row(row, names) for row in rows]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UnusableImageError(f"cannot be read as a list of labels ({brief(error)})") from None


def _row(row: dict[str, Any], names: Sequence[str]) -> _Row:
    context = row.get(CONTEXT)
    return _Row(
        file=str(row.get(FILE_NAME) or ""),
        label=row.get(LABEL),
        has_label=LABEL in names,
        context=None if CONTEXT not in names else context if isinstance(context, str) else "",
    )


def _check_columns(names: Sequence[str]) -> None:
    missing = [FILE_NAME] if FILE_NAME not in names else []
    missing += [LABEL] if LABEL not in names and CONTEXT not in names else []
    if missing:
        raise UnusableImageError(f"gives no labels, it has no column {' and '.join(missing)}; folders name the classes")


def _csv_rows(path: Path) -> tuple[Sequence[str], list[dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)


def _json_rows(path: Path) -> tuple[Sequence[str], list[dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return list({name: 0 for row in rows for name in row}), rows


def _parquet_rows(path: Path) -> tuple[Sequence[str], list[dict[str, Any]]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        columns = [name for name in (FILE_NAME, LABEL, CONTEXT) if name in names] + accepted_column(names)
        rows = file.read(columns=columns).to_pylist()
    rejected = {LABEL: UnusableImageError(REJECTED)}
    return names, [row | rejected if row.get(ACCEPTED[0]) is False else row for row in rows]

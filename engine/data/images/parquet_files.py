"""Labelled images in parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.images.decode import UnusableImageError, brief, check_bytes
from engine.data.images.image_source import REJECTED, ImageSource, Item, ReadResult, in_context, make_result, unusable
from engine.data.images.labelling import Labelling, are_same_classes, check_label, is_enumeration

if TYPE_CHECKING:
    import pyarrow as pa

KIND = "parquet"
# Columns of images: the first that is there; CIFAR has the second.
IMAGES = ("image", "img")
LABEL, CONTEXT = "label", "context"
# Whether a run accepted a row, in tables of the engine alone, which have the second column too.
ACCEPTED = ("accepted", "schema_version")
ROWS = 64
# Of HF's missing labels.
_MISSING = -1


@dataclass(frozen=True, slots=True)
class LabelColumn:
    """How the labels of a file are read.

    Attributes:
        class_names: of the file's own, which its indices are of; empty where it has none.
        is_named_elsewhere: whether it has none and another file of its set has.
    """

    class_names: tuple[str, ...]
    is_named_elsewhere: bool
    labelling: Labelling

    def class_of(self, value: Any) -> int:
        """Class of a label.

        Raises:
            UnusableImageError: no such class, or no way to know which.
        """
        check_label(value)
        if self.class_names:
            return self._of_own(value)
        if self.is_named_elsewhere and not isinstance(value, str):
            raise UnusableImageError(f"has the label {value} in a file without class names, where others have some")
        return self.labelling.of_value(value)

    def _of_own(self, value: str | int) -> int:
        if isinstance(value, str):
            return self.labelling.of_name(value)
        name = self._own_name(value)
        return value if are_same_classes(self.class_names, self.labelling.labels) else self.labelling.of_name(name)

    def _own_name(self, index: int) -> str:
        if index == _MISSING:
            raise UnusableImageError("has no label (-1)")
        if not 0 <= index < len(self.class_names):
            last = len(self.class_names) - 1
            raise UnusableImageError(
                f"has the label {index}; {index} is not a class index of its file, which has 0 to {last}"
            )
        return self.class_names[index]


def parquet(
    paths: Sequence[Path],
    labels: Labelling | tuple[str, ...],
    class_names: tuple[str, ...] | None = (),
    root: Path | None = None,
) -> ImageSource:
    """Rows of parquet files as Hugging Face has them.

    Column `image`, or `img`, holds the bytes of a file, or a struct with `bytes`; column `label` a class name or an
    index. Where the file names its classes, an index is one of those, and its name decides. A text column `context` is
    taken along.

    Args:
        labels: class names of the target in index order, or how labels are read.
        class_names: those of the files that name none of their own, as a data set's card has them; None where it has
            several lists.
        root: what the names of the files are relative to; their own folders where not given.
    """
    labelling = labels if isinstance(labels, Labelling) else Labelling(labels)
    tables = _Tables(tuple(paths), labelling, class_names, root)
    sizes = [_num_rows(path) for path in paths]
    files = tuple(partial(tables.items, path) for path in paths)
    return ImageSource(KIND, sum(sizes), files, labelling=labelling)


class _Tables:
    """A set of parquet files, whose labels are read in one way."""

    def __init__(
        self, paths: tuple[Path, ...], labelling: Labelling, class_names: tuple[str, ...] | None, root: Path | None
    ) -> None:
        self._paths, self._labelling, self._card_names, self._root = paths, labelling, class_names, root
        self._names: dict[Path, tuple[str, ...]] | None = None

    def items(self, path: Path) -> Iterator[Item]:
        """The rows of a file, in order."""
        import pyarrow as pa

        name = path.name if self._root is None else path.relative_to(self._root).as_posix()
        try:
            yield from self._rows(path, name)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield partial(unusable, name, f"cannot be read as parquet from here on ({_reason(path, error)})")

    def _rows(self, path: Path, name: str) -> Iterator[Item]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            image = _image_column(columns)
            if missing := [column for column in (image or IMAGES[0], LABEL) if column not in columns]:
                reason = f"has no column {' and '.join(missing)}; it has {', '.join(columns)}: rename what holds them"
                yield partial(unusable, name, reason)
                return
            column, number = self._label_column(path), 0
            wanted = [column for column in (image, LABEL, CONTEXT) if column in columns] + accepted_column(columns)
            for batch in file.iter_batches(batch_size=ROWS, columns=wanted):
                for row in batch.to_pylist():
                    yield partial(_read_row, f"{name} row {number}", row, image, column.class_of)
                    number += 1

    def _label_column(self, path: Path) -> LabelColumn:
        """How labels of a file are read; the whole set decides."""
        if self._names is None:
            self._names = {file: self._class_names(file) for file in self._paths}
            self._labelling.settle(text for file in self._paths for text in label_texts(file))
        own_names = self._names[path]
        is_named_elsewhere = not own_names and (self._card_names is None or any(self._names.values()))
        return LabelColumn(own_names, is_named_elsewhere, self._labelling)

    def _class_names(self, path: Path) -> tuple[str, ...]:
        names = class_names_of(path) or self._card_names or ()
        return () if is_enumeration(names, self._labelling.labels) else names


def class_names_of(path: Path) -> tuple[str, ...]:
    """The class names that Hugging Face datasets keeps in a file's schema, or none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        features = json.loads((pq.read_schema(path).metadata or {})[b"huggingface"])["info"]["features"]
        return names_in(features[LABEL])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError):
        return ()


def names_in(feature: Any) -> tuple[str, ...]:
    """The class names of a feature: a list, or a mapping from indices, as cards have it."""
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict):
        names = [names.get(str(index), names.get(index)) for index in range(len(names))]
    return tuple(map(str, names)) if isinstance(names, list) and None not in names else ()


def label_texts(path: Path) -> set[str]:
    """The different texts in a file's labels; none where they are numbers, or cannot be read (reported later)."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    texts: set[str] = set()
    try:
        with pq.ParquetFile(path) as file:
            if LABEL not in file.schema_arrow.names or not is_text(file.schema_arrow.field(LABEL).type):
                return texts
            for batch in file.iter_batches(columns=[LABEL]):
                texts.update(text for text in pc.unique(batch.column(0)).to_pylist() if text is not None)
    except (pa.ArrowException, OSError, ValueError):
        pass
    return texts


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts, also where they are kept in a dictionary."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def has_images(path: Path) -> bool:
    """Whether a file has a column of images; true where it cannot be read, so that it is reported."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return bool(_image_column(pq.read_schema(path).names))
    except (pa.ArrowException, OSError):
        return True


def _image_column(names: Sequence[str]) -> str:
    """The column of images among the columns of a file; empty where there is none."""
    return next((column for column in IMAGES if column in names), "")


def _num_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError):
        return 0


def accepted_column(names: Sequence[str]) -> list[str]:
    """The column that marks accepted rows, or none."""
    return [ACCEPTED[0]] if set(ACCEPTED) <= set(names) else []


def _read_row(name: str, row: dict[str, Any], image: str, class_of: Callable[[Any], int]) -> ReadResult:
    if row.get(ACCEPTED[0]) is False:
        return unusable(name, REJECTED)
    item = make_result(name, partial(class_of, row[LABEL]), partial(_cell_bytes, row[image], image))
    return in_context(item, row.get(CONTEXT))


def _cell_bytes(value: Any, column: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise UnusableImageError(f"holds no bytes of an image file in column {column}")
    check_bytes(len(data))
    return data


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with a file that is no parquet."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(32).startswith(b"version https://git-lfs")
    except OSError:
        is_pointer = False
    return "a Git LFS pointer; fetch the file with `git lfs pull`" if is_pointer else brief(error)

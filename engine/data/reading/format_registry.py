"""The registry of export formats: one record each, which is all that an export knows of them by name.

To add a format, write its writer in a module next to this one and add a record to `FORMATS`. Addresses are strings: a
writer is imported when an export uses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import JobError

if TYPE_CHECKING:
    from pathlib import Path

    from engine.data.reading.pairs import ImageFile
    from engine.data.stores.folder import FolderStore
    from engine.job.records import SampleResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportData:
    """What a writer is given.

    Attributes:
        store: of the new data set, where it writes its files.
        name: prefix of shards.
        samples: with the extensions of their images, in order; can be read once.
        num_samples: how many there are.
        labels: class names in index order.
        folders: a folder's name for each class.
        samples_per_shard: in each file of a format that divides samples.
        image_format: extension of all images, of a format that requires one.
        pairs: of a format of pairs, start and twin of a sample by its key; None where it has no such image.
        finished: is told of a large file, or one of many, that the writer needs no more: it may be uploaded and leave.
    """

    store: FolderStore
    name: str
    samples: Iterator[tuple[SampleResult, str]]
    num_samples: int
    labels: Sequence[str]
    folders: Sequence[str]
    samples_per_shard: int
    image_format: str
    pairs: Callable[[str], tuple[ImageFile | None, ImageFile | None]] | None = None
    finished: Callable[[Path], None] = lambda path: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a writer wrote, for the card.

    Attributes:
        data_files: patterns of the data files, relative to the data set.
        loading: section on how they are read.
        features: types of the columns for the card's header; None where the files state them.
    """

    data_files: list[str]
    loading: str
    features: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFormat:
    """A format.

    Attributes:
        name: value of `--format`.
        writer: `module:function` from `ExportData` to `Written`.
        is_sharded: whether `samples_per_shard` divides it.
        has_one_image_format: whether all images must have one format.
        has_class_folders: whether readers number the folders of classes.
        has_pairs: whether it is of samples with a start or a twin alone, and holds these too.
    """

    name: str
    writer: str
    is_sharded: bool = True
    has_one_image_format: bool = False
    has_class_folders: bool = False
    has_pairs: bool = False

    def load_writer(self) -> Callable[[ExportData], Written]:
        """Import the writer."""
        module, _, name = self.writer.partition(":")
        writer: Callable[[ExportData], Written] = getattr(importlib.import_module(module), name)
        return writer


# The first one is the default.
FORMATS: dict[str, ExportFormat] = {
    record.name: record
    for record in (
        ExportFormat(
            name="webdataset", writer="engine.data.reading.formats:write_webdataset", has_one_image_format=True
        ),
        ExportFormat(
            name="imagefolder",
            writer="engine.data.reading.formats:write_imagefolder",
            is_sharded=False,
            has_class_folders=True,
        ),
        ExportFormat(name="parquet", writer="engine.data.reading.formats:write_parquet"),
        ExportFormat(name="pairs", writer="engine.data.reading.formats:write_pairs", has_pairs=True),
    )
}
DEFAULT_FORMAT = next(iter(FORMATS))


def check_format(name: str) -> None:
    """Check the name of a format.

    Raises:
        JobError: there is none of this name.
    """
    if name not in FORMATS:
        raise JobError(f"--format: '{name}' is not one of {', '.join(FORMATS)}")

"""The formats of an export: WebDataset shards, a folder by class, or parquet with embedded images."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from engine.data.reading.format_registry import ExportData, Written
from engine.data.run.card_loading import FILES_LOADING, FOLDERS_LOADING, PAIRS_LOADING, merged_loading_section
from engine.data.run.commits import CommitSummary
from engine.data.run.file_names import CLASS_MAP, FOLDER_LABELS, METADATA
from engine.data.run.metadata_table import write_metadata
from engine.data.run.reader_indexes import IndexEntry, write_index_files
from engine.data.run.schema import arrow_schema, tar_features
from engine.data.run.shard_writing import discard, stage_shard
from engine.data.run.shards import SHARDS, shard_name
from engine.data.stores.base import STATE
from engine.data.stores.file_errors import explained
from engine.errors import JobError
from engine.job.class_names import label_names
from engine.job.columns import RECORD_COLUMNS, SCHEMA_VERSION
from engine.job.records import SampleResult

if TYPE_CHECKING:
    import pyarrow as pa

# What an export calls the folders of classes: indices, which are in the order of labels for every reader, or names.
FOLDERS = ("index", "name")
ROWS_PER_GROUP = 256

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _()+=,@&-]{0,79}")
# Names that Windows keeps for devices, and that readers of folders pass over.
_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{device}{number}" for device in ("com", "lpt") for number in range(10)), "shards"]
)


def write_webdataset(data: ExportData) -> Written:
    """Write shards, the rows of all of them, and the indexes of other readers; holds one image at a time."""
    store, samples = data.store, (result for result, _ in data.samples)
    commits: dict[int, CommitSummary] = {}
    entries: list[IndexEntry] = []
    for first in samples:
        number, stem = len(commits), shard_name(data.name, len(commits))
        shard_samples = chain([first], islice(samples, data.samples_per_shard - 1))
        staged = stage_shard(store.staging(), stem, shard_samples, data.image_format)
        store.publish(f"{SHARDS}/{stem}.tar", staged.tar)
        store.publish(f"{SHARDS}/{stem}.parquet", staged.parquet)
        commits[number] = CommitSummary(number, staged.counts)
        entries.append(IndexEntry(f"{stem}.tar", staged.counts.attempted, staged.tar_md5, staged.tar_bytes))
        discard(staged)
        data.finished(store.path(f"{SHARDS}/{stem}.tar"))
    write_metadata(store, data.name, commits)
    write_index_files(store, entries)
    store.remove_tree(STATE)
    return Written(
        data_files=[f"{SHARDS}/*.tar"],
        loading=merged_loading_section(data.image_format, SCHEMA_VERSION),
        features=tar_features(data.image_format, SCHEMA_VERSION, data.labels),
    )


def write_imagefolder(data: ExportData) -> Written:
    """Write `CLASS/KEY.png` and `metadata.parquet`, as torchvision, timm and Hugging Face read a folder by class.

    torchvision and timm number the folders that they find in an order of their own: `folders.json` has the label of
    every one, and `class_map.txt` all of them in the order of labels, as timm's `class_map` takes it.

    A `metadata.csv` would do for Hugging Face too, but an empty text in it is read as a missing number.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    root, folders = data.store.root, data.folders
    text = json.dumps({name: label for label, name in enumerate(folders)}, ensure_ascii=False, indent=1)
    with explained(root):
        (root / FOLDER_LABELS).write_text(text + "\n", encoding="utf-8")
        (root / CLASS_MAP).write_text("".join(f"{name}\n" for name in folders), encoding="utf-8")
    schema = _schema([pa.field("file_name", pa.string())], {}, data.labels)
    with explained(root), pq.ParquetWriter(root / METADATA, schema, compression="zstd") as writer:
        while batch := list(islice(data.samples, ROWS_PER_GROUP)):
            rows = []
            for result, extension in batch:
                record = result.record
                place = f"{folders[record['class_index']]}/{record['key']}.{extension}"
                (root / place).parent.mkdir(exist_ok=True)
                (root / place).write_bytes(result.image)
                data.finished(root / place)
                rows.append({"file_name": place, "label": record["class_index"]} | record)
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return Written(data_files=[METADATA, "*/*"], loading=FILES_LOADING + FOLDERS_LOADING)


def class_folders(labels: Sequence[str]) -> list[str]:
    """A folder's name for each class: its own where that is safe on any system, else its index in four digits or more.

    `riskforge prepare` and `retrain` find the class by either.
    """
    lower = Counter(label.lower() for label in labels)
    return [
        label if _is_safe(label) and lower[label.lower()] == 1 else number
        for label, number in zip(labels, numbered_folders(labels), strict=True)
    ]


def numbered_folders(labels: Sequence[str]) -> list[str]:
    """The index of each class in four digits or more, which is the name of no class: their order is that of labels."""
    lower = {label.lower() for label in labels}
    digits = max(4, len(str(len(labels) - 1)))
    while any(f"{index:0{digits}d}" in lower for index in range(len(labels))):
        digits += 1
    return [f"{index:0{digits}d}" for index in range(len(labels))]


def _is_safe(label: str) -> bool:
    # An index would be read as one.
    is_plain = _SAFE.fullmatch(label) is not None and not label.endswith(" ") and not label.isdigit()
    return is_plain and label.lower() not in _RESERVED


def write_parquet(data: ExportData) -> Written:
    """Write files with columns `image` and `label` as Hugging Face `datasets` has them, and those of the record."""
    _write_rows(data, ("image",), _parquet_row)
    return Written(data_files=["train-*.parquet"], loading=FILES_LOADING)


def write_pairs(data: ExportData) -> Written:
    """Write the same files, of samples with a start or an unguided twin, which are columns before the image.

    A sample without one of them has null there.
    """
    pairs = data.pairs
    assert pairs is not None, "the format is one of pairs"

    def row(result: SampleResult, extension: str) -> dict[str, Any]:
        key = result.record["key"]
        seconds = zip(("start", "twin"), pairs(key), strict=True)
        return {
            name: None if file is None else _image(file.data, f"{key}.{name}.{file.image_format}")
            for name, file in seconds
        } | _parquet_row(result, extension)

    _write_rows(data, ("start", "twin", "image"), row)
    return Written(data_files=["train-*.parquet"], loading=PAIRS_LOADING)


def _write_rows(
    data: ExportData, images: Sequence[str], make_row: Callable[[SampleResult, str], dict[str, Any]]
) -> None:
    """Write parquet files of the samples, so many in each.

    Args:
        images: columns of images, in order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = parquet_schema(data.labels, images)
    num_files = -(-data.num_samples // data.samples_per_shard)
    for number in range(num_files):
        path = data.store.root / f"train-{number:05d}-of-{num_files:05d}.parquet"
        with explained(path), pq.ParquetWriter(path, schema, compression="zstd") as writer:
            file_samples = islice(data.samples, data.samples_per_shard)
            while batch := list(islice(file_samples, ROWS_PER_GROUP)):
                rows = [make_row(result, extension) for result, extension in batch]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        data.finished(path)


def parquet_schema(labels: Sequence[str], images: Sequence[str] = ("image",)) -> pa.Schema:
    """Columns of an export to parquet; the schema's metadata marks the columns of images, and names the classes."""
    import pyarrow as pa

    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    fields = [pa.field(name, image) for name in images]
    return _schema(fields, {name: {"_type": "Image"} for name in images}, labels)


def _schema(first_fields: list[pa.Field], features: dict[str, Any], labels: Sequence[str]) -> pa.Schema:
    """Own columns, the label, and the record's; `datasets` finds features and class names in the metadata."""
    import pyarrow as pa

    schema = arrow_schema()
    others = [pa.field(column.name, _nullable(schema.field(column.name).type)) for column in RECORD_COLUMNS]
    known = features | {"label": {"names": label_names(labels), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": known}})}
    return pa.schema([*first_fields, pa.field("label", pa.int64()), *others], metadata=metadata)


def _nullable(kind: pa.DataType) -> pa.DataType:
    """The same type with parts that may be null, as `datasets` has them."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return pa.list_(_nullable(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _nullable(field.type)) for field in kind])
    return kind


def _parquet_row(result: SampleResult, extension: str) -> dict[str, Any]:
    record = result.record
    image = _image(result.image, f"{record['key']}.{extension}")
    return {"image": image, "label": record["class_index"]} | record


def _image(data: bytes, path: str) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def check_folders(name: str) -> None:
    """Check what folders are to be called.

    Raises:
        JobError: there is no such way.
    """
    if name not in FOLDERS:
        raise JobError(f"--folders: '{name}' is not one of {', '.join(FOLDERS)}")

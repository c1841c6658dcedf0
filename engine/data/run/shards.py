"""Shards: a WebDataset tar of the images and a parquet of every attempt, how they are named and read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, NoReturn, get_args

from engine.data.run.companions import KEY_COLUMNS, CompanionTar, TarFacts, difference_to_row
from engine.data.run.counts import ShardCounts, count_rows
from engine.data.run.schema import arrow_schema
from engine.data.stores.file_errors import explained, shown_path
from engine.data.tars import BLOCK_BYTES, DamagedTarError, Member, read_member, walk_tar
from engine.errors import CorruptShardError
from engine.job.columns import SCHEMA_VERSION
from engine.job.records import STATUS_OK, check_record, columns_of
from engine.job.spec import OutputSpec

SHARDS = "shards"

# Of an image or a record: a side of 4096 pixels without compression fits.
MAX_SAMPLE_BYTES = 64 * 2**20
ROWS_PER_GROUP = 1024
IMAGE_FORMATS: tuple[str, ...] = get_args(OutputSpec.model_fields["image_format"].annotation)

_NONE: Mapping[str, Path] = MappingProxyType({})
_VERSIONS = range(SCHEMA_VERSION, 0, -1)
_KEY = re.compile(r"[a-z0-9-]{1,90}")


class TarSample(NamedTuple):
    """A sample of a tar: its image is the file's bytes, its label the class index."""

    key: str
    image: bytes
    record: dict[str, Any]
    label: int


_NO_SAMPLE = TarSample("", b"", {}, 0)


def shard_name(job_name: str, number: int) -> str:
    """Name of a shard's files without their extensions."""
    return f"{job_name}-{number:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFiles:
    """Files that belong together, with the attributes that the commit record states.

    Attributes:
        companions: tars with second images of the samples, by their folder.
    """

    tar: Path
    parquet: Path
    tar_sha256: str
    tar_md5: str
    tar_bytes: int
    parquet_sha256: str
    parquet_bytes: int
    counts: ShardCounts
    companions: Mapping[str, CompanionTar] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """All files, in the order of `engine.data.run.commit_record.file_names`."""
        return [self.tar, self.parquet, *(companion.path for companion in self.companions.values())]


def is_key(text: str) -> bool:
    """Whether a text can be the key of a sample: it is a file's name in tars and folders."""
    return _KEY.fullmatch(text) is not None


def read_shard(path: Path) -> Iterator[TarSample]:
    """The samples of a tar in order.

    Raises:
        CorruptShardError: the tar is cut short, has a foreign or misplaced member, or a record that breaks the schema.
    """
    members = read_tar(path)
    for name, image in members:
        key, _, extension = name.partition(".")
        if extension not in IMAGE_FORMATS:
            _corrupt(path, f"member {name!r} is where an image should be")
        parts = [data for wanted, (name, data) in zip((".json", ".cls"), members, strict=False) if name == key + wanted]
        if len(parts) != 2:
            _corrupt(path, f"sample {key!r} lacks its .json or .cls next to the image")
        try:
            record, cls = json.loads(parts[0]), int(parts[1].decode("ascii"))
            check_record(record)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptShardError(f"{shown_path(path)}: sample {key!r}: {error}") from error
        if record["key"] != key or record["class_index"] != cls:
            _corrupt(path, f"sample {key!r} holds the record of {record['key']!r}, or another class")
        yield TarSample(key, image, record, cls)


def read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the members of a tar of plain files, strictly.

    Raises:
        CorruptShardError: anything but plain files of at most `MAX_SAMPLE_BYTES` and a proper end.
    """
    with explained(path), path.open("rb") as file:
        for member in _walk(path, file):
            try:
                yield member.name, read_member(file, member)
            except DamagedTarError as error:
                _corrupt(path, str(error))


def tar_entries(path: Path) -> Iterator[tuple[str, int, int]]:
    """Names of the members of a tar, and where their contents begin and how long they are; contents are not read.

    Raises:
        CorruptShardError: anything but plain files of at most `MAX_SAMPLE_BYTES` and a proper end.
    """
    with explained(path), path.open("rb") as file:
        for member in _walk(path, file):
            yield member.name, member.offset, member.size


def _walk(path: Path, file: BinaryIO) -> Iterator[Member]:
    """The members of a shard's tar, which are plain files under short names."""
    end = 0
    try:
        for member in walk_tar(file, "strict"):
            if not member.is_file or member.is_extended:
                _corrupt(path, f"member {member.name!r} is not a plain file")
            if member.size > MAX_SAMPLE_BYTES:
                _corrupt(path, f"member {member.name!r} has {member.size} bytes; up to {MAX_SAMPLE_BYTES} are read")
            yield member
            end = member.offset + member.size + -member.size % BLOCK_BYTES
    except DamagedTarError as error:
        raise CorruptShardError(f"{shown_path(path)}: {error}") from None
    if os.fstat(file.fileno()).st_size - end < 2 * BLOCK_BYTES:
        _corrupt(path, "cut short: the end of the archive is missing")


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a shard's parquet in order.

    Raises:
        CorruptShardError: the file is not a parquet, or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with explained(path), path.open("rb") as source:
        try:
            with pq.ParquetFile(source) as file:
                if not any(file.schema_arrow.equals(arrow_schema(version=version)) for version in _VERSIONS):
                    _corrupt(path, "its columns are not those of this version")
                for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns):
                    yield from batch.to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise CorruptShardError(f"{shown_path(path)}: not a whole parquet file ({error})") from error


def describe_files(tar: Path, parquet: Path, counts: ShardCounts, companions: Mapping[str, Path] = _NONE) -> ShardFiles:
    """Sizes and checksums of the files of a shard."""
    return ShardFiles(
        tar=tar,
        parquet=parquet,
        tar_sha256=file_digest(tar, "sha256"),
        tar_md5=file_digest(tar, "md5"),
        tar_bytes=tar.stat().st_size,
        parquet_sha256=file_digest(parquet, "sha256"),
        parquet_bytes=parquet.stat().st_size,
        counts=counts,
        companions={kind: _companion(path) for kind, path in companions.items()},
    )


def _companion(path: Path) -> CompanionTar:
    facts = TarFacts(sha256=file_digest(path, "sha256"), md5=file_digest(path, "md5"), bytes=path.stat().st_size)
    return CompanionTar(path=path, facts=facts)


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def read_samples(
    tar: Path, parquet: Path, companions: Mapping[str, Path] = _NONE
) -> Iterator[tuple[dict[str, Any], dict[str, TarSample]]]:
    """The rows of a shard in order, each with what its tars hold of it, by their folder; nothing where no image is.

    Args:
        companions: tars with second images of the samples, by their folder.

    Raises:
        CorruptShardError: they are not whole, or the images are not those that the rows list.
    """
    tars = {SHARDS: tar, **companions}
    samples = {folder: read_shard(path) for folder, path in tars.items()}
    for row in read_rows(parquet):
        found = {}
        for folder, path in tars.items():
            if _has_image(folder, row):
                one = found[folder] = next(samples[folder], _NO_SAMPLE)
                is_listed = folder != SHARDS or hashlib.sha256(one.image).hexdigest() == row["sha256"]
                if one.key != row["key"] or not is_listed:
                    _corrupt(path, f"the image of {row['key']} is missing or not the one listed in {parquet.name}")
        yield row, found
    for folder, path in tars.items():
        if extra := next(samples[folder], None):
            _corrupt(path, f"{extra.key} is not listed in {parquet.name}")


def _has_image(folder: str, row: Mapping[str, Any]) -> bool:
    """Whether a tar has an image for a row: where the sample's own is stored, second images that the row names too."""
    return bool(row["sha256"] and (folder == SHARDS or row.get(KEY_COLUMNS[folder])))


def inspect_pair(tar: Path, parquet: Path, companions: Mapping[str, Path] = _NONE) -> ShardFiles:
    """Read a shard's files to the end and check that they belong together.

    Every image is listed in the parquet with its checksum, every listed image is there, and the records agree field
    by field. A companion has an image for each row that names it, and a record that does not contradict that row.

    Args:
        companions: as in `read_samples`.

    Raises:
        CorruptShardError: they are not whole, or not of one piece.
    """
    brief = []
    for row, samples in read_samples(tar, parquet, companions):
        brief.append({name: row[name] for name in ("key", "status", "accepted")})
        if row["status"] == STATUS_OK and not samples:
            _corrupt(parquet, f"{row['key']} is listed without an image")
        for folder, sample in samples.items():
            _check_record(tar if folder == SHARDS else companions[folder], folder, sample.record, row)
    with explained(tar):
        return describe_files(tar, parquet, count_rows(brief), companions)


def _check_record(path: Path, folder: str, record: dict[str, Any], row: dict[str, Any]) -> None:
    """Check the record of an image in a tar against the row of its sample."""
    if folder == SHARDS:
        if record != {name: row.get(name) for name in columns_of(record["schema_version"])}:
            _corrupt(path, f"the record of {row['key']} is not that of its row")
    elif name := difference_to_row(folder, record, row):
        _corrupt(path, f"the record of {row['key']} contradicts its row in {name}")


def _corrupt(path: Path, what: str) -> NoReturn:
    raise CorruptShardError(f"{shown_path(path)}: {what}")

"""Shards: a WebDataset tar of the images and a parquet of every attempt.

The tar is plain ustar with nothing in it that depends on the run: equal samples give equal bytes. Members of a sample
are adjacent, `KEY.png`, `KEY.json`, `KEY.cls`, in this order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, get_args

from engine.data.run.counts import ShardCounts, count_rows
from engine.data.run.schema import arrow_schema, check_run_fields
from engine.data.stores.file_errors import explained, shown
from engine.data.tars import BLOCK_BYTES, DamagedTarError, Member, read_member, walk_tar
from engine.errors import CorruptShardError
from engine.job.columns import SCHEMA_VERSION
from engine.job.records import STATUS_FAILED, STATUS_OK, SampleResult, check_record, columns_of, in_version
from engine.job.spec import OutputSpec

SHARDS = "shards"
RECORD_BYTES = 10240
# Of an image or a record: a side of 4096 pixels without compression fits.
MAX_SAMPLE_BYTES = 64 * 2**20
ROWS_PER_GROUP = 1024
IMAGE_FORMATS: tuple[str, ...] = get_args(OutputSpec.model_fields["image_format"].annotation)

_VERSIONS = range(SCHEMA_VERSION, 0, -1)
_KEY = re.compile(r"[a-z0-9-]{1,90}")


def shard_name(job_name: str, number: int) -> str:
    """Name of a shard's files without their extensions."""
    return f"{job_name}-{number:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFiles:
    """A tar and a parquet that belong together, with what the commit record says of them."""

    tar: Path
    parquet: Path
    tar_sha256: str
    tar_md5: str
    tar_bytes: int
    parquet_sha256: str
    parquet_bytes: int
    counts: ShardCounts


def is_key(text: str) -> bool:
    """Whether a text can be the key of a sample: it is a file's name in tars and folders."""
    return _KEY.fullmatch(text) is not None


def stage_shard(
    folder: Path,
    name: str,
    results: Iterable[SampleResult],
    image_format: str,
    schema_version: int = SCHEMA_VERSION,
) -> ShardFiles:
    """Write the files of a shard, unpublished, into a new folder inside `folder`.

    Args:
        folder: an existing folder on the file system of the output (`Store.staging`).
        name: name of the files without extension.
        results: the samples in order, `ok` ones with their images; a rejected one's is stored where it is given.
        image_format: extension of the images.
        schema_version: of the columns; all shards of a run have one.

    Raises:
        OutputError: the files cannot be written.
        ValueError: a record that breaks the schema, a key twice, or an image missing or too many.

    Side effects:
        Leaves nothing behind when it raises.
    """
    with explained(folder):
        home = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    try:
        writer = _ShardWriter(home / f"{name}.tar", home / f"{name}.parquet", image_format, schema_version)
        try:
            for result in results:
                writer.add(result)
        finally:
            writer.close()
        with explained(home):
            return describe_files(writer.tar_path, writer.parquet_path, count_rows(writer.brief))
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def warm_up() -> None:
    """Import what the first shard needs, so that sampling need not share the interpreter with it.

    pyarrow looks for pandas at its first array, and imports it where it is: half a second.
    """
    import pyarrow as pa
    import pyarrow.parquet

    pa.array([0])


def discard(staged: ShardFiles) -> None:
    """Remove the staged files of a shard and their folder; what was published stays."""
    shutil.rmtree(staged.tar.parent, ignore_errors=True)


class _ShardWriter:
    """Writes tar and parquet side by side, rows in groups."""

    def __init__(self, tar_path: Path, parquet_path: Path, image_format: str, schema_version: int) -> None:
        import pyarrow.parquet as pq

        if image_format not in IMAGE_FORMATS:
            raise ValueError(f"image_format {image_format!r} is not one of {', '.join(IMAGE_FORMATS)}")
        self.tar_path, self.parquet_path, self.image_format = tar_path, parquet_path, image_format
        self.version, self.schema = schema_version, arrow_schema(version=schema_version)
        self.brief: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.rows: list[dict[str, Any]] = []
        with explained(tar_path):
            self.tar = tar_path.open("wb")
            self.parquet = pq.ParquetWriter(parquet_path, self.schema, compression="zstd")

    def add(self, result: SampleResult) -> None:
        check_record(result.record)
        record, image = in_version(result.record, self.version), result.image
        check_run_fields(result.run)
        key, status, stored = record["key"], record["status"], bool(image)
        if not _KEY.fullmatch(key) or key in self.keys:
            raise ValueError(f"key {key!r} is there twice, or is not of a-z, 0-9 and hyphens")
        if (status == STATUS_OK and not stored) or (status == STATUS_FAILED and stored):
            raise ValueError(f"sample {key}: status {status!r} with {len(image)} bytes of image")
        self.keys.add(key)
        if stored:
            with explained(self.tar_path):
                for name, data in sample_members(record, image, self.image_format):
                    self.tar.write(tar_member(name, data))
        sha256 = hashlib.sha256(image).hexdigest() if stored else ""
        self.rows.append(record | result.run | {"sha256": sha256})
        self.brief.append({name: record[name] for name in ("key", "status", "accepted")})
        if len(self.rows) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        with explained(self.parquet_path):
            self._flush()
            self.parquet.close()
        with explained(self.tar_path), self.tar:
            size = self.tar.tell() + 2 * BLOCK_BYTES
            self.tar.write(bytes(2 * BLOCK_BYTES + -size % RECORD_BYTES))

    def _flush(self) -> None:
        import pyarrow as pa

        if self.rows:
            with explained(self.parquet_path):
                self.parquet.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
        self.rows = []


def sample_members(record: dict[str, Any], image: bytes, image_format: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a sample's members in their order."""
    key = record["key"]
    yield f"{key}.{image_format}", image
    yield f"{key}.json", record_json(record)
    yield f"{key}.cls", str(record["class_index"]).encode()


def record_json(record: dict[str, Any]) -> bytes:
    """The json member of a sample: one line, fields in the order of the schema, UTF-8."""
    return (json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode()


def tar_member(name: str, data: bytes) -> bytes:
    """Header and content of a member; time, owner and mode are always the same."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK_BYTES)


def read_shard(path: Path) -> Iterator[tuple[str, bytes, dict[str, Any], int]]:
    """The samples of a tar in order: key, image file, record, class.

    Raises:
        CorruptShardError: the tar is cut short, has a foreign or misplaced member, or a record that breaks the schema.
    """
    members = read_tar(path)
    for name, image in members:
        key, _, extension = name.partition(".")
        if extension not in IMAGE_FORMATS:
            _corrupt(path, f"member {name!r} stands where an image should")
        parts = [
            data for wanted, (found, data) in zip((".json", ".cls"), members, strict=False) if found == key + wanted
        ]
        if len(parts) != 2:
            _corrupt(path, f"sample {key!r} lacks its .json or .cls beside the image")
        try:
            record, cls = json.loads(parts[0]), int(parts[1].decode("ascii"))
            check_record(record)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptShardError(f"{shown(path)}: sample {key!r}: {error}") from error
        if record["key"] != key or record["class_index"] != cls:
            _corrupt(path, f"sample {key!r} holds the record of {record['key']!r}, or another class")
        yield key, image, record, cls


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
        raise CorruptShardError(f"{shown(path)}: {error}") from None
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
                if not any(file.schema_arrow.equals(arrow_schema(version=one)) for one in _VERSIONS):
                    _corrupt(path, "its columns are not those of this version")
                for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns):
                    yield from batch.to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise CorruptShardError(f"{shown(path)}: not a whole parquet file ({error})") from error


def describe_files(tar: Path, parquet: Path, counts: ShardCounts) -> ShardFiles:
    """Sizes and checksums of a pair of files."""
    return ShardFiles(
        tar=tar,
        parquet=parquet,
        tar_sha256=file_digest(tar, "sha256"),
        tar_md5=file_digest(tar, "md5"),
        tar_bytes=tar.stat().st_size,
        parquet_sha256=file_digest(parquet, "sha256"),
        parquet_bytes=parquet.stat().st_size,
        counts=counts,
    )


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def inspect_pair(tar: Path, parquet: Path) -> ShardFiles:
    """Read a shard's files to the end and check that they belong together.

    Every image is listed in the parquet with its checksum, every listed image is there, and the records agree field
    by field.

    Raises:
        CorruptShardError: they are not whole, or not of one piece.
    """
    brief = []
    samples = read_shard(tar)
    for row in read_rows(parquet):
        brief.append({name: row[name] for name in ("key", "status", "accepted")})
        if not row["sha256"]:
            if row["status"] == STATUS_OK:
                _corrupt(parquet, f"{row['key']} is listed without an image")
            continue
        key, image, record, _ = next(samples, ("", b"", {}, 0))
        if key != row["key"] or hashlib.sha256(image).hexdigest() != row["sha256"]:
            _corrupt(tar, f"the image of {row['key']} is missing or not the one listed in {parquet.name}")
        if record != {name: row.get(name) for name in columns_of(record["schema_version"])}:
            _corrupt(tar, f"the record of {row['key']} is not the one listed in {parquet.name}")
    if extra := next(samples, None):
        _corrupt(tar, f"{extra[0]} is not listed in {parquet.name}")
    with explained(tar):
        return describe_files(tar, parquet, count_rows(brief))


def _corrupt(path: Path, what: str) -> NoReturn:
    raise CorruptShardError(f"{shown(path)}: {what}")

"""Writing a shard: a WebDataset tar of the images and a parquet of every attempt.

The tar is plain ustar with nothing in it that depends on the run: equal samples give equal bytes. Members of a sample
are adjacent, `KEY.png`, `KEY.json`, `KEY.cls`, in this order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.data.run.companions import KEY_COLUMNS
from engine.data.run.counts import count_rows
from engine.data.run.schema import arrow_schema, check_run_fields
from engine.data.run.shards import IMAGE_FORMATS, ROWS_PER_GROUP, ShardFiles, describe_files, is_key
from engine.data.stores.file_errors import explained
from engine.data.tars import BLOCK_BYTES
from engine.job.columns import SCHEMA_VERSION
from engine.job.records import STATUS_FAILED, STATUS_OK, SampleResult, check_record, in_version

RECORD_BYTES = 10240


def stage_shard(
    folder: Path,
    name: str,
    results: Iterable[SampleResult],
    image_format: str,
    schema_version: int = SCHEMA_VERSION,
    companions: Sequence[str] = (),
) -> ShardFiles:
    """Write the files of a shard, unpublished, into a new folder inside `folder`.

    Args:
        folder: an existing folder on the file system of the output (`Store.staging`).
        name: name of the files without extension.
        results: the samples in order, `ok` ones with their images; a rejected one's is stored where it is given.
        image_format: extension of the images.
        schema_version: of the columns; all shards of a run have one.
        companions: folders of the tars that are written too, with the second images of the samples.

    Raises:
        OutputError: the files cannot be written.
        ValueError: a record that breaks the schema, a key twice, or an image missing or too many, also in a companion.

    Side effects:
        Leaves nothing behind when it raises.
    """
    with explained(folder):
        home = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    try:
        writer = _ShardWriter(home, name, image_format, schema_version, companions)
        try:
            for result in results:
                writer.add(result)
        finally:
            writer.close()
        with explained(home):
            counts, others = count_rows(writer.brief), {kind: tar.path for kind, tar in writer.companions.items()}
            return describe_files(writer.tar.path, writer.parquet_path, counts, others)
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
    """Writes tars and parquet side by side, rows in groups."""

    def __init__(
        self, home: Path, name: str, image_format: str, schema_version: int, companions: Sequence[str]
    ) -> None:
        import pyarrow.parquet as pq

        if image_format not in IMAGE_FORMATS:
            raise ValueError(f"image_format {image_format!r} is not one of {', '.join(IMAGE_FORMATS)}")
        self.parquet_path, self.image_format = home / f"{name}.parquet", image_format
        self.version, self.schema = schema_version, arrow_schema(version=schema_version)
        self.brief: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.rows: list[dict[str, Any]] = []
        self.tar = _TarFile(home / f"{name}.tar", image_format)
        self.companions = {kind: _TarFile(home / f"{name}.{kind}.tar", image_format) for kind in companions}
        with explained(self.parquet_path):
            self.parquet = pq.ParquetWriter(self.parquet_path, self.schema, compression="zstd")

    def add(self, result: SampleResult) -> None:
        """Write a sample; see `stage_shard` for the errors."""
        check_record(result.record)
        record, image = in_version(result.record, self.version), result.image
        check_run_fields(result.run)
        key, status, stored = record["key"], record["status"], bool(image)
        if not is_key(key) or key in self.keys:
            raise ValueError(f"key {key!r} is there twice, or is not of a-z, 0-9 and hyphens")
        if (status == STATUS_OK and not stored) or (status == STATUS_FAILED and stored):
            raise ValueError(f"sample {key}: status {status!r} with {len(image)} bytes of image")
        self.keys.add(key)
        if stored:
            self.tar.add(record, image)
            for kind, tar in self.companions.items():
                self._add_companion(kind, tar, record, result)
        sha256 = hashlib.sha256(image).hexdigest() if stored else ""
        self.rows.append(record | result.run | {"sha256": sha256})
        self.brief.append({name: record[name] for name in ("key", "status", "accepted")})
        if len(self.rows) == ROWS_PER_GROUP:
            self._flush()

    def _add_companion(self, kind: str, tar: _TarFile, record: dict[str, Any], result: SampleResult) -> None:
        """Write the second image of a stored sample, which has it where its record names it."""
        companion = result.companions.get(kind)
        if (companion is not None) != bool(record[KEY_COLUMNS[kind]]):
            raise ValueError(
                f"sample {record['key']}: {KEY_COLUMNS[kind]} and its image in {kind} contradict each other"
            )
        if companion is not None:
            check_record(companion.record)
            tar.add(in_version(companion.record, self.version), companion.image())

    def close(self) -> None:
        """Write the remaining rows and the ends of all files."""
        with explained(self.parquet_path):
            self._flush()
            self.parquet.close()
        for tar in (self.tar, *self.companions.values()):
            tar.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self.rows:
            with explained(self.parquet_path):
                self.parquet.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
        self.rows = []


class _TarFile:
    """A tar of samples in the making."""

    def __init__(self, path: Path, image_format: str) -> None:
        self.path, self._format = path, image_format
        with explained(path):
            self._file = path.open("wb")

    def add(self, record: dict[str, Any], image: bytes) -> None:
        """Write the members of a sample."""
        with explained(self.path):
            for name, data in sample_members(record, image, self._format):
                self._file.write(tar_member(name, data))

    def close(self) -> None:
        """Write the end of the archive."""
        with explained(self.path), self._file:
            size = self._file.tell() + 2 * BLOCK_BYTES
            self._file.write(bytes(2 * BLOCK_BYTES + -size % RECORD_BYTES))


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

"""Packs: parquet files that hold many commit records each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.run.commit_record import CommitRecord, parse_record
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained, shown_path
from engine.errors import CorruptShardError

PACKS = "_state/packs"
MAX_LOOSE = 10_000


def write_pack(path: Path, records: Iterator[tuple[str, CommitRecord]]) -> list[str]:
    """Write a pack and return the names of its records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("number", pa.int64()), ("name", pa.string()), ("record", pa.string())])
    names: list[str] = []
    with explained(path), pq.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for name, record in records:
            rows.append({"number": record.shard, "name": Path(name).name, "record": record.to_json()})
            names.append(name)
            if len(rows) == MAX_LOOSE:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return names


def packed_records(store: Store, pack: str) -> Iterator[CommitRecord]:
    """The records of a pack, in the order of their shards.

    Raises:
        CorruptShardError: the pack or a record cannot be read.
    """
    return (parse_record(pack, row["record"]) for row in pack_rows(store.fetch(pack), ["record"]))


def pack_rows(path: Path, columns: list[str], number: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a pack in order, or those of one shard."""
    import pyarrow.parquet as pq

    with reading_pack(path):
        if number is not None:
            wanted = [("number", "==", number)]
            yield from pq.read_table(path, columns=columns, filters=wanted, partitioning=None).to_pylist()
            return
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()


@contextlib.contextmanager
def reading_pack(path: Path) -> Iterator[None]:
    """Turn errors of the file system and of Arrow into ones that name the pack.

    Raises:
        CorruptShardError: in the block, the pack cannot be read.
    """
    import pyarrow as pa

    with explained(path):
        try:
            yield
        except pa.ArrowException as error:
            reason = f"the packed commit records cannot be read ({error})"
            raise CorruptShardError(f"{shown_path(path)}: {reason}") from error

"""Packs: parquet files that hold many commit records each.

Records are packed while a run goes on, a thousand at a time, and small packs are merged into larger ones, so that a run
of a million shards has some dozens of packs and at most a thousand loose records. Nothing is removed before what
replaces it is published: whoever is killed or races another driver leaves records twice, never none, and readers take
each once.
"""

from __future__ import annotations

import contextlib
import heapq
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.data.run.commit_record import CommitRecord, parse_record
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained, shown_path
from engine.errors import CorruptShardError

PACKS = "_state/packs"
MAX_LOOSE = 1_000
# Packs below a size are merged where there are so many of them. A record takes about 250 bytes.
MERGE_PACKS = 10
MERGE_BELOW_BYTES = (2**20, 10 * 2**20)
ROWS_PER_GROUP = 10_000
_COLUMNS = ["number", "name", "record"]
# Packs may be merged again and again while somebody lists them.
_TRIES = 10


class Pack(NamedTuple):
    """A pack that is open: merged into another one, it stays readable."""

    name: str
    path: Path
    file: BinaryIO


def write_pack(path: Path, records: Iterable[tuple[str, CommitRecord]]) -> list[str]:
    """Write a pack and return the names of its records."""
    names: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for name, record in records:
            names.append(name)
            yield {"number": record.shard, "name": Path(name).name, "record": record.to_json()}

    _write_rows(path, rows())
    return names


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("number", pa.int64()), ("name", pa.string()), ("record", pa.string())])
    with explained(path), pq.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []
        for row in rows:
            group.append(row)
            if len(group) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        writer.write_table(pa.Table.from_pylist(group, schema=schema))


def publish_pack(store: Store, records: Iterable[tuple[str, CommitRecord]]) -> list[str]:
    """Publish a pack of records that are in the store, in the order of their shards, then remove the loose ones.

    Returns:
        Names of the records.
    """
    staged = store.staging() / "pack.parquet"
    packed = write_pack(staged, records)
    _publish(store, staged)
    store.remove_all(packed)
    return packed


def _publish(store: Store, staged: Path) -> None:
    """Publish a pack under a number above all others: numbers of merged packs are not used again."""
    numbers = [int(stem) for name in store.list(PACKS) if (stem := Path(name).stem).isdecimal()]
    number = max(numbers, default=-1) + 1
    while not store.publish(f"{PACKS}/{number:06d}.parquet", staged):
        number += 1
    staged.unlink()


def packs_to_merge(sizes: Mapping[str, int]) -> list[str]:
    """Names of the packs that are to become one; none where there are few.

    Args:
        sizes: bytes of all packs by name.
    """
    for limit in reversed(MERGE_BELOW_BYTES):
        small = sorted(name for name, size in sizes.items() if size < limit)
        tiny = [name for name in small if sizes[name] < MERGE_BELOW_BYTES[0]]
        # Larger ones are merged by themselves, so that a record is written only once for each size.
        chosen = tiny if limit == MERGE_BELOW_BYTES[0] else [name for name in small if name not in tiny]
        if len(chosen) >= MERGE_PACKS:
            return chosen
    return []


def merge_packs(store: Store) -> int:
    """Merge small packs into larger ones where there are many; how many were merged.

    Raises:
        CorruptShardError: a pack cannot be read.
    """
    merged = 0
    while names := packs_to_merge(store.sizes(PACKS)):
        with contextlib.ExitStack() as stack:
            packs = _open_all(store, names, stack)
            if packs is None:
                break  # Another driver is merging them.
            staged = store.staging() / "pack.parquet"
            _write_rows(staged, _distinct(heapq.merge(*map(pack_rows, packs), key=_place)))
        _publish(store, staged)
        store.remove_all(names)
        merged += len(names)
    return merged


def _place(row: Mapping[str, Any]) -> tuple[int, str, str]:
    return row["number"], row["name"], row["record"]


def _distinct(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows without those that equal the one before."""
    last: dict[str, Any] = {}
    for row in rows:
        if row != last:
            yield row
        last = row


@contextlib.contextmanager
def opened_packs(store: Store) -> Iterator[list[Pack]]:
    """All packs in order, open, so that one that is merged meanwhile can still be read.

    Raises:
        CorruptShardError: a pack that is listed cannot be found, however often it is tried.
    """
    for _ in range(_TRIES):
        with contextlib.ExitStack() as stack:
            packs = _open_all(store, names := store.list(PACKS), stack)
            if packs is not None:
                yield packs
                return
        # One was merged after it was listed: what it was merged into has been published before.
    raise CorruptShardError(f"{store.address(PACKS)}: packs of commit records are listed and not there: {names[0]} ...")


def _open_all(store: Store, names: Sequence[str], stack: contextlib.ExitStack) -> list[Pack] | None:
    """Packs by name, opened; None where one is not there any more."""
    packs = []
    for name, path in zip(names, store.fetch_each(names, keep=True), strict=True):
        with explained(path):
            try:
                packs.append(Pack(name, path, stack.enter_context(path.open("rb"))))
            except FileNotFoundError:
                return None
    return packs


def packed_records(pack: Pack) -> Iterator[CommitRecord]:
    """The records of a pack, in the order of their shards.

    Raises:
        CorruptShardError: the pack or a record cannot be read.
    """
    return (parse_record(pack.name, row["record"]) for row in pack_rows(pack, ["record"]))


def merged_records(packs: Iterable[Pack], *others: Iterator[CommitRecord]) -> Iterator[CommitRecord]:
    """The records of packs and other sources in the order of their shards."""
    return heapq.merge(*others, *map(packed_records, packs), key=operator.attrgetter("shard"))


def pack_rows(pack: Pack, columns: Sequence[str] = _COLUMNS, number: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a pack in order, or those of one shard."""
    import pyarrow.parquet as pq

    with reading_pack(pack.path):
        if number is not None:
            wanted = [("number", "==", number)]
            yield from pq.read_table(pack.file, columns=list(columns), filters=wanted).to_pylist()
            return
        with pq.ParquetFile(pack.file, pre_buffer=False) as file:
            for batch in file.iter_batches(columns=list(columns), batch_size=ROWS_PER_GROUP):
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

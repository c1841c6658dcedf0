"""The commit records of a run, loose or packed: listing, reading, packing and removing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.data.run.commit_packs import (
    MAX_LOOSE,
    merge_packs,
    merged_records,
    opened_packs,
    pack_rows,
    packed_records,
    publish_pack,
    write_pack,
)
from engine.data.run.commit_record import COMMITS, CommitRecord, parse_record
from engine.data.run.counts import ShardCounts, parse_record_name, record_name
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, OutputError


class CommitSummary(NamedTuple):
    """Shard and counts, as in a record's name. A tuple, as there may be a million."""

    number: int
    counts: ShardCounts


def list_commits(store: Store) -> dict[int, CommitSummary]:
    """The committed shards by number, from one listing of the records' names and the names in the packs.

    Raises:
        CorruptShardError: two different records for one shard.
    """
    commits: dict[int, CommitSummary] = {}
    for name in _all_names(store):
        parsed = parse_record_name(name)
        if parsed is None:
            continue
        number, counts = parsed
        if number not in commits:
            commits[number] = CommitSummary(number, counts or _counts_inside(store, name, number))
        elif (other := record_name(number, commits[number].counts)) != name:
            raise CorruptShardError(
                f"{store.address(COMMITS)}: shard {number} has two records, {other} and {name}; remove the one whose "
                "checksums are not those of the shard's files"
            )
    return commits


def read_commit(store: Store, number: int) -> CommitRecord | None:
    """The record of a shard, or None where it is not committed.

    Raises:
        CorruptShardError: the record cannot be read.
    """
    # Loose records first: a record that is just being packed is in its pack before it stops being loose.
    for name in store.list(COMMITS):
        parsed = parse_record_name(Path(name).name)
        if parsed and parsed[0] == number and (record := _read_loose(store, name)):
            return record
    with opened_packs(store) as packs:
        for pack in packs:
            for row in pack_rows(pack, ["record"], number):
                return parse_record(pack.name, row["record"])
    return None


def inspect_records(store: Store) -> Iterator[tuple[int, CommitRecord | CorruptShardError]]:
    """Every committed shard's number with its record, or with what is wrong with it; in constant memory but for names.

    A record is wrong that cannot be read, is not the only one of its shard, or has other counts than its name.
    """
    names: dict[int, set[str]] = {}
    for name in _all_names(store):
        if parsed := parse_record_name(name):
            names.setdefault(parsed[0], set()).add(name)
    for number, record_names in names.items():
        if len(record_names) > 1:
            yield number, CorruptShardError(f"shard {number} has several records: {', '.join(sorted(record_names))}")
    for number, name, text in _record_texts(store):
        if len(names.get(number, ())) == 1:
            yield number, _inspected(store.address(f"{COMMITS}/{name}"), name, number, text)
            # A record that is being packed exists twice.
            names.pop(number)


def _record_texts(store: Store) -> Iterator[tuple[int, str, str | bytes | OutputError]]:
    """Number, name and text of every record, or why it cannot be read; loose ones first."""
    names = {name: parse_record_name(Path(name).name) for name in store.list(COMMITS)}
    numbers = {name: parsed[0] for name, parsed in names.items() if parsed}
    for name, data in store.read_each(numbers, listed=True):
        yield numbers[name], Path(name).name, data
    with opened_packs(store) as packs:
        for pack in packs:
            yield from ((row["number"], row["name"], row["record"]) for row in pack_rows(pack))


def _inspected(where: str, name: str, number: int, text: str | bytes | OutputError) -> CommitRecord | CorruptShardError:
    try:
        record = parse_record(where, text)
        if record.shard != number or record_name(number, record.counts) != name:
            raise CorruptShardError(f"{where}: holds another shard or other counts than its name")
    except CorruptShardError as error:
        return error
    return record


def forget_commit(store: Store, number: int) -> list[str]:
    """Remove all records of a shard, so that it is made again. The caller holds the lease.

    Returns:
        Names of the removed or rewritten files.
    """
    loose = [name for name in store.list(COMMITS) if Path(name).name.startswith(f"{number:06d}.")]
    store.remove_all(loose)
    rewritten = []
    with opened_packs(store) as packs:
        for pack in packs:
            if any(pack_rows(pack, ["number"], number)):
                staged = store.staging() / "pack.parquet"
                kept = (record for record in packed_records(pack) if record.shard != number)
                write_pack(staged, ((record.file_name, record) for record in kept))
                store.replace(pack.name, staged)
                rewritten.append(pack.name)
    return loose + rewritten


def read_commits(store: Store) -> Iterator[CommitRecord]:
    """All records in the order of their shards, in constant memory.

    Raises:
        CorruptShardError: a record cannot be read.
    """
    last = -1
    # Loose ones are listed first: one that is being packed is in its pack before it stops being loose.
    loose = _loose_records(store)
    with opened_packs(store) as packs:
        for record in merged_records(packs, loose):
            if record.shard != last:
                yield record
            last = record.shard


def compact_commits(store: Store, max_loose: int = MAX_LOOSE) -> int:
    """Move the loose records into one pack when there are more than `max_loose`, and merge packs where there are many.

    Safe with concurrently committing workers, a second driver and at any interruption: a record is removed only once
    the pack that has it is published.

    Returns:
        Number of records packed.
    """
    num_packed = len(publish_pack(store, _loose(store))) if len(store.list(COMMITS)) > max_loose else 0
    merge_packs(store)
    return num_packed


class CommitPacker:
    """Packs records while a run goes on, without reading them from the store again.

    Args:
        every: number of records in a pack.
    """

    def __init__(self, store: Store, every: int = MAX_LOOSE) -> None:
        self._store, self._every = store, every
        self._records: dict[str, CommitRecord] = {}

    def add(self, record: CommitRecord) -> int:
        """Take a record that is in the store; how many were packed by that.

        Raises:
            OutputError: the store refuses. The records are loose or packed, and are packed when the run is closed.
            CorruptShardError: a pack cannot be read.
        """
        self._records[record.file_name] = record
        if len(self._records) < self._every:
            return 0
        records, self._records = self._records, {}
        publish_pack(self._store, sorted(records.items(), key=lambda item: item[1].shard))
        merge_packs(self._store)
        return len(records)


def _all_names(store: Store) -> Iterator[str]:
    """File names of all records, loose ones first."""
    prefix = len(COMMITS) + 1
    yield from (name[prefix:] for name in store.list(COMMITS))
    with opened_packs(store) as packs:
        for pack in packs:
            yield from (row["name"] for row in pack_rows(pack, ["name"]))


def _counts_inside(store: Store, name: str, number: int) -> ShardCounts:
    record = _read_loose(store, f"{COMMITS}/{name}") or read_commit(store, number)
    assert record is not None, f"shard {number} was listed"
    return record.counts


def _loose_records(store: Store) -> Iterator[CommitRecord]:
    return (record for _, record in _loose(store))


def _loose(store: Store) -> Iterator[tuple[str, CommitRecord]]:
    """Names and contents of the loose records in the order of their shards; they are listed at once."""
    parsed = ((parse_record_name(Path(name).name), name) for name in store.list(COMMITS))
    numbered = [(parsed_name[0], name) for parsed_name, name in parsed if parsed_name]
    # Those that were packed after they were listed are not there.
    some = store.read_each((name for _, name in sorted(numbered)), listed=True)
    return ((name, parse_record(store.address(name), data)) for name, data in some)


def _read_loose(store: Store, name: str) -> CommitRecord | None:
    """A loose record, or None where it was packed after it was listed."""
    return next((parse_record(store.address(name), data) for _, data in store.read_each([name], listed=True)), None)

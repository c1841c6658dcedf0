"""Commit records: the proof that a shard is whole, created last, one for each shard (contract: commit).

The shard's files are published first, then the record. Whoever finds files without a record checks them: a pair that
is whole is adopted, whoever made it; anything else is moved aside. The record always tells of the published files.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import operator
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.run.counts import ShardCounts, parse_record_name, record_name
from engine.data.run.shards import SHARDS, ShardFiles, discard, file_digest, inspect_pair, read_rows
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained, shown
from engine.errors import MAX_REASON_CHARS, CorruptShardError, OutputError, RiskforgeError
from engine.job.plan import ShardSpec
from engine.methods.strict_json import parse_json

COMMITS = "_state/commits"
PACKS = "_state/packs"
MAX_LOOSE = 10_000
RECORD_VERSION = 1
NUM_LOCKS = 64
# What a record as `CommitRecord.to_json` writes it says of its files.
_FILES = (
    r'^\{"record_version": 1, "shard": (?P<shard>\d{1,15}), "name": "(?P<name>[a-z0-9-]+)", .*'
    r'"tar_bytes": (?P<tar>\d{1,18}), .*"parquet_bytes": (?P<parquet>\d{1,18}),'
)
# Pauses of whoever lost a race for a shard's files, in seconds, at least.
RACE_WAITS = (0.1, 0.4, 1.5)
# Of a row of a `ScreeningTally`.
TALLY_COLUMNS = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-\d{6,}")


class _RacedError(CorruptShardError):
    """Another process put a file where this one had just moved one away."""


class CommitSummary(NamedTuple):
    """What a record's name says: the shard and its counts. A tuple, as there may be a million."""

    number: int
    counts: ShardCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """What a record holds.

    Attributes:
        shard: number of the shard.
        name: name of its files without extension.
        request, start, stop: the samples, as in `ShardSpec`.
        attempt, worker: the try that made the published files.
        timing: seconds by name, as measured by the worker; empty where the files of another try were adopted.
        screening: rows of a `ScreeningTally`; empty where nothing was screened.
    """

    shard: int
    name: str
    plan_digest: str
    request: int
    start: int
    stop: int
    attempt: int
    worker: str
    counts: ShardCounts
    tar_sha256: str
    tar_md5: str
    tar_bytes: int
    parquet_sha256: str
    parquet_bytes: int
    timing: dict[str, float]
    screening: list[list[int]] = field(default_factory=list)

    @property
    def file_name(self) -> str:
        """Name of the record in the store."""
        return f"{COMMITS}/{record_name(self.shard, self.counts)}"

    def to_json(self) -> str:
        """The record as one line."""
        return json.dumps({"record_version": RECORD_VERSION} | dataclasses.asdict(self), allow_nan=False)


def commit_shard(
    store: Store,
    plan_digest: str,
    shard: ShardSpec,
    shard_name: str,
    staged: ShardFiles,
    attempt: int,
    worker: str,
    timing: dict[str, float],
    screening: list[list[int]] | None = None,
) -> CommitRecord:
    """Publish a staged shard and create its commit record, or adopt what is published already.

    Returns:
        The record as it stands in the store. It tells of the published files, which another try may have made.

    Raises:
        OutputError: the store refuses.
        CorruptShardError: the shard was committed before and its files are not what the record says.
        ValueError: the staged files do not hold the samples of the shard.

    Side effects:
        Removes the staged files once the record stands.
    """
    if staged.counts.attempted != shard.num_samples:
        raise ValueError(f"shard {shard.number}: {staged.counts.attempted} samples staged of {shard.num_samples}")
    own = CommitRecord(
        shard=shard.number,
        name=shard_name,
        plan_digest=plan_digest,
        request=shard.request,
        start=shard.start,
        stop=shard.stop,
        attempt=attempt,
        worker=worker,
        timing=timing,
        screening=screening or [],
        **_about(staged),
    )
    with store.lock(f"shard-{shard.number % NUM_LOCKS:02d}"):
        record = _settle_in_turn(store, own, staged)
    discard(staged)
    return record


def _settle_in_turn(store: Store, own: CommitRecord, staged: ShardFiles) -> CommitRecord:
    """As `_settle`; again where another process, which no lock keeps away, moved or put files in the middle of it."""
    for wait in RACE_WAITS:
        try:
            return _settle(store, own, staged)
        except RiskforgeError as error:
            if not isinstance(error, _RacedError) and not isinstance(error.__cause__, FileNotFoundError):
                raise
        time.sleep(wait * (1 + random.random()))
    return _settle(store, own, staged)


def _settle(store: Store, own: CommitRecord, staged: ShardFiles) -> CommitRecord:
    """Bring the files and the record of a shard to their final state."""
    tar, parquet = _names(own.name)
    if (store.exists(tar) or store.exists(parquet)) and (earlier := read_commit(store, own.shard)):
        _check_committed(store, earlier, own, staged)
        return earlier
    # Both are published, whatever the first answers: a free name is filled, a taken one is looked at below.
    is_own = [store.publish(tar, staged.tar), store.publish(parquet, staged.parquet)]
    record = own if all(is_own) else _adopt(store, own, staged)
    if not store.publish(record.file_name, record.to_json().encode()):
        record = _parse(record.file_name, store.read(record.file_name))
        _check_committed(store, record, own, staged)
    return record


def _adopt(store: Store, own: CommitRecord, staged: ShardFiles) -> CommitRecord:
    """Record what is published if it is whole and of this shard, otherwise put the staged files in its place."""
    tar, parquet = _names(own.name)
    try:
        found = inspect_pair(store.fetch(tar), store.fetch(parquet))
        if _identity(found.parquet) != _identity(staged.parquet):
            raise CorruptShardError(f"{shown(found.parquet)}: holds other samples than shard {own.shard} of this plan")
    except CorruptShardError:
        store.set_aside(tar)
        store.set_aside(parquet)
        for name, data in ((tar, staged.tar), (parquet, staged.parquet)):
            if not store.publish(name, data):
                raise _RacedError(f"{store.address(name)}: written by two processes at once; run again") from None
        return own
    if found.parquet_sha256 == own.parquet_sha256:
        return own
    first = next(read_rows(found.parquet, ["attempt", "worker"]))
    return dataclasses.replace(own, **first, timing={}, **_about(found))


def _check_committed(store: Store, record: CommitRecord, own: CommitRecord, staged: ShardFiles) -> None:
    """Check the published files against the record; a lost file that was made again byte for byte is put back."""
    told = ((record.tar_sha256, own.tar_sha256), (record.parquet_sha256, own.parquet_sha256))
    for name, data, (wanted, made) in zip(_names(record.name), (staged.tar, staged.parquet), told, strict=True):
        where = store.address(name)
        if not store.exists(name) and made == wanted:
            store.publish(name, data)
        if not store.exists(name):
            raise CorruptShardError(f"{where}: is missing, but shard {record.shard} is committed; restore the file")
        with explained(where):
            digest = file_digest(store.fetch(name), "sha256")
        if digest != wanted:
            raise CorruptShardError(f"{where}: is not the file that was committed (checksum {digest[:12]}); restore it")


def _about(files: ShardFiles) -> dict[str, Any]:
    """The part of a record that tells of the files."""
    names = ("counts", "tar_sha256", "tar_md5", "tar_bytes", "parquet_sha256", "parquet_bytes")
    return {name: getattr(files, name) for name in names}


def _names(shard_name: str) -> tuple[str, str]:
    return f"{SHARDS}/{shard_name}.tar", f"{SHARDS}/{shard_name}.parquet"


def _identity(parquet: Path) -> list[dict[str, Any]]:
    """Which samples a parquet tells of: their keys and seeds."""
    return list(read_rows(parquet, ["key", "seed"]))


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
    for pack in store.list(PACKS):
        for row in _pack_rows(store.fetch(pack), ["record"], number):
            return _parse(pack, row["record"])
    return None


def inspect_records(store: Store) -> Iterator[tuple[int, CommitRecord | CorruptShardError]]:
    """Every committed shard's number with its record, or with what is wrong with it; in constant memory but for names.

    A record is wrong that cannot be read, is not the only one of its shard, or has other counts than its name.
    """
    names: dict[int, set[str]] = {}
    for name in _all_names(store):
        if parsed := parse_record_name(name):
            names.setdefault(parsed[0], set()).add(name)
    for number, found in names.items():
        if len(found) > 1:
            yield number, CorruptShardError(f"shard {number} has several records: {', '.join(sorted(found))}")
    for number, name, text in _record_texts(store):
        if len(names.get(number, ())) == 1:
            yield number, _inspected(store.address(f"{COMMITS}/{name}"), name, number, text)
            # One that is being packed is in two places.
            names.pop(number)


def recorded_files(store: Store) -> Iterator[tuple[int, str, int] | CorruptShardError]:
    """Shard, name and bytes of every file that the records tell of; an error in the place of a record that cannot be
    read.
    """
    for name, data in store.read_each(name for name in store.list(COMMITS) if parse_record_name(Path(name).name)):
        yield from _files_of(store.address(name), data)
    for pack in store.list(PACKS):
        yield from _packed_files(store.fetch(pack))


def _files_of(where: str, text: str | bytes | OutputError) -> Iterator[tuple[int, str, int] | CorruptShardError]:
    try:
        record = _parse(where, text)
    except CorruptShardError as error:
        yield error
        return
    for name, num_bytes in zip(_names(record.name), (record.tar_bytes, record.parquet_bytes), strict=True):
        yield record.shard, name, num_bytes


def _packed_files(path: Path) -> Iterator[tuple[int, str, int] | CorruptShardError]:
    """As `recorded_files`, of a pack: there may be a million, so that JSON is only read where a pattern fails."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with explained(path):
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["record"]):
                    found = pc.extract_regex(batch.column(0), _FILES).to_pylist()
                    for place, fields in enumerate(found):
                        if fields is None:
                            yield from _files_of(shown(path), batch.column(0)[place].as_py())
                            continue
                        tar, parquet = _names(fields["name"])
                        yield int(fields["shard"]), tar, int(fields["tar"])
                        yield int(fields["shard"]), parquet, int(fields["parquet"])
        except pa.ArrowException as error:
            raise CorruptShardError(f"{shown(path)}: the packed commit records cannot be read ({error})") from error


def _record_texts(store: Store) -> Iterator[tuple[int, str, str | bytes | OutputError]]:
    """Number, name and text of every record, or why it cannot be read; loose ones first."""
    parsed = {name: found for name in store.list(COMMITS) if (found := parse_record_name(Path(name).name))}
    for name, data in store.read_each(parsed):
        yield parsed[name][0], Path(name).name, data
    for pack in store.list(PACKS):
        for row in _pack_rows(store.fetch(pack), ["number", "name", "record"]):
            yield row["number"], row["name"], row["record"]


def _inspected(where: str, name: str, number: int, text: str | bytes | OutputError) -> CommitRecord | CorruptShardError:
    try:
        record = _parse(where, text)
        if record.shard != number or record_name(number, record.counts) != name:
            raise CorruptShardError(f"{where}: holds another shard or other counts than its name")
    except CorruptShardError as error:
        return error
    return record


def forget_commit(store: Store, number: int) -> list[str]:
    """Remove all records of a shard, so that it is made again. Only for whoever holds the lease.

    Returns:
        Names of what was removed or written anew.
    """
    loose = [name for name in store.list(COMMITS) if Path(name).name.startswith(f"{number:06d}.")]
    store.remove_all(loose)
    packs = [pack for pack in store.list(PACKS) if any(_pack_rows(store.fetch(pack), ["number"], number))]
    for pack in packs:
        staged = store.staging() / "pack.parquet"
        kept = (record for record in _packed_records(store, pack) if record.shard != number)
        _write_pack(staged, ((record.file_name, record) for record in kept))
        store.replace(pack, staged)
    return loose + packs


def read_commits(store: Store) -> Iterator[CommitRecord]:
    """All records in the order of their shards, in constant memory.

    Raises:
        CorruptShardError: a record cannot be read.
    """
    last = -1
    sources = [_loose_records(store), *(_packed_records(store, pack) for pack in store.list(PACKS))]
    for record in heapq.merge(*sources, key=operator.attrgetter("shard")):
        if record.shard != last:
            yield record
        last = record.shard


def compact_commits(store: Store, max_loose: int = MAX_LOOSE) -> int:
    """Move the loose records into one pack when there are more than `max_loose`.

    Safe beside committing workers and at any interruption: a record leaves its own file only once the pack is there.

    Returns:
        Number of records packed.
    """
    names = store.list(COMMITS)
    if len(names) <= max_loose:
        return 0
    staged = store.staging() / "pack.parquet"
    packed = _write_pack(staged, _loose(store))
    number = len(store.list(PACKS))
    while not store.publish(f"{PACKS}/{number:06d}.parquet", staged):
        number += 1
    staged.unlink()
    store.remove_all(packed)
    return len(packed)


def _write_pack(path: Path, records: Iterator[tuple[str, CommitRecord]]) -> list[str]:
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


def _all_names(store: Store) -> Iterator[str]:
    """File names of all records, loose ones first."""
    prefix = len(COMMITS) + 1
    yield from (name[prefix:] for name in store.list(COMMITS))
    for pack in store.list(PACKS):
        yield from (row["name"] for row in _pack_rows(store.fetch(pack), ["name"]))


def _counts_inside(store: Store, name: str, number: int) -> ShardCounts:
    record = _read_loose(store, f"{COMMITS}/{name}") or read_commit(store, number)
    assert record is not None, f"shard {number} was listed"
    return record.counts


def _loose_records(store: Store) -> Iterator[CommitRecord]:
    return (record for _, record in _loose(store))


def _loose(store: Store) -> Iterator[tuple[str, CommitRecord]]:
    """Names and contents of the loose records in the order of their shards."""
    parsed = ((parse_record_name(Path(name).name), name) for name in store.list(COMMITS))
    numbered = [(one[0], name) for one, name in parsed if one]
    # Those that were packed after they were listed are not there.
    for name, data in store.read_each(name for _, name in sorted(numbered)):
        yield name, _parse(store.address(name), data)


def _read_loose(store: Store, name: str) -> CommitRecord | None:
    """A loose record, or None where it was packed after it was listed."""
    return next((_parse(store.address(name), data) for _, data in store.read_each([name])), None)


def _packed_records(store: Store, pack: str) -> Iterator[CommitRecord]:
    return (_parse(pack, row["record"]) for row in _pack_rows(store.fetch(pack), ["record"]))


def _pack_rows(path: Path, columns: list[str], number: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a pack in order, or those of one shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with explained(path):
        try:
            if number is not None:
                wanted = [("number", "==", number)]
                yield from pq.read_table(path, columns=columns, filters=wanted, partitioning=None).to_pylist()
                return
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=columns):
                    yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise CorruptShardError(f"{shown(path)}: the packed commit records cannot be read ({error})") from error


def _parse(where: str, text: str | bytes | OutputError) -> CommitRecord:
    if isinstance(text, OutputError):
        raise CorruptShardError(f"{text}; or remove it to make the shard again") from text
    try:
        raw = parse_json(text)
        if raw.pop("record_version") != RECORD_VERSION:
            raise ValueError("of another version")
        counts = ShardCounts(**raw["counts"])
        # Class codes and counts that have no name are not ours.
        record_name(0, counts)
        record = CommitRecord(**raw | {"counts": counts})
        _check_fields(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error)[:MAX_REASON_CHARS]
        remedy = "remove it to make the shard again"
        raise CorruptShardError(f"{where}: not a commit record ({reason}); {remedy}") from error
    return record


def _check_fields(record: CommitRecord) -> None:
    """Refuse a record whose fields are of other types, or whose name is none of a shard's files.

    Raises:
        ValueError: with the field.
    """
    for name in ("shard", "request", "start", "stop", "attempt", "tar_bytes", "parquet_bytes"):
        if type(value := getattr(record, name)) is not int or value < 0:
            raise ValueError(f"{name} is not a whole number: {value!r}")
    for name in ("name", "plan_digest", "worker", "tar_sha256", "tar_md5", "parquet_sha256"):
        if not isinstance(value := getattr(record, name), str):
            raise ValueError(f"{name} is not a text: {value!r}")
    if not _NAME.fullmatch(record.name):
        raise ValueError(f"name {record.name!r} is not that of a shard")
    if not isinstance(record.timing, dict) or not all(type(one) in (int, float) for one in record.timing.values()):
        raise ValueError(f"timing is not seconds by name: {record.timing!r}")
    rows = record.screening
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == TALLY_COLUMNS and all(type(one) is int for one in row) for row in rows
    ):
        raise ValueError(f"screening is not rows of {TALLY_COLUMNS} counts: {rows!r}")

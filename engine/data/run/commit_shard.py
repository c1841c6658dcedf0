"""Committing a shard: its files are published first, its record last (contract: commit).

Files without a record are checked: a complete set is adopted, no matter which process wrote it; anything else is moved
aside. The record always describes the published files.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.data.run.commit_record import CommitRecord, file_names, parse_record
from engine.data.run.commits import read_commit
from engine.data.run.notices import storable
from engine.data.run.shard_writing import discard
from engine.data.run.shards import ShardFiles, file_digest, inspect_pair, read_rows
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained, shown_path
from engine.errors import CorruptShardError, RiskforgeError
from engine.job.plan import ShardSpec

NUM_LOCKS = 64

# Minimum pauses after a lost race for a shard's files, in seconds.
RACE_WAITS = (0.1, 0.4, 1.5)


class RacedError(CorruptShardError):
    """Another process published a file where this one had just moved one aside."""


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
    notices: Iterable[str] = (),
) -> CommitRecord:
    """Publish a staged shard and create its commit record, or adopt what is published already.

    Args:
        notices: texts for the record, of any kind and length.

    Returns:
        The record in the store. It describes the published files, which another attempt may have made.

    Raises:
        OutputError: the store refuses.
        CorruptShardError: the shard was committed before and its files do not match the record.
        ValueError: the staged files do not hold the samples of the shard.

    Side effects:
        Removes the staged files once the record is published.
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
        notices=storable(notices),
        **_file_facts(staged),
    )
    with store.lock(f"shard-{shard.number % NUM_LOCKS:02d}"):
        record = _settle_in_turn(store, own, staged)
    discard(staged)
    return record


def _settle_in_turn(store: Store, own: CommitRecord, staged: ShardFiles) -> CommitRecord:
    """As `_settle`, with retries where another process, which no lock excludes, moved or published files meanwhile."""
    for wait in RACE_WAITS:
        try:
            return _settle(store, own, staged)
        except RiskforgeError as error:
            if not isinstance(error, RacedError) and not isinstance(error.__cause__, FileNotFoundError):
                raise
        time.sleep(wait * (1 + random.random()))
    return _settle(store, own, staged)


def _settle(store: Store, own: CommitRecord, staged: ShardFiles) -> CommitRecord:
    """Publish or adopt the files of a shard, and its record."""
    names = file_names(own.name, own.companions)
    # All are published, whatever the first returns: a free name is filled, a taken one is checked below.
    is_own = [store.publish(name, path) for name, path in zip(names, staged.paths, strict=True)]
    if not all(is_own) and (earlier := read_commit(store, own.shard)):
        _withdraw(store, earlier, own, list(itertools.compress(names, is_own)))
        _check_committed(store, earlier, own, staged)
        return earlier
    record = own if all(is_own) else _adopt(store, own, staged)
    if not store.publish(record.file_name, record.to_json().encode()):
        record = parse_record(record.file_name, store.read(record.file_name))
        _withdraw(store, record, own, list(itertools.compress(names, is_own)))
        _check_committed(store, record, own, staged)
    return record


def _withdraw(store: Store, record: CommitRecord, own: CommitRecord, names: list[str]) -> None:
    """Move own files aside that were published under names of a committed shard whose files had gone from there."""
    for name in names:
        digest, _ = own.files[name]
        if name in record.files and record.files[name][0] != digest:
            path = store.fetch(name)
            with explained(store.address(name)):
                is_own = path.is_file() and file_digest(path, "sha256") == digest
            if is_own:
                store.set_aside(name)


def _adopt(store: Store, own: CommitRecord, staged: ShardFiles) -> CommitRecord:
    """Record the published files if they are whole and of this shard, otherwise replace them by the staged ones."""
    names = file_names(own.name, own.companions)
    try:
        tar, parquet, *others = map(store.fetch, names)
        published = inspect_pair(tar, parquet, dict(zip(own.companions, others, strict=True)))
        if _identity(published.parquet) != _identity(staged.parquet):
            where = shown_path(published.parquet)
            raise CorruptShardError(f"{where}: holds other samples than shard {own.shard} of this plan")
    except CorruptShardError:
        for name in names:
            store.set_aside(name)
        for name, data in zip(names, staged.paths, strict=True):
            if not store.publish(name, data):
                raise RacedError(f"{store.address(name)}: written by two processes at once; run again") from None
        return own
    facts = _file_facts(published)
    if facts == _file_facts(staged):
        return own
    first = next(read_rows(published.parquet, ["attempt", "worker"]))
    return dataclasses.replace(own, **first, timing={}, **facts)


def _check_committed(store: Store, record: CommitRecord, own: CommitRecord, staged: ShardFiles) -> None:
    """Check the published files against the record; a lost file that was regenerated byte for byte is restored."""
    made = dict(zip(own.files, staged.paths, strict=True))
    for name, (wanted, _) in record.files.items():
        where = store.address(name)
        if not store.exists(name) and own.files.get(name, ("", 0))[0] == wanted:
            store.publish(name, made[name])
        if not store.exists(name):
            raise CorruptShardError(f"{where}: is missing, but shard {record.shard} is committed; restore the file")
        with explained(where):
            digest = file_digest(store.fetch(name), "sha256")
        if digest != wanted:
            raise CorruptShardError(f"{where}: is not the file that was committed (checksum {digest[:12]}); restore it")


def _file_facts(files: ShardFiles) -> dict[str, Any]:
    """The part of a record that describes the files."""
    names = ("counts", "tar_sha256", "tar_md5", "tar_bytes", "parquet_sha256", "parquet_bytes")
    companions = {kind: companion.facts for kind, companion in files.companions.items()}
    return {name: getattr(files, name) for name in names} | {"companions": companions}


def _identity(parquet: Path) -> list[dict[str, Any]]:
    """The samples of a parquet: their keys and seeds."""
    return list(read_rows(parquet, ["key", "seed"]))

"""Verifying a run: every committed byte is read and compared with its record and the plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.data.run.commit_record import CommitRecord
from engine.data.run.commits import inspect_records
from engine.data.run.companions import COMPANIONS, CompanionTar, companions_of
from engine.data.run.counts import ShardCounts
from engine.data.run.curated import curation_of, damaged_files, describes, find_curation, is_curated, remake_command
from engine.data.run.file_names import (
    CARD,
    CURATION,
    CURATION_DOCUMENT,
    MANIFEST,
    METADATA,
    REPORT,
    SELECTION,
    SUCCESS,
    SURPLUS_LIST,
)
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.presence import torn_files
from engine.data.run.quarantine import quarantined_shards
from engine.data.run.selection_table import read_selection
from engine.data.run.shards import SHARDS, ShardFiles, file_digest, inspect_pair, read_rows
from engine.data.run.stored_plan import stored_plan
from engine.data.run.surplus import surplus_lines
from engine.data.run.twins_table import read_twins
from engine.data.stores.base import TORN, Store
from engine.data.stores.file_errors import is_no_file, shown_path
from engine.errors import CorruptShardError, OutputError, RiskforgeError, StoreLostError, first_line
from engine.job.plan import Plan
from engine.job.quotas import replay
from engine.job.spec import JobSpec

Kind = Literal["damage", "unfinished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A defect of a run.

    Attributes:
        kind: `damage`, or `unfinished` where continuing the run resolves it.
        shard: its number, None where no shard is concerned.
    """

    kind: Kind
    text: str
    shard: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of `verify`.

    Attributes:
        num_committed: shards with a record, of `num_shards` planned so far.
        num_samples: attempts in them.
    """

    findings: tuple[Finding, ...]
    num_shards: int
    num_committed: int
    num_samples: int

    @property
    def damage(self) -> tuple[Finding, ...]:
        """The findings that are damage."""
        return tuple(finding for finding in self.findings if finding.kind == "damage")


def verify(store: Store, advance: Callable[[str], None] = lambda text: None) -> Verdict:
    """Read a run to the last byte, without changing it.

    Args:
        advance: progress callback.

    Raises:
        OutputError: there is no run, or its plan cannot be read, or files cannot be copied out of the store.
    """
    job, plan = stored_plan(store)
    findings: list[Finding] = []
    counts: dict[int, ShardCounts] = {}
    for number, record in inspect_records(store):
        advance(f"shard {number} of {plan.num_shards}")
        paths = _paths(store, record)  # Not in the `try`: a store that cannot be read now is no damage.
        try:
            if isinstance(paths, CorruptShardError):
                raise paths
            counts[number] = check_shard(plan, record, paths)
        except StoreLostError:
            raise
        except RiskforgeError as error:
            findings.append(Finding(kind="damage", shard=number, text=str(error)))
    num_committed = len(counts) + len(findings)
    findings += _unrecorded(
        store, job, {*counts, *(finding.shard for finding in findings if finding.shard is not None)}
    )
    findings += _unfinished(store, job, plan, counts, num_committed)
    num_samples = sum(shard_counts.attempted for shard_counts in counts.values())
    return Verdict(
        findings=tuple(findings), num_shards=plan.num_shards, num_committed=num_committed, num_samples=num_samples
    )


def _paths(store: Store, record: CommitRecord | CorruptShardError) -> list[Path] | CorruptShardError:
    """Where the files of a shard can be read, in the order of its record; empty where that cannot be read.

    A pipe, device or folder under the name of a file is damage of the shard.
    """
    if isinstance(record, CorruptShardError):
        return []
    try:
        return list(store.fetch_each(record.files))
    except OutputError as error:
        if not is_no_file(error):
            raise
        return CorruptShardError(str(error))


def check_shard(plan: Plan, record: CommitRecord | CorruptShardError, paths: list[Path]) -> ShardCounts:
    """Compare a committed shard with its record and the plan.

    Args:
        paths: of its files, in the order of its record.

    Raises:
        CorruptShardError: with what is wrong.
        OutputError: a file cannot be read.
    """
    if isinstance(record, CorruptShardError):
        raise record
    for path in paths:
        if not path.exists():
            raise CorruptShardError(f"{shown_path(path)}: is missing, but shard {record.shard} is committed")
    _check_planned(plan, record)
    tar, parquet, *others = paths
    actual = inspect_pair(tar, parquet, dict(zip(record.companions, others, strict=True)))
    for path, found, committed in zip(paths, _facts(actual), _facts(record), strict=True):
        if found != committed:
            raise CorruptShardError(f"{shown_path(path)}: is not the file that was committed (checksum or size)")
    if actual.counts != record.counts:
        raise CorruptShardError(f"{shown_path(parquet)}: holds other counts than its record")
    check_samples(plan, record.shard, parquet)
    return actual.counts


def _facts(files: ShardFiles | CommitRecord) -> list[tuple[object, ...]]:
    """Sizes and checksums of the files of a shard, in their order."""
    pair = [(files.tar_sha256, files.tar_md5, files.tar_bytes), (files.parquet_sha256, files.parquet_bytes)]
    others = [one.facts if isinstance(one, CompanionTar) else one for one in files.companions.values()]
    return [*pair, *((facts.sha256, facts.md5, facts.bytes) for facts in others)]


def _check_planned(plan: Plan, record: CommitRecord) -> None:
    if not 0 <= record.shard < plan.num_shards:
        raise CorruptShardError(f"shard {record.shard} is committed and not in the plan")
    shard = plan.shard(record.shard)
    if (record.request, record.start, record.stop) != (shard.request, shard.start, shard.stop):
        raise CorruptShardError(f"shard {record.shard}: its record has other samples than the plan")
    if record.plan_digest != plan.digest:
        raise CorruptShardError(f"shard {record.shard}: was made by another plan")
    wanted = companions_of(plan.requests[shard.request].spec)
    if tuple(record.companions) != wanted:
        raise CorruptShardError(
            f"shard {record.shard}: its record lists {' and '.join(record.companions) or 'no tars'} beside its own, and"
            f" its request has {' and '.join(wanted) or 'none'}"
        )


def check_samples(plan: Plan, number: int, parquet: Path) -> None:
    """Keys and seeds are those that the plan has, in the run's schema version."""
    rows = list(read_rows(parquet, ["key", "seed", "schema_version"]))
    planned = [(sample.key, sample.seed) for sample in plan.samples(plan.shard(number))]
    if [(row["key"], row["seed"]) for row in rows] != planned:
        raise CorruptShardError(f"{shown_path(parquet)}: holds other samples than the plan has in shard {number}")
    if others := {row["schema_version"] for row in rows} - {plan.schema_version}:
        raise CorruptShardError(
            f"{shown_path(parquet)}: has schema version {min(others)}, the run has {plan.schema_version}"
        )


def _unrecorded(store: Store, job: JobSpec, committed: set[int]) -> Iterator[Finding]:
    """Files of shards without a record, and files that were moved aside."""
    names = (name for folder in (SHARDS, *COMPANIONS) for name in store.list(folder))
    numbers = {_number_of(name, job) for name in names} - {None} - committed
    for number in sorted(number for number in numbers if number is not None):
        text = f"shard {number}: has files and no record; the next run checks them"
        yield Finding(kind="unfinished", shard=number, text=text)
    if torn := store.list(TORN):
        yield Finding(kind="unfinished", text=f"{len(torn)} files that were not whole were moved to {TORN}")


def _number_of(name: str, job: JobSpec) -> int | None:
    stem, _, kind = Path(name).name.partition(".")
    digits = stem.removeprefix(f"{job.name}-")
    return int(digits) if kind in ("tar", "parquet") and digits.isdigit() and digits != stem else None


def _unfinished(
    store: Store, job: JobSpec, plan: Plan, counts: dict[int, ShardCounts], num_committed: int
) -> Iterator[Finding]:
    """What a finished run lacks; it is damage where the run is marked as finished."""
    is_marked = store.exists(SUCCESS)
    kind: Kind = "damage" if is_marked else "unfinished"
    quarantined = quarantined_shards(store)
    for number in quarantined:
        yield Finding(kind=kind, shard=number, text=f"shard {number} is in quarantine")
    missing = plan.num_shards - num_committed - len(quarantined)
    if missing > 0:
        yield Finding(kind=kind, text=f"{missing} of {plan.num_shards} shards are not committed")
    elif not quarantined and replay(plan, counts, (), job.output.samples_per_shard).advance():
        yield Finding(kind=kind, text="quotas ask for more shards")
    if not is_marked:
        yield Finding(kind="unfinished", text=f"{SUCCESS} is not there")
        return
    if num_committed != len(counts):
        return
    torn = set(torn_files(store, plan))
    # The metadata are checked below; what is written for human readers alone is no part of the data.
    for name in sorted(torn - {METADATA, CARD, REPORT}):
        text = f"{name}: is missing or not whole; {remake_command(plan)} writes it"
        yield Finding(kind="damage", text=text)
    wanted = sum(shard_counts.attempted for shard_counts in counts.values())
    num_rows = _count_metadata(store)
    if num_rows is None:
        yield Finding(kind="damage", text=f"{METADATA}: is missing or cannot be read")
    elif num_rows != wanted:
        yield Finding(kind="damage", text=f"{METADATA}: has {num_rows} rows, the shards have {wanted}")
    elif SURPLUS_LIST not in torn and store.exists(SURPLUS_LIST):
        yield from _check_surplus(store)
    if is_curated(plan) and num_rows == wanted:
        yield from _check_curation(store, plan)
    try:
        read_twins(store, plan.digest)
    except CorruptShardError as error:
        yield Finding(kind="damage", text=str(error))


def _check_curation(store: Store, plan: Plan) -> Iterator[Finding]:
    """Compare the files of a curation with each other, with the manifest and with what the shards have as accepted."""
    try:
        curation = find_curation(store)
        if curation is None:
            return  # Reported as a missing file.
        if not describes(curation, plan):
            yield Finding(kind="damage", text=f"{CURATION_DOCUMENT}: is of another curation than the plan")
        for name in damaged_files(store, curation):
            yield Finding(kind="damage", text=f"{CURATION}/{name}: is missing or not the file that was written")
        if curation_of(read_manifest(store)) != curation:
            yield Finding(kind="damage", text=f"{MANIFEST}: states another curation than {CURATION_DOCUMENT}")
        selection = read_selection(store)
    except CorruptShardError as error:
        yield Finding(kind="damage", text=str(error))
        return
    except ValueError as error:
        yield Finding(kind="damage", text=f"{MANIFEST}: its curation cannot be read ({first_line(error)})")
        return
    if selection is not None and selection.selected_keys != _accepted_keys(store):
        yield Finding(kind="damage", text=f"{SELECTION}: selects other samples than the shards have as accepted")


def _accepted_keys(store: Store) -> frozenset[str]:
    """Keys of the accepted samples of a run."""
    import pyarrow.compute as pc
    import pyarrow.dataset

    rows = pyarrow.dataset.dataset(store.fetch(METADATA), format="parquet", partitioning=None)
    return frozenset(rows.to_table(["key"], filter=pc.field("accepted"))["key"].to_pylist())


def _check_surplus(store: Store) -> Iterator[Finding]:
    """Compare the list of surplus keys next to the tars with the metadata."""
    import pyarrow as pa

    wanted = hashlib.sha256()
    try:
        for line in surplus_lines(store.fetch(METADATA)):
            wanted.update(line)
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        yield Finding(kind="damage", text=f"{METADATA}: its rows cannot be read ({reason})")
        return
    listed = _fetch_file(store, SURPLUS_LIST)
    if listed is None or not listed.is_file() or file_digest(listed, "sha256") != wanted.hexdigest():
        yield Finding(kind="damage", text=f"{SURPLUS_LIST}: lists other keys than those that {METADATA} marks")


def _fetch_file(store: Store, name: str) -> Path | None:
    """Where a file can be read; None where its name belongs to something else, such as a pipe."""
    try:
        return store.fetch(name)
    except OutputError as error:
        if is_no_file(error):
            return None
        raise


def _count_metadata(store: Store) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (path := _fetch_file(store, METADATA)) is None:
        return None
    try:
        paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        return sum(pq.read_metadata(part).num_rows for part in paths)
    except (OSError, pa.ArrowException):
        return None

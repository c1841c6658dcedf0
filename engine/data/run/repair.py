"""Removing damaged shards from a run, so that the next run makes them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.data.run.commit_record import file_names
from engine.data.run.commits import forget_commit
from engine.data.run.companions import COMPANIONS, companions_of
from engine.data.run.file_names import SUCCESS
from engine.data.run.shards import inspect_pair, shard_name
from engine.data.run.stored_plan import stored_plan
from engine.data.run.verify import Finding, check_samples, verify
from engine.data.stores.base import TORN, Store
from engine.errors import CorruptShardError, OutputError, StoreLostError
from engine.job.plan import Plan
from engine.job.spec import JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """The actions of `repair` as texts, and the shards that have to be made again."""

    actions: tuple[str, ...]
    to_make: tuple[int, ...]


def repair(store: Store, advance: Callable[[str], None] = lambda text: None) -> Repaired:
    """Remove damaged shards, so that the next run makes them again; undamaged ones are not touched.

    The caller holds the lease.

    Side effects: moves files of damaged shards under `_state/torn`, removes their records, `_SUCCESS` if anything was
        damaged, and the unfinished files of dead processes.
    """
    job, plan = stored_plan(store)
    store.clean_staging()
    actions: list[str] = []
    to_make: list[int] = []
    for finding in verify(store, advance).findings:
        if finding.kind == "damage" and finding.shard is not None:
            actions += _take_out(store, job, finding)
            to_make.append(finding.shard)
        elif finding.kind == "damage":
            actions.append(f"to be written again: {finding.text}")
        elif finding.shard is not None and not _is_whole(store, job, plan, finding.shard):
            actions += _set_aside(store, job, finding.shard)
    if actions:
        store.remove(SUCCESS)
    return Repaired(actions=tuple(actions), to_make=tuple(to_make))


def _take_out(store: Store, job: JobSpec, finding: Finding) -> Iterator[str]:
    assert finding.shard is not None
    yield f"taken out: {finding.text}"
    yield from _set_aside(store, job, finding.shard)
    for name in forget_commit(store, finding.shard):
        yield f"record removed: {name}"


def _set_aside(store: Store, job: JobSpec, number: int) -> Iterator[str]:
    for name in file_names(shard_name(job.name, number), COMPANIONS):
        if store.exists(name):
            store.set_aside(name)
            yield f"moved to {TORN}: {name}"


def _is_whole(store: Store, job: JobSpec, plan: Plan, number: int) -> bool:
    """Whether files without a record could be adopted, or belong to a shard in quarantine that has none."""
    stem = shard_name(job.name, number)
    if not any(map(store.exists, file_names(stem, COMPANIONS))):
        return True
    try:
        kinds = companions_of(plan.requests[plan.shard(number).request].spec)
        tar, parquet, *others = store.fetch_each(file_names(stem, kinds))
        inspect_pair(tar, parquet, dict(zip(kinds, others, strict=True)))
        check_samples(plan, number, parquet)
    except StoreLostError:
        raise
    except (CorruptShardError, OutputError, IndexError):
        return False
    return True

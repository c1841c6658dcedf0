"""Closing a run: metadata of all shards, indexes for other readers, manifest, card and, last, `_SUCCESS`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.data.run.card import dataset_card
from engine.data.run.commits import CommitSummary, compact_commits, list_commits
from engine.data.run.counts import num_stored
from engine.data.run.file_names import CARD, MANIFEST, METADATA, SUCCESS
from engine.data.run.manifest import MAX_LISTED_SHARDS, build_manifest
from engine.data.run.metadata_table import MAX_ROWS_PER_FILE, write_metadata, write_surplus
from engine.data.run.reader_indexes import write_indexes
from engine.data.run.shards import SHARDS, shard_name
from engine.data.run.summary import (
    GroupSummary,
    summarise,
)
from engine.data.run.surplus import quotas_of
from engine.data.stores.base import Store
from engine.errors import OutputError
from engine.job.plan import Plan
from engine.job.spec import JobSpec

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """The result of `finalise`.

    Attributes:
        manifest: the content of manifest.json.
        groups: the summary per request and context.
        complete: whether every shard of the plan is committed, and no quota asks for more.
    """

    manifest: dict[str, Any]
    groups: list[GroupSummary]
    complete: bool


def finalise(
    store: Store,
    job: JobSpec,
    plan: Plan,
    *,
    models: dict[str, Any],
    timing: dict[str, float],
    versions: dict[str, str],
    hardware: dict[str, Any],
    rows_per_file: int = MAX_ROWS_PER_FILE,
) -> FinishedRun:
    """Write metadata, list of surplus, indexes, manifest and card over the committed shards, whether or not all are.

    The caller writes its report and then calls `mark_success`.

    Args:
        models: by role, each with address and digest, for the manifest and the card.
        rows_per_file: above this number of rows `metadata.parquet` is a folder of parts.

    Raises:
        OutputError: the store refuses.
        CorruptShardError: a committed shard is missing or has other rows than its record.

    Side effects:
        Removes `_SUCCESS`; packs the commit records when there are many.
    """
    store.remove(SUCCESS)
    compact_commits(store)
    commits = list_commits(store)
    write_metadata(store, job.name, commits, rows_per_file, schema_version=plan.schema_version, quotas=quotas_of(plan))
    write_surplus(store)
    write_indexes(store, job)
    groups = summarise(store.fetch(METADATA))
    manifest = build_manifest(
        store, job, plan, commits, groups, models=models, timing=timing, versions=versions, hardware=hardware
    )
    store.replace(MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    store.replace(CARD, dataset_card(job, manifest, groups, _data_files(job, commits)).encode())
    return FinishedRun(manifest=manifest, groups=groups, complete=manifest["complete"])


def _data_files(job: JobSpec, commits: dict[int, CommitSummary]) -> list[str]:
    """Patterns of the tars that hold images: readers that inspect the first tar fail on an empty one."""
    filled = [number for number in sorted(commits) if num_stored(job, commits[number].counts)]
    if len(filled) == len(commits) or len(filled) > MAX_LISTED_SHARDS:
        return [f"{SHARDS}/*.tar"]
    return [f"{SHARDS}/{shard_name(job.name, number)}.tar" for number in filled]


def mark_success(store: Store, plan: Plan) -> None:
    """Write `_SUCCESS`: the run is complete and everything else is written.

    Raises:
        OutputError: shards of the plan are not committed.
    """
    missing = plan.num_shards - len(list_commits(store))
    if missing > 0:
        raise OutputError(f"output {store.uri}: {missing} of {plan.num_shards} shards are not committed; run again")
    store.replace(SUCCESS, f"{plan.digest}\n".encode())

"""Writing a curated run: its plan, what was drawn, and its shards, copied row by row from those of the parent.

The plan is there first and what was drawn second, so that a run that was interrupted at any moment continues with the
same selection, whatever a reward gives the second time. A selected sample keeps its row and its image file, byte for
byte; any other one that has an image becomes `rejected` and loses it; the rest is kept.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from engine.data.run.commit_record import CommitRecord
from engine.data.run.commit_shard import commit_shard
from engine.data.run.commits import list_commits
from engine.data.run.curated import KEY
from engine.data.run.foreign_files import check_unused
from engine.data.run.shard_writing import stage_shard
from engine.data.run.shards import SHARDS, TarSample, file_digest, read_samples
from engine.data.run.stored_plan import publish_stage, read_run
from engine.data.stores.base import Store
from engine.data.stores.folder import FolderStore
from engine.data.stores.lease import Lease
from engine.driver.progress import Display
from engine.errors import CorruptShardError, OutputError
from engine.job.columns import RUN_COLUMNS
from engine.job.json_values import difference
from engine.job.plan import Plan
from engine.job.records import STATUS_OK, STATUS_REJECTED, Companion, SampleResult, columns_of
from engine.job.spec import JobSpec, RequestSpec
from engine.studies.curate.candidates import Parent

MAX_DIFFERENCES = 20
# What differs where no option of that name does.
_DIGESTED = {
    f"{KEY}.shards": "curation.shards: RUN has other samples now, such as more of them",
    f"{KEY}.reward.digest": "curation.reward.digest: the function, the CLIP model, or a file of --preferences,"
    " --trusted or --after is another",
}
_RUN_FIELDS = tuple(column.name for column in RUN_COLUMNS if column.name != "sha256")


def curated_job(parent: Parent, output: Store) -> JobSpec:
    """The job of a curated run: the parent's, for another output, in which quotas mean nothing any more.

    What was rejected has no image, and no further round is made, however few samples are accepted.
    """
    job = parent.job
    update = {"uri": output.uri, "store_rejected": False}
    return job.model_copy(
        update={
            "output": job.output.model_copy(update=update),
            "requests": tuple(map(_without_quota, job.requests)),
        }
    )


def _without_quota(request: RequestSpec) -> RequestSpec:
    return request.model_copy(update={"max_attempts": "1x"}) if request.has_quota else request


def curated_plan(parent: Parent, curation: Mapping[str, Any]) -> Plan:
    """The plan of a curated run: the shards of its parent in one stage, under an identity of its own.

    Args:
        curation: what decides the selection, as JSON.
    """
    plan = parent.plan
    output = plan.identity["output"] | {"store_rejected": False}
    identity = plan.identity | {"output": output, KEY: dict(curation)}
    requests = tuple(replace(request, spec=_without_quota(request.spec)) for request in plan.requests)
    return Plan(requests, identity, (plan.extents,), plan.schema_version)


def open_curated(store: Store, plan: Plan, job: JobSpec) -> None:
    """Begin a curated run in an output, or continue it.

    Raises:
        OutputError: the output holds something else, or a curation with other options, with the difference.
    """
    store.clean_staging()
    if not publish_stage(store, plan, job, 0, plan.stages[0]):
        check_output_is(store, plan)


class OtherCurationError(OutputError):
    """An output holds a curated run with other options or rewards."""


def check_output_is(store: Store, plan: Plan) -> bool:
    """Check that an output is empty or holds this curated run; whether it holds it. Changes nothing.

    Raises:
        OtherCurationError: it holds another curated run, with the difference.
        OutputError: it holds something else.
    """
    stored = read_run(store)
    if stored is None:
        check_unused(store)
        return False
    if stored.digest == plan.digest:
        return True
    remedy = "choose another --output"
    if KEY not in stored.identity:
        raise OutputError(f"--output {store.uri}: holds a run that was not curated; {remedy}")
    lines = difference(stored.identity, plan.identity)
    if len(lines) > MAX_DIFFERENCES:
        lines[MAX_DIFFERENCES:] = [f"and {len(lines) - MAX_DIFFERENCES} more differences"]
    raise OtherCurationError(
        "\n".join(
            [
                f"--output {store.uri}: holds another curated run (there -> asked for now):",
                *(f"  {line}" for line in lines),
                *(what for name, what in _DIGESTED.items() if any(line.startswith(name) for line in lines)),
                f"give the options of that one to continue it, or {remedy}",
            ]
        )
    )


def write_shards(
    parent: Parent, store: Store, plan: Plan, selected: Collection[str], lease: Lease, display: Display
) -> None:
    """Copy the shards that are not committed yet.

    Args:
        selected: keys of the selected samples.

    Raises:
        CorruptShardError: a shard of the parent is damaged.
        OwnedError: another process has taken the output over.
    """
    committed = list_commits(store)
    for record in parent.commits:
        if record.shard in committed:
            continue
        lease.check()
        display.advance(f"shard {record.shard + 1} of {plan.num_shards}")
        staged = stage_shard(
            store.staging(),
            record.name,
            copied_samples(parent, record, selected),
            parent.job.output.image_format,
            plan.schema_version,
            tuple(record.companions),
        )
        # Worker, attempt, screening and notices are those of who made the samples.
        commit_shard(
            store, plan.digest, plan.shard(record.shard), record.name, staged, record.attempt, record.worker, {},
            record.screening, record.notices,
        )  # fmt: skip


def copied_samples(parent: Parent, record: CommitRecord, selected: Collection[str]) -> Iterator[SampleResult]:
    """The samples of a shard of the parent as its curated run has them.

    Raises:
        CorruptShardError: rows or images are not those that were committed.
    """
    tar, *others = parent.store.fetch_each(record.files)
    # The images of the samples have checksums in the rows.
    for path, (name, (digest, _)) in zip(others, list(record.files.items())[1:], strict=True):
        if not path.exists() or file_digest(path, "sha256") != digest:
            _damaged(f"{parent.store.address(name)}: is not the file that was committed")
    try:
        rows, *companions = others
        for row, samples in read_samples(tar, rows, dict(zip(record.companions, companions, strict=True))):
            yield _copied(row, samples, row["key"] in selected)
    except CorruptShardError as error:
        _damaged(str(error))


def _copied(row: dict[str, Any], samples: dict[str, TarSample], is_selected: bool) -> SampleResult:
    record = {name: row[name] for name in columns_of(row["schema_version"])}
    run = {name: row[name] for name in _RUN_FIELDS}
    if is_selected:
        files = {kind: Companion(one.record, partial(bytes, one.image)) for kind, one in samples.items()}
        own = files.pop(SHARDS, None)
        return SampleResult(record=record, image=own.image if own else b"", run=run, companions=files)
    if row["status"] == STATUS_OK:
        record |= {"status": STATUS_REJECTED, "accepted": False}
    return SampleResult(record=record, run=run)


def _damaged(what: str) -> NoReturn:
    raise CorruptShardError(f"RUN: {what}; `riskforge verify` says more, and `riskforge repair` takes the shard out")


def lineage_address(parent: Store, store: Store) -> str:
    """The address of a parent for its curated run: of folders a relative one, so that both can be moved together."""
    if isinstance(parent, FolderStore) and isinstance(store, FolderStore):
        return Path(os.path.relpath(parent.place, store.place)).as_posix()
    return parent.uri

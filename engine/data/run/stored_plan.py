"""The plan files of an output: reading, checking and extending the stored plan.

`_state/plan/000000.json` holds the plan's digest, identity, schema version, job and first stage; every time the counts
grew, the next number holds the job and the stage that was added. Rounds of quotas are stages, too; their files hold no
job.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from engine.data.run.file_names import PLANS
from engine.data.run.manifest_reading import check_is_run
from engine.data.stores.base import Store
from engine.errors import MAX_REASON_CHARS, JobError, OutputError, OwnedError
from engine.job.parsing import parse_job
from engine.job.plan import EVERY_CELL, Cell, Extent, Plan, RequestPlan, planned_temperature, planned_validity
from engine.job.records import columns_of
from engine.job.spec import JobSpec
from engine.methods.strict_json import parse_json

PLAN_VERSION = 1
# Samples of a request over all of its classes, at most: a larger number is not a valid plan.
MAX_POSITIONS = 10**15

OTHER_OUTPUT = "or choose another --output"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """The run that an output holds, by its plan files.

    Attributes:
        job: the job as it was last extended, as plain data.
        stages: what was planned, one list of extents for each time that the job was extended.
        schema_version: of the columns of its shards, those that are still to be made too.
    """

    digest: str
    identity: dict[str, Any]
    job: dict[str, Any]
    stages: tuple[tuple[Extent, ...], ...]
    schema_version: int


def read_run(store: Store) -> StoredRun | None:
    """The run of an output, or None where no run has begun in it.

    Raises:
        OutputError: a plan file that cannot be read.
    """
    names = store.list(PLANS)
    if not names:
        return None
    files = [_read_plan_file(store, name) for name in names]
    stages = tuple(tuple(_extent(extent) for extent in file["stage"]) for file in files)
    first, job = files[0], [file["job"] for file in files if "job" in file][-1:]
    if "identity" not in first or not job:
        raise OutputError(f"{store.address(PLANS)}: the first part of the plan is missing; restore it, {OTHER_OUTPUT}")
    return StoredRun(
        digest=first["digest"],
        identity=first["identity"],
        job=job[0],
        stages=stages,
        schema_version=first["schema_version"],
    )


def read_digest(store: Store) -> str | None:
    """The digest of the plan of an output, or None where no run has begun in it.

    Raises:
        OutputError: a plan file that cannot be read.
    """
    first = f"{PLANS}/{0:06d}.json"
    return str(_read_plan_file(store, first)["digest"]) if store.exists(first) else None


def publish_rounds(store: Store, plan: Plan, extents: tuple[Extent, ...]) -> Plan:
    """Add rounds of quotas to the plan of an output: they are there before any of their shards is.

    Each is a stage of its own: rounds follow from the committed samples, but how many are due at a time depends on
    timing. An equal round that a driver added after it lost the run is accepted, too.

    Raises:
        OwnedError: another driver has added another round in the meantime.
    """
    for extent in extents:
        file = {
            "plan_version": PLAN_VERSION,
            "schema_version": plan.schema_version,
            "digest": plan.digest,
            "stage": [dataclasses.asdict(extent)],
        }
        name, data = f"{PLANS}/{len(plan.stages):06d}.json", json.dumps(file, indent=1).encode()
        if not store.publish(name, data) and store.read(name) != data:
            raise OwnedError(f"output {store.uri}: another driver has taken this run over")
        plan = plan.grown((extent,))
    return plan


def stored_plan(store: Store) -> tuple[JobSpec, Plan]:
    """Job and plan of a run as its output has them; classes are called by their numbers.

    Raises:
        OutputError: there is no run, or its plan cannot be read.
    """
    stored = read_run(store)
    if stored is None:
        check_is_run(store)
        raise OutputError(f"{store.uri}: there is no run; give the folder of one")
    try:
        job = parse_job(stored.job | {"output": {"provenance": False} | stored.job["output"] | {"uri": store.uri}})
        requests = tuple(
            RequestPlan(
                number=number,
                spec=spec,
                job_name=job.name,
                job_seed=job.seed,
                cells=tuple(map(_cell, raw["classes"])),
                where=job.where(number),
            )
            for number, (spec, raw) in enumerate(zip(job.requests, stored.identity["requests"], strict=True))
        )
        plan = Plan(requests, stored.identity, stored.stages, stored.schema_version)
        _check_extents(plan)
        planned_temperature(plan.identity)
        planned_validity(plan.identity)
    except _READ_ERRORS as error:
        raise _unreadable(store.address(PLANS), error) from error
    return job, plan


# Errors of reading a plan that no version of this program wrote.
_READ_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, JobError)


def _unreadable(where: str, error: Exception) -> OutputError:
    """The error to raise where plan files cannot be read."""
    reason = "; ".join(error.problems) if isinstance(error, JobError) else str(error)
    return OutputError(
        f"{where}: cannot be read as the plan of a run ({reason[:MAX_REASON_CHARS]}); use the version that wrote it,"
        f" {OTHER_OUTPUT}"
    )


def _check_extents(plan: Plan) -> None:
    """Refuse extents of requests and classes that the plan does not have.

    Raises:
        ValueError: there is one.
    """
    for extent in plan.extents:
        if not 0 <= extent.request < len(plan.requests):
            raise ValueError(f"request {extent.request} is not in the job")
        if not EVERY_CELL <= extent.cell < len(plan.requests[extent.request].cells):
            raise ValueError(f"request {extent.request} has no class {extent.cell}")


def _cell(classes: Any) -> Cell:
    """The classes of a request's cell from a file; they are called by their numbers.

    Raises:
        ValueError: they are not numbers of classes.
    """
    if not isinstance(classes, list) or any(type(index) is not int or index < 0 for index in classes):
        raise ValueError(f"{classes!r} are not numbers of classes")
    return Cell(classes=tuple(classes), names=tuple(map(str, classes)))


def _extent(raw: dict[str, Any]) -> Extent:
    """An extent from a file.

    Raises:
        ValueError: its numbers are not whole, or not a valid range.
        TypeError: it has other fields.
    """
    extent = Extent(**raw)
    if any(type(value) is not int for value in dataclasses.astuple(extent)):
        raise ValueError(f"{raw} has fields that are not whole numbers")
    if not 0 <= extent.start <= extent.stop <= MAX_POSITIONS or extent.samples_per_shard < 1:
        raise ValueError(f"{raw} is not a part of a sequence")
    return extent


def _read_plan_file(store: Store, name: str) -> dict[str, Any]:
    try:
        file = parse_json(store.read(name))
        if file["plan_version"] != PLAN_VERSION:
            raise ValueError(f"version {file['plan_version']}")
        for extent in file["stage"]:
            _extent(extent)
        wanted = ("digest", "stage", *(("identity", "job") if name == f"{PLANS}/{0:06d}.json" or "job" in file else ()))
        if "identity" in wanted:
            # What a plan is compared by: requests by their names.
            file["identity"]["output"].get("provenance")
            "".join(one["name"] for one in file["identity"]["requests"])
        # Plans of version 1 do not state it.
        columns_of(version := file.get("schema_version", 1))
        return {key: file[key] for key in wanted} | {"schema_version": version}
    except _READ_ERRORS as error:
        raise _unreadable(store.address(name), error) from error


def publish_stage(store: Store, plan: Plan, job: JobSpec, number: int, stage: tuple[Extent, ...]) -> bool:
    """Add a stage to the plan of an output; False where another process has added one under this number."""
    file = {
        "plan_version": PLAN_VERSION,
        "schema_version": plan.schema_version,
        "digest": plan.digest,
        "identity": plan.identity,
        "job": job.model_dump(mode="json"),
        "stage": [dataclasses.asdict(extent) for extent in stage],
    }
    text = json.dumps(file, indent=1, ensure_ascii=False, allow_nan=False)
    return store.publish(f"{PLANS}/{number:06d}.json", text.encode())

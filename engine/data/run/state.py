"""Which plan an output belongs to, and what a run may do with an output that is not empty (contract: resume).

`_state/plan/000000.json` holds the plan's digest, identity, schema version, job and first stage; every time the counts
grew, the next number holds the job and the stage that was added. Rounds of quotas are stages, too; their files hold no
job.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.run.shards import SHARDS
from engine.data.stores.base import DRIVER_LOCK, LEASES, LOCKS, STATE, Store
from engine.errors import MAX_REASON_CHARS, CorruptShardError, JobError, OutputError, OwnedError
from engine.job.parsing import parse_job
from engine.job.plan import EVERY_CELL, Cell, Extent, Plan, RequestPlan, difference, next_stage
from engine.job.records import columns_of
from engine.job.spec import JobSpec
from engine.methods.strict_json import parse_json

PLANS = "_state/plan"
QUARANTINE = "_state/quarantine"
PLAN_VERSION = 1
SUCCESS = "_SUCCESS"
METADATA = "metadata.parquet"
MANIFEST = "manifest.json"
CARD = "README.md"
REPORT = "report.html"
EVALUATION = "evaluation.json"
WIDS_INDEX = "shards/wids.json"
TIMM_INFO = "shards/_info.json"
# Keys of accepted samples beyond their quota, a line each: what readers of the tars leave out.
SURPLUS_LIST = "shards/surplus.txt"
# The schema version from which on every closed run has its list of surplus.
SURPLUS_LIST_SINCE = 3
# Of an export to a folder by class: the label of each of its folders.
CLASSES = "classes.json"
# Folders of `riskforge rescore`, one for each target, and what marks one.
RESCORED = "rescored"
RESCORING = "_state/rescoring.json"
# What the manifests of folders say that are no runs.
RESCORED_FROM = "rescored_from"
EXPORT_KIND = "export"

RUN_FILES = (SUCCESS, METADATA, MANIFEST, CARD, REPORT, EVALUATION, WIDS_INDEX, TIMM_INFO, SURPLUS_LIST)
MAX_SHOWN = 8
# Samples of a request over all of its classes, at most: more is no plan of ours.
MAX_POSITIONS = 10**15
MAX_DIFFERENCES = 20
_ELSEWHERE = "or choose another --output"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """What an output says of itself.

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


def open_run(store: Store, plan: Plan, job: JobSpec, resume: str, confirmed: bool) -> Plan:
    """Make an output ready for a job: new, continued, extended or emptied.

    Args:
        plan: the job planned as a single stage.
        resume: `auto` continues the same plan and extends it where counts grew; `never` wants an empty output;
            `overwrite` removes what an earlier run wrote.
        confirmed: whether removing was agreed to (`--yes`).

    Returns:
        The plan with the stages of this output.

    Raises:
        OutputError: the output is another plan's or somebody else's, or may not be written.
        JobError: a count shrank.

    Side effects:
        Removes the unfinished files of processes that are no more, and `_SUCCESS` when the plan grows.
    """
    if resume not in ("auto", "never", "overwrite"):
        raise ValueError(f"resume {resume!r} is not one of auto, never, overwrite")
    held = [name for name in store.list() if name != STATE or store.list(PLANS)]
    if resume == "never" and held:
        raise OutputError(f"output {store.uri}: is not empty ({_shown(held)}); use --resume auto, {_ELSEWHERE}")
    if resume == "overwrite" and held:
        _clear(store, confirmed)
    stored = read_run(store)
    if stored is None:
        check_unused(store)
    store.clean_staging()
    if stored is None:
        if _publish_stage(store, plan, job, 0, plan.stages[0]):
            return plan
        # Another process was faster: its run is not ours to remove.
        return open_run(store, plan, job, "never" if resume == "never" else "auto", confirmed=False)
    _check_same(store, stored, plan)
    return _extend(store, stored, plan, job)


def as_begun(store: Store, job: JobSpec) -> JobSpec:
    """A job without what is on where nothing is said of it, but was not when the run of its output began.

    Runs from before images said that they are synthetic go on without it: a data set has files of one kind.

    Raises:
        OutputError: a plan file that cannot be read.
    """
    if "provenance" in job.output.model_fields_set or not job.output.provenance:
        return job
    stored = read_run(store)
    if stored is None or stored.identity["output"].get("provenance"):
        return job
    return job.model_copy(update={"output": job.output.model_copy(update={"provenance": False})})


def find_plan(store: Store, plan: Plan, job: JobSpec) -> Plan | None:
    """The plan of an output with its stages if it is that of the job and need not grow; changes nothing.

    Args:
        plan: the job planned as a single stage.

    Raises:
        OutputError: a plan file that cannot be read.
        JobError: a count shrank.
    """
    stored = read_run(store)
    if stored is None or stored.digest != plan.digest:
        return None
    if next_stage(plan.requests, stored.stages, job.output.samples_per_shard) or _has_other_goals(stored, plan):
        return None
    return Plan(plan.requests, plan.identity, stored.stages, stored.schema_version)


def read_run(store: Store) -> StoredRun | None:
    """What an output says of itself, or None where no run has begun in it.

    Raises:
        OutputError: a plan file that cannot be read.
    """
    names = store.list(PLANS)
    if not names:
        return None
    files = [_read_plan(store, name) for name in names]
    stages = tuple(tuple(_extent(extent) for extent in file["stage"]) for file in files)
    first, job = files[0], [file["job"] for file in files if "job" in file][-1:]
    if "identity" not in first or not job:
        raise OutputError(f"{store.address(PLANS)}: the first part of the plan is missing; restore it, {_ELSEWHERE}")
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
    return str(_read_plan(store, first)["digest"]) if store.exists(first) else None


def publish_rounds(store: Store, plan: Plan, extents: tuple[Extent, ...]) -> Plan:
    """Add rounds of quotas to the plan of an output: they are there before any of their shards is.

    Each is a stage of its own: rounds follow from what is committed, but how many are due at a time depends on who was
    quicker. One that a driver added that had lost the run and did not know it yet is ours, too.

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


def read_manifest(store: Store) -> dict[str, Any]:
    """What a run, a rescoring or an export says of itself.

    Raises:
        OutputError: there is no manifest.
        CorruptShardError: it is no JSON object.
    """
    if not store.exists(MANIFEST):
        raise OutputError(f"output {store.uri}: has no {MANIFEST}; finish the run first (`riskforge run`)")
    try:
        manifest = parse_json(store.read(MANIFEST))
        if not isinstance(manifest, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise manifest_error(store, error) from error
    return manifest


def manifest_error(store: Store, reason: object) -> CorruptShardError:
    """What to raise where a manifest cannot be read, or lacks what every manifest has."""
    return CorruptShardError(
        f"{store.address(MANIFEST)}: cannot be read as a manifest ({str(reason)[:MAX_REASON_CHARS]}); restore the file,"
        " or remove _SUCCESS, and the run's command writes it anew"
    )


def check_kind(store: Store, *, scores: bool = False) -> None:
    """Refuse a folder that says of itself that it is no run.

    Args:
        scores: whether what `rescore` made is taken, too.

    Raises:
        OutputError: it is a merged or exported data set, or has the scores that `rescore` made.
    """
    try:
        manifest = read_manifest(store) if store.exists(MANIFEST) else {}
    except CorruptShardError:
        return
    if manifest.get("kind") == EXPORT_KIND:
        raise OutputError(
            f"{store.uri}: is a merged or exported data set, not a run; give the folder of a run here"
            " (`riskforge inspect`, `merge` and `export` take such a data set)"
        )
    if RESCORED_FROM in manifest and not scores:
        raise OutputError(
            f"{store.uri}: has the scores that `riskforge rescore` made, and no images; give the folder of the run"
            " itself here (`riskforge inspect`, `compare` and `report` take such scores)"
        )


def stored_plan(store: Store) -> tuple[JobSpec, Plan]:
    """Job and plan of a run as its output has them; classes are called by their numbers.

    Raises:
        OutputError: there is no run, or its plan cannot be read.
    """
    stored = read_run(store)
    if stored is None:
        check_kind(store)
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
            )
            for number, (spec, raw) in enumerate(zip(job.requests, stored.identity["requests"], strict=True))
        )
        plan = Plan(requests, stored.identity, stored.stages, stored.schema_version)
        _check_extents(plan)
    except _BROKEN as error:
        raise _unreadable(store.address(PLANS), error) from error
    return job, plan


# What reading a plan raises that no version of this program wrote.
_BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, JobError)


def _unreadable(where: str, error: Exception) -> OutputError:
    reason = "; ".join(error.problems) if isinstance(error, JobError) else str(error)
    return OutputError(
        f"{where}: cannot be read as the plan of a run ({reason[:MAX_REASON_CHARS]}); use the version that wrote it,"
        f" {_ELSEWHERE}"
    )


def _check_extents(plan: Plan) -> None:
    """Refuse extents of requests and classes that the plan does not have.

    Raises:
        ValueError: there is one.
    """
    for one in plan.extents:
        if not 0 <= one.request < len(plan.requests):
            raise ValueError(f"request {one.request} is not in the job")
        if not EVERY_CELL <= one.cell < len(plan.requests[one.request].cells):
            raise ValueError(f"request {one.request} has no class {one.cell}")


def _cell(classes: Any) -> Cell:
    """The classes of a request's cell from a file; they are called by their numbers.

    Raises:
        ValueError: they are no numbers of classes.
    """
    if not isinstance(classes, list) or any(type(one) is not int or one < 0 for one in classes):
        raise ValueError(f"{classes!r} are not numbers of classes")
    return Cell(classes=tuple(classes), names=tuple(map(str, classes)))


def _extent(raw: dict[str, Any]) -> Extent:
    """An extent from a file.

    Raises:
        ValueError: its numbers are none, or mean nothing.
        TypeError: it has other fields.
    """
    extent = Extent(**raw)
    if any(type(one) is not int for one in dataclasses.astuple(extent)):
        raise ValueError(f"{raw} has fields that are not whole numbers")
    if not 0 <= extent.start <= extent.stop <= MAX_POSITIONS or extent.samples_per_shard < 1:
        raise ValueError(f"{raw} is not a part of a sequence")
    return extent


def quarantined_shards(store: Store) -> list[int]:
    """Numbers of the shards that are left out, in order."""
    stems = (Path(name).stem for name in store.list(QUARANTINE) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _read_plan(store: Store, name: str) -> dict[str, Any]:
    try:
        file = parse_json(store.read(name))
        if file["plan_version"] != PLAN_VERSION:
            raise ValueError(f"version {file['plan_version']}")
        for extent in file["stage"]:
            _extent(extent)
        wanted = ("digest", "stage", *(("identity", "job") if name == f"{PLANS}/{0:06d}.json" or "job" in file else ()))
        # Plans of version 1 do not say so.
        columns_of(version := file.get("schema_version", 1))
        return {key: file[key] for key in wanted} | {"schema_version": version}
    except _BROKEN as error:
        raise _unreadable(store.address(name), error) from error


def _publish_stage(store: Store, plan: Plan, job: JobSpec, number: int, stage: tuple[Extent, ...]) -> bool:
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


def check_unused(store: Store) -> None:
    """Refuse a folder with files that no run of ours has put there.

    Raises:
        OutputError: some of them.
    """
    if store.list(PLANS):
        return
    foreign = [name for name in store.list() if name != STATE]
    if foreign:
        raise OutputError(
            f"output {store.uri}: holds files that are not of a run ({_shown(foreign)}); choose another --output"
        )


def _check_same(store: Store, stored: StoredRun, plan: Plan) -> None:
    if stored.digest == plan.digest:
        return
    lines = difference(stored.identity, json.loads(json.dumps(plan.identity)))
    if len(lines) > MAX_DIFFERENCES:
        lines[MAX_DIFFERENCES:] = [f"and {len(lines) - MAX_DIFFERENCES} more differences"]
    raise OutputError(
        "\n".join(
            [
                f"output {store.uri}: holds a run with another plan (there -> this job):",
                *(f"  {line}" for line in lines),
                "undo the change, use --resume overwrite --yes to remove that run, or choose another --output",
            ]
        )
    )


def _extend(store: Store, stored: StoredRun, plan: Plan, job: JobSpec) -> Plan:
    """The plan with the stored stages and, where counts grew, the next one."""
    _check_quotas(stored, plan)
    stage = next_stage(plan.requests, stored.stages, job.output.samples_per_shard)
    stages = stored.stages
    if stage or _has_other_goals(stored, plan):
        # The marker goes first: whoever sees it can trust that the run is complete.
        store.remove(SUCCESS)
        plan = Plan(plan.requests, plan.identity, plan.stages, stored.schema_version)
        if not _publish_stage(store, plan, job, len(stages), stage):
            return open_run(store, plan, job, "auto", confirmed=False)  # Another process was faster.
        stages = (*stages, stage)
    return Plan(plan.requests, plan.identity, stages, stored.schema_version)


def _check_quotas(stored: StoredRun, plan: Plan) -> None:
    """Refuse quotas that shrank: samples beyond them are there already."""
    shrunk = [
        f"requests.{request.number}.count: {request.spec.count} is below the {raw['count']} asked for in this output;"
        " counts can only grow (or use another output)"
        for request, raw in zip(plan.requests, stored.job["requests"], strict=True)
        if request.spec.has_quota and request.spec.count < raw["count"]
    ]
    if shrunk:
        raise JobError(shrunk)


def _has_other_goals(stored: StoredRun, plan: Plan) -> bool:
    """Whether a quota, or its limit of attempts, is not what it was."""
    return any(
        request.spec.has_quota
        and (request.spec.count, request.spec.max_attempts) != (raw["count"], raw.get("max_attempts"))
        for request, raw in zip(plan.requests, stored.job["requests"], strict=True)
    )


def _clear(store: Store, confirmed: bool) -> None:
    """Remove the files of an earlier run, the plan last, so that an interrupted removal can be taken up again."""
    stored = read_run(store)
    if stored is None:
        check_unused(store)
        return
    own, foreign = _sort_files(store, str(stored.job["name"]))
    if foreign:
        raise OutputError(
            f"output {store.uri}: holds files that the earlier run did not write ({_shown(foreign)}); move them away, "
            f"{_ELSEWHERE}"
        )
    if not confirmed:
        num_shards = sum(name.endswith(".tar") for name in own)
        raise OutputError(
            f"output {store.uri}: --resume overwrite would remove a run with {num_shards} shards; add --yes to do so"
        )
    store.remove(SUCCESS)
    for name in store.list(STATE):
        # The lease is held by whoever calls this.
        if name not in (PLANS, LOCKS, LEASES):
            store.remove_tree(name)
    for name in store.list(LOCKS):
        # The driver's is, too.
        if name != f"{LOCKS}/{DRIVER_LOCK}":
            store.remove(name)
    for name in (METADATA, RESCORED):
        if name in own:
            store.remove_tree(name)
    store.remove_all(name for name in own if name not in (METADATA, RESCORED))
    store.remove_tree(SHARDS)
    for name in reversed(store.list(PLANS)):
        store.remove(name)


def _sort_files(store: Store, job_name: str) -> tuple[list[str], list[str]]:
    """The files outside `_state` that a run of this name writes, and all others."""
    shard = re.compile(rf"{SHARDS}/{re.escape(job_name)}-\d{{6,}}\.(tar|parquet)")
    parts = re.compile(rf"{METADATA}/part-\d{{6}}\.parquet")
    own: list[str] = []
    foreign: list[str] = []
    for name in store.list():
        if name == SHARDS:
            for inner in store.list(SHARDS):
                is_own = shard.fullmatch(inner) or inner in RUN_FILES
                (own if is_own else foreign).append(inner)
        elif name == METADATA and store.is_folder(name):
            strangers = [inner for inner in store.list(METADATA) if not parts.fullmatch(inner)]
            foreign += strangers
            own += [] if strangers else [name]
        elif name == RESCORED and store.is_folder(name):
            # New scores of images that go are of no use to anybody.
            strangers = [inner for inner in store.list(RESCORED) if not store.exists(f"{inner}/{RESCORING}")]
            foreign += strangers
            own += [] if strangers else [name]
        elif name != STATE:
            (own if name in RUN_FILES else foreign).append(name)
    return own, foreign


def _shown(names: list[str]) -> str:
    """Some of the names, with control characters escaped."""
    some = ", ".join(repr(Path(name).as_posix()) for name in names[:MAX_SHOWN])
    return f"{some} and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else some

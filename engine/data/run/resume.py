"""What a run may do with an output that is not empty: continue, extend or overwrite it (contract: resume)."""

from __future__ import annotations

import json
from typing import Any

from engine.data.review.answers import DESIGNS, REVIEW
from engine.data.run.companions import COMPANIONS
from engine.data.run.file_names import CURATION, METADATA, PLANS, RESCORED, SUCCESS
from engine.data.run.foreign_files import check_unused, list_names, sort_files
from engine.data.run.shards import SHARDS
from engine.data.run.stored_plan import OTHER_OUTPUT, StoredRun, publish_stage, read_run
from engine.data.stores.base import DRIVER_LOCK, LEASES, LOCKS, STATE, Store
from engine.errors import JobError, OutputError
from engine.job.json_values import difference
from engine.job.plan import Plan, next_stage
from engine.job.spec import GuidanceSpec, JobSpec, merge

MAX_DIFFERENCES = 20
# What is removed whole.
_FOLDERS = (METADATA, RESCORED, CURATION)


def open_output(store: Store, plan: Plan, job: JobSpec, resume: str, confirmed: bool) -> Plan:
    """Make an output ready for a job: new, continued, extended or emptied.

    Args:
        plan: the job planned as a single stage.
        resume: `auto` continues the same plan and extends it where counts grew; `never` wants an empty output;
            `overwrite` removes what an earlier run wrote.
        confirmed: whether the user confirmed removing (`--yes`).

    Returns:
        The plan with the stages of this output.

    Raises:
        OutputError: the output holds another plan or foreign files, or cannot be written.
        JobError: a count shrank.

    Side effects:
        Removes the unfinished files of processes that have ended, and `_SUCCESS` when the plan grows.
    """
    if resume not in ("auto", "never", "overwrite"):
        raise ValueError(f"resume {resume!r} is not one of auto, never, overwrite")
    present = [name for name in store.list() if name != STATE or store.list(PLANS)]
    if resume == "never" and present:
        raise OutputError(
            f"output {store.uri}: is not empty ({list_names(present)}); use --resume auto, or choose another --output"
        )
    if resume == "overwrite" and present:
        _clear(store, confirmed)
    stored = read_run(store)
    if stored is None:
        check_unused(store)
    store.clean_staging()
    if stored is None:
        if publish_stage(store, plan, job, 0, plan.stages[0]):
            return plan
        # Another process was faster: its run must not be removed.
        return open_output(store, plan, job, "never" if resume == "never" else "auto", confirmed=False)
    _check_same(store, stored, plan, job)
    return _extend(store, stored, plan, job)


def as_begun(store: Store, job: JobSpec) -> JobSpec:
    """A job without a default that did not exist when the run of its output began.

    Runs that began before images were marked as synthetic continue without the mark: a data set has files of one kind.

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


def _check_same(store: Store, stored: StoredRun, plan: Plan, job: JobSpec) -> None:
    if stored.digest == plan.digest:
        return
    lines = _differences(stored.identity, json.loads(json.dumps(plan.identity)), plan)
    if len(lines) > MAX_DIFFERENCES:
        lines[MAX_DIFFERENCES:] = [f"and {len(lines) - MAX_DIFFERENCES} more differences"]
    if methods := _of_old_default(stored, plan, job):
        lines.append("the default of guidance changed since it began; this continues it:")
        lines.append(
            " ".join(["  riskforge run JOB", *(f"--set guidance.{name}.preset=adversarial" for name in methods)])
        )
    raise OutputError(
        "\n".join(
            [
                f"output {store.uri}: holds a run with another plan (there -> this job):",
                *(f"  {line}" for line in lines),
                "undo the change, use --resume overwrite --yes to remove that run, or choose another --output",
            ]
        )
    )


def _of_old_default(stored: StoredRun, plan: Plan, job: JobSpec) -> list[str]:
    """The methods that preset `adversarial` would plan as they are stored; none where anything else differs."""
    identity, methods = json.loads(json.dumps(plan.identity)), dict[str, None]()
    for request, before, now in zip(plan.requests, stored.identity["requests"], identity["requests"], strict=False):
        if before["guidance"] != now["guidance"]:
            name = request.spec.method_record.name
            methods[name] = None
            now["guidance"] = _as_adversarial(job, name).parameters_of(request.spec).identity()
    return list(methods) if identity == stored.identity else []


def _as_adversarial(job: JobSpec, method: str) -> JobSpec:
    """The job as `--set guidance.METHOD.preset=adversarial` makes it, with the other fields that its file names."""
    named = merge(job.guidance.model_dump(exclude_unset=True), {method: {"preset": "adversarial"}})
    return job.model_copy(update={"guidance": GuidanceSpec.model_validate(named)})


def _differences(old: dict[str, Any], new: dict[str, Any], plan: Plan) -> list[str]:
    """Lines on what differs between two identities, by the places of requests in the job file.

    Args:
        plan: with the new one.
    """
    before, after = ({one["name"]: one for one in identity["requests"]} for identity in (old, new))
    where = {request.spec.name: request.where for request in plan.requests}
    lines = difference(old | {"requests": []}, new | {"requests": []})
    # Requests between which others were put, or taken out, are the same ones; in their old places they are renamed.
    common = before.keys() & after.keys()
    renamed = [pair for pair in zip(before, after, strict=False) if not common.intersection(pair)]
    pairs = [*((name, name) for name in after if name in common), *(renamed if len(before) == len(after) else [])]
    for one, other in pairs:
        lines += difference(before[one], after[other], where[other])
    seen, made = ({pair[place] for pair in pairs} for place in (0, 1))
    lines += [f'requests: "{name}" -> absent' for name in before if name not in seen]
    lines += [f'{where[name]}: absent -> "{name}"' for name in after if name not in made]
    # A list of strengths makes several requests of one place, which often differ in the same way.
    return list(dict.fromkeys(lines)) or ["requests: in another order"]


def _extend(store: Store, stored: StoredRun, plan: Plan, job: JobSpec) -> Plan:
    """The plan with the stored stages and, where counts grew, the next one."""
    _check_quotas(stored, plan)
    stage = next_stage(plan.requests, stored.stages, job.output.samples_per_shard)
    stages = stored.stages
    if stage or _has_other_goals(stored, plan):
        # The marker is removed first: where it exists, the run is complete.
        store.remove(SUCCESS)
        plan = Plan(plan.requests, plan.identity, plan.stages, stored.schema_version)
        if not publish_stage(store, plan, job, len(stages), stage):
            return open_output(store, plan, job, "auto", confirmed=False)  # Another process was faster.
        stages = (*stages, stage)
    return Plan(plan.requests, plan.identity, stages, stored.schema_version)


def _check_quotas(stored: StoredRun, plan: Plan) -> None:
    """Refuse quotas that shrank: samples beyond them are there already."""
    shrunk = [
        f"{request.where}.count: {request.spec.count} is below the {raw['count']} asked for in this output;"
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
    """Remove the files of an earlier run, the plan last, so that an interrupted removal can be continued."""
    stored = read_run(store)
    if stored is None:
        check_unused(store)
        return
    if [name for name in store.list(REVIEW) if name != DESIGNS]:
        raise OutputError(
            f"output {store.uri}: holds what people answered about its images ({REVIEW}), which cannot be made again,"
            f" and means nothing without them; copy the run, or move {REVIEW} away, {OTHER_OUTPUT}"
        )
    own, foreign = sort_files(store, str(stored.job["name"]))
    if foreign:
        raise OutputError(
            f"output {store.uri}: holds files that the earlier run did not write ({list_names(foreign)}); move them"
            f" away, {OTHER_OUTPUT}"
        )
    if not confirmed:
        num_shards = sum(name.startswith(f"{SHARDS}/") and name.endswith(".tar") for name in own)
        raise OutputError(
            f"output {store.uri}: --resume overwrite would remove a run with {num_shards} shards; add --yes to do so"
        )
    _remove_files(store, own)


def _remove_files(store: Store, names: list[str]) -> None:
    """Remove a run.

    Args:
        names: its files and folders outside `_state`.
    """
    store.remove(SUCCESS)
    for name in store.list(STATE):
        # The caller holds the lease.
        if name not in (PLANS, LOCKS, LEASES):
            store.remove_tree(name)
    for name in store.list(LOCKS):
        # And the driver's lock.
        if name != f"{LOCKS}/{DRIVER_LOCK}":
            store.remove(name)
    for name in _FOLDERS:
        if name in names:
            store.remove_tree(name)
    store.remove_all(name for name in names if name not in _FOLDERS)
    for folder in (SHARDS, *COMPANIONS):
        store.remove_tree(folder)
    # Designs that nobody has answered.
    store.remove_tree(REVIEW)
    for name in reversed(store.list(PLANS)):
        store.remove(name)

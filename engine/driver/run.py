"""The driver of a run: from a job to a finished data set, or as far as it goes.

What is done is read from the store and nowhere else, so a run can be ended at any moment and continued by the same
command.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.run.commits import CommitSummary, list_commits, read_commits
from engine.data.run.file_names import MANIFEST, METADATA, REPORT, SUCCESS
from engine.data.run.finalise import FinishedRun, finalise, mark_success
from engine.data.run.foreign_files import check_unused
from engine.data.run.manifest import software_versions
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.output_folder import check_output
from engine.data.run.presence import check_committed, is_closed, lost_files
from engine.data.run.quarantine import QUARANTINE, quarantined_shards
from engine.data.run.resume import as_begun, find_plan, open_output
from engine.data.stores.base import Store
from engine.data.stores.file_errors import is_no_file
from engine.data.stores.journal import Journal
from engine.data.stores.lease import Lease, hold
from engine.data.stores.opening import open_store
from engine.driver.executors.base import Executor, WorkerLike
from engine.driver.progress import Display
from engine.driver.run_loop import DEADLINE, Shift, ShiftEnd
from engine.errors import EXIT_DRAINED, EXIT_INCOMPLETE, EXIT_OK, CorruptShardError, JobError, OutputError
from engine.generation.messages import Rules
from engine.job.class_names import planned_names
from engine.job.plan import Plan, RequestPlan, build_plan, resolve_requests
from engine.job.quotas import replay
from engine.job.spec import JobSpec
from engine.models.artefacts import missing_artefacts
from engine.models.custom_methods import method_digests
from engine.models.digests import model_digests
from engine.models.factories import add_import_folders, import_folders
from engine.models.hardware import hardware_problems
from engine.models.job_checks import check_addresses
from engine.models.labels import target_labels
from engine.models.licences import licence_of

if TYPE_CHECKING:
    from engine.data.run.summary import GroupSummary

# Device files of NVIDIA, AMD and of GPUs under WSL: seen without loading torch.
GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")

MakeWorker = Callable[[JobSpec, Plan], WorkerLike]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What came of a run.

    Attributes:
        report: path of the report; empty where there is nothing to report on.
        groups: medians per request and context.
        remarks: what came of screening and of dials, in words, a line a request.
        quarantined: numbers of the shards that were left out.
        num_samples: attempts in the committed shards.
        num_failed: those of them without an image.
        failure: the most frequent message of the failed ones.
        was_complete: whether there was nothing to do.
        drained: why the run ended early, with shards left: the name of a signal, or `deadline`; empty otherwise.
        short: quotas that are not filled, in words, a line a class.
        sampling_share: share of the workers' time that went into sampling and scoring, None where nothing was made.
    """

    exit_code: int
    uri: str
    report: str
    num_shards: int
    num_committed: int
    num_samples: int
    num_failed: int
    seconds: float
    failure: str = ""
    groups: list[GroupSummary] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    quarantined: tuple[int, ...] = ()
    was_complete: bool = False
    drained: str = ""
    short: tuple[str, ...] = ()
    sampling_share: float | None = None


def run_job(
    job: JobSpec,
    *,
    executor: Executor,
    resume: str,
    confirmed: bool,
    display: Display,
    make_worker: MakeWorker | None = None,
    rules: Rules | None = None,
    retry: bool = False,
) -> RunSummary:
    """Make what is missing of a job, then everything that closes a run.

    Args:
        executor: where workers live; it is closed in the end, whatever happens.
        resume: `auto`, `never` or `overwrite`, as in `engine.data.run.resume.open_output`.
        confirmed: whether removing an earlier run was agreed to.
        make_worker: builds a worker in its process; `engine.generation.worker.Worker` when not given. Picklable.
        rules: when patience ends; its deadline is on the clock of `time.monotonic`.
        retry: give the shards in quarantine a fresh start.

    Raises:
        RiskforgeError: the job, its models or its output are not as they must be.
        OwnedError: another driver is at work on the output.
        CorruptShardError: files of committed shards are lost.
        WorkersFailingError: workers fail over and over.
    """
    started = time.monotonic()
    rules = rules or Rules()
    try:
        display.phase("checking models and output")
        if resume == "auto":
            job = as_begun(open_store(job.output.uri), job)
        store, job, planned, models = prepare(job, executor, display)
        if resume == "auto" and store.exists(SUCCESS) and (plan := find_plan(store, planned, job)):
            committed = list_commits(store)
            if len(committed) == plan.num_shards and is_closed(store, plan) and not lost_files(store):
                return _summary(store, job, plan, committed, started, was_complete=True)
        check_unused(store)
        with (
            hold(store, notice=display.notice) as lease,
            contextlib.closing(executor),
            contextlib.ExitStack() as cleanup,
        ):
            plan = open_output(store, planned, job, resume, confirmed)
            check_committed(store)
            if retry:
                store.remove_tree(QUARANTINE)
            journal = Journal(store, lease.number)
            cleanup.callback(journal.keep, is_end=True)
            shift = Shift(
                store,
                job,
                plan,
                list_commits(store),
                executor=executor,
                display=display,
                lease=lease,
                journal=journal,
                rules=rules,
            )
            end = ShiftEnd(plan=plan, drained="", sampling_share=None)
            hardware = _known_hardware(store)
            if shift.begin_rounds():
                end = shift.work(partial(make_worker or _here(default_worker), job, shift.plan))
                hardware |= executor.describe()
            return _close(store, job, end, executor, display, lease, models, started, hardware)
    except KeyboardInterrupt:
        display.notice("interrupted; what is committed is kept")
        raise
    finally:
        executor.close()
        display.close()


def _close(
    store: Store,
    job: JobSpec,
    end: ShiftEnd,
    executor: Executor,
    display: Display,
    lease: Lease,
    models: dict[str, Any],
    started: float,
    hardware: dict[str, Any],
) -> RunSummary:
    """Give the workers back and write what closes a run; not after a signal, whose sender may not wait."""
    closing = threading.Thread(target=executor.close)
    closing.start()
    finished = None
    if end.drained in ("", DEADLINE):
        display.phase("writing manifest and report")
        lease.check()
        seconds = time.monotonic() - started
        finished = close_run(
            store,
            job,
            end.plan,
            models=models,
            run_seconds=seconds,
            hardware=hardware,
            sampling_share=end.sampling_share,
        )
    closing.join()
    Journal(store, lease.number).note("ended", drained=end.drained)
    return _summary(store, job, end.plan, list_commits(store), started, finished=finished, end=end)


def _known_hardware(store: Store) -> dict[str, Any]:
    """This machine, and what the manifest says of those that have worked so far."""
    earlier: dict[str, Any] = {}
    try:
        with contextlib.suppress(CorruptShardError, AttributeError, TypeError):
            earlier = dict(read_manifest(store).get("hardware") or {}) if store.exists(MANIFEST) else {}
    except OutputError as error:
        # The manifest is written anew, whatever stands in its place.
        if not is_no_file(error):
            raise
    return earlier | {"machine": platform.machine()}


def prepare(job: JobSpec, executor: Executor, display: Display) -> tuple[Store, JobSpec, Plan, dict[str, Any]]:
    """Check a job against its models, while the executor prepares.

    Returns:
        The store, the job with the absolute address of its output, its plan as a single stage, and the models for the
        manifest.
    """
    check_addresses(job)
    store = open_store(job.output.uri)
    check_output(store)
    job = job.model_copy(update={"output": job.output.model_copy(update={"uri": store.uri})})
    labels = target_labels(job)
    requests = resolve_requests(job, labels)
    digests = {"conditioning": _conditioning_digests(job, requests, labels, display)}
    if not store.exists(SUCCESS):
        executor.begin()
    digests |= model_digests(job) | method_digests(job)
    # Once more, as models of the hub are here only now.
    check_addresses(job)
    return store, job, build_plan(job, labels, digests), describe_models(job, digests, labels)


def _conditioning_digests(
    job: JobSpec, requests: tuple[RequestPlan, ...], labels: list[str], display: Display
) -> dict[str, str]:
    """Digests of artefacts and given images; torch is only loaded for a job that has some.

    Raises:
        JobError: one is missing, a line each.
    """
    if missing := missing_artefacts(job):
        raise JobError(missing)
    if all(request.conditioning is None for request in job.requests):
        return {}
    from engine.generation.conditioner import conditioning_digests

    return conditioning_digests(job, requests, labels, progress=display.advance, notice=display.notice)


def plan_job(job: JobSpec, display: Display | None = None) -> Plan:
    """The plan of a job as far as its shards go: models are found, their contents are not looked at.

    Args:
        display: given where samples are to be made: artefacts and given images are then looked into. It is closed in
            the end.

    Raises:
        JobError: models or classes that are not there.
    """
    check_addresses(job)
    addresses = {job.models.diffusion, *(request.diffusion for request in job.requests if request.diffusion)}
    labels = target_labels(job)
    conditioning = dict.fromkeys(
        [spec.artefact or spec.images or "" for request in job.requests if (spec := request.conditioning)], ""
    )
    if display is not None:
        with contextlib.closing(display):
            conditioning = _conditioning_digests(job, resolve_requests(job, labels), labels, display)
    unknown = {
        "diffusion": dict.fromkeys(addresses, ""),
        "conditioning": conditioning,
        "clip": "",
        "target": "",
        "transfer": [],
        "oracle": "",
    }
    return build_plan(job, labels, unknown)


def check_hardware(job: JobSpec, *, is_here: bool) -> None:
    """Refuse what `runtime` asks for and cannot be.

    Args:
        is_here: whether the workers are on this machine; of others nothing is known.

    Raises:
        JobError: all problems, a line each.
    """
    has_gpu = not is_here or any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES)
    if problems := hardware_problems(job.runtime, has_gpu):
        raise JobError(problems)


def describe_models(job: JobSpec, digests: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """Address, digest, licence of every model by role; of the target its labels too, which class indices refer to."""
    models = job.models

    def about(address: str, digest: str) -> dict[str, Any]:
        return {"address": address, "digest": digest, "license": licence_of(address)}

    described: dict[str, Any] = {
        "diffusion": [about(address, one) for address, one in digests["diffusion"].items()],
        "clip": about(models.clip, digests["clip"]),
        "target": about(models.target, digests["target"]) | {"labels": labels},
    }
    if models.transfer:
        pairs = zip(models.transfer, digests["transfer"], strict=True)
        described["transfer"] = [about(address, one) for address, one in pairs]
    for role in ("oracle", "judge", "guidance_decoder"):
        if address := getattr(models, role):
            described[role] = about(address, digests[role])
    for role in ("conditioning", "methods"):
        if used := digests.get(role):
            described[role] = [{"address": address, "digest": one} for address, one in used.items()]
    return described


def _here(make_worker: Callable[..., WorkerLike]) -> MakeWorker:
    return partial(make_worker, folder=str(Path.cwd()), imports=import_folders())


def default_worker(job: JobSpec, plan: Plan, folder: str, imports: tuple[str, ...] = ()) -> WorkerLike:
    """The worker that makes samples, named after its machine and process.

    Args:
        folder: the driver's working folder, which relative addresses of models start from.
        imports: the folders that factories are imported from, beside those of the process.

    Side effects: makes `folder` the working folder of this process, where there is one of that name, and adds to
    `sys.path`.
    """
    from engine.generation.worker import Worker

    with contextlib.suppress(OSError):
        os.chdir(folder)
    add_import_folders(imports)
    return Worker(job, plan, name=f"{socket.gethostname()}-{os.getpid()}")


def close_run(
    store: Store,
    job: JobSpec,
    plan: Plan,
    *,
    models: dict[str, Any],
    run_seconds: float,
    hardware: dict[str, Any],
    sampling_share: float | None = None,
) -> FinishedRun | None:
    """Write what is made over all shards, then the report and, if all shards are there, the marker.

    Args:
        run_seconds: time of this session, from its start; the sampling time is that of all sessions together.
        sampling_share: of the workers' time in this session; None where nothing was made.

    Returns:
        None where no shard is committed.

    Raises:
        CorruptShardError: files of committed shards are lost.
    """
    if not list_commits(store):
        return None
    check_committed(store)
    from engine.report.render import write_report

    timing = {
        "sampling_seconds": sum(record.timing.get("sampling_seconds", 0.0) for record in read_commits(store)),
        "run_seconds": run_seconds,
        "finished": time.time(),
    }
    timing |= {} if sampling_share is None else {"sampling_share": sampling_share}
    finished = finalise(store, job, plan, models=models, timing=timing, versions=software_versions(), hardware=hardware)
    write_report(store)
    if finished.complete:
        mark_success(store, plan)
    return finished


def _remarks(manifest: dict[str, Any]) -> list[str]:
    """What came of screening and of dials, a line a request."""
    lines = []
    for name, classes in manifest["counts"]["screening"].items():
        screened, samples, draws = (sum(one[key] for one in classes) for key in ("screened", "samples", "draws"))
        rates = [one["acceptance_rate"] for one in classes]
        lines.append(
            f"{name}: {screened} of {samples} samples screened in {draws} draws; of a class's draws {min(rates):.1%} to"
            f" {max(rates):.1%} pass"
        )
        if not screened:
            lines.append(f"{name}: no draw passed; lower conditioning.threshold, or raise max_draws")
    for name, counts in manifest["counts"]["requests"].items():
        if counts["rejected"] and not counts["accepted"]:
            lines.append(f"{name}: its rule accepted none of {counts['attempted']} samples")
    for name, one in manifest["dials"].items():
        near = f"{one['share_within_tolerance']:.0%} within {one['tolerance']:g}"
        lines.append(
            f"{name}: median risk {one['risk_median']:.2f} for a dial of {one['target_risk']:g}; {near}, half within"
            f" {one['distance_median']:.2f}"
        )
    return lines


def _summary(
    store: Store,
    job: JobSpec,
    plan: Plan,
    committed: dict[int, CommitSummary],
    started: float,
    *,
    finished: FinishedRun | None = None,
    was_complete: bool = False,
    end: ShiftEnd | None = None,
) -> RunSummary:
    drained = end.drained if end else ""
    quarantined = tuple(number for number in quarantined_shards(store) if number not in committed)
    short = () if drained else tuple(shortfalls(plan, committed, job.output.samples_per_shard))
    num_failed = sum(commit.counts.failed for commit in committed.values())
    is_complete = len(committed) == plan.num_shards and not short and not _is_short(plan, committed)
    return RunSummary(
        exit_code=EXIT_DRAINED if drained else EXIT_OK if is_complete else EXIT_INCOMPLETE,
        uri=store.uri,
        report=store.address(REPORT) if store.exists(REPORT) else "",
        num_shards=plan.num_shards,
        num_committed=len(committed),
        num_samples=sum(commit.counts.attempted for commit in committed.values()),
        num_failed=num_failed,
        failure=_top_failure(store) if num_failed else "",
        seconds=time.monotonic() - started,
        groups=finished.groups if finished else [],
        remarks=_remarks(finished.manifest) if finished else [],
        quarantined=quarantined,
        was_complete=was_complete,
        drained=drained,
        short=short,
        sampling_share=end.sampling_share if end else None,
    )


def shortfalls(plan: Plan, committed: dict[int, CommitSummary], samples_per_shard: int) -> Iterator[str]:
    """The quotas that are not filled, in words."""
    counts, names = {number: commit.counts for number, commit in committed.items()}, planned_names(plan)
    for one in replay(plan, counts, (), samples_per_shard).standings():
        if one.missing:
            request = plan.requests[one.request]
            name = " and ".join(names[index] for index in request.cells[one.cell].classes)
            yield f"{request.spec.name}, {name}: {one.accepted} of {one.wanted} accepted in {one.attempted} attempts"


def _is_short(plan: Plan, committed: dict[int, CommitSummary]) -> bool:
    """Whether a request without quotas has fewer samples than planned; failed ones are lacking, rejected ones not."""
    samples: Counter[int] = Counter()
    for number, commit in committed.items():
        samples[plan.shard(number).request] += commit.counts.ok + commit.counts.rejected
    return any(samples[request.number] < request.total for request in plan.requests if not request.spec.has_quota)


def _top_failure(store: Store) -> str:
    """The most frequent message of failed samples."""
    if not store.exists(METADATA):
        return ""
    from engine.report.data import failures, open_metadata

    messages = failures(open_metadata(store.fetch(METADATA)))
    return messages[0][0] if messages else ""

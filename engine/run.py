"""The driver of a run: from a job to a finished data set, or as far as it goes.

What is done is read from the store and nowhere else, so a run can be ended at any moment and continued by the same
command.
"""

from __future__ import annotations

import contextlib
import json
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

from engine import scheduler
from engine.dataset.commits import CommitSummary, list_commits, read_commits
from engine.dataset.manifest import FinishedRun, finalise, mark_success, software_versions
from engine.dataset.state import METADATA, REPORT, SUCCESS, check_unused, find_plan, open_run
from engine.dataset.store import DRIVER_LOCK, Store, open_store
from engine.errors import EXIT_INCOMPLETE, EXIT_OK, JobError, OwnedError, RiskforgeError
from engine.executors.base import Executor, ExecutorEvent, ShardProgress, ShardResult, WorkerFactory, WorkerLike
from engine.models.addresses import check_addresses, missing_artefacts, model_digests, read_labels, resolve
from engine.models.runtime import hardware_problems
from engine.models.targets import add_import_folders, import_folders
from engine.plan import Plan, RequestPlan, build_plan, resolve_requests
from engine.progress import Display, Tally
from engine.spec import JobSpec

if TYPE_CHECKING:
    from engine.dataset.summary import GroupSummary

QUARANTINE = "_state/quarantine"
POLL_SECONDS = 0.25
# Device files of NVIDIA, AMD and of GPUs under WSL: seen without loading torch.
GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
MAX_REASON_CHARS = 300
# From when on the user hears that workers wait for room.
UNPLACED_SECONDS = 60.0
FAULTS = f"{QUARANTINE}/workers.txt"

MakeWorker = Callable[[JobSpec, Plan], WorkerLike]


class WorkersFailingError(RiskforgeError):
    """Workers fail over and over and nothing gets done: a defect, of this program or of the machines."""

    exit_code = EXIT_INCOMPLETE


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


def run_job(
    job: JobSpec,
    *,
    executor: Executor,
    resume: str,
    confirmed: bool,
    display: Display,
    make_worker: MakeWorker | None = None,
) -> RunSummary:
    """Make what is missing of a job, then everything that closes a run.

    Args:
        executor: where workers live; it is closed in the end, whatever happens.
        resume: `auto`, `never` or `overwrite`, as in `engine.dataset.state.open_run`.
        confirmed: whether removing an earlier run was agreed to.
        make_worker: builds a worker in its process; `engine.worker.Worker` when not given. Picklable.

    Raises:
        RiskforgeError: the job, its models or its output are not as they must be.
        OwnedError: another driver is at work on the output.
        WorkersFailingError: workers fail over and over.
    """
    started = time.monotonic()
    try:
        display.phase("checking models and output")
        store, job, planned, models = prepare(job, executor, display)
        if resume == "auto" and store.exists(SUCCESS) and (plan := find_plan(store, planned, job)):
            committed = list_commits(store)
            if len(committed) == plan.num_shards:
                return _summary(store, plan, committed, started, was_complete=True)
        with owned(store), contextlib.closing(executor):
            plan = open_run(store, planned, job, resume, confirmed)
            committed = list_commits(store)
            hardware: dict[str, Any] = {"machine": platform.machine()}
            if len(committed) < plan.num_shards:
                shift = _Shift(store, plan, committed, executor, display)
                shift.work(partial(make_worker or _here(default_worker), job, plan))
                hardware |= executor.describe()
            closing = threading.Thread(target=executor.close)
            closing.start()
            display.phase("writing manifest and report")
            seconds = time.monotonic() - started
            finished = close_run(store, job, plan, models=models, run_seconds=seconds, hardware=hardware)
            closing.join()
            return _summary(store, plan, list_commits(store), started, finished=finished)
    except KeyboardInterrupt:
        display.notice("interrupted; what is committed is kept")
        raise
    finally:
        executor.close()
        display.close()


@contextlib.contextmanager
def owned(store: Store) -> Iterator[None]:
    """Be the only driver at work on an output; ends with the process, however that ends.

    Raises:
        OwnedError: another is, with its machine, process and time of beginning.
        OutputError: the folder is somebody else's.
    """
    check_unused(store)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with store.try_lock(DRIVER_LOCK, f"process {os.getpid()} on {socket.gethostname()}, since {since}") as holder:
        if holder:
            raise OwnedError(
                f"output {store.uri}: another driver is at work on it ({holder}); let it finish or stop it, or choose"
                " another --output"
            )
        yield


def prepare(job: JobSpec, executor: Executor, display: Display) -> tuple[Store, JobSpec, Plan, dict[str, Any]]:
    """Check a job against its models, while the executor prepares.

    Returns:
        The store, the job with the absolute address of its output, its plan as a single stage, and the models for the
        manifest.
    """
    check_addresses(job)
    store = open_store(job.output.uri)
    job = job.model_copy(update={"output": job.output.model_copy(update={"uri": store.uri})})
    labels = target_labels(job)
    requests = resolve_requests(job, labels)
    digests = {"conditioning": _conditioning_digests(job, requests, labels, display)}
    if not store.exists(SUCCESS):
        executor.begin()
    digests |= model_digests(job)
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
    from engine.conditioner import conditioning_digests

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


def target_labels(job: JobSpec) -> list[str]:
    """The class names of a job's target; a model of the hub is fetched for them."""
    labels = read_labels(job.models.target)
    if labels is None:
        try:
            resolve(job.models.target)
        except JobError as error:
            raise JobError([f"models.target: {problem}" for problem in error.problems]) from None
        labels = read_labels(job.models.target)
    assert labels is not None, "a resolved model has labels"
    return labels


def describe_models(job: JobSpec, digests: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """Address and digest of every model by role; of the target its labels too, which every class index refers to."""
    models = job.models
    described: dict[str, Any] = {
        "diffusion": [{"address": address, "digest": one} for address, one in digests["diffusion"].items()],
        "clip": {"address": models.clip, "digest": digests["clip"]},
        "target": {"address": models.target, "digest": digests["target"], "labels": labels},
    }
    if models.transfer:
        pairs = zip(models.transfer, digests["transfer"], strict=True)
        described["transfer"] = [{"address": address, "digest": one} for address, one in pairs]
    if models.oracle:
        described["oracle"] = {"address": models.oracle, "digest": digests["oracle"]}
    if models.judge:
        described["judge"] = {"address": models.judge, "digest": digests["judge"]}
    if models.guidance_decoder:
        described["guidance_decoder"] = {"address": models.guidance_decoder, "digest": digests["guidance_decoder"]}
    if digests["conditioning"]:
        pairs = digests["conditioning"].items()
        described["conditioning"] = [{"address": address, "digest": one} for address, one in pairs]
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
    from engine.worker import Worker

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
) -> FinishedRun | None:
    """Write what is made over all shards, then the report and, if all shards are there, the marker.

    Args:
        run_seconds: time of this session, from its start; the sampling time is that of all sessions together.

    Returns:
        None where no shard is committed.
    """
    if not list_commits(store):
        return None
    from engine.report.render import write_report

    timing = {
        "sampling_seconds": sum(record.timing.get("sampling_seconds", 0.0) for record in read_commits(store)),
        "run_seconds": run_seconds,
        "finished": time.time(),
    }
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
    plan: Plan,
    committed: dict[int, CommitSummary],
    started: float,
    *,
    finished: FinishedRun | None = None,
    was_complete: bool = False,
) -> RunSummary:
    is_complete = len(committed) == plan.num_shards
    num_failed = sum(commit.counts.failed for commit in committed.values())
    return RunSummary(
        exit_code=EXIT_OK if is_complete and not _is_short(plan, committed) else EXIT_INCOMPLETE,
        uri=store.uri,
        report=str(store.path(REPORT)) if store.exists(REPORT) else "",
        num_shards=plan.num_shards,
        num_committed=len(committed),
        num_samples=sum(commit.counts.attempted for commit in committed.values()),
        num_failed=num_failed,
        failure=_top_failure(store) if num_failed else "",
        seconds=time.monotonic() - started,
        groups=finished.groups if finished else [],
        remarks=_remarks(finished.manifest) if finished else [],
        quarantined=tuple(number for number in range(plan.num_shards) if number not in committed)
        if not is_complete
        else (),
        was_complete=was_complete,
    )


def _is_short(plan: Plan, committed: dict[int, CommitSummary]) -> bool:
    """Whether a request has fewer samples than were planned; `count` is attempts, so that rejected ones are no lack."""
    samples: Counter[int] = Counter()
    for number, commit in committed.items():
        samples[plan.shard(number).request] += commit.counts.ok + commit.counts.rejected
    return any(samples[request.number] < request.total for request in plan.requests)


def _top_failure(store: Store) -> str:
    """The most frequent message of failed samples."""
    if not store.exists(METADATA):
        return ""
    from engine.report.data import failures, open_metadata

    messages = failures(open_metadata(store.path(METADATA)))
    return messages[0][0] if messages else ""


class _Shift:
    """The loop between scheduler and executor, from the first worker to the last shard."""

    def __init__(
        self, store: Store, plan: Plan, committed: dict[int, CommitSummary], executor: Executor, display: Display
    ) -> None:
        self._store = store
        self._plan = plan
        self._executor = executor
        self._display = display
        self._tally = Tally(plan, {number: commit.counts for number, commit in committed.items()})
        self._flags = bytearray(plan.num_shards)
        for number in committed:
            self._flags[number] = 1
        self._unplaced_since: float | None = None
        self._has_told_unplaced = False

    def work(self, factory: WorkerFactory) -> None:
        """Make all missing shards; what cannot be made is put in quarantine."""
        for name in self._store.list(QUARANTINE):
            self._store.remove(name)
        num_missing = self._flags.count(0)
        self._display.phase(f"{self._executor.opening} for {num_missing} of {self._plan.num_shards} shards")
        num_workers = self._executor.open(factory, num_missing)
        self._display.phase(f"loading models ({num_workers} worker{'s' if num_workers > 1 else ''})")
        state, actions = scheduler.start(bytes(self._flags), num_workers)
        while not self._carry_out(actions):
            actions = []
            for event in self._executor.poll(POLL_SECONDS):
                if isinstance(event, ShardProgress):
                    self._note_progress(event, state)
                    continue
                self._note(event)
                state, more = scheduler.step(state, event)
                actions += more
            self._note_unplaced(time.monotonic())
            self._display.show(self._tally)

    def _carry_out(self, actions: list[scheduler.Action]) -> bool:
        """Do what the scheduler says; True when it is the end."""
        for action in actions:
            if isinstance(action, scheduler.StartWorker):
                self._executor.start_worker(action.worker)
            elif isinstance(action, scheduler.StopWorker):
                self._executor.stop_worker(action.worker)
            elif isinstance(action, scheduler.Assign):
                self._executor.submit(action.worker, self._plan.shard(action.shard), action.attempt)
            elif isinstance(action, scheduler.Quarantine):
                self._quarantine(action)
            elif isinstance(action, scheduler.Abort):
                raise RiskforgeError(action.message) if action.user_fault else self._give_up(action.message)
            else:
                return True
        return False

    def _give_up(self, message: str) -> WorkersFailingError:
        """Keep the whole message, which may hold tracebacks, and say it in short."""
        self._store.replace(FAULTS, f"{message}\n".encode())
        head, mark, reason = message.partition("the last one: ")
        return WorkersFailingError(
            f"{head}{mark}{brief(reason)}\nthe whole message is in {self._store.path(FAULTS)}; mend the cause, and the"
            " same command continues"
        )

    def _note_progress(self, event: ShardProgress, state: scheduler.State) -> None:
        """Count samples of a shard in work, if the worker still has it: the news may be late."""
        worker = state.workers.get(event.worker)
        if worker and event.shard in worker.queue:
            self._tally.working(event.worker, event.shard, event.num_done, time.monotonic())

    def _note_unplaced(self, now: float) -> None:
        """Say once when workers wait for a machine for long."""
        num = self._executor.num_unplaced
        if not num:
            self._unplaced_since = None
            return
        self._unplaced_since = now if self._unplaced_since is None else self._unplaced_since
        if now - self._unplaced_since >= UNPLACED_SECONDS and not self._has_told_unplaced:
            self._has_told_unplaced = True
            self._display.notice(f"{num} worker(s) still wait for room on the cluster; ask for fewer with --workers")

    def _note(self, event: ExecutorEvent) -> None:
        """Take what concerns the user from an event."""
        now = time.monotonic()
        if isinstance(event, scheduler.WorkerReady):
            self._display.phase("")
            self._tally.ready(event.worker, now)
        elif isinstance(event, ShardResult):
            self._tally.commit(event.worker, event.shard, event.outcome.counts, now)
        elif isinstance(event, scheduler.ShardError):
            self._tally.drop(event.shard)
            self._display.notice(
                f"shard {event.shard} failed, worker {event.worker} is replaced: {brief(event.message)}"
            )
        elif isinstance(event, scheduler.WorkerLost):
            self._display.notice(f"worker {event.worker} is replaced: {brief(event.message)}")

    def _quarantine(self, action: scheduler.Quarantine) -> None:
        shard = self._plan.shard(action.shard)
        note = {
            "shard": shard.number,
            "request": self._plan.requests[shard.request].spec.name,
            "first_key": next(self._plan.samples(shard)).key,
            "num_samples": shard.num_samples,
            "reasons": list(action.reasons),
        }
        self._tally.drop(shard.number)
        name = f"{QUARANTINE}/{shard.number:06d}.json"
        self._store.replace(name, (json.dumps(note, indent=1, ensure_ascii=False) + "\n").encode())
        self._display.notice(f"shard {shard.number} is in quarantine after {len(action.reasons)} faults: {name}")


def brief(message: str) -> str:
    """The line that says most: the last of a traceback, the first of anything else."""
    lines = message.strip().splitlines() or ["no reason given"]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line[:MAX_REASON_CHARS]

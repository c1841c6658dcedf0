"""The driver of a run: from a job to a finished data set, or as far as it goes.

What is done is read from the store and nowhere else, so a run can be ended at any moment and continued by the same
command.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import scheduler
from engine.dataset.commits import list_commits
from engine.dataset.manifest import FinishedRun, finalise, mark_success, software_versions
from engine.dataset.state import REPORT, SUCCESS, open_run
from engine.dataset.store import Store, open_store
from engine.errors import EXIT_INCOMPLETE, EXIT_OK, JobError, RiskforgeError
from engine.executors.base import Executor, ExecutorEvent, ShardProgress, ShardResult, WorkerFactory, WorkerLike
from engine.models.addresses import check_addresses, model_digests, read_labels, resolve
from engine.models.runtime import hardware_problems
from engine.plan import Plan, build_plan, resolve_requests
from engine.progress import Display, Tally
from engine.spec import JobSpec

if TYPE_CHECKING:
    from engine.dataset.summary import GroupSummary

QUARANTINE = "_state/quarantine"
POLL_SECONDS = 0.25
# Device files of NVIDIA, AMD and of GPUs under WSL: seen without loading torch.
GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
MAX_REASON_CHARS = 300

MakeWorker = Callable[[JobSpec, Plan], WorkerLike]


class WorkersFailingError(Exception):
    """Workers fail over and over and nothing gets done: a defect, of this program or of the machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What came of a run.

    Attributes:
        report: path of the report; empty where there is nothing to report on.
        groups: medians per request and context.
        quarantined: numbers of the shards that were left out.
        was_complete: whether there was nothing to do.
    """

    exit_code: int
    uri: str
    report: str
    num_shards: int
    num_committed: int
    seconds: float
    groups: list[GroupSummary] = field(default_factory=list)
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
        WorkersFailingError: workers fail over and over.
    """
    started = time.monotonic()
    try:
        display.phase("checking models and output")
        store, job, plan, models = prepare(job, executor, resume, confirmed)
        committed = list_commits(store)
        if len(committed) == plan.num_shards and store.exists(SUCCESS):
            return _summary(store, plan, started, was_complete=True)
        timing = {"sampling_seconds": 0.0}
        hardware: dict[str, Any] = {"machine": platform.machine()}
        if len(committed) < plan.num_shards:
            shift = _Shift(store, plan, executor, display)
            timing = shift.work(partial(make_worker or default_worker, job, plan))
            hardware |= executor.describe()
        closing = threading.Thread(target=executor.close)
        closing.start()
        display.phase("writing manifest and report")
        timing |= {"run_seconds": time.monotonic() - started, "finished": time.time()}
        finished = close_run(store, job, plan, models=models, timing=timing, hardware=hardware)
        closing.join()
        return _summary(store, plan, started, finished=finished)
    except KeyboardInterrupt:
        display.notice("interrupted; what is committed is kept")
        raise
    finally:
        executor.close()
        display.close()


def prepare(
    job: JobSpec, executor: Executor, resume: str, confirmed: bool
) -> tuple[Store, JobSpec, Plan, dict[str, Any]]:
    """Check a job against its models and open its output, while the executor prepares.

    Returns:
        The store, the job with the absolute address of its output, its plan, and the models for the manifest.
    """
    check_addresses(job)
    store = open_store(job.output.uri)
    job = job.model_copy(update={"output": job.output.model_copy(update={"uri": store.uri})})
    labels = target_labels(job)
    resolve_requests(job, labels)
    if not store.exists(SUCCESS):
        executor.begin()
    digests = model_digests(job)
    plan = open_run(store, build_plan(job, labels, digests), job, resume, confirmed)
    return store, job, plan, describe_models(job, digests)


def plan_job(job: JobSpec) -> Plan:
    """The plan of a job as far as its shards go: models are found, their contents are not looked at.

    Raises:
        JobError: models or classes that are not there.
    """
    check_addresses(job)
    addresses = {job.models.diffusion, *(request.diffusion for request in job.requests if request.diffusion)}
    unknown = {"diffusion": dict.fromkeys(addresses, ""), "clip": "", "target": "", "transfer": [], "oracle": ""}
    return build_plan(job, target_labels(job), unknown)


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
        resolve(job.models.target)
        labels = read_labels(job.models.target)
    assert labels is not None, "a resolved model has labels"
    return labels


def describe_models(job: JobSpec, digests: dict[str, Any]) -> dict[str, Any]:
    """Address and digest of every model by role."""
    models = job.models
    described: dict[str, Any] = {
        "diffusion": [{"address": address, "digest": one} for address, one in digests["diffusion"].items()],
        "clip": {"address": models.clip, "digest": digests["clip"]},
        "target": {"address": models.target, "digest": digests["target"]},
    }
    if models.transfer:
        pairs = zip(models.transfer, digests["transfer"], strict=True)
        described["transfer"] = [{"address": address, "digest": one} for address, one in pairs]
    if models.oracle:
        described["oracle"] = {"address": models.oracle, "digest": digests["oracle"]}
    return described


def default_worker(job: JobSpec, plan: Plan) -> WorkerLike:
    """The worker that makes samples, named after its machine and process."""
    from engine.worker import Worker

    return Worker(job, plan, name=f"{socket.gethostname()}-{os.getpid()}")


def close_run(
    store: Store,
    job: JobSpec,
    plan: Plan,
    *,
    models: dict[str, Any],
    timing: dict[str, float],
    hardware: dict[str, Any],
) -> FinishedRun | None:
    """Write what is made over all shards, then the report and, if all shards are there, the marker.

    Returns:
        None where no shard is committed.
    """
    if not list_commits(store):
        return None
    from engine.report.render import write_report

    finished = finalise(store, job, plan, models=models, timing=timing, versions=software_versions(), hardware=hardware)
    write_report(store)
    if finished.complete:
        mark_success(store, plan)
    return finished


def _summary(
    store: Store, plan: Plan, started: float, *, finished: FinishedRun | None = None, was_complete: bool = False
) -> RunSummary:
    committed = list_commits(store)
    is_complete = len(committed) == plan.num_shards
    return RunSummary(
        exit_code=EXIT_OK if is_complete else EXIT_INCOMPLETE,
        uri=store.uri,
        report=str(store.path(REPORT)) if store.exists(REPORT) else "",
        num_shards=plan.num_shards,
        num_committed=len(committed),
        seconds=time.monotonic() - started,
        groups=finished.groups if finished else [],
        quarantined=tuple(number for number in range(plan.num_shards) if number not in committed)
        if not is_complete
        else (),
        was_complete=was_complete,
    )


class _Shift:
    """The loop between scheduler and executor, from the first worker to the last shard."""

    def __init__(self, store: Store, plan: Plan, executor: Executor, display: Display) -> None:
        self._store = store
        self._plan = plan
        self._executor = executor
        self._display = display
        committed = list_commits(store)
        self._tally = Tally(plan, {number: commit.counts for number, commit in committed.items()})
        self._flags = bytearray(plan.num_shards)
        for number in committed:
            self._flags[number] = 1
        self._sampling_seconds = 0.0
        self._worker_seconds = 0.0

    def work(self, factory: WorkerFactory) -> dict[str, float]:
        """Make all missing shards; what cannot be made is put in quarantine.

        Returns:
            Seconds that workers spent, by kind.
        """
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
                self._note(event)
                if not isinstance(event, ShardProgress):
                    state, more = scheduler.step(state, event)
                    actions += more
            self._display.show(self._tally)
        return {"sampling_seconds": self._sampling_seconds, "worker_seconds": self._worker_seconds}

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
                raise (RiskforgeError if action.user_fault else WorkersFailingError)(action.message)
            else:
                return True
        return False

    def _note(self, event: ExecutorEvent) -> None:
        """Take what concerns the user from an event."""
        now = time.monotonic()
        if isinstance(event, scheduler.WorkerReady):
            self._display.phase("")
            self._tally.ready(event.worker, now)
        elif isinstance(event, ShardProgress):
            self._tally.working(event.worker, event.shard, event.num_done, now)
        elif isinstance(event, ShardResult):
            self._tally.commit(event.worker, event.shard, event.outcome.counts, now)
            self._sampling_seconds += event.outcome.sampling_seconds
            self._worker_seconds += event.outcome.total_seconds
        elif isinstance(event, scheduler.ShardError):
            self._tally.drop(event.shard)
            self._display.notice(f"shard {event.shard} failed, worker {event.worker} is replaced: {_brief(event)}")
        elif isinstance(event, scheduler.WorkerLost):
            self._display.notice(f"worker {event.worker} is replaced: {_brief(event)}")

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


def _brief(event: scheduler.ShardError | scheduler.WorkerLost) -> str:
    """The line that says most: the last of a traceback, the first of anything else."""
    lines = event.message.strip().splitlines() or ["no reason given"]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line[:MAX_REASON_CHARS]

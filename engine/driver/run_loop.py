"""The run loop: makes the missing shards of a run, from the first worker to the last shard."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass

from engine.data.run.commit_record import CommitRecord
from engine.data.run.commits import CommitPacker, CommitSummary
from engine.data.run.counts import ShardCounts
from engine.data.run.notices import MAX_DISTINCT
from engine.data.run.quarantine import QUARANTINE, quarantined_shards
from engine.data.run.stored_plan import publish_rounds
from engine.data.stores.base import Store
from engine.data.stores.journal import NOTICE, Journal
from engine.data.stores.lease import Lease
from engine.driver.executors.base import Executor, ExecutorEvent, ShardResult, WorkerFactory
from engine.driver.interrupts import StopRequest, deferred_signals
from engine.driver.monitor import Monitor, RunCounts
from engine.driver.progress import Display, Tally
from engine.driver.sampling_share import SamplingShare
from engine.driver.scheduler_loop import SchedulerLoop, WorkersFailingError, brief_abort, main_line
from engine.driver.scheduling import scheduler
from engine.driver.scheduling.faults import is_job_fault
from engine.driver.scheduling.messages import (
    Abort,
    Action,
    Assign,
    Drain,
    Drained,
    PlanGrown,
    Quarantine,
    SchedulerLimits,
    ShardError,
    ShardProgress,
    ShardRange,
    StartWorker,
    StopWorker,
    Tick,
    WorkerLost,
    WorkerReady,
)
from engine.driver.scheduling.state import State, Step
from engine.driver.worker_logs import WorkerLogs
from engine.driver.workers import HANGS
from engine.errors import CorruptShardError, OutputError, RiskforgeError, StoreLostError, first_line
from engine.job.plan import Extent, Plan, ShardSpec
from engine.job.quotas import replay
from engine.job.spec import JobSpec

DEADLINE = "deadline"
FAULTS = f"{QUARANTINE}/workers.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLoopResult:
    """How a run loop ended.

    Attributes:
        plan: the plan with the rounds that quotas added.
        drained: why it stopped with shards left to do: the name of a signal, or `deadline`; empty otherwise.
        sampling_share: share of the workers' time, from ready to the last commit, spent sampling and scoring; None if
            nothing was made.
    """

    plan: Plan
    drained: str = ""
    sampling_share: float | None = None


class RunLoop(SchedulerLoop):
    """Makes the missing shards of a run.

    Args:
        committed: the committed shards.
        limits: timeouts; a deadline is on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        store: Store,
        job: JobSpec,
        plan: Plan,
        committed: dict[int, CommitSummary],
        *,
        executor: Executor,
        display: Display,
        lease: Lease,
        journal: Journal,
        limits: SchedulerLimits,
    ) -> None:
        super().__init__(executor, display)
        self._store = store
        self._job = job
        self._plan = plan
        self._lease = lease
        self._journal = journal
        self._limits = limits
        counts = {number: commit.counts for number, commit in committed.items()}
        quarantined = set(quarantined_shards(store))
        # Requests that have images: an exception from every sample is not attributed to the job any more.
        self._proven = {plan.shard(number).request for number, shard in counts.items() if shard.ok or shard.rejected}
        self._tally = Tally(plan, counts)
        self._quotas = replay(plan, counts, quarantined, job.output.samples_per_shard)
        self._skipped = bytearray(plan.num_shards)
        for number in (*committed, *quarantined):
            self._skipped[number] = 1
        self._sampling_share = SamplingShare()
        self._num_committed, self._num_quarantined = len(committed), len(quarantined - committed.keys())
        self._packer = CommitPacker(store)
        self._noticed: set[str] = set()
        self._drained = ""
        self._stop_request: StopRequest | None = None

    def begin_rounds(self) -> bool:
        """Add the rounds of quotas that are due at the start; whether there is anything to make."""
        self._skipped += bytes(sum(extent.num_shards for extent in self._add_rounds()))
        return 0 in self._skipped

    @property
    def plan(self) -> Plan:
        """The plan as it has grown so far."""
        return self._plan

    def run(self, factory: WorkerFactory) -> RunLoopResult:
        """Make all missing shards; a shard that keeps failing is quarantined.

        Raises:
            OwnedError: another driver has taken over the run.
            WorkersFailingError: workers fail repeatedly.
            RiskforgeError: an error that the user has to fix.
        """
        self._store.remove(FAULTS)
        self._monitor = Monitor(self._store, self._lease.token, self._executor, self._tally)
        self._logs = WorkerLogs(self._store, self._lease.number)
        num_missing = self._skipped.count(0)
        self._display.phase(f"{self._executor.opening} for {num_missing} of {self._plan.num_shards} shards")
        num_workers = self._executor.open(factory, num_missing)
        self._display.phase(f"loading models ({num_workers} worker{'s' if num_workers > 1 else ''})")
        self._journal.note("started", workers=num_workers, shards=self._plan.num_shards, missing=num_missing)
        with deferred_signals() as self._stop_request, contextlib.ExitStack() as cleanup:
            cleanup.callback(lambda: self._monitor.close(self._counts()))
            if isinstance(self._drive(*self._start(num_workers)), Drained):
                self._drained = self._drained or DEADLINE
        return RunLoopResult(plan=self._plan, drained=self._drained, sampling_share=self._sampling_share.value())

    def _start(self, num_workers: int) -> Step:
        return scheduler.start(
            bytes(self._skipped),
            num_workers,
            ranges=map(self._shard_range, self._plan.extents),
            is_final=self._quotas.is_final,
            proven=self._proven,
            limits=self._limits,
            now=time.monotonic(),
        )

    def _shard(self, number: int) -> ShardSpec:
        return self._plan.shard(number)

    def _requests(self) -> list[Drain]:
        self._lease.check()
        if not self._stop_request or self._drained:
            return []
        self._note_drain(self._stop_request.signal_name)
        return [Drain()]

    def _report_progress(self) -> None:
        self._display.show(self._tally)
        self._journal.keep()
        self._monitor.report(self._counts())

    def _counts(self) -> RunCounts:
        return RunCounts(
            plan=self._plan,
            num_committed=self._num_committed,
            num_quarantined=self._num_quarantined,
            sampling_share=self._sampling_share.value(),
        )

    def _growth(self, event: ExecutorEvent | Tick | Drain, actions: list[Action]) -> PlanGrown | None:
        """Report finished and quarantined shards to the quotas; what they add to the plan, for the scheduler."""
        if self._quotas.is_final:
            return None
        if isinstance(event, ShardResult):
            counts = event.outcome.counts
            self._quotas.settle(self._plan.shard(event.shard), counts.attempted, counts.accepted)
        for action in actions:
            if isinstance(action, Quarantine):
                self._quotas.settle(self._plan.shard(action.shard), 0, 0)
        extents = self._add_rounds()
        if not extents and not self._quotas.is_final:
            return None
        return PlanGrown(tuple(map(self._shard_range, extents)), self._quotas.is_final)

    def _add_rounds(self) -> tuple[Extent, ...]:
        """Plan the rounds that are due, durably, before any of their shards is started."""
        extents = self._quotas.advance()
        if extents:
            self._plan = publish_rounds(self._store, self._plan, extents)
            self._tally.grow(self._plan)
            self._journal.note("rounds", shards=self._plan.num_shards)
        return extents

    def _shard_range(self, extent: Extent) -> ShardRange:
        addresses = [request.diffusion or self._job.models.diffusion for request in self._job.requests]
        model = addresses.index(addresses[extent.request])
        return ShardRange(extent.num_shards, request=extent.request, model=model)

    def _perform(self, action: Action) -> None:
        if isinstance(action, StartWorker):
            self._monitor.table.start(action.worker, time.time())
        elif isinstance(action, Assign):
            self._monitor.table.assign(action.worker, action.shard, time.time())
            if action.is_second:
                self._journal.note("second_attempt", shard=action.shard, worker=action.worker)
        elif isinstance(action, StopWorker):
            self._sampling_share.remove_worker(action.worker)
            self._monitor.table.stop(action.worker)
        super()._perform(action)

    def _error(self, action: Abort) -> RiskforgeError:
        self._journal.note("aborted", message=main_line(action.message))
        return super()._error(action)

    def _workers_failing(self, message: str) -> WorkersFailingError:
        """Store the whole message, which may hold tracebacks, and shorten it for the user."""
        self._store.replace(FAULTS, f"{message}\n".encode())
        return WorkersFailingError(
            f"{brief_abort(message)}\nthe full message is in {self._store.address(FAULTS)}; fix the cause, and the same"
            " command continues"
        )

    def _note_drain(self, signal_name: str) -> None:
        self._drained = signal_name
        self._journal.note("draining", reason=signal_name)
        self._display.notice(
            f"{signal_name}: shards in flight have {self._limits.grace_seconds:g} s to finish;"
            " a second signal stops at once"
        )

    def _note_event(self, event: ExecutorEvent, state: State) -> None:
        now = time.monotonic()
        self._monitor.note(event, self._plan)
        if isinstance(event, WorkerReady):
            self._display.phase("")
            self._tally.ready(event.worker, now)
            self._sampling_share.add_worker(event.worker, now)
            self._journal.note("ready", worker=event.worker)
        elif isinstance(event, ShardProgress):
            self._tally.progress(event.worker, event.shard, event.num_done, now)
        elif isinstance(event, ShardResult):
            self._note_commit(event, now)
        elif isinstance(event, ShardError):
            self._tally.drop(event.shard)
            if not is_job_fault(state, event):
                self._note_fault(event.worker, event.message, self._monitor.kind_of(event), event.shard)
        elif isinstance(event, WorkerLost):
            self._sampling_share.remove_worker(event.worker)
            self._note_fault(event.worker, event.message, self._monitor.kind_of(event))

    def _note_commit(self, event: ShardResult, now: float) -> None:
        counts: ShardCounts = event.outcome.counts
        self._tally.commit(event.worker, event.shard, counts, now)
        self._sampling_share.add_commit(event.worker, event.outcome.sampling_seconds, now)
        self._num_committed += 1
        fields = {"samples": counts.attempted, "accepted": counts.accepted, "failed": counts.failed}
        self._journal.note("committed", shard=event.shard, worker=event.worker, **fields)
        self._show_notices(event)
        self._pack(event.outcome.record)

    def _pack(self, record: CommitRecord) -> None:
        """Pack the records of a thousand shards; where that fails they stay as they are until the run is closed."""
        try:
            self._packer.add(record)
        except StoreLostError:
            raise
        except (OutputError, CorruptShardError) as error:
            self._journal.note("not packed", message=first_line(error))

    def _show_notices(self, event: ShardResult) -> None:
        """Show what the hardware forced, each sentence once however many workers it concerns."""
        for text in event.outcome.notices:
            if text not in self._noticed and len(self._noticed) < MAX_DISTINCT:
                self._noticed.add(text)
                self._display.notice(text)
                self._journal.note(NOTICE, text=text, shard=event.shard)

    def _note_replaced(self, worker: int, message: str) -> None:
        self._note_fault(worker, message, HANGS)

    def _note_fault(self, worker: int, message: str, kind: str, shard: int | None = None) -> None:
        """Record why a worker is replaced: on the terminal, in the journal, and in a file with its last output."""
        log = self._logs.write(worker, message)
        self._monitor.fault(worker, message, kind=kind, shard=shard, log=log)
        prefix = "" if shard is None else f"shard {shard} failed, "
        self._display.notice(f"{prefix}worker {worker} is replaced: {main_line(message)}")
        fields = {"log": log} if log else {}
        self._journal.note("replaced", worker=worker, kind=kind, message=main_line(message), **fields)

    def _note_avoided(self, message: str) -> None:
        super()._note_avoided(message)
        self._journal.note("avoided", message=message)

    def _quarantine(self, action: Quarantine) -> None:
        shard = self._plan.shard(action.shard)
        record = {
            "shard": shard.number,
            "request": self._plan.requests[shard.request].spec.name,
            "first_key": next(self._plan.samples(shard)).key,
            "num_samples": shard.num_samples,
            "reasons": list(action.reasons),
        }
        self._tally.drop(shard.number)
        self._num_quarantined += 1
        name = f"{QUARANTINE}/{shard.number:06d}.json"
        self._store.replace(name, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
        self._display.notice(f"shard {shard.number} is in quarantine after {len(action.reasons)} faults: {name}")
        self._journal.note("quarantined", shard=shard.number, reason=main_line(action.reasons[-1]))

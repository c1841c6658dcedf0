"""The loop between scheduler and executor, from the first worker to the last shard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.data.run.commits import CommitSummary
from engine.data.run.counts import ShardCounts
from engine.data.run.state import QUARANTINE, publish_rounds, quarantined_shards
from engine.data.stores.base import Store
from engine.data.stores.journal import Journal
from engine.data.stores.lease import Lease
from engine.driver.executors.base import Executor, ExecutorEvent, ShardResult, WorkerFactory
from engine.driver.interrupts import StopRequest, deferred_signals
from engine.driver.progress import Display, Tally
from engine.driver.sampling_share import SamplingShare
from engine.driver.scheduling import scheduler
from engine.driver.scheduling.faults import is_job_fault
from engine.driver.scheduling.messages import (
    Abort,
    Action,
    Assign,
    Drain,
    Drained,
    Finished,
    PlanGrown,
    Quarantine,
    Replaced,
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
from engine.errors import EXIT_INCOMPLETE, MAX_REASON_CHARS, RiskforgeError, fault
from engine.job.plan import Extent, Plan
from engine.job.quotas import replay
from engine.job.spec import JobSpec

POLL_SECONDS = 0.25
DEADLINE = "deadline"
# The user is notified when workers have been waiting for a machine this long.
UNPLACED_SECONDS = 60.0
FAULTS = f"{QUARANTINE}/workers.txt"


class WorkersFailingError(RiskforgeError):
    """Workers fail repeatedly and no shard is finished: a defect of this program or of the machines."""

    exit_code = EXIT_INCOMPLETE


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


class RunLoop:
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
        self._store = store
        self._job = job
        self._plan = plan
        self._executor = executor
        self._display = display
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
        self._drained = ""
        self._unplaced_since: float | None = None
        self._is_unplaced_noted = False

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
        num_missing = self._skipped.count(0)
        self._display.phase(f"{self._executor.opening} for {num_missing} of {self._plan.num_shards} shards")
        num_workers = self._executor.open(factory, num_missing)
        self._display.phase(f"loading models ({num_workers} worker{'s' if num_workers > 1 else ''})")
        self._journal.note("started", workers=num_workers, shards=self._plan.num_shards, missing=num_missing)
        with deferred_signals() as stop:
            state, actions = self._start(num_workers)
            while not self._execute(actions):
                self._lease.check()
                state, actions = self._poll(state, stop)
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

    def _poll(self, state: State, stop: StopRequest) -> Step:
        """Pass the events of one poll to the scheduler."""
        events: list[Any] = [Tick(time.monotonic())]
        if stop and not self._drained:
            self._note_drain(stop.signal_name)
            events.append(Drain())
        actions: list[Action] = []
        for event in [*events, *self._executor.poll(POLL_SECONDS)]:
            if not isinstance(event, (Tick, Drain)):
                if _is_stale(event, state):
                    continue
                self._record(event, state)
            state, added = scheduler.step(state, event)
            actions += added
            if growth := self._update_quotas(event, added):
                state, added = scheduler.step(state, growth)
                actions += added
        self._note_unplaced(time.monotonic())
        self._display.show(self._tally)
        self._journal.keep()
        return state, actions

    def _update_quotas(self, event: Any, actions: list[Action]) -> PlanGrown | None:
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

    def _execute(self, actions: Iterable[Action]) -> bool:
        """Execute the scheduler's actions; True at the end of the run."""
        for action in actions:
            if isinstance(action, StartWorker):
                self._executor.start_worker(action.worker)
            elif isinstance(action, StopWorker):
                self._sampling_share.remove_worker(action.worker)
                self._executor.stop_worker(action.worker)
            elif isinstance(action, Assign):
                shard = self._plan.shard(action.shard)
                self._executor.submit(action.worker, shard, action.attempt, action.batch_limit)
            elif isinstance(action, Quarantine):
                self._quarantine(action)
            elif isinstance(action, Replaced):
                self._note_replaced(action.worker, action.message)
            else:
                self._end(action)
                return True
        return False

    def _end(self, action: Finished | Drained | Abort) -> None:
        """End the loop, by an error if the scheduler gave up the run."""
        if isinstance(action, Abort):
            self._journal.note("aborted", message=brief(action.message))
            raise fault(action.message, action.exit_code) if action.user_fault else self._give_up(action.message)
        if isinstance(action, Drained):
            self._drained = self._drained or DEADLINE

    def _give_up(self, message: str) -> WorkersFailingError:
        """Store the whole message, which may hold tracebacks, and return an error with a short one."""
        self._store.replace(FAULTS, f"{message}\n".encode())
        head, mark, reason = message.partition("the last one: ")
        return WorkersFailingError(
            f"{head}{mark}{brief(reason)}\nthe full message is in {self._store.address(FAULTS)}; fix the cause, and"
            " the same command continues"
        )

    def _note_drain(self, signal_name: str) -> None:
        self._drained = signal_name
        self._journal.note("draining", reason=signal_name)
        self._display.notice(
            f"{signal_name}: shards in flight have {self._limits.grace_seconds:g} s to finish;"
            " a second signal stops at once"
        )

    def _note_unplaced(self, now: float) -> None:
        """Notify the user once if workers wait for a machine for long."""
        num = self._executor.num_unplaced
        if not num:
            self._unplaced_since = None
            return
        self._unplaced_since = now if self._unplaced_since is None else self._unplaced_since
        if now - self._unplaced_since >= UNPLACED_SECONDS and not self._is_unplaced_noted:
            self._is_unplaced_noted = True
            self._display.notice(f"{num} worker(s) still wait for room on the cluster; ask for fewer with --workers")

    def _record(self, event: ExecutorEvent, state: State) -> None:
        """Record an event in progress and journal."""
        now = time.monotonic()
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
                self._note_replaced(event.worker, event.message, event.shard)
        elif isinstance(event, WorkerLost):
            self._sampling_share.remove_worker(event.worker)
            self._note_replaced(event.worker, event.message)

    def _note_commit(self, event: ShardResult, now: float) -> None:
        counts: ShardCounts = event.outcome.counts
        self._tally.commit(event.worker, event.shard, counts, now)
        self._sampling_share.add_commit(event.worker, event.outcome.sampling_seconds, now)
        fields = {"samples": counts.attempted, "accepted": counts.accepted, "failed": counts.failed}
        self._journal.note("committed", shard=event.shard, worker=event.worker, **fields)

    def _note_replaced(self, worker: int, message: str, shard: int | None = None) -> None:
        prefix = "" if shard is None else f"shard {shard} failed, "
        self._display.notice(f"{prefix}worker {worker} is replaced: {brief(message)}")
        self._journal.note("replaced", worker=worker, message=brief(message))

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
        name = f"{QUARANTINE}/{shard.number:06d}.json"
        self._store.replace(name, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
        self._display.notice(f"shard {shard.number} is in quarantine after {len(action.reasons)} faults: {name}")
        self._journal.note("quarantined", shard=shard.number, reason=brief(action.reasons[-1]))


def _is_stale(event: ExecutorEvent, state: State) -> bool:
    """Whether an event is late or a duplicate: its shard is not in the queue of its worker."""
    if not isinstance(event, (ShardResult, ShardError, ShardProgress)):
        return False
    worker = state.workers.get(event.worker)
    return worker is None or event.shard not in worker.queue


def brief(message: str) -> str:
    """The most informative line of a message: the last line of a traceback, the first line of anything else."""
    lines = message.strip().splitlines() or ["no reason given"]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line[:MAX_REASON_CHARS]

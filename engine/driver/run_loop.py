"""The loop between scheduler and executor, from the first worker to the last shard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.data.run.commits import CommitSummary
from engine.data.run.counts import ShardCounts
from engine.data.run.quarantine import QUARANTINE, quarantined_shards
from engine.data.run.stored_plan import publish_rounds
from engine.data.stores.base import Store
from engine.data.stores.journal import Journal
from engine.data.stores.lease import Lease
from engine.driver import scheduler
from engine.driver.executors.base import Executor, ExecutorEvent, ShardResult, WorkerFactory
from engine.driver.interrupts import Request, deferred
from engine.driver.progress import Display, Tally
from engine.errors import EXIT_INCOMPLETE, MAX_REASON_CHARS, RiskforgeError, fault
from engine.generation.messages import (
    Abort,
    Action,
    Assign,
    Drain,
    Drained,
    Lot,
    PlanGrown,
    Quarantine,
    Replaced,
    Rules,
    ShardError,
    ShardProgress,
    StartWorker,
    StopWorker,
    Tick,
    WorkerLost,
    WorkerReady,
)
from engine.job.plan import Extent, Plan
from engine.job.quotas import replay
from engine.job.spec import JobSpec

POLL_SECONDS = 0.25
DEADLINE = "deadline"
# From when on the user hears that workers wait for room.
UNPLACED_SECONDS = 60.0
FAULTS = f"{QUARANTINE}/workers.txt"


class WorkersFailingError(RiskforgeError):
    """Workers fail over and over and nothing gets done: a defect, of this program or of the machines."""

    exit_code = EXIT_INCOMPLETE


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftEnd:
    """How a shift ended.

    Attributes:
        drained: why, where shards are left that could be made: the name of a signal, or `deadline`; empty otherwise.
        sampling_share: share of the workers' time, from ready to the last commit, that went into sampling and scoring;
            None where nothing was made.
    """

    plan: Plan
    drained: str
    sampling_share: float | None


class Shift:
    """Makes the missing shards of a run.

    Args:
        committed: the shards that are there.
        rules: when patience ends; a deadline is on the clock of `time.monotonic`.
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
        rules: Rules,
    ) -> None:
        self._store = store
        self._job = job
        self._plan = plan
        self._executor = executor
        self._display = display
        self._lease = lease
        self._journal = journal
        self._rules = rules
        counts = {number: commit.counts for number, commit in committed.items()}
        quarantined = set(quarantined_shards(store))
        # Requests that have images: what fails with every sample from now on is not the job's fault.
        self._proven = {plan.shard(number).request for number, one in counts.items() if one.ok or one.rejected}
        self._tally = Tally(plan, counts)
        self._quotas = replay(plan, counts, quarantined, job.output.samples_per_shard)
        self._skipped = bytearray(plan.num_shards)
        for number in (*committed, *quarantined):
            self._skipped[number] = 1
        self._watch = _Watch()
        self._drained = ""
        self._unplaced_since: float | None = None
        self._has_told_unplaced = False

    def begin_rounds(self) -> bool:
        """Add the rounds of quotas that are due from the beginning; whether there is anything to make."""
        self._skipped += bytes(sum(one.num_shards for one in self._add_rounds()))
        return 0 in self._skipped

    @property
    def plan(self) -> Plan:
        """The plan as it has grown so far."""
        return self._plan

    def work(self, factory: WorkerFactory) -> ShiftEnd:
        """Make all missing shards; what cannot be made is put in quarantine.

        Raises:
            OwnedError: another driver has taken the run over.
            WorkersFailingError: workers fail over and over.
            RiskforgeError: something that the user has to mend.
        """
        self._store.remove(FAULTS)
        num_missing = self._skipped.count(0)
        self._display.phase(f"{self._executor.opening} for {num_missing} of {self._plan.num_shards} shards")
        num_workers = self._executor.open(factory, num_missing)
        self._display.phase(f"loading models ({num_workers} worker{'s' if num_workers > 1 else ''})")
        self._journal.note("started", workers=num_workers, shards=self._plan.num_shards, missing=num_missing)
        with deferred() as asked:
            state, actions = scheduler.start(
                bytes(self._skipped),
                num_workers,
                lots=map(self._lot, self._plan.extents),
                is_final=self._quotas.is_final,
                proven=self._proven,
                rules=self._rules,
                now=time.monotonic(),
            )
            while not self._carry_out(actions):
                self._lease.check()
                state, actions = self._turn(state, asked)
        return ShiftEnd(plan=self._plan, drained=self._drained, sampling_share=self._watch.share())

    def _turn(self, state: scheduler.State, asked: Request) -> scheduler.Step:
        """Let the scheduler hear what happened in a moment."""
        events: list[Any] = [Tick(time.monotonic())]
        if asked and not self._drained:
            self._note_drain(asked.signal_name)
            events.append(Drain())
        actions: list[Action] = []
        for event in [*events, *self._executor.poll(POLL_SECONDS)]:
            if not isinstance(event, (Tick, Drain)) and not self._take(event, state):
                continue
            state, more = scheduler.step(state, event)
            actions += more
            if settled := self._settle(event, more):
                state, more = scheduler.step(state, settled)
                actions += more
        self._note_unplaced(time.monotonic())
        self._display.show(self._tally)
        self._journal.keep()
        return state, actions

    def _settle(self, event: Any, actions: list[Action]) -> PlanGrown | None:
        """Tell the quotas what a step has settled; what they add, for the scheduler."""
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
        return PlanGrown(tuple(map(self._lot, extents)), self._quotas.is_final)

    def _add_rounds(self) -> tuple[Extent, ...]:
        """Plan the rounds that are due, durably, before any of their shards is begun."""
        extents = self._quotas.advance()
        if extents:
            self._plan = publish_rounds(self._store, self._plan, extents)
            self._tally.grow(self._plan)
            self._journal.note("rounds", shards=self._plan.num_shards)
        return extents

    def _lot(self, extent: Extent) -> Lot:
        addresses = [request.diffusion or self._job.models.diffusion for request in self._job.requests]
        return Lot(extent.num_shards, kind=extent.request, model=addresses.index(addresses[extent.request]))

    def _carry_out(self, actions: Iterable[Action]) -> bool:
        """Do what the scheduler says; True when it is the end."""
        for action in actions:
            if isinstance(action, StartWorker):
                self._executor.start_worker(action.worker)
            elif isinstance(action, StopWorker):
                self._watch.left(action.worker)
                self._executor.stop_worker(action.worker)
            elif isinstance(action, Assign):
                shard = self._plan.shard(action.shard)
                self._executor.submit(action.worker, shard, action.attempt, action.batch_limit)
            elif isinstance(action, Quarantine):
                self._quarantine(action)
            elif isinstance(action, Replaced):
                self._tell_replaced(action.worker, action.message)
            elif isinstance(action, Abort):
                self._journal.note("aborted", message=brief(action.message))
                raise fault(action.message, action.exit_code) if action.user_fault else self._give_up(action.message)
            else:
                if isinstance(action, Drained):
                    self._drained = self._drained or DEADLINE
                return True
        return False

    def _give_up(self, message: str) -> WorkersFailingError:
        """Keep the whole message, which may hold tracebacks, and say it in short."""
        self._store.replace(FAULTS, f"{message}\n".encode())
        head, mark, reason = message.partition("the last one: ")
        return WorkersFailingError(
            f"{head}{mark}{brief(reason)}\nthe whole message is in {self._store.address(FAULTS)}; mend the cause, and"
            " the same command continues"
        )

    def _note_drain(self, signal_name: str) -> None:
        self._drained = signal_name
        self._journal.note("draining", reason=signal_name)
        self._display.notice(
            f"{signal_name}: what is in work has {self._rules.grace_seconds:g} s to finish; once more ends at once"
        )

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

    def _take(self, event: ExecutorEvent, state: scheduler.State) -> bool:
        """Take what concerns the user from an event; False for one that is late or came twice."""
        now = time.monotonic()
        if isinstance(event, (ShardResult, ShardError, ShardProgress)):
            worker = state.workers.get(event.worker)
            if worker is None or event.shard not in worker.queue:
                return False
        if isinstance(event, WorkerReady):
            self._display.phase("")
            self._tally.ready(event.worker, now)
            self._watch.ready(event.worker, now)
            self._journal.note("ready", worker=event.worker)
        elif isinstance(event, ShardProgress):
            self._tally.working(event.worker, event.shard, event.num_done, now)
        elif isinstance(event, ShardResult):
            self._note_commit(event, now)
        elif isinstance(event, ShardError):
            self._tally.drop(event.shard)
            if not scheduler.is_fault_of_job(state, event):
                self._tell_replaced(event.worker, event.message, event.shard)
        elif isinstance(event, WorkerLost):
            self._watch.left(event.worker)
            self._tell_replaced(event.worker, event.message)
        return True

    def _note_commit(self, event: ShardResult, now: float) -> None:
        counts: ShardCounts = event.outcome.counts
        self._tally.commit(event.worker, event.shard, counts, now)
        self._watch.committed(event.worker, event.outcome.sampling_seconds, now)
        about = {"samples": counts.attempted, "accepted": counts.accepted, "failed": counts.failed}
        self._journal.note("committed", shard=event.shard, worker=event.worker, **about)

    def _tell_replaced(self, worker: int, message: str, shard: int | None = None) -> None:
        what = "" if shard is None else f"shard {shard} failed, "
        self._display.notice(f"{what}worker {worker} is replaced: {brief(message)}")
        self._journal.note("replaced", worker=worker, message=brief(message))

    def _quarantine(self, action: Quarantine) -> None:
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
        self._journal.note("quarantined", shard=shard.number, reason=brief(action.reasons[-1]))


class _Watch:
    """Which part of their time workers sample, from ready to their last commit."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._sampling = 0.0
        self._present = 0.0

    def ready(self, worker: int, now: float) -> None:
        """A worker begins."""
        self._since[worker] = now

    def committed(self, worker: int, sampling_seconds: float, now: float) -> None:
        """A worker has committed a shard."""
        self._present += now - self._since.get(worker, now)
        self._since[worker] = now
        self._sampling += sampling_seconds

    def left(self, worker: int) -> None:
        """A worker is gone."""
        self._since.pop(worker, None)

    def share(self) -> float | None:
        """The share of all workers together; None where nothing was committed."""
        return min(1.0, self._sampling / self._present) if self._present else None


def brief(message: str) -> str:
    """The line that says most: the last of a traceback, the first of anything else."""
    lines = message.strip().splitlines() or ["no reason given"]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line[:MAX_REASON_CHARS]

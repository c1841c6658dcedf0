"""The scheduler: what happened goes in, what to do next comes out.

A pure state machine, `step(state, event) -> (state, actions)`. It knows shards by number and workers by number and
nothing else: no clock, no files, no processes. Time, where a rule needs it, arrives inside an event.

Memory is flat in the number of shards. Fresh shards are a cursor over a string of flags; only shards that were given
back are kept one by one. A finished shard leaves nothing behind but a smaller count: results of workers that are not
known any more, or of shards that the worker does not hold, are ignored, so a late or doubled result changes nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

MAX_MARKS = 3
MAX_QUEUED = 2
# The run is given up when more shards than these fail one after the other, or so many workers fail to start while none
# is ready: then the fault is not theirs.
FAULT_ALLOWANCE = 6
FAULT_ALLOWANCE_PER_WORKER = 3
MAX_START_FAULTS = 3


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded its models."""

    worker: int


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A worker has committed a shard."""

    worker: int
    shard: int


@dataclass(frozen=True, slots=True)
class ShardError:
    """An exception came out of a shard. The worker's process lives, in an unknown condition."""

    worker: int
    shard: int
    message: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone, with its node (nobody's fault) or alone."""

    worker: int
    node_lost: bool
    message: str


@dataclass(frozen=True, slots=True)
class UserFault:
    """Something that only the user can mend: no other attempt would fare better."""

    message: str


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker under a number that was not used before."""

    worker: int


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End a worker; what it still does is of no interest."""

    worker: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Queue a shard on a worker; attempts are counted from 1."""

    worker: int
    shard: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Leave a shard out: it was at fault too often."""

    shard: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Every shard is committed or in quarantine."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Give the run up. `user_fault`: the message is for the user; else something is broken."""

    message: str
    user_fault: bool


Event = WorkerReady | ShardDone | ShardError | WorkerLost | UserFault
Action = StartWorker | StopWorker | Assign | Quarantine | Finished | Abort


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker: whether its models are loaded, and its shards, the one in work first."""

    is_ready: bool = False
    queue: tuple[int, ...] = ()


class State(NamedTuple):
    """Where a run stands. Made by `start`, changed by `step` alone; a tuple, as that is copied fastest.

    Attributes:
        committed: a flag for each shard, not zero where it was committed before the run.
        cursor: shards below it have been given out, or were committed before.
        num_fresh: shards not given out yet.
        num_open: shards neither committed nor in quarantine.
        returned: shards that were given out and came back, lowest first.
        attempts: the next (or present) attempt of shards that were in work before; any other's is its first.
        marks: reasons of the faults laid to a shard.
        idle: ready workers without a shard, lowest first.
        faults_in_a_row: faults in shards since one was last finished.
        start_faults_in_a_row: workers that failed to start since one was last ready.
    """

    committed: bytes
    max_workers: int
    num_fresh: int
    num_open: int
    cursor: int = 0
    returned: tuple[int, ...] = ()
    attempts: Mapping[int, int] = {}
    marks: Mapping[int, tuple[str, ...]] = {}
    workers: Mapping[int, WorkerState] = {}
    idle: tuple[int, ...] = ()
    next_worker: int = 0
    faults_in_a_row: int = 0
    start_faults_in_a_row: int = 0
    is_over: bool = False

    @property
    def num_pending(self) -> int:
        """Shards that wait for a worker."""
        return self.num_fresh + len(self.returned)


Step = tuple[State, list[Action]]
Value = TypeVar("Value")


def start(committed: bytes, max_workers: int) -> Step:
    """The state at the beginning of a run and the first actions.

    Args:
        committed: a flag for each shard of the plan, not zero where it is committed already.
        max_workers: workers at a time.
    """
    missing = committed.count(0)
    return _settle(State(committed=committed, max_workers=max_workers, num_fresh=missing, num_open=missing), [])


def step(state: State, event: Event) -> Step:
    """The state after an event and the actions it calls for, in order."""
    if state.is_over:
        return state, []
    if isinstance(event, UserFault):
        return _abort(state, event.message, user_fault=True)
    worker = state.workers.get(event.worker)
    if worker is None:
        return state, []
    if isinstance(event, WorkerReady):
        return _on_ready(state, event.worker, worker)
    if isinstance(event, ShardDone):
        return _on_done(state, event.worker, worker, event.shard)
    if isinstance(event, ShardError):
        return _on_error(state, event, worker)
    return _on_lost(state, event, worker)


def _on_ready(state: State, number: int, worker: WorkerState) -> Step:
    if worker.is_ready:
        return state, []
    workers = {**state.workers, number: WorkerState(is_ready=True)}
    return _settle(state._replace(workers=workers, idle=_with(state.idle, number), start_faults_in_a_row=0), [])


def _on_done(state: State, number: int, worker: WorkerState, shard: int) -> Step:
    if shard not in worker.queue:
        return state, []
    queue = _without(worker.queue, shard)
    state = state._replace(
        workers={**state.workers, number: WorkerState(is_ready=True, queue=queue)},
        idle=state.idle if queue else _with(state.idle, number),
        num_open=state.num_open - 1,
        faults_in_a_row=0,
        attempts=_forget(state.attempts, shard),
        marks=_forget(state.marks, shard),
    )
    actions: list[Action] = []
    if queue:
        state = _assign(state, number, actions, ahead=True)
    return _settle(state, actions)


def _on_error(state: State, event: ShardError, worker: WorkerState) -> Step:
    """The process may be spoilt (a device error stays with it), so the worker is replaced."""
    if event.shard not in worker.queue:
        return state, []
    actions: list[Action] = [StopWorker(event.worker)]
    state = _remove_worker(state, event.worker, worker)
    return _blame(state, event.shard, event.message, actions)


def _on_lost(state: State, event: WorkerLost, worker: WorkerState) -> Step:
    state = _remove_worker(state, event.worker, worker)
    if event.node_lost:
        return _settle(state, [])
    if worker.queue:
        return _blame(state, worker.queue[0], event.message, [])
    if not worker.is_ready:
        state = state._replace(start_faults_in_a_row=state.start_faults_in_a_row + 1)
        if state.start_faults_in_a_row >= MAX_START_FAULTS and not any(one.is_ready for one in state.workers.values()):
            return _abort(state, f"workers do not start; the last one: {event.message}", user_fault=False)
    return _settle(state, [])


def _blame(state: State, shard: int, message: str, actions: list[Action]) -> Step:
    """Lay a fault to a shard that had started, and put it in quarantine if it was the last it may have."""
    reasons = (*state.marks.get(shard, ()), message)
    state = state._replace(marks={**state.marks, shard: reasons}, faults_in_a_row=state.faults_in_a_row + 1)
    if len(reasons) >= MAX_MARKS:
        state = _quarantine(state, shard)
        actions.append(Quarantine(shard, reasons))
    if state.faults_in_a_row > FAULT_ALLOWANCE + FAULT_ALLOWANCE_PER_WORKER * state.max_workers:
        text = f"{state.faults_in_a_row} faults in a row and no shard finished; the last one: {message}"
        state, last = _abort(state, text, user_fault=False)
        return state, actions + last
    return _settle(state, actions)


def _quarantine(state: State, shard: int) -> State:
    return state._replace(
        returned=_without(state.returned, shard),
        attempts=_forget(state.attempts, shard),
        marks=_forget(state.marks, shard),
        num_open=state.num_open - 1,
    )


def _remove_worker(state: State, number: int, worker: WorkerState) -> State:
    """Take a worker out; its shards come back."""
    attempts = {shard: state.attempts.get(shard, 1) + 1 for shard in worker.queue[:1]}
    return state._replace(
        workers=_forget(state.workers, number),
        idle=_without(state.idle, number),
        returned=tuple(sorted((*state.returned, *worker.queue))),
        attempts={**state.attempts, **attempts},
    )


def _settle(state: State, actions: list[Action]) -> Step:
    """Give work to who has none, replace who is missing, and see whether it is the end."""
    for number in state.idle[: state.num_pending]:
        state = _assign(state, number, actions)
        state = _assign(state, number, actions, ahead=True)
    num_new = min(state.max_workers, state.num_open) - len(state.workers)
    if num_new > 0:
        new = range(state.next_worker, state.next_worker + num_new)
        actions += map(StartWorker, new)
        workers = {**state.workers, **dict.fromkeys(new, WorkerState())}
        state = state._replace(workers=workers, next_worker=new.stop)
    if state.num_open == 0:
        actions.append(Finished())
        state = state._replace(is_over=True)
    return state, actions


def _assign(state: State, number: int, actions: list[Action], *, ahead: bool = False) -> State:
    """Give a worker the lowest pending shard.

    Args:
        ahead: the worker has one in work. Then the last shards, fewer than there are workers, are kept for who is
            free first.
    """
    queue = state.workers[number].queue
    if len(queue) >= MAX_QUEUED or state.num_pending < (state.max_workers if ahead else 1):
        return state
    changes: dict[str, Any]
    # Shards that came back are all below the cursor.
    if state.returned:
        shard, changes = state.returned[0], {"returned": state.returned[1:]}
    else:
        shard = state.committed.index(0, state.cursor)
        changes = {"cursor": shard + 1, "num_fresh": state.num_fresh - 1}
    actions.append(Assign(number, shard, state.attempts.get(shard, 1)))
    workers = {**state.workers, number: WorkerState(is_ready=True, queue=(*queue, shard))}
    return state._replace(workers=workers, idle=_without(state.idle, number), **changes)


def _abort(state: State, message: str, *, user_fault: bool) -> Step:
    return state._replace(is_over=True), [Abort(message, user_fault)]


def _with(ordered: tuple[int, ...], one: int) -> tuple[int, ...]:
    place = bisect.bisect_left(ordered, one)
    return (*ordered[:place], one, *ordered[place:])


def _without(ordered: tuple[int, ...], one: int) -> tuple[int, ...]:
    return tuple(other for other in ordered if other != one) if one in ordered else ordered


def _forget(table: Mapping[int, Value], key: int) -> Mapping[int, Value]:
    return {other: value for other, value in table.items() if other != key} if key in table else table

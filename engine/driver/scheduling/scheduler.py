"""The scheduler: a pure state machine, `step(state, event) -> (state, actions)`.

It knows shards and workers by number and, of a shard, its request and its model; there is no clock (time comes in
`Tick`), no file and no process. Results of workers that are no longer known, or of shards that the worker does not
hold, are ignored, so late and duplicate results change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine.driver.scheduling.dispatch import assign, settle
from engine.driver.scheduling.endgame import end_rivals, wind_down
from engine.driver.scheduling.faults import abort, add_start_fault, add_strikes, is_job_fault
from engine.driver.scheduling.liveness import check_liveness, is_check_due
from engine.driver.scheduling.messages import (
    Action,
    CapacityChanged,
    Drain,
    Event,
    PlanGrown,
    SchedulerLimits,
    ShardDone,
    ShardError,
    ShardProgress,
    ShardRange,
    ShardSampled,
    StopWorker,
    Tick,
    UserFault,
    WorkerActive,
    WorkerEvent,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.driver.scheduling.nodes import follow_capacity, note_node_fault, note_node_success, start_of
from engine.driver.scheduling.state import State, Step, WorkerState, grow, inserted, remove_worker, without

# Of the last shard, in the moving average of durations.
AVERAGE_WEIGHT = 0.1


def start(
    skipped: bytes,
    max_workers: int,
    *,
    ranges: Iterable[ShardRange] | None = None,
    is_final: bool = True,
    proven: Iterable[int] = (),
    limits: SchedulerLimits | None = None,
    now: float = 0.0,
) -> Step:
    """The state at the beginning of a run and the first actions.

    Args:
        skipped: a flag for each shard of the plan, nonzero if it is committed or in quarantine already.
        max_workers: workers at a time, until `CapacityChanged` reports another number.
        ranges: the plan's shard ranges; a single one if not given.
        is_final: whether no shards will be added.
        proven: requests of which shards with images are committed already.
        now: the time, on the clock of `Tick`.
    """
    state = State(
        limits=limits or SchedulerLimits(),
        skipped=b"",
        max_workers=max_workers,
        is_final=is_final,
        proven=frozenset(proven),
        now=now,
        next_check=now,
    )
    state = grow(state, tuple(ranges) if ranges is not None else (ShardRange(len(skipped)),), skipped)
    return settle(state, [])


def step(state: State, event: Event) -> Step:
    """The state after an event and the actions it calls for, in order."""
    if state.is_over:
        return state, []
    if isinstance(event, Tick):
        return _on_tick(state, event.now)
    if isinstance(event, PlanGrown):
        num_shards = sum(part.num_shards for part in event.ranges)
        return settle(grow(state, event.ranges, bytes(num_shards))._replace(is_final=event.is_final), [])
    if isinstance(event, CapacityChanged):
        actions: list[Action] = []
        return settle(follow_capacity(state, event, actions), actions)
    if isinstance(event, Drain):
        return settle(_drain(state), [])
    if isinstance(event, UserFault):
        return abort(state, event.message, user_fault=True, exit_code=event.exit_code)
    worker = state.workers.get(event.worker)
    return (state, []) if worker is None else _on_worker_event(state, event, worker)


def _on_worker_event(state: State, event: WorkerEvent, worker: WorkerState) -> Step:
    if isinstance(event, ShardDone):
        return _on_done(state, event.worker, worker, event.shard)
    if isinstance(event, ShardProgress):
        return _on_progress(state, event, worker), []
    if isinstance(event, ShardSampled):
        return _on_sampled(state, event, worker)
    if isinstance(event, WorkerPlaced):
        return _on_placed(state, event, worker), []
    if isinstance(event, WorkerActive):
        return _on_active(state, event.worker, worker), []
    if isinstance(event, WorkerReady):
        return _on_ready(state, event.worker, worker)
    if isinstance(event, ShardError):
        return _on_error(state, event, worker)
    return _on_lost(state, event, worker)


def _on_tick(state: State, now: float) -> Step:
    """Advance the time: deadline, end of the grace period, liveness check."""
    before, state = state.now, state._replace(now=max(now, state.now))
    deadline = state.limits.deadline
    if deadline is not None and state.now >= deadline:
        state = _drain(state)
    actions: list[Action] = []
    if is_check_due(state, before):
        state = check_liveness(state._replace(next_check=state.now + state.limits.check_seconds), actions)
        state = state if state.is_over else wind_down(state, actions)
    elif state.now >= state.next_check:
        state = state._replace(next_check=state.now)
    return (state, actions) if state.is_over else settle(state, actions)


def _drain(state: State) -> State:
    if state.drain_until is not None:
        return state
    return state._replace(drain_until=state.now + state.limits.grace_seconds)


def _on_placed(state: State, event: WorkerPlaced, worker: WorkerState) -> State:
    placed = worker._replace(
        is_placed=True, node=event.node, node_kind=event.node_kind, last_heartbeat=state.now, started_at=state.now
    )
    return state._replace(workers=state.workers.put(event.worker, placed))


def _on_ready(state: State, number: int, worker: WorkerState) -> Step:
    if worker.is_ready:
        return state, []
    ready = worker._replace(is_ready=True, is_placed=True, last_heartbeat=state.now)
    state = state._replace(
        workers=state.workers.put(number, ready),
        num_starting=state.num_starting - 1,
        load_seconds=state.now - worker.started_at if worker.is_placed else state.load_seconds,
        idle=inserted(state.idle, number),
        consecutive_start_faults=0,
        start_after=0.0,
    )
    return settle(state, [])


def _on_active(state: State, number: int, worker: WorkerState) -> State:
    """A heartbeat, which counts only until batches are measured: from then on progress in batches is required."""
    if worker.is_ready and not (worker.queue and _is_unmeasured(state, worker.queue[0])):
        return state
    return state._replace(workers=state.workers.put(number, worker._replace(last_heartbeat=state.now)))


def _is_unmeasured(state: State, shard: int) -> bool:
    return state.range_of(shard).request not in state.batch_seconds


def _on_progress(state: State, event: ShardProgress, worker: WorkerState) -> State:
    """A heartbeat, and measurements."""
    if not worker.queue or event.shard != worker.queue[0]:
        return state
    request = state.range_of(event.shard).request
    state = state._replace(workers=state.workers.put(event.worker, worker._replace(last_heartbeat=state.now)))
    if event.batch_seconds > state.batch_seconds.get(request, 0.0):
        state = state._replace(batch_seconds={**state.batch_seconds, request: event.batch_seconds})
    # A shard is reported from its beginning, before a batch shows anything.
    return _note_limit(state, event, request) if event.batch_seconds else state


def _note_limit(state: State, event: ShardProgress, request: int) -> State:
    """Let the limit of batch sizes of a kind of node follow what its workers find out.

    A report of less than the worker's last one is news unless the worker was given that limit since: then it ran out of
    memory itself, which lowers the limit of its kind. A report of more is news: then it proved that more fits, which
    raises the limit. Any other report repeats what may be long out of date; so news counts once, and nothing changes
    to and fro.
    """
    worker, limit = state.workers[event.worker], event.batch_limit
    begun = [pair for pair in worker.given_limits if _is_begun(state, worker, pair[0], request)]
    before, given = worker.reported_limits.get(request, 0), [known for _, known in begun]
    if begun or limit != before:
        noted = worker._replace(
            given_limits=tuple(pair for pair in worker.given_limits if pair not in begun),
            reported_limits={**worker.reported_limits, request: limit},
        )
        state = state._replace(workers=state.workers.put(event.worker, noted))
    if limit == before or (limit in given and _as_size(limit) < _as_size(before)):
        return state
    change = min if _as_size(limit) < min(map(_as_size, [before, *given])) else max
    key = (worker.node_kind, request)
    return _with_limit(state, key, change(limit, state.batch_limits.get(key, 0), key=_as_size))


def _is_begun(state: State, worker: WorkerState, shard: int, request: int) -> bool:
    """Whether a shard that a worker was given is of this request, and not queued behind the one in flight."""
    return shard not in worker.queue[1:] and state.range_of(shard).request == request


def _as_size(limit: int) -> float:
    """A limit of batch sizes as a number to compare: 0 is none."""
    return limit or math.inf


def _with_limit(state: State, key: tuple[str, int], limit: int) -> State:
    others = {other: known for other, known in state.batch_limits.items() if other != key}
    return state._replace(batch_limits=others | ({key: limit} if limit else {}))


def _on_sampled(state: State, event: ShardSampled, worker: WorkerState) -> Step:
    """The next shard of the queue has started. Another attempt at the sampled one ends, unless it is written already.

    So two workers hardly ever publish the files of a shard at the same time.
    """
    shard = event.shard
    if shard not in worker.queue[worker.num_sampled :]:
        return state, []
    sampled = worker._replace(num_sampled=worker.queue.index(shard) + 1, last_heartbeat=state.now)
    state = state._replace(workers=state.workers.put(event.worker, sampled))
    others = [state.workers[number] for number in without(state.rivals.get(shard, ()), event.worker)]
    if not others or any(shard in other.queue[: other.num_sampled] for other in others):
        return state, []
    actions: list[Action] = []
    return settle(end_rivals(state, event.worker, shard, actions), actions)


def _on_done(state: State, number: int, worker: WorkerState, shard: int) -> Step:
    if shard not in worker.queue:
        return state, []
    actions: list[Action] = []
    state = note_node_success(end_rivals(state, number, shard, actions), worker.node, actions)
    state, slowness = _note_shard_seconds(state, worker, shard)
    queue, num_sampled = without(worker.queue, shard), max(0, worker.num_sampled - 1)
    rest = worker._replace(
        queue=queue, num_sampled=num_sampled, last_heartbeat=state.now, started_at=state.now, slowness=slowness
    )
    state = state._replace(
        workers=state.workers.put(number, rest),
        idle=state.idle if queue else inserted(state.idle, number),
        num_open=state.num_open - 1,
        consecutive_faults=0,
        attempts=state.attempts.drop(shard),
        strikes=state.strikes.drop(shard),
        rivals=state.rivals.drop(shard),
    )
    if state.drain_until is not None or (rest.has_obsolete and not queue):
        # The shard that is queued behind comes back, too.
        actions.append(StopWorker(number))
        state = remove_worker(state, number, rest, was_interrupted=False)
    elif queue:
        state = assign(state, number, actions, ahead=True)
    return settle(state, actions)


def _note_shard_seconds(state: State, worker: WorkerState, shard: int) -> tuple[State, float]:
    """Remember how long a shard took; also the slowness of its worker."""
    if shard != worker.queue[0]:
        return state, worker.slowness
    request, seconds = state.range_of(shard).request, state.now - worker.started_at
    if seconds > state.shard_seconds.get(request, 0.0):
        state = state._replace(shard_seconds={**state.shard_seconds, request: seconds})
    if shard in state.attempts:
        # An earlier attempt may have committed it.
        return state, worker.slowness
    usual = state.usual_seconds.get(request, seconds)
    average = usual + AVERAGE_WEIGHT * (seconds - usual)
    state = state._replace(usual_seconds={**state.usual_seconds, request: average})
    return state, seconds / usual if usual else 1.0


def _on_error(state: State, event: ShardError, worker: WorkerState) -> Step:
    """The process may be unusable (a device error persists in it), so the worker is replaced."""
    if event.shard not in worker.queue:
        return state, []
    if is_job_fault(state, event):
        return abort(state, event.message, user_fault=True)
    actions: list[Action] = [StopWorker(event.worker)]
    state = note_node_fault(remove_worker(state, event.worker, worker), worker, event.shard, event.message, actions)
    state = add_strikes(state, (event.shard,), event.message, actions)
    return (state, actions) if state.is_over else settle(state, actions)


def _on_lost(state: State, event: WorkerLost, worker: WorkerState) -> Step:
    actions: list[Action] = []
    state = remove_worker(state, event.worker, worker)
    if not event.node_lost:
        cause = worker.queue[0] if worker.queue else start_of(event.worker)
        state = note_node_fault(state, worker, cause, event.message, actions)
        if worker.queue:
            state = add_strikes(state, worker.in_flight, event.message, actions)
        elif not worker.is_ready:
            state = add_start_fault(state, event.message, actions)
    return (state, actions) if state.is_over else settle(state, actions)

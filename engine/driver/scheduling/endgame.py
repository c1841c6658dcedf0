"""When no shard is pending: second attempts at shards that take long, and the release of workers without work."""

from __future__ import annotations

import math
from typing import NamedTuple

from engine.driver.scheduling.dispatch import fits_any, give, start_workers
from engine.driver.scheduling.messages import Action, StopWorker
from engine.driver.scheduling.nodes import stop_unplaced
from engine.driver.scheduling.state import State, WorkerState, remove_worker, without

# `second_attempt_factor` where workers are machines that can be stopped: shards of a request differ by less.
SECOND_ATTEMPT_FACTOR = 1.5
# Shards that take less are not worth another attempt.
MIN_SECONDS = 5.0


class Straggler(NamedTuple):
    """A shard in flight that is expected to take longer than a fresh attempt.

    Attributes:
        remaining: seconds until it is expected to be finished; infinity if it should have been already.
        age: seconds since its worker began to work on it, or on the one before it.
        fresh: seconds that a fresh attempt is expected to take.
    """

    remaining: float
    age: float
    fresh: float
    shard: int
    worker: int


def wind_down(state: State, actions: list[Action]) -> State:
    """Give idle workers second attempts, start workers for those that are left, and release all other workers.

    Called with the liveness check, since it looks at every worker.
    """
    if state.drain_until is not None or (state.num_pending and fits_any(state)):
        return state
    late = stragglers(state)
    while late and state.idle:
        state = _attempt_again(state, late.pop(0), actions)
    # A worker that has to be started is of use to a shard that is expected to take even longer.
    late = [one for one in late if one.remaining > state.load_seconds + state.limits.second_attempt_factor * one.fresh]
    num_new = min(state.max_workers - len(state.workers), len(late) - state.num_starting)
    if num_new > 0 and state.now >= state.start_after:
        state = start_workers(state, num_new, actions)
    if state.is_final:
        state = stop_unplaced(state, state.num_starting - len(late), actions)
    return _release_idle(state, actions)


def stragglers(state: State) -> list[Straggler]:
    """Shards of which a second attempt is expected to be finished earlier, the latest first; none has two already."""
    factor = state.limits.second_attempt_factor
    if math.isinf(factor):
        return []
    late = []
    for number, worker in state.workers.items():
        remaining = 0.0
        for position, shard in enumerate(worker.queue):
            if (usual := state.usual_seconds.get(state.range_of(shard).request)) is None:
                break
            fresh = max(usual, MIN_SECONDS)
            remaining = _remaining(state, worker, position, fresh, remaining)
            if remaining > factor * fresh and shard not in state.rivals and _fits(state, fresh):
                late.append(Straggler(remaining, state.now - worker.started_at, fresh, shard, number))
    return sorted(late, reverse=True)


def _remaining(state: State, worker: WorkerState, position: int, usual: float, before: float) -> float:
    """Seconds until a shard of a worker's queue is expected to be finished; the one in front of it takes `before`."""
    expected = usual * max(1.0, worker.slowness)
    if position > worker.num_sampled:
        return before + expected
    age = state.now - worker.started_at
    return math.inf if age > state.limits.second_attempt_factor * expected else max(0.0, expected - age)


def _fits(state: State, seconds: float) -> bool:
    deadline = state.limits.deadline
    return deadline is None or state.now + seconds <= deadline + state.limits.grace_seconds


def _attempt_again(state: State, late: Straggler, actions: list[Action]) -> State:
    """Assign a shard that is in flight to an idle worker too: to a fast one, on another machine if there is one."""
    node = state.workers[late.worker].node

    def preference(number: int) -> tuple[bool, float, int]:
        worker = state.workers[number]
        return worker.node == node, worker.slowness, number

    number = min(state.idle, key=preference)
    state = state._replace(
        attempts=state.attempts.put(late.shard, state.attempts.get(late.shard, 1) + 1),
        rivals=state.rivals.put(late.shard, (late.worker, number)),
    )
    return give(state, number, late.shard, actions, is_second=True)


def _release_idle(state: State, actions: list[Action]) -> State:
    """Stop workers that wait in vain, or longer for the next round than it takes to load the models again."""
    patience = 0.0 if state.is_final else max(state.limits.idle_seconds, state.load_seconds)
    for number in state.idle:
        if state.is_final or state.now - state.workers[number].last_heartbeat > patience:
            actions.append(StopWorker(number))
            state = remove_worker(state, number, state.workers[number])
    return state


def end_rivals(state: State, number: int, shard: int, actions: list[Action]) -> State:
    """End the other attempt at a shard that a worker has sampled or finished.

    The other worker is stopped, because its process cannot be interrupted otherwise; if it has not begun with the
    shard, it works on, and is stopped after that.
    """
    for other in without(state.rivals.get(shard, ()), number):
        worker = state.workers[other]
        position = worker.queue.index(shard)
        rest = worker._replace(queue=without(worker.queue, shard))
        if position > worker.num_sampled:
            state = state._replace(workers=state.workers.put(other, rest._replace(has_obsolete=True)))
        else:
            actions.append(StopWorker(other))
            num_sampled = worker.num_sampled - (position < worker.num_sampled)
            state = remove_worker(state, other, rest._replace(num_sampled=num_sampled))
    return state._replace(rivals=state.rivals.put(shard, (number,))) if shard in state.rivals else state

"""Liveness check: workers whose last heartbeat is too old are replaced."""

from __future__ import annotations

from engine.driver.scheduling.faults import add_start_fault, add_strikes
from engine.driver.scheduling.messages import Action, Replaced, StopWorker
from engine.driver.scheduling.nodes import note_node_fault, start_of
from engine.driver.scheduling.state import State, remove_worker

# A driver that misses this many liveness checks was suspended itself.
LATE_CHECKS = 2


def is_check_due(state: State, before: float) -> bool:
    """Whether workers are to be checked at this tick; not after a pause of the driver itself.

    If it was suspended or blocked by a store, the events that piled up are processed first, once.

    Args:
        before: time of the previous tick.
    """
    if state.now < state.next_check:
        return False
    return state.next_check <= before or state.now - before <= LATE_CHECKS * state.limits.check_seconds


def check_liveness(state: State, actions: list[Action]) -> State:
    """Replace hanging workers."""
    for number, message in _hanging_workers(state):
        if not state.is_over:
            state = _replace_hanging(state, number, message, actions)
    return state


def _hanging_workers(state: State) -> list[tuple[int, str]]:
    """Workers without a recent heartbeat, lowest first, each with a message."""
    hanging = []
    for number, worker in state.workers.items():
        silence = state.now - worker.last_heartbeat
        if worker.queue:
            limit = time_limit(state, worker.queue[0])
            if silence > limit:
                hanging.append((number, f"hangs: no heartbeat for {silence:.0f} s, the limit is {limit:.0f} s"))
        elif worker.is_placed and not worker.is_ready and silence > (limit := state.limits.start_limit_seconds):
            text = f"hangs: no heartbeat for {silence:.0f} s while loading models, the limit is {limit:.0f} s"
            hanging.append((number, text))
    return sorted(hanging)


def time_limit(state: State, shard: int) -> float:
    """Longest time between two heartbeats of a worker at a shard, in seconds, from the slowest batch of its request."""
    measured = state.batch_seconds.get(state.range_of(shard).request)
    if measured is None:
        return max(state.limits.first_limit_seconds, state.limits.min_limit_seconds)
    return max(state.limits.min_limit_seconds, state.limits.limit_factor * measured)


def _replace_hanging(state: State, number: int, message: str, actions: list[Action]) -> State:
    worker = state.workers[number]
    actions += [StopWorker(number), Replaced(number, message)]
    state = remove_worker(state, number, worker)
    cause = worker.queue[0] if worker.queue else start_of(number)
    state = note_node_fault(state, worker, cause, message, actions)
    if worker.queue:
        return add_strikes(state, worker.queue[:1], message, actions)
    return add_start_fault(state, message, actions)

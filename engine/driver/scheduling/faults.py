"""Fault attribution: strikes of shards, quarantine, backoff of starts, and when a run is given up."""

from __future__ import annotations

from engine.driver.scheduling.messages import Abort, Action, Quarantine, ShardError
from engine.driver.scheduling.state import State, Step, without
from engine.errors import EXIT_USER

# The run is given up when more shards than this fail in a row: then the fault is not in the shards.
FAULT_ALLOWANCE = 6
FAULT_ALLOWANCE_PER_WORKER = 3


def is_job_fault(state: State, event: ShardError) -> bool:
    """Whether an exception of a whole batch is attributed to the job: no batch of its request ever succeeded."""
    request = state.range_of(event.shard).request
    return event.every_sample and not (request in state.proven or request in state.batch_seconds)


def add_strikes(state: State, shards: tuple[int, ...], message: str, actions: list[Action]) -> State:
    """Attribute one fault to shards that were in flight; quarantine those that reach the limit of strikes.

    A shard that another worker still has in flight gets none: if that fails as well, the two have one cause.
    """
    for shard in shards:
        if shard in state.rivals:
            continue
        reasons = (*state.strikes.get(shard, ()), message)
        state = state._replace(strikes=state.strikes.put(shard, reasons))
        if len(reasons) >= state.limits.max_strikes:
            state = _quarantine(state, shard)
            actions.append(Quarantine(shard, reasons))
    state = state._replace(consecutive_faults=state.consecutive_faults + 1)
    if state.consecutive_faults > FAULT_ALLOWANCE + FAULT_ALLOWANCE_PER_WORKER * state.max_workers:
        text = f"{state.consecutive_faults} faults in a row and no shard finished; the last one: {message}"
        state, last = abort(state, text, user_fault=False)
        actions += last
    return state


def _quarantine(state: State, shard: int) -> State:
    model = state.range_of(shard).model
    queue = state.model_queues[model]
    return state._replace(
        model_queues={**state.model_queues, model: queue._replace(returned=without(queue.returned, shard))},
        attempts=state.attempts.drop(shard),
        strikes=state.strikes.drop(shard),
        num_open=state.num_open - 1,
        num_pending=state.num_pending - 1,
    )


def add_start_fault(state: State, message: str, actions: list[Action]) -> State:
    """Double the wait before the next start; give up the run where no worker is ready."""
    num_faults = state.consecutive_start_faults + 1
    wait = min(2.0 ** (num_faults - 2), state.limits.max_backoff_seconds) if num_faults > 1 else 0.0
    state = state._replace(consecutive_start_faults=num_faults, start_after=state.now + wait)
    if num_faults >= state.limits.max_start_faults and not any(worker.is_ready for worker in state.workers.values()):
        state, last = abort(state, f"workers do not start; the last one: {message}", user_fault=False)
        actions += last
    return state


def abort(state: State, message: str, *, user_fault: bool, exit_code: int = EXIT_USER) -> Step:
    """End the run with an error."""
    return state._replace(is_over=True), [Abort(message, user_fault, exit_code)]

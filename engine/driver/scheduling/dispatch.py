"""Dispatch: which worker gets which shard, when workers are started, and when a run has ended."""

from __future__ import annotations

from engine.driver.scheduling.messages import Action, Assign, Drained, Finished, StartWorker
from engine.driver.scheduling.state import (
    ModelQueue,
    State,
    Step,
    WorkerState,
    change_holder,
    without,
)

MAX_QUEUED = 2


def settle(state: State, actions: list[Action]) -> Step:
    """Assign shards to idle workers, start missing workers, and end the run if nothing is left to do."""
    if state.num_open == 0 and state.is_final:
        return state._replace(is_over=True), [*actions, Finished()]
    if state.drain_until is None:
        for number in state.idle[: state.num_pending]:
            state = assign(state, number, actions)
            state = assign(state, number, actions, ahead=True)
        num_new = min(state.max_workers - len(state.workers), state.num_pending - state.num_starting)
        if num_new > 0 and state.now >= state.start_after and fits_any(state):
            state = start_workers(state, num_new, actions)
    if _is_drained(state):
        return state._replace(is_over=True), [*actions, Drained()]
    return state, actions


def start_workers(state: State, num_new: int, actions: list[Action]) -> State:
    """Start so many workers."""
    workers = state.workers
    for number in range(state.next_worker, state.next_worker + num_new):
        actions.append(StartWorker(number))
        workers = workers.put(number, WorkerState(last_heartbeat=state.now))
    return state._replace(
        workers=workers, num_starting=state.num_starting + num_new, next_worker=state.next_worker + num_new
    )


def _is_drained(state: State) -> bool:
    """Whether there is nothing left to wait for, although shards are missing."""
    if state.drain_until is None:
        if state.limits.deadline is None or fits_any(state) or not state.num_pending:
            return False
    elif state.now >= state.drain_until:
        return True
    return len(state.idle) == len(state.workers) or not any(worker.queue for worker in state.workers.values())


def fits_any(state: State) -> bool:
    """Whether a pending shard may be started, or there is no deadline."""
    return state.limits.deadline is None or any(_fits_deadline(state, model) for model in state.model_queues)


def _fits_deadline(state: State, model: int) -> bool:
    """Whether the next shard of a model is expected to finish before the deadline and its grace period."""
    queue, limits = state.model_queues[model], state.limits
    if not queue.num_pending:
        return False
    if limits.deadline is None:
        return True
    expected = state.shard_seconds.get(state.range_of(_next_shard(state, queue)[0]).request, 0.0)
    return state.now + expected <= limits.deadline + limits.grace_seconds


def assign(state: State, number: int, actions: list[Action], *, ahead: bool = False) -> State:
    """Assign the lowest pending shard of a suitable model to a worker.

    Args:
        ahead: the worker already has a shard in flight. Then the last shards, fewer than there are workers, are kept
            for the workers that become idle first; and a shard with strikes is queued neither behind another nor
            before one, so that its next fault can be attributed to it alone.
    """
    worker = state.workers[number]
    if len(worker.queue) >= MAX_QUEUED or state.num_pending < (state.max_workers if ahead else 1):
        return state
    if worker.has_obsolete:
        return state
    model = _choose_model(state, worker)
    if model is None:
        return state
    shard, queue = _next_shard(state, state.model_queues[model])
    if ahead and state.strikes and (shard in state.strikes or worker.queue[0] in state.strikes):
        return state
    model_queues = {**state.model_queues, model: queue}
    state = state._replace(model_queues=model_queues, num_pending=state.num_pending - 1)
    return give(state, number, shard, actions)


def give(state: State, number: int, shard: int, actions: list[Action], *, is_second: bool = False) -> State:
    """Queue a shard on a worker; its current attempt is the one to make.

    Args:
        is_second: whether another worker has the shard in flight.
    """
    worker, place = state.workers[number], state.range_of(shard)
    limit = state.batch_limits.get((worker.node_kind, place.request), 0)
    actions.append(Assign(number, shard, state.attempts.get(shard, 1), limit, is_second))
    assigned = worker._replace(queue=(*worker.queue, shard), model=place.model)
    if limit:
        assigned = assigned._replace(given_limits=(*worker.given_limits, (shard, limit)))
    if not worker.queue:
        assigned = assigned._replace(last_heartbeat=state.now, started_at=state.now)
    return state._replace(
        workers=state.workers.put(number, assigned),
        idle=without(state.idle, number),
        model_queues=change_holder(state.model_queues, worker.model, place.model),
    )


def _choose_model(state: State, worker: WorkerState) -> int | None:
    """The model that the worker has loaded, or else the one with the most pending shards per holder."""
    if worker.model in state.model_queues and _fits_deadline(state, worker.model):
        return worker.model
    queues = [(model, queue) for model, queue in state.model_queues.items() if _fits_deadline(state, model)]
    if not queues:
        return None
    return max(queues, key=lambda pair: (pair[1].num_pending / (pair[1].num_holders + 1), -pair[0]))[0]


def _next_shard(state: State, queue: ModelQueue) -> tuple[int, ModelQueue]:
    """The lowest pending shard of a queue that is not empty, and the queue without it."""
    # Shards that came back were dispatched before all fresh ones, so their numbers are lower.
    if queue.returned:
        return queue.returned[0], queue._replace(returned=queue.returned[1:])
    for index in range(queue.span_index, len(queue.spans)):
        first, stop = queue.spans[index]
        shard = state.skipped.find(0, max(first, queue.cursor), stop)
        if shard >= 0:
            break
    return shard, queue._replace(span_index=index, cursor=shard + 1, num_fresh=queue.num_fresh - 1)

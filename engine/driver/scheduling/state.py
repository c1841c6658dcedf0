"""The scheduler's state, and the changes that several of its rules make to it.

Memory is constant per shard. Fresh shards are a cursor over ranges of numbers and a string of flags; only shards that
came back from a worker are kept individually, and a finished shard leaves nothing behind but a smaller count.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from typing import NamedTuple

from engine.driver.scheduling.messages import Action, SchedulerLimits, ShardRange
from engine.driver.scheduling.persistent_map import PersistentMap

NO_MODEL = -1


class WorkerState(NamedTuple):
    """A worker: whether its models are loaded, and its queue of shards, the one in flight first.

    Attributes:
        num_sampled: shards at the head of its queue that are only being written; the one behind them is being sampled.
        model: the model it used last.
        node, node_kind: its machine, and the type of that.
        last_heartbeat: time of its last heartbeat: placed, ready, progress in the shard in flight, or active.
        started_at: time when the shard in flight was started; before the first one, when it was placed.
        slowness: duration of its last shard, as a multiple of the usual one.
        has_obsolete: whether its process has a shard queued that another worker has finished.
        given_limits: (shard, limit of batch sizes) of what it was assigned with a limit and has not reported on since.
        reported_limits: the last limit that it reported, by request; 0 for none.
    """

    is_ready: bool = False
    is_placed: bool = False
    queue: tuple[int, ...] = ()
    num_sampled: int = 0
    model: int = NO_MODEL
    node: str = ""
    node_kind: str = ""
    last_heartbeat: float = 0.0
    started_at: float = 0.0
    slowness: float = 1.0
    has_obsolete: bool = False
    given_limits: tuple[tuple[int, int], ...] = ()
    reported_limits: Mapping[int, int] = {}

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The shards that a fault of its process may be attributed to."""
        return self.queue[: self.num_sampled + 1]


class ModelQueue(NamedTuple):
    """The pending shards of one model.

    Attributes:
        spans: (first, stop) of its shards, in order, including those dispatched long ago.
        span_index, cursor: where fresh shards begin: index into `spans`, and number of the shard.
        num_fresh: shards that were never dispatched.
        returned: shards that were dispatched and came back, lowest first.
        num_holders: workers whose last model this is.
    """

    spans: tuple[tuple[int, int], ...] = ()
    span_index: int = 0
    cursor: int = 0
    num_fresh: int = 0
    returned: tuple[int, ...] = ()
    num_holders: int = 0

    @property
    def num_pending(self) -> int:
        """Shards that wait for a worker."""
        return self.num_fresh + len(self.returned)


class State(NamedTuple):
    """State of a run. Made by `scheduler.start`, changed by `scheduler.step`; a tuple, because that copies fastest.

    Attributes:
        skipped: a flag for each shard, nonzero if it was committed or in quarantine before the run.
        max_workers: workers at a time, which follows the number that the machines have room for.
        is_final: whether no more shards will be planned.
        ranges, range_starts: the plan's shard ranges, and the first shard of each.
        model_queues: pending shards by model.
        num_open: shards neither committed nor in quarantine.
        num_pending: shards that wait for a worker.
        attempts: the next (or current) attempt of shards that were in flight before; any other's is its first.
        strikes: reasons of the faults attributed to a shard.
        rivals: workers that hold a shard of which a second attempt was started: one of them once the other is gone.
        num_starting: workers that are not ready yet.
        idle: ready workers without a shard, lowest first.
        batch_seconds: slowest batch, by request.
        shard_seconds: slowest shard, by request.
        usual_seconds: moving average of the duration of shards, by request.
        load_seconds: how long the last worker took to load its models.
        proven: requests of which shards were committed before the run.
        batch_limits: largest batch size that fits, by type of node and request, absent without a limit.
        consecutive_faults: faults in shards since one was last finished.
        consecutive_start_faults: workers that failed to start since one was last ready.
        start_after: no worker is started before this time.
        nodes: machines with room for a worker, if there are several.
        node_faults: what failed on a machine since a shard was finished there: shards, and -1 - n for worker n.
        avoided: machines on which no worker is started.
        drain_until: end of the grace period of shards in flight; None while the run is not draining.
    """

    limits: SchedulerLimits
    skipped: bytes
    max_workers: int
    is_final: bool
    ranges: tuple[ShardRange, ...] = ()
    range_starts: tuple[int, ...] = ()
    model_queues: Mapping[int, ModelQueue] = {}
    num_open: int = 0
    num_pending: int = 0
    attempts: PersistentMap[int] = PersistentMap()
    strikes: PersistentMap[tuple[str, ...]] = PersistentMap()
    rivals: PersistentMap[tuple[int, ...]] = PersistentMap()
    workers: PersistentMap[WorkerState] = PersistentMap()
    num_starting: int = 0
    idle: tuple[int, ...] = ()
    next_worker: int = 0
    batch_seconds: Mapping[int, float] = {}
    shard_seconds: Mapping[int, float] = {}
    usual_seconds: Mapping[int, float] = {}
    load_seconds: float = 0.0
    proven: frozenset[int] = frozenset()
    batch_limits: Mapping[tuple[str, int], int] = {}
    consecutive_faults: int = 0
    consecutive_start_faults: int = 0
    start_after: float = 0.0
    nodes: tuple[str, ...] = ()
    node_faults: Mapping[str, frozenset[int]] = {}
    avoided: frozenset[str] = frozenset()
    now: float = 0.0
    next_check: float = 0.0
    drain_until: float | None = None
    is_over: bool = False

    def range_of(self, shard: int) -> ShardRange:
        """The range that a shard is in."""
        return self.ranges[bisect.bisect_right(self.range_starts, shard) - 1]


Step = tuple[State, list[Action]]


def grow(state: State, ranges: tuple[ShardRange, ...], skipped: bytes) -> State:
    """Append shard ranges, numbered on from the last shard."""
    flags = state.skipped + skipped
    starts = list(itertools.accumulate((part.num_shards for part in ranges), initial=len(state.skipped)))
    spans: dict[int, list[tuple[int, int]]] = {}
    for part, span in zip(ranges, itertools.pairwise(starts), strict=True):
        spans.setdefault(part.model, []).append(span)
    queues = dict(state.model_queues)
    for model, added in spans.items():
        queue = queues.get(model, ModelQueue())
        num_fresh = queue.num_fresh + sum(flags.count(0, *span) for span in added)
        queues[model] = queue._replace(spans=(*queue.spans, *added), num_fresh=num_fresh)
    num_missing = skipped.count(0)
    return state._replace(
        skipped=flags,
        ranges=(*state.ranges, *ranges),
        range_starts=(*state.range_starts, *starts[:-1]),
        model_queues=queues,
        num_open=state.num_open + num_missing,
        num_pending=state.num_pending + num_missing,
    )


def remove_worker(state: State, number: int, worker: WorkerState, *, was_interrupted: bool = True) -> State:
    """Remove a worker and return its shards to their queues, but those that another worker has in flight, too.

    Args:
        was_interrupted: whether shards of its queue were in flight, so that their next try is another attempt.
    """
    queues, attempts, rivals = change_holder(state.model_queues, worker.model, NO_MODEL), state.attempts, state.rivals
    returned = []
    for shard in worker.queue:
        if others := without(rivals.get(shard, ()), number):
            rivals = rivals.put(shard, others)
            continue
        model = state.range_of(shard).model
        queues = {**queues, model: queues[model]._replace(returned=inserted(queues[model].returned, shard))}
        rivals = rivals.drop(shard)
        returned.append(shard)
        if was_interrupted and shard in worker.in_flight:
            attempts = attempts.put(shard, attempts.get(shard, 1) + 1)
    return state._replace(
        workers=state.workers.drop(number),
        num_starting=state.num_starting - (not worker.is_ready),
        idle=without(state.idle, number),
        model_queues=queues,
        num_pending=state.num_pending + len(returned),
        attempts=attempts,
        rivals=rivals,
    )


def change_holder(queues: Mapping[int, ModelQueue], before: int, after: int) -> Mapping[int, ModelQueue]:
    """The queues after a worker changed from one model to another."""
    if before == after:
        return queues
    changes = [(model, change) for model, change in ((before, -1), (after, 1)) if model != NO_MODEL]
    changed = {
        model: queues[model]._replace(num_holders=queues[model].num_holders + change) for model, change in changes
    }
    return {**queues, **changed}


def inserted(ordered: tuple[int, ...], number: int) -> tuple[int, ...]:
    """A sorted tuple with one more number."""
    index = bisect.bisect_left(ordered, number)
    return (*ordered[:index], number, *ordered[index:])


def without(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    """A tuple without a number; the same tuple where it is absent."""
    return tuple(other for other in numbers if other != number) if number in numbers else numbers

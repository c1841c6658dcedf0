"""The scheduler: what happened goes in, what to do next comes out.

A pure state machine, `step(state, event) -> (state, actions)`. It knows shards by number, workers by number, and of a
shard its kind (the request) and its model; and nothing else: no clock, no files, no processes. Time comes in `Tick`.

Memory is flat in the number of shards. Fresh shards are a cursor over ranges of numbers and a string of flags; only
shards that were given back are kept one by one. A finished shard leaves nothing behind but a smaller count: results of
workers that are not known any more, or of shards that the worker does not hold, are ignored, so a late or doubled
result changes nothing.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from engine.driver.persistent_map import Table
from engine.errors import EXIT_USER
from engine.generation.messages import (
    Abort,
    Action,
    Assign,
    Drain,
    Drained,
    Event,
    Finished,
    Lot,
    PlanGrown,
    Quarantine,
    Replaced,
    Rules,
    ShardDone,
    ShardError,
    ShardProgress,
    ShardSampled,
    StartWorker,
    StopWorker,
    Tick,
    UserFault,
    WorkerActive,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)

MAX_QUEUED = 2
# The run is given up when more shards than these fail one after the other: then the fault is not theirs.
FAULT_ALLOWANCE = 6
FAULT_ALLOWANCE_PER_WORKER = 3
# A driver that misses so many looks for workers that hang was away itself.
LATE_CHECKS = 2
NO_MODEL = -1


class WorkerState(NamedTuple):
    """A worker: whether its models are loaded, and its shards, the one in work first.

    Attributes:
        num_sampled: shards at the head of its queue that are only being written; the one behind them is in work, too.
        model: what it worked with last.
        heard: when it was last heard of: placed, ready, a step further in the shard in work, or active.
        began: when the shard in work was begun.
    """

    is_ready: bool = False
    is_placed: bool = False
    queue: tuple[int, ...] = ()
    num_sampled: int = 0
    model: int = NO_MODEL
    node_kind: str = ""
    heard: float = 0.0
    began: float = 0.0

    @property
    def begun(self) -> tuple[int, ...]:
        """The shards that a fault of its process may be laid to."""
        return self.queue[: self.num_sampled + 1]


class Stock(NamedTuple):
    """The shards of one model that wait.

    Attributes:
        ranges: first and last but one of its shards, in order, those given out long ago too.
        at, cursor: fresh shards begin here: index of the range, and number of the shard.
        num_fresh: shards not given out yet.
        returned: shards that were given out and came back, lowest first.
        num_holders: workers that worked with the model last.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    at: int = 0
    cursor: int = 0
    num_fresh: int = 0
    returned: tuple[int, ...] = ()
    num_holders: int = 0

    @property
    def num_pending(self) -> int:
        """Shards that wait."""
        return self.num_fresh + len(self.returned)


class State(NamedTuple):
    """Where a run stands. Made by `start`, changed by `step` alone; a tuple, as that is copied fastest.

    Attributes:
        skipped: a flag for each shard, not zero where it was committed or in quarantine before the run.
        is_final: whether no more shards will be planned.
        lots, firsts: the plan's rows of shards, and the first shard of each.
        num_open: shards neither committed nor in quarantine.
        num_pending: shards that wait for a worker.
        attempts: the next (or present) attempt of shards that were in work before; any other's is its first.
        marks: reasons of the faults laid to a shard.
        idle: ready workers without a shard, lowest first.
        batch_seconds: the slowest batch of a kind.
        shard_seconds: the slowest shard of a kind.
        proven: kinds of which shards were committed before the run.
        batch_limits: largest batch that fits, by kind of node and kind of shard.
        faults_in_a_row: faults in shards since one was last finished.
        start_faults_in_a_row: workers that failed to start since one was last ready.
        start_after: no worker is started before this moment.
        drain_until: when what is in work is given up; None where the run is not asked to end.
    """

    rules: Rules
    skipped: bytes
    max_workers: int
    is_final: bool
    lots: tuple[Lot, ...] = ()
    firsts: tuple[int, ...] = ()
    stocks: Mapping[int, Stock] = {}
    num_open: int = 0
    num_pending: int = 0
    attempts: Table[int] = Table()
    marks: Table[tuple[str, ...]] = Table()
    workers: Table[WorkerState] = Table()
    idle: tuple[int, ...] = ()
    next_worker: int = 0
    batch_seconds: Mapping[int, float] = {}
    shard_seconds: Mapping[int, float] = {}
    proven: frozenset[int] = frozenset()
    batch_limits: Mapping[tuple[str, int], int] = {}
    faults_in_a_row: int = 0
    start_faults_in_a_row: int = 0
    start_after: float = 0.0
    now: float = 0.0
    next_check: float = 0.0
    drain_until: float | None = None
    is_over: bool = False

    def lot(self, shard: int) -> Lot:
        """The row that a shard is in."""
        return self.lots[bisect.bisect_right(self.firsts, shard) - 1]


Step = tuple[State, list[Action]]


def start(
    skipped: bytes,
    max_workers: int,
    *,
    lots: Iterable[Lot] | None = None,
    is_final: bool = True,
    proven: Iterable[int] = (),
    rules: Rules | None = None,
    now: float = 0.0,
) -> Step:
    """The state at the beginning of a run and the first actions.

    Args:
        skipped: a flag for each shard of the plan, not zero where it is committed, or in quarantine, already.
        max_workers: workers at a time.
        lots: the plan's rows of shards; a single one when not given.
        is_final: whether no shards will be added.
        proven: kinds of which shards are committed already, with images.
        now: the time, on the clock of `Tick`.
    """
    state = State(
        rules=rules or Rules(),
        skipped=b"",
        max_workers=max_workers,
        is_final=is_final,
        proven=frozenset(proven),
        now=now,
        next_check=now,
    )
    state = _grow(state, tuple(lots) if lots is not None else (Lot(len(skipped)),), skipped)
    return _settle(state, [])


def step(state: State, event: Event) -> Step:
    """The state after an event and the actions it calls for, in order."""
    if state.is_over:
        return state, []
    if isinstance(event, Tick):
        return _on_tick(state, event.now)
    if isinstance(event, PlanGrown):
        num_shards = sum(lot.num_shards for lot in event.lots)
        return _settle(_grow(state, event.lots, bytes(num_shards))._replace(is_final=event.is_final), [])
    if isinstance(event, Drain):
        return _settle(_drain(state), [])
    if isinstance(event, UserFault):
        return _abort(state, event.message, user_fault=True, exit_code=event.exit_code)
    worker = state.workers.get(event.worker)
    if worker is None:
        return state, []
    if isinstance(event, ShardDone):
        return _on_done(state, event.worker, worker, event.shard)
    if isinstance(event, ShardProgress):
        return _on_progress(state, event, worker), []
    if isinstance(event, ShardSampled):
        return _on_sampled(state, event, worker), []
    if isinstance(event, WorkerPlaced):
        placed = worker._replace(is_placed=True, node_kind=event.node_kind, heard=state.now)
        return state._replace(workers=state.workers.put(event.worker, placed)), []
    if isinstance(event, WorkerActive):
        return _on_active(state, event.worker, worker), []
    if isinstance(event, WorkerReady):
        return _on_ready(state, event.worker, worker)
    if isinstance(event, ShardError):
        return _on_error(state, event, worker)
    return _on_lost(state, event, worker)


def _grow(state: State, lots: tuple[Lot, ...], skipped: bytes) -> State:
    """Number the shards of new lots on from the last."""
    first = len(state.skipped)
    everything = state.skipped + skipped
    firsts = list(itertools.accumulate((lot.num_shards for lot in lots), initial=first))
    ranges: dict[int, list[tuple[int, int]]] = {}
    for lot, (start, stop) in zip(lots, itertools.pairwise(firsts), strict=True):
        ranges.setdefault(lot.model, []).append((start, stop))
    stocks = dict(state.stocks)
    for model, new in ranges.items():
        stock = stocks.get(model, Stock())
        num_fresh = stock.num_fresh + sum(everything.count(0, *one) for one in new)
        stocks[model] = stock._replace(ranges=(*stock.ranges, *new), num_fresh=num_fresh)
    num_missing = skipped.count(0)
    return state._replace(
        skipped=everything,
        lots=(*state.lots, *lots),
        firsts=(*state.firsts, *firsts[:-1]),
        stocks=stocks,
        num_open=state.num_open + num_missing,
        num_pending=state.num_pending + num_missing,
    )


def _on_tick(state: State, now: float) -> Step:
    """Let time pass: deadline, end of grace, workers that hang."""
    before, state = state.now, state._replace(now=max(now, state.now))
    deadline = state.rules.deadline
    if deadline is not None and state.now >= deadline:
        state = _drain(state)
    actions: list[Action] = []
    if state.next_check > before and state.now - before > LATE_CHECKS * state.rules.check_seconds:
        # The driver itself was away, frozen or held up by a store: what came in the meantime is heard first, once.
        state = state._replace(next_check=state.now)
    elif state.now >= state.next_check:
        state = state._replace(next_check=state.now + state.rules.check_seconds)
        for number, message in _hanging(state):
            if not state.is_over:
                state = _replace_hanging(state, number, message, actions)
    return (state, actions) if state.is_over else _settle(state, actions)


def _hanging(state: State) -> list[tuple[int, str]]:
    """Workers that were not heard of for too long, lowest first, with what is wrong."""
    found = []
    for number, worker in state.workers.items():
        silent = state.now - worker.heard
        if worker.queue:
            limit = time_limit(state, worker.queue[0])
            if silent > limit:
                found.append((number, f"hangs: nothing was heard of it for {silent:.0f} s, the limit is {limit:.0f} s"))
        elif worker.is_placed and not worker.is_ready and silent > (limit := state.rules.start_limit_seconds):
            text = f"hangs: its models are not loaded, and nothing moved for {silent:.0f} s, the limit is {limit:.0f} s"
            found.append((number, text))
    return sorted(found)


def time_limit(state: State, shard: int) -> float:
    """Longest silence of a worker at a shard, in seconds, from the slowest batch of its request."""
    measured = state.batch_seconds.get(state.lot(shard).kind)
    if measured is None:
        return max(state.rules.first_limit_seconds, state.rules.min_limit_seconds)
    return max(state.rules.min_limit_seconds, state.rules.limit_factor * measured)


def _replace_hanging(state: State, number: int, message: str, actions: list[Action]) -> State:
    worker = state.workers[number]
    actions += [StopWorker(number), Replaced(number, message)]
    state = _remove_worker(state, number, worker)
    if worker.queue:
        return _blame(state, worker.queue[:1], message, actions)
    return _note_start_fault(state, message, actions)


def _drain(state: State) -> State:
    if state.drain_until is not None:
        return state
    return state._replace(drain_until=state.now + state.rules.grace_seconds)


def _on_ready(state: State, number: int, worker: WorkerState) -> Step:
    if worker.is_ready:
        return state, []
    workers = state.workers.put(number, worker._replace(is_ready=True, is_placed=True, heard=state.now))
    state = state._replace(workers=workers, idle=_with(state.idle, number), start_faults_in_a_row=0, start_after=0.0)
    return _settle(state, [])


def _on_active(state: State, number: int, worker: WorkerState) -> State:
    """A sign of life that counts until batches are measured: from then on their time is the better judge."""
    if worker.is_ready and not (worker.queue and _is_unmeasured(state, worker.queue[0])):
        return state
    return state._replace(workers=state.workers.put(number, worker._replace(heard=state.now)))


def _is_unmeasured(state: State, shard: int) -> bool:
    return state.lot(shard).kind not in state.batch_seconds


def _on_progress(state: State, event: ShardProgress, worker: WorkerState) -> State:
    """A sign of life, and measurements."""
    if not worker.queue or event.shard != worker.queue[0]:
        return state
    kind = state.lot(event.shard).kind
    state = state._replace(workers=state.workers.put(event.worker, worker._replace(heard=state.now)))
    if event.batch_seconds > state.batch_seconds.get(kind, 0.0):
        state = state._replace(batch_seconds={**state.batch_seconds, kind: event.batch_seconds})
    place = (worker.node_kind, kind)
    if event.batch_limit and event.batch_limit != state.batch_limits.get(place):
        limit = min(event.batch_limit, state.batch_limits.get(place, event.batch_limit))
        state = state._replace(batch_limits={**state.batch_limits, place: limit})
    return state


def _on_sampled(state: State, event: ShardSampled, worker: WorkerState) -> State:
    """The next shard of the queue has begun."""
    if event.shard not in worker.queue[worker.num_sampled :]:
        return state
    sampled = worker._replace(num_sampled=worker.queue.index(event.shard) + 1, heard=state.now)
    return state._replace(workers=state.workers.put(event.worker, sampled))


def _on_done(state: State, number: int, worker: WorkerState, shard: int) -> Step:
    if shard not in worker.queue:
        return state, []
    state = _note_shard_seconds(state, worker, shard)
    queue, num_sampled = _without(worker.queue, shard), max(0, worker.num_sampled - 1)
    rest = worker._replace(queue=queue, num_sampled=num_sampled, heard=state.now, began=state.now)
    state = state._replace(
        workers=state.workers.put(number, rest),
        idle=state.idle if queue else _with(state.idle, number),
        num_open=state.num_open - 1,
        faults_in_a_row=0,
        attempts=state.attempts.drop(shard),
        marks=state.marks.drop(shard),
    )
    actions: list[Action] = []
    if state.drain_until is not None:
        # Takes the shard that is queued behind, too.
        actions.append(StopWorker(number))
        state = _remove_worker(state, number, state.workers[number], has_begun=False)
    elif queue:
        state = _assign(state, number, actions, ahead=True)
    return _settle(state, actions)


def _note_shard_seconds(state: State, worker: WorkerState, shard: int) -> State:
    kind, seconds = state.lot(shard).kind, state.now - worker.began
    if shard != worker.queue[0] or seconds <= state.shard_seconds.get(kind, 0.0):
        return state
    return state._replace(shard_seconds={**state.shard_seconds, kind: seconds})


def _on_error(state: State, event: ShardError, worker: WorkerState) -> Step:
    """The process may be spoilt (a device error stays with it), so the worker is replaced."""
    if event.shard not in worker.queue:
        return state, []
    if is_fault_of_job(state, event):
        return state._replace(is_over=True), [Abort(event.message, user_fault=True)]
    actions: list[Action] = [StopWorker(event.worker)]
    state = _blame(_remove_worker(state, event.worker, worker), (event.shard,), event.message, actions)
    return (state, actions) if state.is_over else _settle(state, actions)


def is_fault_of_job(state: State, event: ShardError) -> bool:
    """Whether what every sample of a batch raised is nobody else's fault: no batch of the request went through yet."""
    kind = state.lot(event.shard).kind
    return event.every_sample and not (kind in state.proven or kind in state.batch_seconds)


def _on_lost(state: State, event: WorkerLost, worker: WorkerState) -> Step:
    actions: list[Action] = []
    state = _remove_worker(state, event.worker, worker)
    if not event.node_lost:
        if worker.queue:
            state = _blame(state, worker.begun, event.message, actions)
        elif not worker.is_ready:
            state = _note_start_fault(state, event.message, actions)
    return (state, actions) if state.is_over else _settle(state, actions)


def _note_start_fault(state: State, message: str, actions: list[Action]) -> State:
    """Wait longer and longer before the next start; give the run up where none is at work."""
    num_faults = state.start_faults_in_a_row + 1
    wait = min(2.0 ** (num_faults - 2), state.rules.max_backoff_seconds) if num_faults > 1 else 0.0
    state = state._replace(start_faults_in_a_row=num_faults, start_after=state.now + wait)
    if num_faults >= state.rules.max_start_faults and not any(one.is_ready for one in state.workers.values()):
        state, last = _abort(state, f"workers do not start; the last one: {message}", user_fault=False)
        actions += last
    return state


def _blame(state: State, shards: tuple[int, ...], message: str, actions: list[Action]) -> State:
    """Lay a fault to shards that had started, and put those in quarantine that had it as the last they may have."""
    for shard in shards:
        reasons = (*state.marks.get(shard, ()), message)
        state = state._replace(marks=state.marks.put(shard, reasons))
        if len(reasons) >= state.rules.max_strikes:
            state = _quarantine(state, shard)
            actions.append(Quarantine(shard, reasons))
    state = state._replace(faults_in_a_row=state.faults_in_a_row + 1)
    if state.faults_in_a_row > FAULT_ALLOWANCE + FAULT_ALLOWANCE_PER_WORKER * state.max_workers:
        text = f"{state.faults_in_a_row} faults in a row and no shard finished; the last one: {message}"
        state, last = _abort(state, text, user_fault=False)
        actions += last
    return state


def _quarantine(state: State, shard: int) -> State:
    model = state.lot(shard).model
    stock = state.stocks[model]
    return state._replace(
        stocks={**state.stocks, model: stock._replace(returned=_without(stock.returned, shard))},
        attempts=state.attempts.drop(shard),
        marks=state.marks.drop(shard),
        num_open=state.num_open - 1,
        num_pending=state.num_pending - 1,
    )


def _remove_worker(state: State, number: int, worker: WorkerState, *, has_begun: bool = True) -> State:
    """Take a worker out; its shards come back.

    Args:
        has_begun: whether shards of its queue are in work, so that the next try is another attempt.
    """
    stocks, attempts = _held(state.stocks, worker.model, NO_MODEL), state.attempts
    for shard in worker.queue:
        model = state.lot(shard).model
        stocks = {**stocks, model: stocks[model]._replace(returned=_with(stocks[model].returned, shard))}
    for shard in worker.begun if has_begun else ():
        attempts = attempts.put(shard, attempts.get(shard, 1) + 1)
    return state._replace(
        workers=state.workers.drop(number),
        idle=_without(state.idle, number),
        stocks=stocks,
        num_pending=state.num_pending + len(worker.queue),
        attempts=attempts,
    )


def _settle(state: State, actions: list[Action]) -> Step:
    """Give work to who has none, replace who is missing, and see whether it is the end."""
    if state.num_open == 0 and state.is_final:
        return state._replace(is_over=True), [*actions, Finished()]
    if state.drain_until is None:
        for number in state.idle[: state.num_pending]:
            state = _assign(state, number, actions)
            state = _assign(state, number, actions, ahead=True)
        num_new = min(state.max_workers, state.num_open) - len(state.workers)
        if num_new > 0 and state.now >= state.start_after and _is_any_worth_beginning(state):
            state = _start_workers(state, num_new, actions)
    if _is_drained(state):
        return state._replace(is_over=True), [*actions, Drained()]
    return state, actions


def _start_workers(state: State, num_new: int, actions: list[Action]) -> State:
    workers = state.workers
    for number in range(state.next_worker, state.next_worker + num_new):
        actions.append(StartWorker(number))
        workers = workers.put(number, WorkerState(heard=state.now))
    return state._replace(workers=workers, next_worker=state.next_worker + num_new)


def _is_drained(state: State) -> bool:
    """Whether there is nothing left to wait for, though shards are missing."""
    if state.drain_until is None:
        if state.rules.deadline is None or _is_any_worth_beginning(state) or not state.num_pending:
            return False
    elif state.now >= state.drain_until:
        return True
    return len(state.idle) == len(state.workers) or not any(worker.queue for worker in state.workers.values())


def _is_any_worth_beginning(state: State) -> bool:
    return state.rules.deadline is None or any(_is_worth_beginning(state, model) for model in state.stocks)


def _is_worth_beginning(state: State, model: int) -> bool:
    """Whether the next shard of a model would be done before the deadline and its grace."""
    stock, rules = state.stocks[model], state.rules
    if not stock.num_pending:
        return False
    if rules.deadline is None:
        return True
    expected = state.shard_seconds.get(state.lot(_next_shard(state, stock)[0]).kind, 0.0)
    return state.now + expected <= rules.deadline + rules.grace_seconds


def _assign(state: State, number: int, actions: list[Action], *, ahead: bool = False) -> State:
    """Give a worker the lowest pending shard of a model that suits it.

    Args:
        ahead: the worker has one in work. Then the last shards, fewer than there are workers, are kept for who is
            free first; and a shard with a mark is not put behind another, nor another behind it, so that the next
            fault tells which of two it was.
    """
    worker = state.workers[number]
    if len(worker.queue) >= MAX_QUEUED or state.num_pending < (state.max_workers if ahead else 1):
        return state
    model = _choose_model(state, worker)
    if model is None:
        return state
    shard, stock = _next_shard(state, state.stocks[model])
    if ahead and state.marks and (shard in state.marks or worker.queue[0] in state.marks):
        return state
    limit = state.batch_limits.get((worker.node_kind, state.lot(shard).kind), 0)
    actions.append(Assign(number, shard, state.attempts.get(shard, 1), limit))
    taken = worker._replace(queue=(*worker.queue, shard), model=model)
    if not worker.queue:
        taken = taken._replace(heard=state.now, began=state.now)
    return state._replace(
        workers=state.workers.put(number, taken),
        idle=_without(state.idle, number),
        stocks=_held({**state.stocks, model: stock}, worker.model, model),
        num_pending=state.num_pending - 1,
    )


def _choose_model(state: State, worker: WorkerState) -> int | None:
    """The model that the worker holds, or else the one with the most shards for each of its holders."""
    if worker.model in state.stocks and _is_worth_beginning(state, worker.model):
        return worker.model
    stocks = [(model, stock) for model, stock in state.stocks.items() if _is_worth_beginning(state, model)]
    if not stocks:
        return None
    return max(stocks, key=lambda pair: (pair[1].num_pending / (pair[1].num_holders + 1), -pair[0]))[0]


def _next_shard(state: State, stock: Stock) -> tuple[int, Stock]:
    """The lowest pending shard of a stock that has some, and the stock without it."""
    # Shards that came back were given out before all fresh ones.
    if stock.returned:
        return stock.returned[0], stock._replace(returned=stock.returned[1:])
    for at in range(stock.at, len(stock.ranges)):
        first, stop = stock.ranges[at]
        shard = state.skipped.find(0, max(first, stock.cursor), stop)
        if shard >= 0:
            break
    return shard, stock._replace(at=at, cursor=shard + 1, num_fresh=stock.num_fresh - 1)


def _held(stocks: Mapping[int, Stock], before: int, after: int) -> Mapping[int, Stock]:
    """The stocks when a worker that worked with one model takes another."""
    if before == after:
        return stocks
    changes = [(model, change) for model, change in ((before, -1), (after, 1)) if model != NO_MODEL]
    held = {model: stocks[model]._replace(num_holders=stocks[model].num_holders + change) for model, change in changes}
    return {**stocks, **held}


def _abort(state: State, message: str, *, user_fault: bool, exit_code: int = EXIT_USER) -> Step:
    return state._replace(is_over=True), [Abort(message, user_fault, exit_code)]


def _with(ordered: tuple[int, ...], one: int) -> tuple[int, ...]:
    place = bisect.bisect_left(ordered, one)
    return (*ordered[:place], one, *ordered[place:])


def _without(ordered: tuple[int, ...], one: int) -> tuple[int, ...]:
    return tuple(other for other in ordered if other != one) if one in ordered else ordered

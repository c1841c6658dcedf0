"""The scheduler alone, without Ray, files or time: rules one by one, then worlds full of accidents."""

from __future__ import annotations

import itertools
import random
import time
import tracemalloc

import pytest

from engine.driver.scheduling.faults import FAULT_ALLOWANCE
from engine.driver.scheduling.messages import (
    Abort,
    Assign,
    Drain,
    Drained,
    Finished,
    PlanGrown,
    Quarantine,
    Replaced,
    SchedulerLimits,
    ShardDone,
    ShardError,
    ShardProgress,
    ShardRange,
    ShardSampled,
    StartWorker,
    StopWorker,
    Tick,
    UserFault,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.driver.scheduling.scheduler import start, step


def play(committed: bytes, max_workers: int, *events):
    """The state after events, and the actions of each step."""
    state, actions = start(committed, max_workers)
    history = [actions]
    for event in events:
        state, actions = step(state, event)
        history.append(actions)
    return state, history


def test_a_ready_worker_gets_the_lowest_shards_and_one_ahead():
    """Committed shards are skipped; the second shard is queued before the first one ends."""
    _, history = play(b"\1\0\1\0\0\0", 1, WorkerReady(0), ShardDone(0, 1))
    assert history == [[StartWorker(0)], [Assign(0, 1, 1), Assign(0, 3, 1)], [Assign(0, 4, 1)]]


def test_the_last_shards_are_kept_for_the_first_idle_worker():
    """Fewer shards than workers: no worker queues a shard that another could start at once."""
    _, history = play(bytes(2), 2, WorkerReady(0), WorkerReady(1))
    assert history == [[StartWorker(0), StartWorker(1)], [Assign(0, 0, 1)], [Assign(1, 1, 1)]]


def test_no_more_workers_than_shards():
    """A small rest does not start a large pool."""
    _, history = play(b"\0\1\1\1", 8)
    assert history == [[StartWorker(0)]]


def test_nothing_to_do_is_the_end_at_once():
    """A complete run starts no worker."""
    state, history = play(b"\1\1", 4)
    assert history == [[Finished()]] and state.is_over


def test_a_lost_node_gives_no_strike():
    """However often: both shards come back without a strike, and the one in flight counts an attempt."""
    events = []
    for worker in range(FAULT_ALLOWANCE + 5):
        events += [WorkerReady(worker), WorkerLost(worker, True, "spot")]
    state, history = play(bytes(3), 1, *events, WorkerReady(FAULT_ALLOWANCE + 5))
    assert not state.strikes
    assert history[-1] == [Assign(FAULT_ALLOWANCE + 5, 0, FAULT_ALLOWANCE + 6), Assign(FAULT_ALLOWANCE + 5, 1, 1)]


def test_three_lost_processes_put_the_shard_that_had_started_in_quarantine():
    """The one queued behind it gets no strike; all reasons are kept."""
    events = [WorkerReady(0), WorkerLost(0, False, "a"), WorkerReady(1), WorkerLost(1, False, "b")]
    events += [WorkerReady(2), WorkerLost(2, False, "c"), WorkerReady(3), ShardDone(3, 1)]
    _, history = play(bytes(2), 1, *events)
    assert history[6] == [Quarantine(0, ("a", "b", "c")), StartWorker(3)]
    assert history[7:] == [[Assign(3, 1, 1)], [Finished()]]
    state, _ = play(bytes(2), 1, *events[:6])
    assert (state.num_open, state.num_pending) == (1, 1) and not state.strikes and not state.attempts


def test_a_process_lost_while_it_writes_one_shard_and_samples_the_next_gives_both_a_strike():
    """The fault may be of either: both get a strike, each then runs alone, and only the failing one is quarantined."""
    events = [WorkerReady(0), ShardSampled(0, 0), WorkerLost(0, False, "a"), WorkerReady(1)]
    state, history = play(bytes(4), 1, *events)
    assert dict(state.strikes) == {0: ("a",), 1: ("a",)}
    assert history[-1] == [Assign(1, 0, 2)]
    state, actions = drive(state, ShardSampled(1, 0), ShardDone(1, 0))
    assert actions == [Assign(1, 1, 2)] and dict(state.strikes) == {1: ("a",)}
    state, actions = drive(state, WorkerLost(1, False, "b"), WorkerReady(2), WorkerLost(2, False, "c"))
    assert actions[-2:] == [Quarantine(1, ("a", "b", "c")), StartWorker(3)]
    assert drive(state, WorkerReady(3))[1] == [Assign(3, 2, 1), Assign(3, 3, 1)]


def test_one_lost_process_is_one_fault_however_many_strikes_it_gives():
    """The run is given up after faults, not after strikes."""
    state, _ = play(bytes(4), 1, WorkerReady(0), ShardSampled(0, 0), WorkerLost(0, False, "a"))
    assert state.consecutive_faults == 1


def test_a_shard_that_was_committed_is_not_in_flight_any_more():
    """Of the queue only the one that is sampled then is."""
    state, _ = play(bytes(4), 1, WorkerReady(0), ShardSampled(0, 0), ShardDone(0, 0), WorkerLost(0, False, "a"))
    assert dict(state.strikes) == {1: ("a",)}


def test_an_exception_says_itself_which_shard_it_came_from():
    """The one that is written at the same time gets no strike."""
    state, _ = play(bytes(4), 1, WorkerReady(0), ShardSampled(0, 0), ShardError(0, 0, "disk"))
    assert dict(state.strikes) == {0: ("disk",)} and dict(state.attempts) == {0: 2, 1: 2}


def test_an_exception_gives_the_shard_a_strike_and_replaces_the_worker():
    """A device error stays with its process: the worker is not used again."""
    _, history = play(bytes(3), 1, WorkerReady(0), ShardError(0, 0, "boom"), WorkerReady(1))
    assert history[2] == [StopWorker(0), StartWorker(1)]
    assert history[3] == [Assign(1, 0, 2)]


def test_a_finished_shard_clears_its_strikes():
    """Memory holds only shards that are in trouble."""
    state, _ = play(bytes(3), 1, WorkerReady(0), WorkerLost(0, False, "x"), WorkerReady(1), ShardDone(1, 0))
    assert not state.strikes and not state.attempts


def test_stale_and_doubled_results_change_nothing():
    """A result of a replaced worker, of a shard not held, or a second time."""
    state, _ = play(bytes(4), 1, WorkerReady(0), WorkerLost(0, True, "gone"), WorkerReady(1), ShardDone(1, 0))
    for event in (ShardDone(0, 1), ShardDone(1, 0), ShardDone(1, 3), ShardError(0, 0, "x"), WorkerLost(0, False, "x")):
        assert step(state, event) == (state, [])
    assert step(state, WorkerReady(1)) == (state, [])


def test_a_user_fault_ends_the_run_with_its_message():
    """No other attempt would fare better; what comes after is ignored."""
    state, history = play(bytes(4), 1, WorkerReady(0), UserFault("disk full"))
    assert history[-1] == [Abort("disk full", True)]
    assert step(state, ShardDone(0, 0)) == (state, [])


def test_workers_that_never_start_end_the_run():
    """A worker that fails to load its models would fail forever. Between two tries the wait doubles."""
    events = [event for at in range(9) for event in (WorkerLost(at, False, "no module"), Tick(2.0**at - 1))]
    _, history = play(bytes(9), 1, *events)
    aborts = [action for actions in history for action in actions if isinstance(action, Abort)]
    assert len(aborts) == 1 and "no module" in aborts[0].message and not aborts[0].user_fault


def test_a_run_in_which_nothing_succeeds_is_given_up():
    """A defect in every shard ends after some tries, not after three for each of a million shards."""
    state, actions = start(bytes(10**6), 1)
    for worker in range(100):
        state, actions = step(state, WorkerReady(worker))
        state, actions = step(state, ShardError(worker, actions[0].shard, "defect"))
        if state.is_over:
            break
    assert isinstance(actions[-1], Abort) and worker < 20


class World:
    """Workers that finish, crash, vanish, answer twice and answer late, drawn from a seed.

    Attributes:
        commits: how often each shard was reported as done by the worker that held it.
    """

    def __init__(self, seed: int, num_shards: int, max_workers: int, poison: set[int]) -> None:
        self.random = random.Random(seed)
        self.poison = poison
        self.queues: dict[int, list[int]] = {}
        self.loading: list[int] = []
        self.late: list = []
        self.commits = [0] * num_shards
        self.quarantined: dict[int, int] = {}
        self.accidents = 3 * num_shards
        self.start_faults = 2
        self.ended: list = []
        self.state, actions = start(bytes(num_shards), max_workers)
        self.max_workers = max_workers
        self.obey(actions)

    def obey(self, actions) -> None:
        """Carry out actions, checking what must hold of each."""
        for action in actions:
            if isinstance(action, StartWorker):
                self.loading.append(action.worker)
            elif isinstance(action, Assign):
                self.queues[action.worker].append(action.shard)
                assert len(self.queues[action.worker]) <= 2
                assert self.commits[action.shard] == 0 and action.shard not in self.quarantined
            elif isinstance(action, StopWorker):
                self.queues.pop(action.worker, None)
            elif isinstance(action, Quarantine):
                self.quarantined[action.shard] = len(action.reasons)
            else:
                self.ended.append(action)
        held = [shard for queue in self.queues.values() for shard in queue]
        assert len(held) == len(set(held))
        assert len(self.queues) + len(self.loading) <= self.max_workers

    def send(self, event) -> None:
        """Send an event to the scheduler; some are sent twice, some again much later."""
        self.state, actions = step(self.state, event)
        self.obey(actions)
        if self.random.random() < 0.1:
            assert step(self.state, event) == (self.state, [])
        if self.random.random() < 0.1:
            self.late.append(event)

    def turn(self) -> None:
        """One thing happens."""
        if self.late and self.random.random() < 0.1:
            event = self.late.pop()
            assert step(self.state, event) == (self.state, [])
        elif self.loading and (not self.queues or self.random.random() < 0.3):
            worker = self.loading.pop(self.random.randrange(len(self.loading)))
            if self.start_faults and self.random.random() < 0.2:
                self.start_faults -= 1
                self.send(WorkerLost(worker, False, "models"))
                return
            self.queues[worker] = []
            self.send(WorkerReady(worker))
        else:
            busy = [worker for worker, queue in self.queues.items() if queue]
            if busy:
                self.work(self.random.choice(busy))

        self.send(Tick(self.state.now + self.random.random()))

    def work(self, worker: int) -> None:
        """A worker is done with its shard, or comes to grief."""
        shard, luck = self.queues[worker][0], self.random.random()
        if shard in self.poison or (luck < 0.1 and self.accidents > 0):
            self.accidents -= 1
            if luck < 0.05:
                self.send(ShardError(worker, shard, "error"))
            else:
                del self.queues[worker]
                self.send(WorkerLost(worker, False, "crash"))
        elif luck < 0.2 and self.accidents > 0:
            self.accidents -= 1
            del self.queues[worker]
            self.send(WorkerLost(worker, True, "spot"))
        else:
            self.queues[worker].pop(0)
            self.commits[shard] += 1
            self.send(ShardDone(worker, shard))


@pytest.mark.parametrize("seed", range(60))
def test_every_shard_is_finished_once_or_quarantined_and_it_ends(seed):
    """Whatever happens in whatever order. Other tests ask one rule; this asks what the rules are for."""
    draw = random.Random(seed)
    num_shards, max_workers = draw.randrange(1, 60), draw.randrange(1, 9)
    poison = set(draw.sample(range(num_shards), draw.randrange(0, 1 + num_shards // 20)))
    world = World(seed, num_shards, max_workers, poison)
    for _ in range(100 * num_shards + 100):
        if world.ended:
            break
        world.turn()
    assert world.ended == [Finished()]
    for shard, commits in enumerate(world.commits):
        assert commits + (shard in world.quarantined) == 1
    assert poison <= set(world.quarantined) and set(world.quarantined.values()) <= {SchedulerLimits().max_strikes}


def test_decisions_are_quick_and_memory_is_flat():
    """A million shards, two hundred workers: 20,000 decisions a second, and no memory for what is done.

    The rate is asserted with a margin for busy machines.
    """
    num_shards, num_workers = 10**6, 200
    state, actions = start(bytes(num_shards), num_workers)
    queues: dict[int, list[int]] = {}
    for worker in range(num_workers):
        state, actions = step(state, WorkerReady(worker))
        queues[worker] = [action.shard for action in actions]
    num_events = 10_000
    begun = time.process_time()
    state = run_rounds(state, queues, num_events)
    rate = num_events / (time.process_time() - begun)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    state = run_rounds(state, queues, num_events)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    print(f"{rate:,.0f} decisions a second, {grown:,} bytes more after {num_events:,}")
    assert rate > 2_500
    assert grown < 100_000


def run_rounds(state, queues, num_events):
    """Workers finish one after the other, round and round."""
    for number in range(num_events):
        worker = number % len(queues)
        state, actions = step(state, ShardDone(worker, queues[worker].pop(0)))
        queues[worker] += [action.shard for action in actions]
    return state


def drive(state, *events):
    """The state after events, and all actions."""
    actions = []
    for event in events:
        state, more = step(state, event)
        actions += more
    return state, actions


LIMITS = SchedulerLimits(
    min_limit_seconds=10, first_limit_seconds=100, start_limit_seconds=50, check_seconds=1, grace_seconds=5
)


def test_a_worker_that_hangs_is_replaced_with_one_strike():
    """The limit follows from the slowest batch of the request; before any is measured it is longer."""
    state, _ = start(bytes(3), 1, limits=LIMITS)
    state, _ = drive(state, WorkerPlaced(0, "gpu"), WorkerReady(0), Tick(99))
    assert not state.strikes
    state, _ = drive(state, ShardProgress(0, 0, 1, batch_seconds=3), Tick(128))
    assert not state.strikes and state.now - state.workers[0].last_heartbeat == 29
    state, actions = drive(state, Tick(130))
    text = "hangs: no heartbeat for 31 s, the limit is 30 s"
    assert actions == [StopWorker(0), Replaced(0, text), StartWorker(1)] and state.strikes[0] == (text,)
    assert drive(state, WorkerReady(1))[1][0] == Assign(1, 0, 2)


def test_quick_batches_have_a_limit_that_a_busy_machine_can_keep():
    """Ten times a tenth of a second would be none."""
    state, _ = start(bytes(3), 1, limits=LIMITS)
    state, _ = drive(state, WorkerReady(0), ShardProgress(0, 0, 1, batch_seconds=0.1), Tick(10))
    assert not state.strikes
    assert drive(state, Tick(11))[0].strikes[0] == ("hangs: no heartbeat for 11 s, the limit is 10 s",)


def test_progress_of_another_shard_than_the_one_in_flight_is_late():
    """It is neither a heartbeat nor a measurement."""
    state, _ = drive(start(bytes(3), 1)[0], WorkerReady(0), Tick(7))
    assert step(state, ShardProgress(0, 1, 1, 9.0, 4)) == (state, [])


def test_a_suspended_driver_processes_pending_events_before_a_liveness_check():
    """Suspended, or blocked by a store: heartbeats of the meantime count, workers without one hang."""
    state, _ = start(bytes(6), 2, limits=LIMITS)
    ready = [event for worker in range(2) for event in (WorkerPlaced(worker, "gpu"), WorkerReady(worker))]
    state, _ = drive(state, *ready, Tick(0), Tick(1))
    state, actions = drive(state, Tick(900), ShardProgress(0, 0, 1))
    assert actions == [] and not state.strikes
    state, actions = drive(state, Tick(900.25))
    assert StopWorker(1) in actions and StopWorker(0) not in actions and list(state.strikes) == [2]
    # One that is late every time looks every other time.
    state, actions = drive(state, Tick(1100), Tick(1300))
    assert StopWorker(0) in actions


def test_a_worker_that_does_not_load_is_replaced_and_waiting_for_a_place_is_no_fault():
    """A cluster may take hours to give a machine; models take minutes. Starts that fail wait longer and longer."""
    state, _ = start(bytes(3), 1, limits=LIMITS)
    state, actions = drive(state, Tick(1000), WorkerPlaced(0, "gpu"), Tick(1049))
    assert actions == []
    state, actions = drive(state, Tick(1051))
    assert actions[0] == StopWorker(0) and actions[2] == StartWorker(1)
    state, actions = drive(state, WorkerLost(1, False, "no"))
    assert actions == [] and state.start_after == 1052
    assert drive(state, Tick(1052))[1] == [StartWorker(2)]


def test_a_drain_finishes_shards_in_flight_and_nothing_else():
    """The shard queued behind is not begun; a worker that is lost meanwhile is not replaced; grace has an end."""
    state, _ = start(bytes(9), 2, limits=LIMITS)
    state, _ = drive(state, WorkerReady(0), WorkerReady(1), Tick(10), Drain())
    done, actions = drive(state, ShardDone(0, 0), WorkerLost(1, False, "gone"))
    assert actions == [StopWorker(0), Drained()] and done.is_over and done.num_open == 8
    assert drive(state, Tick(14))[1] == [] and drive(state, Tick(15))[1] == [Drained()]
    assert drive(start(bytes(9), 2, limits=LIMITS)[0], Drain())[1] == [Drained()]


def test_nothing_is_begun_that_the_deadline_would_cut_off():
    """By the slowest shard so far; then the run ends before the deadline. Otherwise it drains when that comes."""
    limits = SchedulerLimits(deadline=100, grace_seconds=5)
    state, _ = start(bytes(9), 1, limits=limits)
    state, _ = drive(state, WorkerReady(0), Tick(40), ShardDone(0, 0))
    at_the_last_moment, _ = drive(state, Tick(64), ShardDone(0, 1))
    assert at_the_last_moment.workers[0].queue == (2, 3), "104 s are within the grace period"
    state, actions = drive(state, Tick(66), ShardDone(0, 1))
    assert actions == [] and state.workers[0].queue == (2,)
    state, actions = drive(state, Tick(70), ShardDone(0, 2))
    assert actions == [Drained()]
    state, actions = drive(start(bytes(9), 1, limits=limits)[0], WorkerReady(0), Tick(100))
    assert state.drain_until == 105 and drive(state, Tick(104), ShardDone(0, 0))[1] == [StopWorker(0), Drained()]


def test_memory_that_ran_out_is_remembered_by_kind_of_node_and_request():
    """The next worker of that kind begins with what fits; other kinds and requests are not held back."""
    state, _ = start(bytes(8), 2, ranges=[ShardRange(4, request=0), ShardRange(4, request=1)])
    state, _ = drive(state, WorkerPlaced(0, "small"), WorkerReady(0), WorkerPlaced(1, "large"), WorkerReady(1))
    state, _ = drive(state, ShardProgress(0, 0, 4, 1.0, batch_limit=4), WorkerLost(0, True, "spot"))
    state, _ = drive(state, WorkerPlaced(2, "small"))
    assert step(state, ShardProgress(1, 1, 4, 1.0))[0].batch_limits == state.batch_limits == {("small", 0): 4}
    state, actions = drive(state, WorkerReady(2))
    assert Assign(2, 0, 2, 4) in actions and not state.strikes
    _, actions = drive(state, ShardDone(1, 1), WorkerPlaced(3, "large"), WorkerReady(3))
    assert all(action.batch_limit == 0 for action in actions if isinstance(action, Assign))


def test_shards_go_to_workers_that_hold_their_model():
    """Each worker stays with one as long as there is work for it, and the models share the workers."""
    state, _ = start(bytes(12), 2, ranges=[ShardRange(4, 0, 0), ShardRange(4, 1, 1), ShardRange(4, 2, 0)])
    state, actions = drive(state, WorkerReady(0), WorkerReady(1))
    assert [(one.worker, one.shard) for one in actions] == [(0, 0), (0, 1), (1, 4), (1, 5)]
    models = {0: [], 1: []}
    while not state.is_over:
        for worker in (0, 1):
            if queue := state.workers[worker].queue:
                models[worker].append(state.range_of(queue[0]).model)
                state, _ = step(state, ShardDone(worker, queue[0]))
    switches = sum(a != b for one in models.values() for a, b in itertools.pairwise(one))
    assert switches <= 1 and len(models[0]) + len(models[1]) == 12


def test_a_plan_that_grows_is_not_over_before_it_is_final():
    """Workers wait where a round has to end first; new shards are numbered on."""
    state, _ = start(bytes(1), 1, is_final=False)
    state, actions = drive(state, WorkerReady(0), ShardDone(0, 0), Tick(5))
    assert actions == [Assign(0, 0, 1)] and state.idle == (0,)
    state, actions = drive(state, PlanGrown((ShardRange(1, request=7),), False))
    assert actions == [Assign(0, 1, 1)] and state.range_of(1).request == 7
    assert drive(state, ShardDone(0, 1), PlanGrown((), True))[1] == [Finished()]

"""Numbers of workers that follow machines and work, second attempts, machines that are avoided: the scheduler alone."""

from __future__ import annotations

import math

import pytest

from engine.driver.scheduling.messages import (
    Abort,
    Assign,
    AvoidNodes,
    CapacityChanged,
    Drain,
    Drained,
    Finished,
    PlanGrown,
    Quarantine,
    SchedulerLimits,
    ShardDone,
    ShardError,
    ShardRange,
    ShardSampled,
    StartWorker,
    StopWorker,
    Tick,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.driver.scheduling.scheduler import start, step

LIMITS = SchedulerLimits(first_limit_seconds=math.inf, check_seconds=1, second_attempt_factor=1.5)


def drive(state, *events):
    """The state after events, and all actions."""
    actions = []
    for event in events:
        state, more = step(state, event)
        actions += more
    return state, actions


def begin(num_shards, max_workers, *ready, limits=LIMITS, **options):
    """A run whose workers, named with their machines, are ready at second 10."""
    state, _ = start(bytes(num_shards), max_workers, limits=limits, **options)
    state, _ = drive(state, *(WorkerPlaced(number, "gpu", node) for number, node in enumerate(ready)), Tick(10))
    return drive(state, *(WorkerReady(number) for number in range(len(ready))))[0]


def test_workers_are_started_as_machines_join_and_never_more_than_shards_wait():
    """A run begins with what fits; a machine that joins is used at once, and a small rest starts no large pool."""
    state, actions = start(bytes(6), 1)
    assert actions == [StartWorker(0)]
    state, actions = drive(state, CapacityChanged(4))
    assert actions == [StartWorker(1), StartWorker(2), StartWorker(3)]
    state, actions = drive(state, CapacityChanged(99))
    assert actions == [StartWorker(4), StartWorker(5)]
    assert drive(state, *map(WorkerReady, range(4)), CapacityChanged(200))[0].next_worker == 6


def test_workers_for_which_there_is_no_machine_any_more_are_not_waited_for():
    """Those that wait for a machine are stopped, the last first; those that have one go on; one is always asked for."""
    state = begin(20, 4, "a", "a")
    assert state.num_starting == 2 and len(state.workers) == 4
    state, actions = drive(state, CapacityChanged(3, ("a",)))
    assert actions == [StopWorker(3)]
    state, actions = drive(state, CapacityChanged(0))
    assert actions == [StopWorker(2)] and set(state.workers) == {0, 1}
    state, actions = drive(state, WorkerLost(0, True, "gone"), WorkerLost(1, True, "gone"))
    assert actions == [StartWorker(4)]


def test_a_worker_without_work_is_released_while_others_are_busy():
    """It would be paid for until the last shard is done. A shard that comes back starts another worker."""
    state = begin(3, 3, "a", "b", "c")
    state, actions = drive(state, ShardDone(0, 0), Tick(10.5), Tick(11))
    assert actions == [StopWorker(0)]
    state, actions = drive(state, WorkerLost(1, True, "spot"))
    assert actions == [StartWorker(3)]
    state, actions = drive(state, WorkerReady(3), ShardDone(2, 2), Tick(12), ShardDone(3, 1))
    assert actions == [Assign(3, 1, 2), StopWorker(2), Finished()]


def test_workers_that_still_load_are_of_no_use_when_everything_is_in_work():
    """Those that have no machine yet are stopped before an autoscaler starts one for them."""
    state = begin(4, 3, "a", "a")
    assert set(state.workers) == {0, 1, 2} and state.num_pending == 1
    state, actions = drive(state, ShardDone(1, 2), Tick(10.5), Tick(11))
    assert actions[-1] == StopWorker(2)


@pytest.mark.parametrize(("load_seconds", "released_at"), [(10, 41), (100, 201)])
def test_a_worker_waits_for_the_next_round_as_long_as_loading_takes(load_seconds, released_at):
    """A quota may plan more shards: waiting costs at most as much again as loading the models once more."""
    limits = SchedulerLimits(first_limit_seconds=math.inf, check_seconds=1)
    state, _ = start(bytes(2), 2, limits=limits, is_final=False)
    state, _ = drive(
        state, WorkerPlaced(0, ""), WorkerPlaced(1, ""), Tick(load_seconds), WorkerReady(0), WorkerReady(1)
    )
    state, _ = drive(state, ShardDone(0, 0))
    state, actions = drive(state, *map(Tick, range(load_seconds, released_at)))
    assert actions == []
    state, actions = drive(state, Tick(released_at))
    assert actions == [StopWorker(0)]
    assert drive(state, PlanGrown((ShardRange(2),), True))[1] == [StartWorker(2)]


def test_workers_are_released_where_the_deadline_lets_nothing_begin():
    """What is pending then is for another run."""
    limits = SchedulerLimits(deadline=100, grace_seconds=5, check_seconds=1)
    state = begin(9, 2, "a", "b", limits=limits)
    state, actions = drive(state, Tick(66), ShardDone(0, 0), ShardDone(0, 1), Tick(67))
    assert StopWorker(0) in actions and state.num_pending > 0
    # What the other has in flight may end.
    assert drive(state, ShardDone(1, 2), ShardDone(1, 3))[1] == [Drained()]


def straggling():
    """Two machines; worker 0 has shard 4 in flight for 200 s, where others took 100, and worker 1 is idle."""
    state = begin(5, 2, "a", "b")
    state, _ = drive(state, Tick(110), ShardDone(0, 0), ShardDone(1, 2), Tick(210), ShardDone(0, 1), ShardDone(1, 3))
    assert state.workers[0].queue == (4,) and state.idle == (1,)
    return state


def test_a_shard_that_takes_long_is_attempted_by_an_idle_worker_too():
    """Only if it is late; with another number of attempt, so that the worker looks whether it is there already."""
    state = straggling()
    released, actions = drive(state, Tick(211))
    assert actions == [StopWorker(1)], "on time: the worker is released"
    assert drive(released, Tick(359))[1] == []
    released, actions = drive(released, Tick(360), Tick(361))
    assert actions == [StartWorker(2)], "late: another worker is started"
    assert drive(released, WorkerReady(2), Tick(362))[1] == [Assign(2, 4, 2, is_second=True)]


def late():
    """As `straggling`, with a second attempt on worker 2."""
    state, _ = drive(straggling(), Tick(211), Tick(360), Tick(361), WorkerPlaced(2, "gpu", "b"))
    state, _ = drive(state, WorkerReady(2), Tick(362))
    assert state.rivals[4] == (0, 2)
    return state


@pytest.mark.parametrize(("first", "other"), [(0, 2), (2, 0)])
def test_the_first_attempt_that_is_sampled_goes_on_alone(first, other):
    """So that two workers do not publish the same files; it ends when that one is committed."""
    state, actions = drive(late(), ShardSampled(first, 4))
    assert actions == [StopWorker(other)]
    assert drive(state, ShardDone(other, 4)) == (state, [])
    assert drive(state, ShardDone(first, 4))[1] == [Finished()]
    assert drive(late(), ShardDone(first, 4))[1] == [StopWorker(other), Finished()]


def test_a_shard_that_is_written_for_long_may_be_overtaken():
    """The one that is committed first counts, even if the other was sampled before."""
    state, _ = drive(straggling(), ShardSampled(0, 4), Tick(211), Tick(360), Tick(361), WorkerReady(2), Tick(362))
    state, actions = drive(state, ShardSampled(2, 4))
    assert actions == [] and state.rivals[4] == (0, 2)
    assert drive(state, ShardDone(2, 4))[1] == [StopWorker(0), Finished()]


@pytest.mark.parametrize("first", [0, 2])
def test_two_attempts_that_fail_give_one_strike(first):
    """While the other one is in flight nothing is lost, and afterwards both have failed for one cause."""
    state, actions = drive(late(), ShardError(first, 4, "broken"))
    assert actions == [StopWorker(first)] and not state.strikes and state.num_pending == 0
    # Two attempts at most: the shard is as late as before.
    assert drive(state, *map(Tick, range(363, 400)))[1] == []
    state, actions = drive(state, WorkerLost(2 - first, False, "died"))
    assert dict(state.strikes) == {4: ("died",)} and actions == [StartWorker(3)]
    assert drive(state, WorkerReady(3))[1] == [Assign(3, 4, 3)] and state.num_open == 1


def test_a_shard_is_not_in_quarantine_while_it_is_in_flight():
    """Its third strike is decided by the attempt that is left."""
    state = late()
    state = state._replace(strikes=state.strikes.put(4, ("a", "b")))
    state, actions = drive(state, ShardError(2, 4, "c"))
    assert not any(isinstance(action, Quarantine) for action in actions)
    assert drive(state, ShardDone(0, 4))[1] == [Finished()]
    assert drive(state, ShardError(0, 4, "d"))[1] == [StopWorker(0), Quarantine(4, ("a", "b", "d")), Finished()]


def test_a_shard_queued_behind_one_that_takes_long_is_made_by_another():
    """The late worker goes on with what it has in flight, and is stopped before it begins with what is done."""
    state = begin(6, 3, "a", "b")
    for second, shard in ((110, 2), (210, 3), (310, 4), (410, 5)):
        state, _ = drive(state, Tick(second), ShardDone(1, shard))
    assert state.workers[0].queue == (0, 1) and state.idle == (1,)
    state, actions = drive(state, Tick(410.5), Tick(411))
    assert actions == [Assign(1, 1, 2, is_second=True)], "worker 2 is kept for the other"
    state, actions = drive(state, WorkerReady(2), Tick(412), Tick(413))
    assert actions == [Assign(2, 0, 2, is_second=True)]
    state, actions = drive(state, ShardDone(1, 1))
    assert actions == [] and state.workers[0].queue == (0,) and state.workers[0].has_obsolete
    state, actions = drive(state, ShardError(2, 0, "x"), ShardDone(0, 0))
    assert actions == [StopWorker(2), StopWorker(0), Finished()]


def test_second_attempts_prefer_another_machine_and_are_none_while_a_run_drains():
    """A slow machine is slow for the second attempt as well."""
    state, _ = start(bytes(8), 3, limits=LIMITS)
    state, _ = drive(state, *(WorkerPlaced(number, "gpu", "aab"[number]) for number in range(3)))
    state, _ = drive(state, *map(WorkerReady, range(3)), Tick(100), ShardDone(1, 2), ShardDone(2, 4))
    state, _ = drive(state, Tick(100.5), ShardDone(1, 3), ShardDone(2, 5))
    state = state._replace(now=300.0)
    for number in (1, 2):
        while queue := state.workers[number].queue:
            state, _ = step(state, ShardDone(number, queue[0]))
    state, _ = drive(state, ShardSampled(0, 0))
    assert state.idle == (1, 2)
    assert drive(state, Drain(), Tick(301))[1] == []
    _, actions = drive(state, Tick(301))
    assert next(action for action in actions if isinstance(action, Assign)).worker == 2


def test_a_machine_on_which_everything_fails_is_avoided():
    """After three faults of different shards or starts: a shard that fails everywhere is not the machine's fault."""
    state, _ = drive(start(bytes(99), 2)[0], CapacityChanged(2, ("a", "b")), WorkerPlaced(1, "gpu", "b"))
    for number in (0, 2):
        state, actions = drive(state, WorkerPlaced(number, "gpu", "a"), WorkerReady(number), ShardError(number, 0, "x"))
    assert state.node_faults == {"a": {0}} and dict(state.strikes) == {0: ("x", "x")}
    for number in (3, 4):
        assert not state.avoided
        state, actions = drive(state, WorkerPlaced(number, "gpu", "a"), WorkerLost(number, False, "no library"))
        state, _ = drive(state, Tick(state.now + 60))
    assert actions[0] == AvoidNodes(("a",), "3 faults in a row on machine a, the last one: no library")
    assert state.avoided == {"a"} and state.consecutive_start_faults == 1


def test_a_shard_that_is_finished_clears_its_machine():
    """Faults in a row count; a machine that is avoided and finishes what it had is used again."""
    state, _ = drive(start(bytes(99), 4)[0], CapacityChanged(4, ("a", "b")))
    state, actions = drive(state, WorkerPlaced(0, "gpu", "a"), WorkerReady(0))
    for number in (1, 2, 3):
        state, actions = drive(state, WorkerPlaced(number, "gpu", "a"), WorkerLost(number, False, "out of memory"))
    assert actions[0].nodes == ("a",)
    state, actions = drive(state, ShardDone(0, 0))
    assert AvoidNodes(()) in actions and not state.node_faults and not state.avoided


def test_the_last_machine_is_not_avoided():
    """There would be nothing left to run on."""
    state, _ = drive(start(bytes(99), 4)[0], CapacityChanged(4, ("a",)), WorkerPlaced(0, "gpu", "a"), WorkerReady(0))
    for number in (1, 2, 3):
        state, _ = drive(state, WorkerPlaced(number, "gpu", "a"), WorkerLost(number, False, "out of memory"))
    assert len(state.node_faults["a"]) == 3 and not state.avoided


def test_machines_that_are_left_alone_are_tried_again():
    """Where the good ones are gone there is nothing else."""
    state, _ = drive(start(bytes(99), 4)[0], CapacityChanged(4, ("a", "b")))
    for number in range(3):
        state, _ = drive(state, WorkerPlaced(number, "gpu", "a"), WorkerLost(number, False, "x"), Tick(state.now + 60))
    assert state.avoided == {"a"}
    state, actions = drive(state, CapacityChanged(4, ("a", "b", "c")))
    assert state.avoided == {"a"} and not any(isinstance(action, AvoidNodes) for action in actions)
    state, actions = drive(state, CapacityChanged(2, ("a",)))
    assert actions[0] == AvoidNodes(()) and not state.avoided


def test_workers_that_fail_on_every_machine_end_the_run():
    """The first machine is avoided, the second one shows that it was not the machine."""
    state, _ = drive(start(bytes(99), 1)[0], CapacityChanged(1, ("a", "b")))
    tried, actions = "", []
    while not state.is_over:
        node, number = "b" if "a" in state.avoided else "a", state.next_worker - 1
        tried += node
        state, actions = drive(state, WorkerPlaced(number, "gpu", node), WorkerLost(number, False, "x"))
        state, _ = drive(state, Tick(state.now + 60))
    assert tried == "aaabb" and isinstance(actions[-1], Abort) and "workers do not start" in actions[-1].message

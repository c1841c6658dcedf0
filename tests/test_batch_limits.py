"""Limits of batch sizes in the scheduler: they follow what workers find out, and nothing that is repeated.

What tests of a worker cannot see: what others of its kind are given, and reports that arrive late.
"""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.driver.scheduling.messages import (
    Action,
    Assign,
    ShardDone,
    ShardProgress,
    ShardRange,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.driver.scheduling.scheduler import start, step
from engine.driver.scheduling.state import State
from tools.simulate import WANTED, Batches

KIND = "small"
SMALL = (KIND, 0)


class Run:
    """The scheduler with workers of one kind of node and one request, driven by hand."""

    def __init__(self, num_workers: int, *, ranges: tuple[ShardRange, ...] = (ShardRange(10_000),)) -> None:
        self.given: dict[int, list[tuple[int, int]]] = {}
        self.state: State = start(bytes(sum(part.num_shards for part in ranges)), num_workers, ranges=ranges)[0]
        for worker in range(num_workers):
            self.add(worker)

    def add(self, worker: int) -> None:
        """A worker is ready."""
        self.given[worker] = []
        self.send(WorkerPlaced(worker, KIND))
        self.send(WorkerReady(worker))

    def send(self, event: object) -> None:
        """Let something happen."""
        actions: list[Action]
        self.state, actions = step(self.state, event)  # type: ignore[arg-type]
        for action in actions:
            if isinstance(action, Assign):
                self.given[action.worker].append((action.shard, action.batch_limit))

    def report(self, worker: int, limit: int) -> int:
        """A worker reports a limit at its shard; the limit for its kind after that."""
        self.send(ShardProgress(worker, self.state.workers[worker].queue[0], 1, 1.0, limit))
        return self.state.batch_limits.get(SMALL, 0)

    def finish(self, worker: int) -> int:
        """A worker's shard is done; the limit that the next one in its queue was given."""
        self.send(ShardDone(worker, self.given[worker].pop(0)[0]))
        return self.given[worker][0][1]


def test_a_limit_falls_and_rises_with_what_a_worker_finds() -> None:
    """Twice as many fit again, then as many as are wanted: nobody is held back any more."""
    run = Run(2)
    assert [run.report(0, limit) for limit in (16, 16, 8, 16, 32, 0)] == [16, 16, 8, 16, 32, 0]
    assert run.state.batch_limits == {}


def test_what_a_worker_was_given_is_no_news() -> None:
    """It keeps the limit for a while, and reports it long after the first one has got rid of it."""
    run = Run(2)
    run.report(0, 16)
    # The shard in flight was assigned before that, the one behind it, too.
    assert [run.finish(1), run.finish(1)] == [0, 16]
    assert run.report(0, 32) == 32
    assert run.report(1, 16) == 32
    assert [run.finish(1), run.finish(1)] == [16, 32]
    assert run.report(1, 16) == 32, "it does not follow a larger one, which changes nothing"
    assert run.report(1, 8) == 8 and run.report(1, 16) == 16, "after that it is what it found itself"


def test_following_an_old_limit_does_not_lift_a_new_one() -> None:
    """Memory ran out again since."""
    run = Run(2)
    run.report(0, 16)
    assert [run.finish(1), run.finish(1)] == [0, 16]
    assert run.report(0, 8) == 8
    assert run.report(1, 16) == 8


def test_who_is_late_with_more_takes_nothing_from_others() -> None:
    """Memory ran out on two machines; one of them proves less than the other has proved already."""
    run = Run(2)
    assert [run.report(worker, 4) for worker in (0, 1)] == [4, 4]
    assert run.report(0, 16) == 16
    assert run.report(1, 8) == 16


def test_what_fits_again_was_given_before() -> None:
    """The shard behind the one in which memory ran out was given the limit that held until then."""
    run = Run(1)
    run.report(0, 16)
    assert [run.finish(0), run.finish(0)] == [0, 16]
    assert run.report(0, 8) == 8
    assert run.finish(0) == 16 and run.report(0, 16) == 16


def test_a_limit_that_was_followed_unseen_is_no_news() -> None:
    """All batches of the shard with the limit were made while the one before was written; the next has another."""
    run = Run(2)
    run.report(0, 16)
    assert [run.finish(1), run.finish(1)] == [0, 16]
    run.report(0, 32)
    assert [run.finish(1), run.finish(1)] == [16, 32]
    assert run.report(1, 16) == 32


def test_a_limit_of_the_shard_behind_is_followed_later() -> None:
    """A report of the shard in flight says nothing of it."""
    run = Run(2)
    run.report(0, 16)
    assert run.finish(1) == 0 and run.given[1][1][1] == 16
    assert run.report(1, 0) == 16 and run.report(0, 32) == 32
    assert run.finish(1) == 16 and run.report(1, 16) == 32


def test_a_limit_is_followed_at_shards_of_its_request() -> None:
    """A report of another request between two shards of it changes nothing."""
    run = Run(2, ranges=(ShardRange(5, request=0), ShardRange(1, request=1), ShardRange(9, request=0)))
    run.report(0, 16)
    # Shards 4 and 6 of the first request are given its limit, and no report of 4 arrives.
    assert [run.finish(1), run.finish(1)] == [0, 16]
    assert run.report(0, 32) == 32
    assert run.finish(1) == 0 and run.report(1, 0) == 32
    assert run.finish(1) == 32 and run.report(1, 16) == 32


def test_a_worker_that_ignores_a_limit_does_not_lift_it() -> None:
    """More has fitted there, and fits; others of its kind begin with what fits for sure."""
    run = Run(2)
    run.report(0, 16)
    assert [run.finish(1), run.finish(1)] == [0, 16]
    assert run.report(1, 0) == 16


def test_a_limit_outlives_its_worker_and_rises_with_its_successor() -> None:
    """On a new machine the first batches have the size that fitted the last one; then it may find that more does."""
    run = Run(1)
    run.report(0, 16)
    run.send(WorkerLost(0, True, "spot"))
    run.add(1)
    assert run.given[1][0][1] == 16
    assert run.report(1, 16) == 16 and run.report(1, 32) == 32


def test_a_limit_of_one_request_is_no_news_of_another() -> None:
    """Requests differ in what a sample takes; each has its own last report."""
    run = Run(2, ranges=(ShardRange(1, request=0), ShardRange(10, request=1)))
    assert run.report(0, 16) == 16
    run.finish(0)
    assert run.report(0, 16) == 16 and run.report(0, 8) == 16
    assert run.state.batch_limits == {SMALL: 16, (KIND, 1): 8}


def test_the_beginning_of_a_shard_says_nothing_of_memory() -> None:
    """A worker reports it before its first batch, with no limit."""
    run = Run(1)
    run.report(0, 16)
    run.send(ShardProgress(0, run.state.workers[0].queue[0], 0))
    assert run.state.batch_limits == {SMALL: 16}


@given(
    seed=st.integers(0, 2**32),
    num_workers=st.integers(1, 5),
    memory=st.sampled_from([8, 16, 48, WANTED]),
    dips=st.lists(st.sampled_from([1, 4, 8]), max_size=6),
)
def test_limits_settle_where_memory_does(seed: int, num_workers: int, memory: int, dips: list[int]) -> None:
    """Something else takes the memory of some workers for a while. Limits change only for what workers find, so there
    is no to and fro; and a long time later every worker makes the largest batches that fit, and new ones begin so."""
    draw, run = random.Random(seed), Run(num_workers)
    batches = {worker: Batches() for worker in range(num_workers)}
    num_found = num_limits = 0
    for turn in range(200 + 80 * num_workers):
        worker = draw.randrange(num_workers)
        batches[worker].give(run.given[worker][0][1])
        now = min(memory, dips[turn // 20]) if turn // 20 < len(dips) and draw.random() < 0.5 else memory
        num_found += batches[worker].make(now)
        before = run.state.batch_limits
        # A report may be too late, after the end of the shard: then it is dropped.
        if draw.random() < 0.7:
            run.report(worker, batches[worker].limit)
        num_limits += run.state.batch_limits != before
        if draw.random() < 0.5:
            run.finish(worker)
    assert num_limits <= num_found
    largest = 0 if memory == WANTED else max(size for size in (8, 16, 32) if size <= memory)
    assert {one.limit for one in batches.values()} == {largest}
    assert run.state.batch_limits.get(SMALL, 0) == largest

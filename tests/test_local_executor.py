"""Workers as threads: what is started, stopped and reported, without a run."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from engine.driver.executors.local import LocalExecutor
from engine.driver.scheduling.messages import ShardProgress, ShardSampled, WorkerPlaced, WorkerReady
from engine.job.plan import ShardSpec
from tests.sleepy import GATE_SECONDS


def shard(number: int) -> ShardSpec:
    """A shard of one sample."""
    return ShardSpec(number=number, request=0, start=0, stop=1)


def threads(*numbers: int) -> list[threading.Thread]:
    """The threads of workers that are alive."""
    return [thread for thread in threading.enumerate() if thread.name in {f"worker-{number}" for number in numbers}]


def poll_until(executor: LocalExecutor, kind: type, count: int = 1) -> list:
    """All events up to the last of so many of a kind."""
    events: list = []
    while sum(isinstance(event, kind) for event in events) < count:
        events += executor.poll(GATE_SECONDS)
    return events


@pytest.fixture
def executor():
    """Two workers whose shards are done at once; they are numbered from 90, which no other test uses."""
    made = LocalExecutor(2)
    done = SimpleNamespace(sample_shard=lambda *_: lambda: "outcome")
    assert made.open(lambda: done, 9) == 2
    for worker in (90, 91):
        made.start_worker(worker)
    yield made
    made.close()


def test_no_more_workers_than_shards(executor):
    """An idle worker would load models for nothing."""
    assert executor.open(lambda: None, 1) == 1


def test_a_shard_is_sampled_before_it_is_done(executor):
    """In the order in which the scheduler attributes faults: placed, ready, sampled, result."""
    events = poll_until(executor, WorkerReady, 2)
    executor.submit(90, shard(5), 1)
    kinds = [type(event).__name__ for event in [*events, *poll_until(executor, ShardSampled)] if event.worker == 90]
    while "ShardResult" not in kinds:
        kinds += [type(event).__name__ for event in executor.poll(GATE_SECONDS)]
    assert [kind for kind in kinds if kind != "WorkerActive"] == [
        "WorkerPlaced", "WorkerReady", "ShardSampled", "ShardResult"
    ]  # fmt: skip


def test_stopped_and_closed_workers_end(executor):
    """An idle thread would keep its models in memory for as long as the process lives."""
    poll_until(executor, WorkerReady, 2)
    [idle] = threads(90)
    executor.stop_worker(90)
    idle.join(GATE_SECONDS)
    assert not idle.is_alive() and len(threads(91)) == 1
    [last] = threads(91)
    executor.close()
    last.join(GATE_SECONDS)
    assert not last.is_alive()


def test_no_event_of_a_stopped_worker_is_reported(executor):
    """The scheduler has forgotten it; what it still does is of no interest."""
    poll_until(executor, WorkerPlaced, 2)
    executor.stop_worker(90)
    executor._events.put((90, WorkerReady(90)))
    executor._events.put((91, WorkerReady(91)))
    assert {event.worker for event in poll_until(executor, WorkerReady)} == {91}


def test_a_stopped_thread_begins_no_queued_shard():
    """Whoever replaces it makes them: not both. One that failed takes nothing more by itself."""
    begun: list[int] = []
    go = threading.Event()

    class Slow:
        """A worker that waits, then fails."""

        def sample_shard(self, shard, attempt, report, batch_limit):
            """Note the shard."""
            begun.append(shard.number)
            report(0)
            go.wait(GATE_SECONDS)
            raise ZeroDivisionError

    def submit_two(executor: LocalExecutor, worker: int) -> None:
        executor.start_worker(worker)
        for number in (0, 1):
            executor.submit(worker, ShardSpec(number=number, request=0, start=0, stop=1), 1)
        while not any(isinstance(event, ShardProgress) for event in executor.poll(10)):
            pass

    executor = LocalExecutor(1)
    executor.open(Slow, 2)
    # Threads of other tests may have the same names.
    others = set(threading.enumerate())
    for worker, is_stopped in enumerate((True, False)):
        go.clear()
        begun.clear()
        submit_two(executor, worker)
        if is_stopped:
            executor.stop_worker(worker)
        go.set()
        for thread in set(threading.enumerate()) - others:
            thread.join(GATE_SECONDS)
            assert not thread.is_alive()
        assert begun == [0]


def test_workers_of_one_process_load_one_after_the_other():
    """Loading models changes how modules are made in the whole process: beside another, a model came out empty."""
    loading, found = threading.Lock(), []

    def factory():
        is_alone = loading.acquire(blocking=False)
        found.append(is_alone)
        time.sleep(0.3)
        if is_alone:
            loading.release()

    executor = LocalExecutor(3)
    executor.open(factory, 3)
    for worker in range(3):
        executor.start_worker(worker)
    ready = 0
    while ready < 3:
        ready += sum(isinstance(event, WorkerReady) for event in executor.poll(60))
    executor.close()
    assert found == [True] * 3

"""Ten minutes without progress, loading and downloads counted as such: who is slow goes on, who hangs is replaced."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.driver.executors import activity
from engine.driver.executors.activity import Activity, bytes_moved
from engine.driver.executors.local import LocalExecutor
from engine.driver.executors.ray import RayExecutor
from engine.driver.run import run_job
from engine.driver.scheduling import scheduler
from engine.driver.scheduling.messages import (
    Replaced,
    SchedulerLimits,
    ShardProgress,
    StopWorker,
    Tick,
    WorkerActive,
    WorkerPlaced,
    WorkerReady,
)
from engine.errors import EXIT_OK
from engine.job.plan import Plan
from engine.job.spec import JobSpec
from engine.methods.heartbeat import beat, listening
from tests.sleepy import Faults, Recorder, SleepyWorker, make_job, run_sleepy

LIMIT = SchedulerLimits().first_limit_seconds


def at(state, *events):
    """The state after events, and the workers that were stopped."""
    stopped = []
    for event in events:
        state, actions = scheduler.step(state, event)
        stopped += [one.worker for one in actions if isinstance(one, StopWorker)]
    return state, stopped


def looks(first: float, last: float):
    """Ticks, as often as the driver looks for workers that hang."""
    now = first
    while now < last:
        now = min(now + 1.5, last)
        yield Tick(now)


def test_the_limit_is_ten_minutes():
    """Before any batch of a request was measured, and while models are loaded."""
    assert LIMIT == SchedulerLimits().start_limit_seconds == 600


@pytest.mark.parametrize("is_ready", [False, True], ids=["loading", "first batch"])
@given(pauses=st.lists(st.floats(1, LIMIT - 1), min_size=1, max_size=4))
def test_a_worker_that_gets_further_is_not_replaced_and_one_that_stops_is(is_ready, pauses):
    """However long it takes in all; silence is measured from its last sign, and ends after ten minutes."""
    state, _ = scheduler.start(bytes(2), 1)
    state, _ = at(state, WorkerPlaced(0, "here"), *([WorkerReady(0)] if is_ready else []))
    now = 0.0
    for pause in pauses:
        state, stopped = at(state, *looks(now, now + pause), WorkerActive(0))
        now += pause
        assert stopped == []
    state, stopped = at(state, *looks(now, now + LIMIT - 5))
    assert stopped == []
    events = []
    for event in looks(now + LIMIT - 5, now + LIMIT + 5):
        state, actions = scheduler.step(state, event)
        events += actions
    assert [one.worker for one in events if isinstance(one, StopWorker)] == [0]
    [message] = [one.message for one in events if isinstance(one, Replaced)]
    assert message.startswith("hangs: ") and "the limit is 600 s" in message


def test_after_a_measured_batch_only_batches_count():
    """A worker in an endless step would report steps for ever: what batches take is known now."""
    state, _ = scheduler.start(bytes(2), 1)
    state, _ = at(state, WorkerPlaced(0, "here"), WorkerReady(0), ShardProgress(0, 0, 1, batch_seconds=1.0))
    events = [event for tick in looks(0, 400) for event in (tick, WorkerActive(0))]
    assert at(state, *events)[1] == [0]


def test_what_is_not_known_is_ignored():
    """A late sign of a worker that was replaced."""
    state, _ = scheduler.start(bytes(2), 1)
    assert scheduler.step(state, WorkerActive(7)) == (state, [])


def test_a_beat_is_heard_by_who_listens_in_this_thread_alone():
    """Two workers in one process are two."""
    heard: list[str] = []

    def work(name: str) -> None:
        with listening(partial(heard.append, name)):
            beat()

    beat()
    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    beat()
    assert sorted(heard) == ["a", "b"]


def read(path: Path) -> None:
    path.read_bytes()


def write(path: Path) -> None:
    path.with_name("copy").write_bytes(bytes(2**21))


@pytest.mark.parametrize("move", [read, write])
def test_bytes_that_move_are_seen(move, tmp_path):
    """Read as weights are, written as downloads are."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2**21))
    before = bytes_moved()
    move(path)
    assert bytes_moved() - before >= 2**21


def test_a_process_that_waits_is_silent_and_one_that_moves_bytes_is_not(monkeypatch, tmp_path):
    """Looked at by a thread beside the one that works."""
    monkeypatch.setattr(activity, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(activity, "MIN_PAUSE_SECONDS", 0.0)
    heard: list[float] = []
    watch = Activity(lambda: heard.append(time.monotonic()))
    watch.begin()
    time.sleep(0.3)
    assert heard == []
    for _ in range(5):
        write(tmp_path / "file")
        time.sleep(0.1)
    watch.end()
    assert heard


class SlowToLoad(SleepyWorker):
    """Takes longer to load than the limit; by parts, by bytes, or without a sign."""

    def __init__(self, job: JobSpec, plan: Plan, kind: str, folder: Path, seconds: float) -> None:
        for part in range(round(10 * seconds)):
            time.sleep(0.1)
            if kind == "parts":
                beat()
            elif kind == "bytes":
                (folder / "part").write_bytes(bytes([part % 256]) * 2**21)
        super().__init__(job, plan, Faults())


def make_slow(job: JobSpec, plan: Plan, *, kind: str, folder: Path, seconds: float, **places) -> SlowToLoad:
    return SlowToLoad(job, plan, kind, folder, seconds)


def run_slow(output: Path, kind: str, executor, limit: float) -> Recorder:
    """A run of workers that load for longer than the limit."""
    display = Recorder()
    limits = SchedulerLimits(
        first_limit_seconds=limit, min_limit_seconds=60, start_limit_seconds=limit, check_seconds=0.1
    )
    make = partial(make_slow, kind=kind, folder=output.parent, seconds=1.5 * limit)
    options = {"resume": "auto", "confirmed": False, "display": display, "limits": limits, "make_worker": make}
    assert run_job(make_job(output, 1), executor=executor, **options).exit_code == EXIT_OK
    return display


@pytest.mark.parametrize("kind", ["parts", "bytes"])
def test_a_worker_that_loads_for_long_is_waited_for(kind, tmp_path, monkeypatch):
    """Two of them, in threads, the second after the first: real files, real time, no replacement."""
    monkeypatch.setattr(activity, "CHECK_SECONDS", 0.2)
    monkeypatch.setattr(activity, "MIN_PAUSE_SECONDS", 0.1)
    display = run_slow(tmp_path / "run", kind, LocalExecutor(2), limit=2.5)
    assert not any("hangs" in notice for notice in display.notices)


@pytest.mark.slow
def test_an_actor_that_loads_for_long_is_waited_for(tmp_path):
    """Its process says so when it is asked, beside its loading; while it starts it is silent."""
    ray = RayExecutor(address=None, num_workers=1, device="cpu")
    display = run_slow(tmp_path / "run", "parts", ray, limit=12.0)
    assert not any("hangs" in notice for notice in display.notices)


def test_a_worker_that_hangs_in_its_first_batch_is_replaced(tmp_path, monkeypatch):
    """Without a sign; the limit is that of the first batch."""
    monkeypatch.setattr(activity, "CHECK_SECONDS", 0.1)
    display = Recorder()
    limits = SchedulerLimits(first_limit_seconds=1.5, min_limit_seconds=1.0, check_seconds=0.1)
    summary = run_sleepy(tmp_path, 1, LocalExecutor(1), faults=Faults(hang_once=(0,)), display=display, limits=limits)
    assert summary.exit_code == EXIT_OK
    assert any("hangs: no heartbeat for" in notice for notice in display.notices)

"""Pools of tasks: values, errors and lost processes, here and on real Ray; and a loop whose tasks are lost."""

from __future__ import annotations

import os
import time

import pytest

from engine.driver.executors.ray_tasks import RayTasks
from engine.driver.executors.tasks import LocalTasks, TaskDone, TaskFailed, TaskLost
from engine.driver.progress import PlainDisplay
from engine.driver.scheduler_loop import WorkersFailingError
from engine.errors import EXIT_INCOMPLETE, EXIT_USER, JobError
from engine.studies.loop.parsing import parse_loop
from engine.studies.loop.program import run_loop
from engine.studies.loop.state import MAX_LOSSES
from tests.loop_cases import mixture_job

WAIT_SECONDS = 120


def outcomes(pool, tasks) -> dict:
    """Run tasks, `(function, *arguments)` each, to their events."""
    assert pool.open(len(tasks)) >= 1
    for number, (function, *arguments) in enumerate(tasks):
        pool.submit(number, function, *arguments)
    events, deadline = {}, time.monotonic() + WAIT_SECONDS
    while len(events) < len(tasks):
        assert time.monotonic() < deadline
        events |= {event.number: event for event in pool.poll(1.0)}
    return events


def check_values_and_errors(events: dict) -> None:
    assert events[0] == TaskDone(0, 3)
    assert isinstance(events[1], TaskFailed) and events[1].exit_code == EXIT_USER
    assert "is not in the zoo" in events[1].message and isinstance(events[1].error, Exception)
    assert isinstance(events[2], TaskFailed) and events[2].exit_code == EXIT_INCOMPLETE
    assert events[2].message.startswith("Traceback") and "ZeroDivisionError" in events[2].message


TASKS = [("operator:add", 1, 2), ("engine.models.addresses:locate", "zoo:nothing/here"), ("operator:floordiv", 1, 0)]


def test_a_task_in_this_process_gives_its_value_or_its_error():
    pool = LocalTasks()
    check_values_and_errors(outcomes(pool, TASKS))
    assert pool.poll(0) == []


@pytest.mark.slow
def test_tasks_on_ray_give_the_same_and_a_lost_process_is_told_from_an_error():
    """Processes are real: one of them aborts, and the others' tasks still end."""
    pool = RayTasks(address=None, num_workers=1, device="cpu")
    try:
        events = outcomes(pool, [*TASKS, ("os:getpid",), ("os:_exit", 1), ("os:getenv", "OMP_NUM_THREADS")])
    finally:
        pool.close()
        pool.close()
    check_values_and_errors(events)
    assert events[3].value != os.getpid()
    assert isinstance(events[4], TaskLost) and "died" in events[4].message
    assert events[5].value == "1"


def test_an_address_of_another_kind_is_refused():
    with pytest.raises(JobError, match="--address: 'ray://x:1' is not supported"):
        RayTasks(address="ray://x:1", num_workers=None, device="auto")


class Losing(LocalTasks):
    """Runs tasks, and loses the first ones."""

    def __init__(self, num_lost: int) -> None:
        super().__init__()
        self._left = num_lost

    def poll(self, timeout_seconds):
        if self._left:
            self._left -= 1
            return [TaskLost(self._waiting.popleft()[0], "the process died: killed")]
        return super().poll(timeout_seconds)


def play(pool, uri, stream):
    job = mixture_job(output={"uri": str(uri)}, rounds=1, seeds=1, arms={"clean": {}})
    return run_loop(parse_loop(job, lambda path: {}), pool, PlainDisplay(stream))


def test_a_lost_task_is_repeated_and_a_loop_that_keeps_losing_ends_with_what_it_has(tmp_path, capsys):
    import sys

    result = play(Losing(MAX_LOSSES), tmp_path / "loop", sys.stderr)
    assert result.exit_code == 0 and capsys.readouterr().err.count("begins again: the process died") == MAX_LOSSES
    with pytest.raises(WorkersFailingError, match="lost again and again"):
        play(Losing(MAX_LOSSES + 1), tmp_path / "other", sys.stderr)
    assert play(LocalTasks(), tmp_path / "other", sys.stderr).exit_code == 0

"""The loop of a run with workers that have no models: what it passes on, filters out, records and reports."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.data.run.commit_packs import PACKS
from engine.data.run.commit_record import COMMITS
from engine.data.run.commits import CommitPacker, list_commits, read_commit
from engine.data.stores.opening import open_store
from engine.driver.checks import plan_job
from engine.driver.executors.base import ShardResult
from engine.driver.executors.local import LocalExecutor
from engine.driver.run_loop import RunLoop
from engine.driver.scheduler_loop import brief_abort, main_line
from engine.driver.scheduling.messages import SchedulerLimits, ShardError, ShardProgress, ShardRange
from engine.errors import EXIT_DRAINED, EXIT_OK, CorruptShardError, OwnedError
from engine.job.parsing import parse_job
from engine.job.plan import Extent
from tests.sleepy import Faults, Recorder, make_job, run_sleepy, tars


def events_of(output: Path, name: str) -> list[dict]:
    """The lines of the journal about one kind of event."""
    lines = [line for path in sorted(output.glob("_state/events/*.jsonl")) for line in path.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == name]


class Stuttering(LocalExecutor):
    """Reports every result twice, and then an error and progress of the finished shard."""

    def poll(self, timeout_seconds):
        """Its events, with late and duplicate ones."""
        events = []
        for event in super().poll(timeout_seconds):
            events.append(event)
            if isinstance(event, ShardResult):
                late = (ShardProgress(event.worker, event.shard, 1), ShardError(event.worker, event.shard, "late"))
                events += [event, *late]
        return events


@pytest.mark.parametrize("request_", [{}, {"accept": {"is_error": True}, "max_attempts": "8x"}])
def test_late_and_duplicate_events_are_ignored(tmp_path, request_):
    """By journal, progress and quotas, not by the scheduler alone: a commit counts once, and no worker is replaced."""
    display = Recorder()
    summary = run_sleepy(tmp_path, 1, Stuttering(2), display=display, request=request_)
    assert summary.exit_code == EXIT_OK and not display.notices and display.in_flight <= summary.num_samples
    commits = events_of(tmp_path, "committed")
    assert sorted(event["shard"] for event in commits) == list(range(summary.num_shards))
    assert sum(event["samples"] for event in commits) == summary.num_samples


class Recording(LocalExecutor):
    """Remembers which shards were submitted."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        self.submitted: list[int] = []

    def submit(self, worker, shard, attempt, batch_limit=0):
        """Remember it."""
        self.submitted.append(shard.number)
        super().submit(worker, shard, attempt, batch_limit)


def test_committed_and_quarantined_shards_are_not_submitted(tmp_path):
    """With others still missing: the run that continues makes those alone."""
    run_sleepy(tmp_path, 1, LocalExecutor(1), faults=Faults(error=(1,)))
    executor = Recording(1)
    run_sleepy(tmp_path, 2, executor)
    assert executor.submitted == [3, 4, 5, *executor.submitted[3:]] and 1 not in executor.submitted


def test_a_run_that_lost_a_file_makes_nothing(tmp_path):
    """Only its user can know where the file is: other missing shards are not made either."""
    run_sleepy(tmp_path, 2, LocalExecutor(1))
    next(tmp_path.glob("shards/*000000.tar")).unlink()
    executor = Recording(1)
    with pytest.raises(CorruptShardError, match="000000"):
        run_sleepy(tmp_path, 3, executor)
    assert executor.submitted == []


def test_requests_with_one_diffusion_model_share_its_number(tmp_path):
    """The scheduler keeps workers with the model that they have loaded: numbers must distinguish models."""
    raw = make_job(tmp_path, 1).model_dump(mode="json", exclude_unset=True)
    request, default = raw["requests"][0], raw["models"]["diffusion"]
    models = (None, "zoo:digits/stable-unclip", default)
    requests = [request | {"name": f"r{number}", "diffusion": model} for number, model in enumerate(models)]
    job, plan = parse_job(raw | {"requests": requests}), plan_job(make_job(tmp_path, 1))
    named = {"executor": LocalExecutor(1), "display": Recorder(), "lease": None, "journal": None}
    loop = RunLoop(open_store(str(tmp_path)), job, plan, {}, limits=SchedulerLimits(), **named)
    extents = [Extent(request=number, cell=0, start=0, stop=8, samples_per_shard=4) for number in range(3)]
    expected = [ShardRange(2, request=0, model=0), ShardRange(2, request=1, model=1), ShardRange(2, request=2, model=0)]
    assert [loop._shard_range(extent) for extent in extents] == expected


def test_a_driver_that_lost_its_lease_stops(monkeypatch, tmp_path):
    """Before the next decision, and whatever its workers do."""
    calls = []

    def check(lease) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OwnedError("taken over")

    monkeypatch.setattr("engine.data.stores.lease.Lease.check", check)
    with pytest.raises(OwnedError, match="taken over"):
        run_sleepy(tmp_path, 9, LocalExecutor(1), faults=Faults(seconds=0.05))
    assert len(list_commits(open_store(str(tmp_path)))) < 20


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("", "no reason given"),
        ("one\ntwo", "one"),
        ("Traceback (most recent call last):\n  File\nValueError: bad\n", "ValueError: bad"),
    ],
)
def test_a_message_is_cut_to_its_most_informative_line(message, line):
    """Of a traceback that is the last one."""
    assert main_line(message) == line
    assert (
        brief_abort(f"workers do not start; the last one: {message}") == f"workers do not start; the last one: {line}"
    )


def test_the_notice_about_room_starts_again_when_all_have_a_place(monkeypatch, tmp_path):
    """Workers that were placed in between have not waited for long."""
    executor, display = LocalExecutor(1), Recorder()
    named = {"executor": executor, "display": display, "lease": None, "journal": None}
    job = make_job(tmp_path, 1)
    loop = RunLoop(open_store(str(tmp_path)), job, plan_job(job), {}, limits=SchedulerLimits(), **named)
    for now, num in ((0.0, 1), (50.0, 0), (70.0, 1), (129.0, 1)):
        monkeypatch.setattr(LocalExecutor, "num_unplaced", num)
        loop._report_unplaced(now)
    assert not display.notices
    for now in (130.0, 131.0, 500.0):
        loop._report_unplaced(now)
    assert len(display.notices) == 1


def test_workers_that_wait_for_room_are_reported_once(monkeypatch, tmp_path):
    """And nothing is reported if all have a machine."""
    monkeypatch.setattr("engine.driver.scheduler_loop.UNPLACED_SECONDS", 0.0)
    display = Recorder()
    run_sleepy(tmp_path / "placed", 1, LocalExecutor(1), display=display)
    assert not display.notices
    monkeypatch.setattr(LocalExecutor, "num_unplaced", 2)
    run_sleepy(tmp_path / "waiting", 1, LocalExecutor(1), display=display)
    assert display.notices == ["2 worker(s) still wait for cluster resources; ask for fewer with --workers"]


def test_a_run_ends_by_its_deadline(monkeypatch, tmp_path):
    """With exit code 75 and a report of what there is."""

    def clock() -> float:
        """An hour later once a shard is there."""
        return time.monotonic() + (3600 if tars(tmp_path) else 0)

    monkeypatch.setattr("engine.driver.scheduler_loop.time", SimpleNamespace(monotonic=clock))
    patient = {"min_limit_seconds": 1e6, "first_limit_seconds": 1e6}
    limits = SchedulerLimits(deadline=time.monotonic() + 3000, grace_seconds=10, **patient)
    summary = run_sleepy(tmp_path, 9, LocalExecutor(1), limits=limits)
    assert (summary.exit_code, summary.drained) == (EXIT_DRAINED, "deadline")
    assert 0 < summary.num_committed < 23 and Path(summary.report).exists() and not (tmp_path / "_SUCCESS").exists()


def test_a_worker_that_hangs_is_replaced(tmp_path):
    """Its shard is made by another, as the next attempt; the run does not wait for it."""
    # On a machine that stalls, others are taken for hung as well, which costs an attempt and changes nothing.
    limits = SchedulerLimits(min_limit_seconds=2, first_limit_seconds=2, check_seconds=0.1)
    display = Recorder()
    summary = run_sleepy(
        tmp_path / "run", 2, LocalExecutor(2), faults=Faults(hang_once=(1,)), display=display, limits=limits
    )
    assert summary.exit_code == EXIT_OK and read_commit(open_store(str(tmp_path / "run")), 1).attempt >= 2
    run_sleepy(tmp_path / "clean", 2, LocalExecutor(1))
    assert tars(tmp_path / "run") == tars(tmp_path / "clean")
    assert any("hangs: no heartbeat for" in notice for notice in display.notices)


def test_the_share_of_sampling_is_reported(tmp_path):
    """Ten samples of a fifth of a second: the share of the time until the last commit, which is in that of the run."""
    started = time.monotonic()
    summary = run_sleepy(tmp_path, 1, LocalExecutor(1), faults=Faults(seconds=0.2))
    assert 2.0 / (time.monotonic() - started) < summary.sampling_share <= 1


def test_records_are_packed_while_the_run_goes_on(monkeypatch, tmp_path):
    """Every second record completes a pack; one that is left over stays loose, and all are there."""
    monkeypatch.setattr("engine.driver.run_loop.CommitPacker", partial(CommitPacker, every=2))
    summary = run_sleepy(tmp_path, 5, LocalExecutor(1))
    store = open_store(summary.uri)
    assert summary.exit_code == EXIT_OK
    committed = list_commits(store)
    assert len(committed) == summary.num_shards > 4
    assert len(store.list(PACKS)) == len(committed) // 2 and len(store.list(COMMITS)) == len(committed) % 2

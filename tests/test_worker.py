"""The worker between its two threads: sampling goes on while files are written, and each hears when the other fails.

What runs of whole jobs cannot see: which thread waits for which.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace

import pytest

import engine.generation.worker
from engine.data.run.commits import list_commits, read_commit
from engine.data.run.shards import read_rows
from engine.data.run.stored_plan import stored_plan
from engine.data.stores.opening import open_store
from engine.driver.checks import plan_job
from engine.driver.executors.local import LocalExecutor
from engine.errors import JobError, OutputError
from engine.generation.batching import MadeBatch
from engine.generation.notices import Notices
from engine.generation.usage import BatchUsage
from engine.generation.worker import MAX_WAITING_BATCHES, Worker
from tests.sleepy import GATE_SECONDS, InTurn, make_job, make_result, run_sleepy, wait_until


class Sampler(InTurn):
    """In the place of the generator: a sample a batch, which it counts."""

    def __init__(self) -> None:
        self.num_made = 0
        self.fails_at = -1
        self.limits: list[tuple[int, int]] = []
        self.notices = Notices()
        self.says: dict[int, str] = {}

    def batch_limit(self, request):
        """Memory never runs out."""
        return 0

    def next_batch(self, request, specs):
        """One sample, or the failure that was asked for."""
        if self.num_made == self.fails_at:
            raise ZeroDivisionError("no kernel")
        if text := self.says.get(self.num_made):
            self.notices.add(text)
        self.num_made += 1
        result = make_result(specs[0], 1)
        result.run = {"batch_size": 1}
        return [result]

    def limit_batches(self, request, limit):
        """Note it."""
        self.limits.append((request, limit))


class Sampling(Worker):
    """The worker with that sampler."""

    def __init__(self, output, samples_per_shard: int) -> None:
        job = make_job(output, 10)
        changed = job.output.model_copy(update={"samples_per_shard": samples_per_shard})
        self._job = job.model_copy(update={"output": changed})
        self._plan, self._name, self._store = plan_job(self._job), "one", open_store(str(output))
        self.sampler = self._generator = Sampler()

    def begin(self, number: int, attempt: int = 1, batch_limit: int = 0):
        """Sample a shard; what is left to do."""
        return self.sample_shard(self._plan.shard(number), attempt, lambda *_: None, batch_limit)


def test_the_next_shard_is_sampled_while_the_last_one_is_written(monkeypatch, tmp_path):
    """Two commits are held up: both shards are sampled all the same, and the outcomes come when they are through."""
    worker, go = Sampling(tmp_path, 4), threading.Event()
    commit = engine.generation.worker.commit_shard

    def slow(*arguments, **named):
        assert go.wait(GATE_SECONDS)
        return commit(*arguments, **named)

    monkeypatch.setattr(engine.generation.worker, "commit_shard", slow)
    finish = [worker.begin(0), worker.begin(1)]
    assert worker.sampler.num_made == 8 and not list_commits(worker._store)
    go.set()
    assert [one().counts.ok for one in finish] == [4, 4] and sorted(list_commits(worker._store)) == [0, 1]


def test_sampling_waits_where_writing_is_behind(monkeypatch, tmp_path):
    """Images wait in memory only so far."""
    worker, go = Sampling(tmp_path, 50), threading.Event()
    stage = engine.generation.worker.stage_shard

    def slow(*arguments):
        assert go.wait(GATE_SECONDS)
        return stage(*arguments)

    monkeypatch.setattr(engine.generation.worker, "stage_shard", slow)
    begun = threading.Thread(target=lambda: made.append(worker.begin(0)()))
    made: list = []
    begun.start()
    wait_until(lambda: worker.sampler.num_made > MAX_WAITING_BATCHES, "the sampler is as far as it may be")
    # Time for it to go too far, which it does not.
    time.sleep(0.5)
    assert worker.sampler.num_made == MAX_WAITING_BATCHES + 1
    go.set()
    begun.join(GATE_SECONDS)
    assert made[0].counts.ok == 50


def test_a_disk_that_fails_ends_the_sampling(monkeypatch, tmp_path):
    """The message comes out; the rest of the shard is not made for nothing."""
    worker = Sampling(tmp_path, 50)

    def full(*_):
        raise OutputError("the disk is full")

    monkeypatch.setattr(engine.generation.worker, "stage_shard", full)
    with pytest.raises(OutputError, match="the disk is full"):
        worker.begin(0)()
    assert worker.sampler.num_made < 50


def test_a_failure_in_sampling_leaves_nothing_behind(tmp_path):
    """No half shard is committed, or stays staged."""
    worker = Sampling(tmp_path, 4)
    worker.sampler.fails_at = 2
    with pytest.raises(ZeroDivisionError):
        worker.begin(0)
    wait_until(lambda: not list(worker._store.staging().iterdir()), "what was staged is removed")
    assert not list_commits(worker._store)


def test_a_shard_whose_answer_was_lost_is_not_made_again(tmp_path):
    """The second attempt finds the record; a limit for batches is passed on."""
    worker = Sampling(tmp_path, 4)
    first = worker.begin(3)()
    assert worker.begin(3, attempt=2)().counts == first.counts and worker.sampler.num_made == 4
    worker.begin(4, attempt=2, batch_limit=7)()
    assert worker.sampler.num_made == 8 and worker.sampler.limits == [(0, 7)]


def test_a_worker_refuses_an_output_without_its_run(tmp_path):
    """On a machine that does not share the driver's folder, it would publish shards that nobody reads."""
    job = make_job(tmp_path, 1)
    run_sleepy(tmp_path, 1, LocalExecutor(1))
    plan = open_plan(tmp_path)
    Worker(job, plan, name="here", load=lambda *_: Sampler())
    elsewhere = job.model_copy(update={"output": job.output.model_copy(update={"uri": str(tmp_path / "empty")})})
    with pytest.raises(JobError, match=r"^output\.uri: .*empty' as seen by worker there does not contain this run"):
        Worker(elsewhere, plan, name="there", load=lambda *_: Sampler())


def open_plan(output):
    """The plan that a run has stored."""
    return stored_plan(open_store(str(output)))[1]


class PairSampler(Sampler):
    """Two samples a batch, which take two seconds of a clock that stands still otherwise."""

    def __init__(self, clock) -> None:
        super().__init__()
        self._clock = clock

    def batches(self, request, specs):
        """Two samples a batch."""
        for start in range(0, len(specs), 2):
            self._clock.now += 2.0
            yield MadeBatch([make_result(spec, 1) for spec in specs[start : start + 2]], 2.0)

    def batch_limit(self, request):
        """Memory ran out in one request."""
        return 8 if request == 3 else 0


def test_batches_of_several_samples_share_their_time(monkeypatch, tmp_path):
    """Every sample is written once, with its part of the duration, the attempt and the worker; progress adds up."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(engine.generation.worker, "time", SimpleNamespace(monotonic=lambda: clock.now))
    worker = Sampling(tmp_path, 5)
    worker._generator = PairSampler(clock)
    reports: list[tuple] = []
    outcome = worker.sample_shard(worker._plan.shard(0), 4, lambda *values: reports.append(values))()
    assert reports == [(2, 2.0, 0), (4, 2.0, 0), (5, 2.0, 0)]
    assert worker.usage == BatchUsage(1), "the last one"
    assert (outcome.counts.attempted, outcome.sampling_seconds) == (5, 6.0)
    assert outcome.total_seconds >= outcome.sampling_seconds
    [path] = worker._store.path("shards").glob("*.parquet")
    rows = list(read_rows(path, ["duration_seconds", "attempt", "worker"]))
    assert [row["duration_seconds"] for row in rows] == [1.0, 1.0, 1.0, 1.0, 2.0]
    assert {(row["attempt"], row["worker"]) for row in rows} == {(4, "one")}


def test_a_limit_of_batches_is_that_of_the_shards_request(tmp_path):
    """Other requests of the job have samples of another size."""
    worker = Sampling(tmp_path, 4)
    shard = dataclasses.replace(worker._plan.shard(0), request=3)
    with pytest.raises(IndexError):
        worker.sample_shard(shard, 1, lambda *_: None, 7)
    assert worker.sampler.limits == [(3, 7)]


def test_an_outcome_that_was_read_takes_no_less_than_its_sampling(tmp_path):
    """Of a shard that an earlier attempt committed only the sampling was timed."""
    worker = Sampling(tmp_path, 4)
    worker.begin(0)()
    record = dataclasses.replace(read_commit(worker._store, 0), timing={"sampling_seconds": 3.0})
    assert engine.generation.worker._outcome(record, 0.0).total_seconds == 3.0

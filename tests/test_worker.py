"""The worker between its two threads: sampling goes on while files are written, and each hears when the other fails.

What runs of whole jobs cannot see: which thread waits for which.
"""

from __future__ import annotations

import threading
import time

import pytest

import engine.generation.worker
from engine.data.run.commits import list_commits
from engine.data.run.stored_plan import stored_plan
from engine.data.stores.opening import open_store
from engine.driver.checks import plan_job
from engine.driver.executors.local import LocalExecutor
from engine.errors import JobError, OutputError
from engine.generation.worker import MAX_WAITING_BATCHES, Worker
from tests.sleepy import GATE_SECONDS, make_job, make_result, run_sleepy, wait_until


class Sampler:
    """In the place of the generator: a sample a batch, which it counts."""

    def __init__(self) -> None:
        self.num_made = 0
        self.fails_at = -1
        self.limits: list[tuple[int, int]] = []

    def batch_limit(self, request):
        """Memory never runs out."""
        return 0

    def next_batch(self, request, specs):
        """One sample, or the failure that was asked for."""
        if self.num_made == self.fails_at:
            raise ZeroDivisionError("no kernel")
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

"""The worker: one shard in, one committed shard out. A plain class; it runs in an actor or in the driver alike.

Two threads: the caller's samples, and one of the worker's own encodes, hashes, writes and commits what was sampled,
behind a bounded queue, so that the models need not wait for the disk.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from engine.data.run.commit_record import CommitRecord
from engine.data.run.commit_shard import commit_shard
from engine.data.run.commits import read_commit
from engine.data.run.counts import ShardCounts
from engine.data.run.shard_writing import stage_shard, warm_up
from engine.data.run.shards import shard_name
from engine.data.run.stored_plan import read_digest
from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.generation.messages import Report
from engine.job.plan import Plan, SampleSpec, ShardSpec
from engine.job.records import SampleResult
from engine.job.spec import JobSpec
from engine.methods.conditioning.tally import ScreeningTally
from engine.models.hardware import choose_hardware, fix_threads
from engine.models.library_logging import quiet_libraries

# Batches that wait for the disk at most; then sampling waits, too.
MAX_WAITING_BATCHES = 4
WAIT_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOutcome:
    """What a worker says of a finished shard.

    Attributes:
        sampling_seconds: time in sampling and scoring.
        total_seconds: time from start to commit.
    """

    counts: ShardCounts
    sampling_seconds: float
    total_seconds: float


class Sampler(Protocol):
    """What makes samples: `engine.generation.generator.Generator`."""

    def next_batch(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """Results of the first samples of `specs`, as many as fit a batch."""
        ...

    def batch_limit(self, request: int) -> int:
        """Largest batch of a request, since memory has run out; 0 where it never has."""
        ...

    def limit_batches(self, request: int, limit: int) -> None:
        """Make no batches of a request larger than this."""
        ...


class Worker:
    """Holds all models of a job and makes its shards.

    Args:
        job: the job.
        plan: its plan.
        name: who this is, for the record.
        load: loads the models.

    Raises:
        JobError: a model cannot be loaded, the hardware lacks what `runtime` asks for, or the output is not shared
            with the driver.
    """

    def __init__(
        self, job: JobSpec, plan: Plan, *, name: str, load: Callable[[JobSpec, Plan], Sampler] | None = None
    ) -> None:
        self._job = job
        self._plan = plan
        self._name = name
        self._store = open_store(job.output.uri)
        if read_digest(self._store) != plan.digest:
            raise JobError(
                f"output.uri: '{job.output.uri}' as worker {name} sees it does not hold this run; use a folder that"
                " all machines share"
            )
        self._generator = (load or load_generator)(job, plan)
        warm_up()

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: Report, batch_limit: int = 0
    ) -> Callable[[], ShardOutcome]:
        """Sample a shard; what is returned waits for its commit. `report` hears how far it is.

        Side effects: publishes the shard's files and its commit record in the job's output, from another thread.
        """
        if attempt > 1 and (record := read_commit(self._store, shard.number)):
            # An earlier attempt got there, and only its answer was lost.
            return lambda: _outcome(record, 0.0)
        if batch_limit:
            self._generator.limit_batches(shard.request, batch_limit)
        making = _Making(shard, attempt)
        writing: Future[ShardOutcome] = Future()
        # A thread of a pool would be waited for at the end of the process, also where sampling hangs.
        threading.Thread(target=self._write_for, args=(making, writing), name="writer", daemon=True).start()
        try:
            self._sample(making, report, writing)
        except BaseException as error:
            making.abandon(error)
            raise
        return writing.result

    def _sample(self, making: _Making, report: Report, writing: Future[ShardOutcome]) -> None:
        """Make a shard batch by batch, as long as there is somebody who writes it."""
        request, specs = making.shard.request, list(self._plan.samples(making.shard))
        done = 0
        while specs and not writing.done():
            started = time.monotonic()
            results = self._generator.next_batch(request, specs)
            seconds = time.monotonic() - started
            making.timing["sampling_seconds"] += seconds
            specs = specs[len(results) :]
            for result in results:
                spent = {"duration_seconds": seconds / len(results)}
                result.run |= {**spent, "attempt": making.attempt, "worker": self._name}
            making.put(results, writing)
            done += len(results)
            report(done, seconds, self._generator.batch_limit(request))
        making.put(None, writing)

    def _write_for(self, making: _Making, writing: Future[ShardOutcome]) -> None:
        try:
            writing.set_result(self._write(making))
        except BaseException as error:
            writing.set_exception(error)

    def _write(self, making: _Making) -> ShardOutcome:
        """Stage and commit what the sampling thread makes; nothing stays where that fails."""
        name = shard_name(self._job.name, making.shard.number)
        tally = ScreeningTally()
        image_format, version = self._job.output.image_format, self._plan.schema_version
        staged = stage_shard(self._store.staging(), name, making.results(tally), image_format, version)
        record = commit_shard(
            self._store,
            self._plan.digest,
            making.shard,
            name,
            staged,
            attempt=making.attempt,
            worker=self._name,
            timing=making.timing,
            screening=tally.rows(),
        )
        return _outcome(record, time.monotonic() - making.started)


class _Making:
    """A shard between the thread that samples and the one that writes."""

    def __init__(self, shard: ShardSpec, attempt: int) -> None:
        self.shard = shard
        self.attempt = attempt
        self.started = time.monotonic()
        self.timing = {"sampling_seconds": 0.0}
        self._batches: queue.Queue[list[SampleResult] | BaseException | None] = queue.Queue(MAX_WAITING_BATCHES)

    def put(self, batch: list[SampleResult] | None, writing: Future[ShardOutcome]) -> None:
        """Hand a batch over, None after the last; waits while the writer is behind, not when it has given up."""
        while not writing.done():
            try:
                self._batches.put(batch, timeout=WAIT_SECONDS)
                return
            except queue.Full:
                continue

    def abandon(self, error: BaseException) -> None:
        """Let the writer give up, too."""
        while True:
            try:
                self._batches.put_nowait(error)
                return
            except queue.Full:
                self._batches.get()

    def results(self, tally: ScreeningTally) -> Iterator[SampleResult]:
        """The results of the shard as they come; draws are added to `tally`."""
        while (batch := self._batches.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            for result in batch:
                if result.num_draws:
                    about = result.record
                    tally.add(about["class_index"], screened=about["screened"], num_draws=result.num_draws)
                yield result


def _outcome(record: CommitRecord, total_seconds: float) -> ShardOutcome:
    seconds = record.timing.get("sampling_seconds", 0.0)
    return ShardOutcome(counts=record.counts, sampling_seconds=seconds, total_seconds=max(total_seconds, seconds))


def load_generator(job: JobSpec, plan: Plan) -> Sampler:
    """The generator with all models of a job."""
    quiet_libraries()
    from engine.generation.generator import Generator

    fix_threads(choose_hardware(job.runtime))
    return Generator(job, plan)

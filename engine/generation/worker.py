"""The worker: makes shards, each from its samples to its commit. A plain class that runs in an actor or in the driver.

Two threads: the caller's thread samples and scores; a thread of the worker encodes, hashes, writes and commits what was
sampled, behind a bounded queue, so that the models do not wait for the disk.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from engine.data.run.commit_record import CommitRecord
from engine.data.run.commit_shard import commit_shard
from engine.data.run.commits import read_commit
from engine.data.run.companions import companions_of
from engine.data.run.counts import ShardCounts
from engine.data.run.notices import unstored
from engine.data.run.shard_writing import stage_shard, warm_up
from engine.data.run.shards import shard_name
from engine.data.run.stored_plan import read_digest
from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.generation.batching import Batches
from engine.generation.notices import Notices
from engine.generation.usage import BatchUsage, batch_usage, failure_kind
from engine.job.plan import Plan, SampleSpec, ShardSpec
from engine.job.records import STATUS_FAILED, SampleResult
from engine.job.spec import JobSpec
from engine.methods.conditioning.screening_tally import ScreeningTally
from engine.models.gpu_sharing import gpu_share
from engine.models.hardware import choose_hardware, fix_threads
from engine.models.library_imports import deferring
from engine.models.library_logging import quiet_libraries

# Most batches that are buffered for the disk; sampling waits when the buffer is full.
MAX_WAITING_BATCHES = 4
WAIT_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOutcome:
    """The result of a finished shard.

    Attributes:
        sampling_seconds: duration of sampling and scoring.
        total_seconds: duration from start to commit.
        record: the commit record in the store.
        failures: failed samples by kind (`failure_kind`), as far as they were made by this attempt.
    """

    record: CommitRecord
    sampling_seconds: float
    total_seconds: float
    failures: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> ShardCounts:
        """Samples of the shard by status."""
        return self.record.counts

    @property
    def notices(self) -> tuple[str, ...]:
        """Those of the commit record."""
        return tuple(self.record.notices)


class ShardProgressCallback(Protocol):
    """Called by a worker to report the progress of a shard."""

    def __call__(self, num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0) -> None:
        """Report the number of samples done so far; see `ShardProgress`."""
        ...


class BatchGenerator(Protocol):
    """Makes samples; implemented by `engine.generation.generator.Generator`.

    Attributes:
        notices: what the hardware made it do otherwise than the job says.
    """

    notices: Notices

    def batches(self, request: int, specs: Sequence[SampleSpec]) -> Batches:
        """The samples of a request, batch by batch, in their order."""
        ...

    def batch_limit(self, request: int) -> int:
        """Largest batch size of a request since one failed; 0 if nothing limits it."""
        ...

    def limit_batches(self, request: int, limit: int) -> None:
        """Limit the batch size of a request."""
        ...


class Worker:
    """Holds all models of a job and makes its shards.

    Args:
        name: identifies the worker in the metadata.
        load: loads the models; `load_generator` if not given.

    Attributes:
        usage: of the last batch; None before the first.

    Raises:
        JobError: a model cannot be loaded, the hardware lacks what `runtime` asks for, or the output is not shared
            with the driver.
    """

    def __init__(
        self, job: JobSpec, plan: Plan, *, name: str, load: Callable[[JobSpec, Plan], BatchGenerator] | None = None
    ) -> None:
        self.usage: BatchUsage | None = None
        self._job = job
        self._plan = plan
        self._name = name
        self._store = open_store(job.output.uri)
        if read_digest(self._store) != plan.digest:
            raise JobError(
                f"output.uri: '{job.output.uri}' as seen by worker {name} does not contain this run; use a folder that"
                " all machines share"
            )
        self._generator = (load or load_generator)(job, plan)
        warm_up()

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: ShardProgressCallback, batch_limit: int = 0
    ) -> Callable[[], ShardOutcome]:
        """Sample a shard.

        Args:
            attempt: counted from 1.
            report: called after every batch.
            batch_limit: largest batch size; 0 for no limit.

        Returns:
            A function that waits for the shard's commit.

        Side effects: publishes the shard's files and its commit record in the job's output, from another thread.
        """
        if attempt > 1 and (record := read_commit(self._store, shard.number)):
            # An earlier attempt committed it, and only its result was lost.
            return lambda: _outcome(record, 0.0)
        if batch_limit:
            self._generator.limit_batches(shard.request, batch_limit)
        buffer = ShardBuffer(shard, attempt, self._generator.notices)
        writing: Future[ShardOutcome] = Future()
        # The process would wait for a thread of a pool at its end, even if sampling hangs.
        threading.Thread(target=self._write_for, args=(buffer, writing), name="writer", daemon=True).start()
        try:
            self._sample(buffer, report, writing)
        except BaseException as error:
            buffer.abandon(error)
            raise
        return writing.result

    def _sample(self, buffer: ShardBuffer, report: ShardProgressCallback, writing: Future[ShardOutcome]) -> None:
        """Sample a shard batch by batch, as long as its writer has not failed."""
        request, done = buffer.shard.request, 0
        with contextlib.closing(self._generator.batches(request, list(self._plan.samples(buffer.shard)))) as batches:
            for results, seconds in batches:
                buffer.timing["sampling_seconds"] += seconds
                for result in results:
                    duration = seconds / len(results)
                    result.run |= {"duration_seconds": duration, "attempt": buffer.attempt, "worker": self._name}
                buffer.put(results, writing)
                done += len(results)
                self.usage = batch_usage(len(results))
                report(done, seconds, self._generator.batch_limit(request))
                if writing.done():
                    return
        buffer.put(None, writing)

    def _write_for(self, buffer: ShardBuffer, writing: Future[ShardOutcome]) -> None:
        try:
            writing.set_result(self._write(buffer))
        except BaseException as error:
            writing.set_exception(error)

    def _write(self, buffer: ShardBuffer) -> ShardOutcome:
        """Stage and commit what the sampling thread makes; if that fails, nothing is left behind."""
        name = shard_name(self._job.name, buffer.shard.number)
        tally = ScreeningTally()
        image_format, version = self._job.output.image_format, self._plan.schema_version
        companions = companions_of(self._job.requests[buffer.shard.request])
        staged = stage_shard(self._store.staging(), name, buffer.results(tally), image_format, version, companions)
        record = commit_shard(
            self._store,
            self._plan.digest,
            buffer.shard,
            name,
            staged,
            attempt=buffer.attempt,
            worker=self._name,
            timing=buffer.timing,
            screening=tally.rows(),
            notices=buffer.notices,
        )
        self._generator.notices.give_back(unstored(buffer.notices, record.notices))
        return _outcome(record, time.monotonic() - buffer.started, buffer.failures)


class ShardBuffer:
    """A shard between the thread that samples it and the thread that writes it.

    Attributes:
        timing: durations by name, in seconds, for the commit record.
        notices: those of the generator since its last shard, for the commit record.
        failures: failed samples so far, by kind.
    """

    def __init__(self, shard: ShardSpec, attempt: int, notices: Notices) -> None:
        self.shard = shard
        self.attempt = attempt
        self.started = time.monotonic()
        self.timing = {"sampling_seconds": 0.0}
        self.notices: list[str] = []
        self.failures: Counter[str] = Counter()
        self._source = notices
        self._batches: queue.Queue[list[SampleResult] | BaseException | None] = queue.Queue(MAX_WAITING_BATCHES)

    def put(self, batch: list[SampleResult] | None, writing: Future[ShardOutcome]) -> None:
        """Append a batch, None after the last; waits while the buffer is full, unless the writer has ended."""
        # By the thread that samples: the one that writes would take those of the next shard.
        self.notices += self._source.take()
        while not writing.done():
            try:
                self._batches.put(batch, timeout=WAIT_SECONDS)
                return
            except queue.Full:
                continue

    def abandon(self, error: BaseException) -> None:
        """Make the writer fail with this error."""
        while True:
            try:
                self._batches.put_nowait(error)
                return
            except queue.Full:
                self._batches.get()

    def results(self, tally: ScreeningTally) -> Iterator[SampleResult]:
        """The results of the shard as they arrive; draws are added to `tally`."""
        while (batch := self._batches.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            for result in batch:
                record = result.record
                if record["status"] == STATUS_FAILED:
                    self.failures[failure_kind(record["error_message"])] += 1
                if result.num_draws:
                    tally.add(record["class_index"], screened=record["screened"], num_draws=result.num_draws)
                yield result


def _outcome(record: CommitRecord, total_seconds: float, failures: Mapping[str, int] | None = None) -> ShardOutcome:
    seconds = record.timing.get("sampling_seconds", 0.0)
    return ShardOutcome(
        record=record,
        sampling_seconds=seconds,
        total_seconds=max(total_seconds, seconds),
        failures=dict(failures or {}),
    )


def load_generator(job: JobSpec, plan: Plan) -> BatchGenerator:
    """The generator with all models of a job."""
    with deferring():
        quiet_libraries()
        from engine.generation.generator import Generator
        from engine.generation.loading import limit_memory

        hardware = choose_hardware(job.runtime)
        fix_threads(hardware)
        if hardware.is_cuda and hardware.memory_share < 1 and gpu_share().owns_process:
            limit_memory(hardware.memory_share)
        return Generator(job, plan)

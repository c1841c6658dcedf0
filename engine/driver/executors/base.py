"""The contract of executors: start workers, hand them shards, report what becomes of both.

An executor decides nothing. It carries out the actions of `engine.driver.scheduler` and turns what happens into its
events.
"""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from engine.driver.executors.activity import Activity
from engine.errors import EverySampleFailedError, RiskforgeError
from engine.generation.messages import (
    Report,
    ShardDone,
    ShardError,
    ShardProgress,
    ShardSampled,
    UserFault,
    WorkerActive,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.job.plan import ShardSpec
from engine.terminal import redacted

if TYPE_CHECKING:
    from engine.generation.worker import ShardOutcome

Item = TypeVar("Item")


class WorkerLike(Protocol):
    """What makes shards. Built once in its process, where it holds models."""

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: Report, batch_limit: int
    ) -> Callable[[], ShardOutcome]:
        """Make the samples of a shard.

        Args:
            attempt: counted from 1.
            report: to be called with the number of samples done so far.
            batch_limit: largest batch that fits this kind of machine, as far as is known; 0 for no limit.

        Returns:
            What is left to do: it waits until the shard is committed and tells counts and timing. Another thread calls
            it, while the next shard may be sampled.
        """
        ...


# Picklable. Builds the worker inside its process.
WorkerFactory = Callable[[], WorkerLike]


@dataclass(frozen=True, slots=True)
class ShardResult(ShardDone):
    """A shard is committed, with what the worker says of it."""

    outcome: ShardOutcome


ExecutorEvent = (
    WorkerPlaced
    | WorkerActive
    | WorkerReady
    | ShardProgress
    | ShardSampled
    | ShardResult
    | ShardError
    | WorkerLost
    | UserFault
)


class Executor(Protocol):
    """Where workers live. Numbers of workers are the scheduler's and never used twice."""

    @property
    def opening(self) -> str:
        """What `open` waits for, in words."""
        ...

    def begin(self) -> None:
        """Prepare in the background, where that takes time."""
        ...

    def open(self, factory: WorkerFactory, num_shards: int) -> int:
        """Wait until workers can be started.

        Args:
            factory: builds a worker.
            num_shards: shards to make; there is no use for more workers than that.

        Returns:
            Workers that there is room for at a time.

        Raises:
            RiskforgeError: the resources that were asked for are not there.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The hardware, for the record. Only while open."""
        ...

    @property
    def num_unplaced(self) -> int:
        """Workers that were started and have no machine yet."""
        ...

    def start_worker(self, worker: int) -> None:
        """Start a worker; `WorkerPlaced`, then `WorkerReady`, `WorkerLost` or `UserFault` follows."""
        ...

    def submit(self, worker: int, shard: ShardSpec, attempt: int, batch_limit: int = 0) -> None:
        """Queue a shard on a ready worker, which works them off one by one; nothing happens if it was just lost."""
        ...

    def stop_worker(self, worker: int) -> None:
        """End a worker, if it was not just lost, without waiting for it; no event of it follows."""
        ...

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """What happened since the last call; waits for the first event, but no longer than the timeout."""
        ...

    def close(self) -> None:
        """End all workers, give back every resource. Also after a `begin` alone, and twice."""
        ...


class Host:
    """A worker in its process. What goes wrong there becomes an event: exceptions do not travel.

    Args:
        number: the scheduler's.
        report_active: called now and then while the worker gets further.

    Attributes:
        has_failed: whether a shard came to grief; the worker is then of no more use.
    """

    def __init__(self, number: int, report_active: Callable[[], None] = lambda: None) -> None:
        self._number = number
        self._activity = Activity(report_active)
        self._activity.begin()
        self.has_failed = False

    def close(self) -> None:
        """Report nothing any more."""
        self._activity.end()

    def load(self, factory: WorkerFactory) -> WorkerReady | WorkerLost | UserFault:
        """Build the worker."""
        try:
            with self._activity.heard():
                self._worker = factory()
        except RiskforgeError as error:
            return UserFault(str(error), error.exit_code)
        except (Exception, SystemExit):
            return WorkerLost(self._number, node_lost=False, message=redacted(traceback.format_exc().strip()))
        return WorkerReady(self._number)

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: Report, batch_limit: int = 0
    ) -> Callable[[], ShardResult | ShardError | UserFault]:
        """Make the samples of a shard; what is returned waits until it is committed, and tells what came of it."""
        try:
            with self._activity.heard():
                finish = self._worker.sample_shard(shard, attempt, report, batch_limit)
        except (Exception, SystemExit) as error:
            self.has_failed = True
            failure = self._failure(shard, error)
            return lambda: failure
        return partial(self._finish, shard, finish)

    def _finish(self, shard: ShardSpec, finish: Callable[[], ShardOutcome]) -> ShardResult | ShardError | UserFault:
        try:
            return ShardResult(self._number, shard.number, finish())
        except (Exception, SystemExit) as error:
            self.has_failed = True
            return self._failure(shard, error)

    def _failure(self, shard: ShardSpec, error: BaseException) -> ShardError | UserFault:
        if isinstance(error, EverySampleFailedError):
            return ShardError(self._number, shard.number, str(error), every_sample=True)
        if isinstance(error, RiskforgeError):
            return UserFault(str(error), error.exit_code)
        message = redacted("".join(traceback.format_exception(error)).strip())
        return ShardError(self._number, shard.number, message)


def drain(inbox: queue.SimpleQueue[Item], timeout_seconds: float) -> Iterator[Item]:
    """What is in a queue; waits for the first, but no longer than the timeout."""
    try:
        yield inbox.get(timeout=timeout_seconds)
        while True:
            yield inbox.get_nowait()
    except queue.Empty:
        return

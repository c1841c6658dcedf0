"""The interface of executors: start workers, submit shards to them, report events of both.

An executor decides nothing. It executes the actions of `engine.driver.scheduling.scheduler` and reports what happens
as its events.
"""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from engine.driver.executors.activity import Activity
from engine.driver.scheduling.messages import (
    CapacityChanged,
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
from engine.errors import EverySampleFailedError, RiskforgeError
from engine.job.plan import ShardSpec
from engine.terminal import redacted

if TYPE_CHECKING:
    from engine.generation.usage import BatchUsage
    from engine.generation.worker import ShardOutcome, ShardProgressCallback

Item = TypeVar("Item")


class WorkerLike(Protocol):
    """Makes shards. Built once in its process, where it holds the models."""

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: ShardProgressCallback, batch_limit: int
    ) -> Callable[[], ShardOutcome]:
        """Make the samples of a shard.

        Args:
            attempt: counted from 1.
            report: called with the number of samples done so far.
            batch_limit: largest batch size known to fit this type of machine; 0 for no limit.

        Returns:
            A function that waits until the shard is committed and returns counts and timing. It is called by another
            thread, while the next shard may be sampled.
        """
        ...


# Picklable. Builds the worker inside its process.
WorkerFactory = Callable[[], WorkerLike]


@dataclass(frozen=True, slots=True)
class ShardResult(ShardDone):
    """A shard is committed, with its counts and timing."""

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
    | CapacityChanged
)


class Executor(Protocol):
    """Runs workers. Their numbers are assigned by the scheduler and never reused."""

    @property
    def opening(self) -> str:
        """What `open` waits for, in words."""
        ...

    def begin(self) -> None:
        """Prepare in the background, if preparation takes time."""
        ...

    def open(self, factory: WorkerFactory, num_shards: int) -> int:
        """Wait until workers can be started.

        Args:
            factory: builds a worker.
            num_shards: shards to make; more workers than that are of no use.

        Returns:
            How many workers can run at a time.

        Raises:
            RiskforgeError: the requested resources do not exist.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The hardware, for the manifest. Only while open."""
        ...

    @property
    def num_unplaced(self) -> int:
        """Workers that were started and have no machine yet."""
        ...

    def start_worker(self, worker: int) -> None:
        """Start a worker; `WorkerPlaced`, then `WorkerReady`, `WorkerLost` or `UserFault` follows."""
        ...

    def submit(self, worker: int, shard: ShardSpec, attempt: int, batch_limit: int = 0) -> None:
        """Queue a shard on a ready worker, which processes them in order; does nothing if it was just lost."""
        ...

    def stop_worker(self, worker: int) -> None:
        """Stop a worker, unless it was just lost, without waiting for it; no event of it follows."""
        ...

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """Events since the last call; waits for the first one, up to the timeout."""
        ...

    def close(self) -> None:
        """Stop all workers and release every resource. May be called after `begin` alone, and twice."""
        ...


@runtime_checkable
class NodeChooser(Protocol):
    """An executor with several machines, which it names in `WorkerPlaced`, and reports in `CapacityChanged`."""

    def avoid_nodes(self, nodes: Collection[str]) -> None:
        """Start no worker on these machines, until this is called again."""
        ...

    def node_name(self, node: str) -> str:
        """What users call a machine."""
        ...


class WorkerHost:
    """Runs a worker in its process. Errors become events, since exceptions do not cross process boundaries.

    Args:
        number: the worker's number.
        report_active: called on heartbeats.

    Attributes:
        has_failed: whether a shard failed; the worker must not be used any more then.
    """

    def __init__(self, number: int, report_active: Callable[[], None] = lambda: None) -> None:
        self._number = number
        self._activity = Activity(report_active)
        self._activity.begin()
        self.has_failed = False

    @property
    def usage(self) -> BatchUsage | None:
        """What the worker's last batch used, if it says so."""
        return getattr(self._worker, "usage", None)

    def close(self) -> None:
        """Stop reporting."""
        self._activity.end()

    def load(self, factory: WorkerFactory) -> WorkerReady | WorkerLost | UserFault:
        """Build the worker."""
        try:
            with self._activity.listen():
                self._worker = factory()
        except RiskforgeError as error:
            return UserFault(str(error), error.exit_code)
        except (Exception, SystemExit):
            return WorkerLost(self._number, node_lost=False, message=redacted(traceback.format_exc().strip()))
        return WorkerReady(self._number)

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: ShardProgressCallback, batch_limit: int = 0
    ) -> Callable[[], ShardResult | ShardError | UserFault]:
        """Make the samples of a shard; the returned function waits for its commit and returns the event."""
        try:
            with self._activity.listen():
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
    """All items of a queue; waits for the first one, up to the timeout."""
    try:
        yield inbox.get(timeout=timeout_seconds)
        while True:
            yield inbox.get_nowait()
    except queue.Empty:
        return

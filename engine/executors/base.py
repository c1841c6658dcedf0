"""The contract of executors: start workers, hand them shards, report what becomes of both.

An executor decides nothing. It carries out the actions of `engine.scheduler` and turns what happens into its events,
and into `ShardProgress`, which is for the eyes of the user.
"""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from engine.errors import RiskforgeError
from engine.plan import ShardSpec
from engine.scheduler import ShardDone, ShardError, UserFault, WorkerLost, WorkerReady

if TYPE_CHECKING:
    from engine.worker import ShardOutcome

Report = Callable[[int], None]
Item = TypeVar("Item")


class WorkerLike(Protocol):
    """What makes shards. Built once in its process, where it holds all models."""

    def run_shard(self, shard: ShardSpec, attempt: int, report: Report) -> ShardOutcome:
        """Make, stage and commit a shard.

        Args:
            attempt: counted from 1.
            report: to be called with the number of samples done so far.

        Returns:
            The outcome: counts and timing of the shard.
        """
        ...


# Picklable. Builds the worker inside its process.
WorkerFactory = Callable[[], WorkerLike]


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """So many samples of a shard are done."""

    worker: int
    shard: int
    num_done: int


@dataclass(frozen=True, slots=True)
class ShardResult(ShardDone):
    """A shard is committed, with what the worker says of it."""

    outcome: ShardOutcome


ExecutorEvent = WorkerReady | ShardProgress | ShardResult | ShardError | WorkerLost | UserFault


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
        """Start a worker; `WorkerReady`, `WorkerLost` or `UserFault` follows."""
        ...

    def submit(self, worker: int, shard: ShardSpec, attempt: int) -> None:
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
    """A worker in its process. What goes wrong there becomes an event: exceptions do not travel."""

    def __init__(self, number: int) -> None:
        self._number = number

    def load(self, factory: WorkerFactory) -> WorkerReady | WorkerLost | UserFault:
        """Build the worker."""
        try:
            self._worker = factory()
        except RiskforgeError as error:
            return UserFault(str(error))
        except Exception:
            return WorkerLost(self._number, node_lost=False, message=traceback.format_exc().strip())
        return WorkerReady(self._number)

    def run_shard(self, shard: ShardSpec, attempt: int, report: Report) -> ShardResult | ShardError | UserFault:
        """Make a shard."""
        try:
            outcome = self._worker.run_shard(shard, attempt, report)
        except RiskforgeError as error:
            return UserFault(str(error))
        except Exception:
            return ShardError(self._number, shard.number, traceback.format_exc().strip())
        return ShardResult(self._number, shard.number, outcome)


def drain(inbox: queue.SimpleQueue[Item], timeout_seconds: float) -> Iterator[Item]:
    """What is in a queue; waits for the first, but no longer than the timeout."""
    try:
        yield inbox.get(timeout=timeout_seconds)
        while True:
            yield inbox.get_nowait()
    except queue.Empty:
        return

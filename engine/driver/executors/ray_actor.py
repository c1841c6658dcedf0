"""The Ray actor: a worker in a process of its own."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from functools import partial

from engine.driver.executors.base import ExecutorEvent, WorkerFactory, WorkerHost
from engine.job.plan import ShardSpec

# The shard last reported on, its samples done, duration of the last batch in seconds, and limit of batch sizes.
Progress = tuple[int, int, float, int]


class RayHost:
    """The actor: runs a worker, and reports its node and its progress.

    A plain class; `ray.remote` is applied by the executor. `progress` and `outcome` run concurrently with `run_shard`,
    in other threads.
    """

    def __init__(self, number: int, threads: int) -> None:
        # Read by the numerical libraries when they are imported, which the worker's factory does.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._num_heartbeats = 0
        self._host = WorkerHost(number, self._note_active)
        self._progress: Progress | None = None
        self._sampled: queue.SimpleQueue[Callable[[], ExecutorEvent]] = queue.SimpleQueue()

    def where(self) -> str:
        """Id of the actor's node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def load(self, factory: WorkerFactory) -> ExecutorEvent:
        """Build the worker."""
        return self._host.load(factory)

    def run_shard(self, shard: ShardSpec, attempt: int, batch_limit: int) -> int:
        """Make the samples of a shard and return its number; `outcome` returns the event."""
        self._report(shard.number, 0)
        self._sampled.put(self._host.sample_shard(shard, attempt, partial(self._report, shard.number), batch_limit))
        return shard.number

    def outcome(self) -> ExecutorEvent:
        """The event of the next shard, in the order of `run_shard`; waits for its commit."""
        return self._sampled.get()()

    def progress(self) -> tuple[Progress | None, int]:
        """The latest progress, and the number of heartbeats so far."""
        return self._progress, self._num_heartbeats

    def _note_active(self) -> None:
        self._num_heartbeats += 1

    def _report(self, shard: int, num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0) -> None:
        self._progress = (shard, num_done, batch_seconds, batch_limit)

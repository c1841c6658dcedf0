"""A third executor, as somebody would add it: a process for each worker. `tests/test_extending.py` installs it.

A thread of the worker's process samples and commits in turn; a process that dies is noticed by its closed pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from engine.driver.executors.base import ExecutorEvent, WorkerFactory, WorkerHost
from engine.driver.scheduling.messages import ShardProgress, ShardSampled, WorkerActive, WorkerLost, WorkerPlaced
from engine.job.plan import ShardSpec

NODE_KIND = "here"
_CONTEXT = multiprocessing.get_context("spawn")


class ProcessExecutor:
    """Runs every worker in a process of this machine. The arguments are those of `ExecutorRecord.make`."""

    opening = "starting processes"
    num_unplaced = 0

    def __init__(self, *, address: str | None, num_workers: int | None, device: str) -> None:
        self._num_workers = num_workers or 1
        self._workers: dict[int, tuple[Any, Connection]] = {}

    def begin(self) -> None:
        """Nothing to prepare."""

    def open(self, factory: WorkerFactory, num_shards: int) -> int:
        """Remember how to build workers."""
        self._factory = factory
        return min(self._num_workers, num_shards)

    def describe(self) -> dict[str, Any]:
        """The hardware, for the manifest."""
        return {"executor": "process", "workers": self._num_workers}

    def start_worker(self, worker: int) -> None:
        """Start a process that builds the worker and waits for shards."""
        here, there = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(worker, self._factory, there), daemon=True)
        process.start()
        # Its copy here would keep the pipe open after the death of the process.
        there.close()
        self._workers[worker] = (process, here)

    def submit(self, worker: int, shard: ShardSpec, attempt: int, batch_limit: int = 0) -> None:
        """Queue a shard in the pipe of a worker."""
        if worker in self._workers:
            with contextlib.suppress(OSError):
                self._workers[worker][1].send((shard, attempt, batch_limit))

    def stop_worker(self, worker: int) -> None:
        """End the process of a worker."""
        if worker in self._workers:
            process, pipe = self._workers.pop(worker)
            process.terminate()
            pipe.close()

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """An event of each worker that has some."""
        owners = {pipe: worker for worker, (_, pipe) in self._workers.items()}
        return [self._receive(owners[pipe]) for pipe in wait(list(owners), timeout_seconds)]

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._workers):
            self.stop_worker(worker)

    def _receive(self, worker: int) -> ExecutorEvent:
        try:
            event: ExecutorEvent = self._workers[worker][1].recv()
        except (EOFError, OSError):
            self.stop_worker(worker)
            return WorkerLost(worker, node_lost=False, message="its process ended")
        return event


def _work(worker: int, factory: WorkerFactory, pipe: Connection) -> None:
    """The main function of a worker's process, which ends with the driver's end of the pipe."""
    sending = threading.Lock()

    def report(event: ExecutorEvent) -> None:
        with sending:
            pipe.send(event)

    report(WorkerPlaced(worker, NODE_KIND))
    host = WorkerHost(worker, lambda: report(WorkerActive(worker)))
    report(host.load(factory))
    with contextlib.suppress(EOFError, OSError):
        while not host.has_failed:
            _make_shard(worker, host, report, *pipe.recv())


def _make_shard(
    worker: int, host: WorkerHost, report: Callable[[ExecutorEvent], None], shard: ShardSpec, attempt: int, limit: int
) -> None:
    def progress(num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0) -> None:
        report(ShardProgress(worker, shard.number, num_done, batch_seconds, batch_limit))

    finish = host.sample_shard(shard, attempt, progress, limit)
    report(ShardSampled(worker, shard.number))
    report(finish())

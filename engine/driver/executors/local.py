"""Workers as threads of this process: no cluster, nothing to start. The reference that tests compare Ray with."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from engine.driver.executors.base import ExecutorEvent, WorkerFactory, WorkerHost, drain
from engine.driver.scheduling.messages import ShardProgress, ShardSampled, WorkerActive, WorkerPlaced
from engine.job.plan import ShardSpec
from engine.models.gpu_sharing import GpuShare, sharing_gpu

Inbox = queue.SimpleQueue[tuple[ShardSpec, int, int] | None]
NODE_KIND = "here"


def make_local_executor(*, address: str | None, num_workers: int | None, device: str) -> LocalExecutor:
    """An executor with one worker by default; the arguments are those of `ExecutorRecord.make`."""
    return LocalExecutor(num_workers or 1)


class LocalExecutor:
    """Runs every worker in a thread of its own.

    A thread cannot be stopped from outside: a stopped worker finishes its shard in flight, whose events are dropped,
    and starts no other. A worker that failed at a shard ends by itself.

    Args:
        num_workers: workers at a time.
    """

    opening = "starting workers"
    num_unplaced = 0

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._inboxes: dict[int, Inbox] = {}
        self._loading = threading.Lock()
        self._waiting: set[int] = set()
        self._events: queue.SimpleQueue[tuple[int, ExecutorEvent]] = queue.SimpleQueue()

    def begin(self) -> None:
        """Nothing to prepare."""

    def open(self, factory: WorkerFactory, num_shards: int) -> int:
        """Remember how to build workers."""
        self._factory = factory
        num_workers = min(self._num_workers, num_shards)
        # All on the same GPU, if there is one.
        self._share = GpuShare(memory=1 / num_workers)
        return num_workers

    def describe(self) -> dict[str, Any]:
        """This machine."""
        return {"executor": "local", "workers": self._num_workers, "cpu_cores": os.cpu_count()}

    def start_worker(self, worker: int) -> None:
        """Start a thread that builds the worker and waits for shards."""
        inbox = self._inboxes[worker] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(worker, inbox), name=f"worker-{worker}", daemon=True).start()

    def submit(self, worker: int, shard: ShardSpec, attempt: int, batch_limit: int = 0) -> None:
        """Queue a shard on a worker."""
        self._inboxes[worker].put((shard, attempt, batch_limit))

    def stop_worker(self, worker: int) -> None:
        """Remove the queued shards of a thread, which ends after its shard in flight."""
        inbox = self._inboxes.pop(worker)
        with contextlib.suppress(queue.Empty):
            while True:
                inbox.get_nowait()
        inbox.put(None)

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """Events of running workers since the last call."""
        return [event for worker, event in drain(self._events, timeout_seconds) if worker in self._inboxes]

    def close(self) -> None:
        """Stop all workers."""
        for worker in list(self._inboxes):
            self.stop_worker(worker)

    def _run(self, worker: int, inbox: Inbox) -> None:
        """A worker's thread; a second thread waits for its commits."""
        host = WorkerHost(worker, partial(self._report_active, worker))
        self._events.put((worker, WorkerPlaced(worker, NODE_KIND, machine=socket.gethostname())))
        self._waiting.add(worker)
        # One at a time: libraries that load models patch the construction of modules for all threads meanwhile.
        with self._loading:
            self._waiting.discard(worker)
            with sharing_gpu(self._share):
                ready = host.load(self._factory)
        self._events.put((worker, ready))
        with ThreadPoolExecutor(1, thread_name_prefix=f"commits-{worker}") as commits:
            while not host.has_failed and (item := inbox.get()) is not None:
                shard, attempt, batch_limit = item
                report = partial(self._report, worker, host, shard.number)
                finish = host.sample_shard(shard, attempt, report, batch_limit)
                self._events.put((worker, ShardSampled(worker, shard.number)))
                try:
                    commits.submit(self._finish, worker, finish)
                except RuntimeError:
                    # The process ends, and takes no more work; the shard is made again by the next run.
                    break
        host.close()

    def _report_active(self, worker: int) -> None:
        """Report a heartbeat, also for the workers that wait for this one to load."""
        for active in (worker, *tuple(self._waiting)):
            self._events.put((active, WorkerActive(active)))

    def _report(
        self, worker: int, host: WorkerHost, shard: int, num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0
    ) -> None:
        self._events.put((worker, ShardProgress(worker, shard, num_done, batch_seconds, batch_limit, host.usage)))

    def _finish(self, worker: int, finish: Callable[[], ExecutorEvent]) -> None:
        self._events.put((worker, finish()))

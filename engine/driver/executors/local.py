"""Workers as threads of this process: no cluster, nothing to start. The oracle in tests of the others."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from engine.driver.executors.base import ExecutorEvent, Host, WorkerFactory, drain
from engine.generation.messages import ShardProgress, ShardSampled, WorkerActive, WorkerPlaced
from engine.job.plan import ShardSpec

Inbox = queue.SimpleQueue[tuple[ShardSpec, int, int] | None]
NODE_KIND = "here"


class LocalExecutor:
    """Runs every worker in a thread of its own.

    A thread cannot be ended from outside: one that was stopped finishes the shard it has in work, unseen, and begins no
    other. One that failed at a shard ends by itself.

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
        """Remember how workers are built."""
        self._factory = factory
        return min(self._num_workers, num_shards)

    def describe(self) -> dict[str, Any]:
        """This machine."""
        return {"executor": "local", "workers": self._num_workers, "cpu_cores": os.cpu_count()}

    def start_worker(self, worker: int) -> None:
        """Start a thread that builds the worker and waits for shards."""
        inbox = self._inboxes[worker] = queue.SimpleQueue()
        threading.Thread(target=self._live, args=(worker, inbox), name=f"worker-{worker}", daemon=True).start()

    def submit(self, worker: int, shard: ShardSpec, attempt: int, batch_limit: int = 0) -> None:
        """Queue a shard on a worker."""
        self._inboxes[worker].put((shard, attempt, batch_limit))

    def stop_worker(self, worker: int) -> None:
        """Take the queued shards from a thread, which ends after the one it has in work."""
        inbox = self._inboxes.pop(worker)
        with contextlib.suppress(queue.Empty):
            while True:
                inbox.get_nowait()
        inbox.put(None)

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """What happened since the last call."""
        return [event for worker, event in drain(self._events, timeout_seconds) if worker in self._inboxes]

    def close(self) -> None:
        """Stop all workers."""
        for worker in list(self._inboxes):
            self.stop_worker(worker)

    def _live(self, worker: int, inbox: Inbox) -> None:
        """A worker's life, in its thread; a second one waits for its commits."""
        host = Host(worker, partial(self._report_active, worker))
        self._events.put((worker, WorkerPlaced(worker, NODE_KIND)))
        self._waiting.add(worker)
        # One at a time: libraries that load models change how every thread makes modules meanwhile.
        with self._loading:
            self._waiting.discard(worker)
            ready = host.load(self._factory)
        self._events.put((worker, ready))
        with ThreadPoolExecutor(1, thread_name_prefix=f"commits-{worker}") as commits:
            while not host.has_failed and (item := inbox.get()) is not None:
                shard, attempt, batch_limit = item
                report = partial(self._report, worker, shard.number)
                finish = host.sample_shard(shard, attempt, report, batch_limit)
                self._events.put((worker, ShardSampled(worker, shard.number)))
                commits.submit(self._finish, worker, finish)
        host.close()

    def _report_active(self, worker: int) -> None:
        """Who waits for its turn to load gets further with the one that loads."""
        for one in (worker, *tuple(self._waiting)):
            self._events.put((one, WorkerActive(one)))

    def _report(self, worker: int, shard: int, num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0) -> None:
        self._events.put((worker, ShardProgress(worker, shard, num_done, batch_seconds, batch_limit)))

    def _finish(self, worker: int, finish: Callable[[], ExecutorEvent]) -> None:
        self._events.put((worker, finish()))

"""A worker in a process that the fork server has forked, and the actor's end of the connection to it.

An actor sends what `WorkerHost` is called with; the worker's process sends heartbeats, progress and events. Each end is
lost with the other; `fork_server` says how.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from engine.driver.executors.base import ExecutorEvent, WorkerFactory, WorkerHost
from engine.driver.executors.worker_output import show_crashes
from engine.job.plan import ShardSpec
from engine.models.gpu_sharing import GpuShare, sharing_gpu

if TYPE_CHECKING:
    from engine.generation.usage import BatchUsage
    from engine.generation.worker import ShardProgressCallback

# How long an actor waits for the server, which may still be importing; then it builds the worker itself.
FORK_SECONDS = 120.0
# What a message of the worker's process is.
_FORKED, _HEARTBEAT, _PROGRESS, _ANSWER, _OUTCOME = range(5)


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What a forked process takes over from the actor that it works for.

    Attributes:
        worker: the worker's number.
    """

    worker: int
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str = field(default_factory=os.getcwd)
    path: list[str] = field(default_factory=lambda: list(sys.path))

    def apply(self) -> None:
        """Take it over.

        Side effects: replaces the environment, the working folder and the import path of this process.
        """
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.path[:] = self.path


class ForkedHost:
    """The `WorkerHost` of a process of its own, as its actor sees it. This process ends with that one.

    Args:
        connection: to the process.
        report_active: called on its heartbeats.
        dump: pickles a worker's factory.

    Attributes:
        usage: of the worker's last batch.
    """

    def __init__(
        self, connection: Connection, report_active: Callable[[], None], dump: Callable[[WorkerFactory], bytes]
    ) -> None:
        self.usage: BatchUsage | None = None
        self._connection = connection
        self._report_active = report_active
        self._dump = dump
        self._answers: queue.SimpleQueue[ExecutorEvent | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[ExecutorEvent] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="forked", daemon=True).start()

    def load(self, factory: WorkerFactory) -> ExecutorEvent:
        """Have the worker built."""
        self._connection.send_bytes(self._dump(factory))
        event = self._answers.get()
        assert event is not None
        return event

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: ShardProgressCallback, batch_limit: int = 0
    ) -> Callable[[], ExecutorEvent]:
        """Have the samples of a shard made; the returned function waits for its commit and returns the event."""
        self._report = report
        self._connection.send((shard, attempt, batch_limit))
        self._answers.get()
        return self._outcomes.get

    def _listen(self) -> None:
        """Distribute what the process sends until it ends."""
        try:
            while True:
                kind, content = self._connection.recv()
                if kind == _HEARTBEAT:
                    self._report_active()
                elif kind == _PROGRESS:
                    self.usage, *progress = content
                    self._report(*progress)
                else:
                    (self._outcomes if kind == _OUTCOME else self._answers).put(content)
        finally:
            # By the signal that mostly ended the other one, so that Ray gives the same reasons.
            os.kill(os.getpid(), signal.SIGKILL)


def request_worker(address: str, worker: int, seconds: float = FORK_SECONDS) -> Connection | None:
    """A connection to a process that is forked for this one, with the same environment, folder and output.

    Args:
        address: of the server's socket.
        worker: its number.
        seconds: how long to wait for the server.

    Returns:
        None if there is no server any more, or it takes too long.
    """
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(address)
            socket.send_fds(client, [b"f"], [1, 2])
            connection = Connection(client.detach())
            connection.send(ProcessState(worker))
            if connection.poll(seconds) and connection.recv() == (_FORKED, None):
                return connection
        except (OSError, EOFError):
            pass
    return None


def serve_worker(connection: Connection) -> None:
    """Run a worker in this process, which was forked for it, until the actor ends."""
    state: ProcessState = connection.recv()
    state.apply()
    show_crashes()
    send = _Sender(connection)
    send(_FORKED)
    host = WorkerHost(state.worker, partial(send, _HEARTBEAT))
    factory = connection.recv_bytes()
    with sharing_gpu(GpuShare(owns_process=True)):
        # Also what the factory imports may fail.
        send(_ANSWER, host.load(lambda: pickle.loads(factory)()))
    with ThreadPoolExecutor(1, thread_name_prefix="commits") as commits:
        while True:
            shard, attempt, batch_limit = connection.recv()
            finish = host.sample_shard(shard, attempt, partial(send.progress, host), batch_limit)
            send(_ANSWER)
            commits.submit(send.outcome, finish)


class _Sender:
    """Sends to the actor, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def __call__(self, kind: int, content: Any = None) -> None:
        with self._lock:
            self._connection.send((kind, content))

    def progress(self, host: WorkerHost, num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0) -> None:
        """A `ShardProgressCallback` for the worker of a host."""
        self(_PROGRESS, (host.usage, num_done, batch_seconds, batch_limit))

    def outcome(self, finish: Callable[[], ExecutorEvent]) -> None:
        """Wait for a commit and send its event."""
        self(_OUTCOME, finish())

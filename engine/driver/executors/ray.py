"""Workers as Ray actors.

Ray provides processes, placement and transport; it neither retries nor restarts anything, which is the scheduler's
task. Ray is imported only by the modules `ray`, `ray_actor` and `ray_cluster` of this package, inside functions.
"""

from __future__ import annotations

import gc
import queue
import time
from dataclasses import dataclass
from typing import Any

from engine.driver.executors.base import ExecutorEvent, WorkerFactory, drain
from engine.driver.executors.fork_server import ForkServer
from engine.driver.executors.ray_actor import Progress, RayHost
from engine.driver.executors.ray_cluster import RayCluster
from engine.driver.executors.ray_layout import divide
from engine.driver.scheduling.messages import (
    ShardProgress,
    ShardSampled,
    WorkerActive,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.job.plan import ShardSpec

# Busy workers are asked for their progress twice a second, or less often, so that this many requests are sent a second.
ASK_SECONDS = 0.5
MAX_ASKS_PER_SECOND = 200


@dataclass(slots=True)
class Handle:
    """The driver's view of an actor.

    Attributes:
        node: id of its node, empty until it is known.
        is_ready: whether its worker is built.
        num_queued: shards submitted and not answered.
        is_asked: whether it was asked for its progress and has not answered.
    """

    actor: Any
    node: str = ""
    is_ready: bool = False
    num_queued: int = 0
    is_asked: bool = False
    progress: Progress | None = None
    num_heartbeats: int = 0


class RayExecutor:
    """Runs every worker as an actor, on a cluster of our own or on the one at `address`.

    Args:
        address: a running cluster (`auto` or `host:port`), or None to start one here.
        num_workers: actors, or None for one per GPU, or one per CPU core, up to sixteen per node and one per 2 GB of
            its memory.
        device: `auto`, `cpu` or `cuda`, as in the job.
    """

    def __init__(self, *, address: str | None, num_workers: int | None, device: str) -> None:
        self._address = address
        self._num_workers = num_workers
        self._device = device
        self._cluster = RayCluster(address, num_workers)
        self._fork_server: ForkServer | None = None
        self._factory: Any = None
        self._actor_class: Any = None
        self._handles: dict[int, Handle] = {}
        self._node_kinds: dict[str, str] = {}
        self._answers: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._next_ask = 0.0

    @property
    def opening(self) -> str:
        """What `open` waits for."""
        return self._cluster.opening

    def begin(self) -> None:
        """Load Ray and start or join the cluster, in the background; once."""
        self._cluster.begin()

    def open(self, factory: WorkerFactory, num_shards: int) -> int:
        """Wait for the cluster and divide it among workers."""
        self.begin()
        self._cluster.wait()
        import ray

        self._nodes = self._cluster.resources()
        self._layout = divide(self._nodes, self._device, self._num_workers, num_shards, is_own=self._address is None)
        if self._shares_imports():
            self._fork_server = ForkServer()
        self._factory = ray.put(factory)
        self._actor_class = ray.remote(concurrency_groups={"side": 1, "commits": 1})(RayHost)
        return self._layout.num_workers

    def _shares_imports(self) -> bool:
        """Whether workers are forked: several on this machine, without a GPU, whose libraries forbid it."""
        return self._address is None and not self._layout.workers_per_gpu and self._layout.num_workers > 1

    def describe(self) -> dict[str, Any]:
        """The cluster as it was when it was opened."""
        kinds = {
            name.partition(":")[2] for node in self._nodes for name in node if name.startswith("accelerator_type:")
        }
        shared = {"workers_per_gpu": self._layout.workers_per_gpu} if self._layout.workers_per_gpu else {}
        return {
            "executor": "ray",
            "workers": self._layout.num_workers,
            "nodes": len(self._nodes),
            "cpu_cores": int(sum(node.get("CPU", 0) for node in self._nodes)),
            "gpus": int(sum(node.get("GPU", 0) for node in self._nodes)),
            "accelerators": ", ".join(sorted(kinds)),
            **shared,
        }

    @property
    def num_unplaced(self) -> int:
        """Actors that no node has the resources for yet, or that have just been created."""
        return sum(not handle.node for handle in self._handles.values())

    def start_worker(self, worker: int) -> None:
        """Create an actor and let it load its models."""
        self._cluster.await_head()
        options = self._actor_class.options(max_restarts=0, max_task_retries=0, **self._layout.resources)
        fork_server = self._fork_server.address if self._fork_server else ""
        actor = options.remote(worker, self._layout.threads, self._layout.workers_per_gpu, fork_server)
        self._handles[worker] = Handle(actor)
        self._expect(worker, "where", actor.where.options(concurrency_group="side").remote())
        self._expect(worker, "event", actor.load.remote(self._factory))

    def submit(self, worker: int, shard: ShardSpec, attempt: int, batch_limit: int = 0) -> None:
        """Queue a shard on an actor."""
        if handle := self._handles.get(worker):
            handle.num_queued += 1
            self._expect(worker, "sampled", handle.actor.run_shard.remote(shard, attempt, batch_limit))
            self._expect(worker, "shard", handle.actor.outcome.options(concurrency_group="commits").remote())

    def stop_worker(self, worker: int) -> None:
        """Kill an actor."""
        import ray

        if handle := self._handles.pop(worker, None):
            ray.kill(handle.actor, no_restart=True)

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """Events since the last call.

        Raises:
            ClusterLostError: the cluster does not answer any more.
        """
        self._cluster.check()
        self._ask_progress()
        events: list[ExecutorEvent] = []
        for worker, kind, future in drain(self._answers, timeout_seconds):
            if worker in self._handles and (event := self._event(worker, kind, future)):
                events.append(event)
        return events

    def close(self) -> None:
        """Kill the actors and shut down or leave the cluster."""
        # References to Ray's objects go first, also those in cycles: Ray ends the process if one is released during
        # its shutdown.
        self._handles.clear()
        self._factory = self._actor_class = None
        self._answers = queue.SimpleQueue()
        gc.collect()
        self._cluster.close()
        if self._fork_server:
            self._fork_server.close()

    def _expect(self, worker: int, kind: str, reference: Any) -> None:
        """Have the answer to a call put into the queue."""
        reference.future().add_done_callback(lambda future: self._answers.put((worker, kind, future)))

    def _event(self, worker: int, kind: str, future: Any) -> ExecutorEvent | None:
        """The event that an answer stands for, if any."""
        import ray.exceptions

        handle = self._handles[worker]
        error = future.exception()
        if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
            return self._lost(worker, error)
        answer = future.result()
        if kind == "sampled":
            return ShardSampled(worker, answer)
        if kind == "where":
            handle.node = answer
            return WorkerPlaced(worker, self._node_kind(answer))
        if kind == "progress":
            return _progress_event(worker, handle, answer)
        if kind == "shard":
            handle.num_queued -= 1
        event: ExecutorEvent = answer
        handle.is_ready |= isinstance(event, WorkerReady)
        return event

    def _node_kind(self, node: str) -> str:
        """Type of a node, by which limits of batch sizes are remembered: its accelerators, and its memory in GB."""
        if node not in self._node_kinds:
            for listed in self._cluster.nodes():
                resources = listed["Resources"]
                names = sorted(name for name in resources if name.startswith("accelerator_type:"))
                memory = round(resources.get("memory", 0) / 2**30)
                self._node_kinds[listed["NodeID"]] = " ".join([*names, f"{memory} GB"])
        return self._node_kinds.get(node, "")

    def _lost(self, worker: int, error: Exception) -> WorkerLost:
        """An actor does not answer any more: it was lost with its node, or alone.

        An actor that is merely unreachable is killed and counts as lost with its node: nothing indicates that its
        shard is at fault.
        """
        import ray.exceptions

        node = self._handles[worker].node
        is_alive = {listed["NodeID"]: listed["Alive"] for listed in self._cluster.nodes()}
        is_unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
        node_lost = is_unreachable or (node != "" and not is_alive.get(node, False))
        self.stop_worker(worker)
        what = "the worker's node was lost" if node_lost else "the worker's process died"
        return WorkerLost(worker, node_lost=node_lost, message=f"{what}: {error}")

    def _ask_progress(self) -> None:
        now = time.monotonic()
        if now < self._next_ask:
            return
        self._next_ask = now + max(ASK_SECONDS, len(self._handles) / MAX_ASKS_PER_SECOND)
        for worker, handle in self._handles.items():
            if (handle.num_queued or (handle.node and not handle.is_ready)) and not handle.is_asked:
                handle.is_asked = True
                self._expect(worker, "progress", handle.actor.progress.options(concurrency_group="side").remote())


def _progress_event(
    worker: int, handle: Handle, answer: tuple[Progress | None, int]
) -> ShardProgress | WorkerActive | None:
    """The news in an actor's answer about its progress, if any."""
    handle.is_asked = False
    progress, num_heartbeats = answer
    if progress is not None and progress != handle.progress:
        handle.progress = progress
        return ShardProgress(worker, *progress)
    is_active, handle.num_heartbeats = num_heartbeats != handle.num_heartbeats, num_heartbeats
    return WorkerActive(worker) if is_active else None

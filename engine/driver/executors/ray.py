"""Workers as Ray actors.

Ray provides processes, placement and transport; it neither retries nor restarts anything, which is the scheduler's
task. Ray is imported only by the modules `ray`, `ray_actor` and `ray_cluster` of this package, inside functions.
"""

from __future__ import annotations

import gc
import queue
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from engine.driver.executors.base import ExecutorEvent, WorkerFactory, drain
from engine.driver.executors.fork_server import ForkServer
from engine.driver.executors.ray_actor import Progress, RayHost
from engine.driver.executors.ray_cluster import RayCluster
from engine.driver.executors.ray_layout import divide, lacking, machine_names, machines_for, workers_that_fit
from engine.driver.executors.ray_metrics import RayMetrics, check_packages, check_port
from engine.driver.executors.software import software, software_problem
from engine.driver.executors.worker_output import read_tails
from engine.driver.metrics import Reading
from engine.driver.scheduling.messages import (
    CapacityChanged,
    ShardProgress,
    ShardSampled,
    UserFault,
    WorkerActive,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.errors import JobError
from engine.job.plan import ShardSpec
from engine.job.resources import ResourcesSpec

# Busy workers are asked for their progress twice a second, or less often, so that this many requests are sent a second.
ASK_SECONDS = 0.5
MAX_ASKS_PER_SECOND = 200
# How often the machines of a cluster are counted, and the label by which Ray names them.
LOOK_SECONDS = 3.0
NODE_LABEL = "ray.io/node-id"
# How long the loss of a worker on another machine waits for its last output.
TAIL_SECONDS = 10.0


@dataclass(slots=True)
class Handle:
    """The driver's view of an actor.

    Attributes:
        node: id of its node, empty until it is known.
        is_ready: whether its worker is built.
        num_queued: shards submitted and not answered.
        is_asked: whether it was asked for its progress and has not answered.
        output: files with its output, on its node.
        lost: what to report once its last output is here, None while it lives; and until when to wait for that.
    """

    actor: Any
    node: str = ""
    is_ready: bool = False
    num_queued: int = 0
    is_asked: bool = False
    progress: Progress | None = None
    num_heartbeats: int = 0
    output: tuple[str, ...] = ()
    lost: WorkerLost | None = None
    wait_until: float = 0.0
    # Ray cancels a task to whose result nothing refers.
    tail: Any = None


class RayExecutor:
    """Runs every worker as an actor, on a cluster of our own or on the one at `address`.

    Args:
        address: a running cluster (`auto` or `host:port`), or None to start one here.
        num_workers: actors, or None for one per GPU, or one per CPU core, up to sixteen per node and one per 2 GB of
            its memory.
        device: `auto`, `cpu` or `cuda`, as in the job.
        resources: what the job wants each worker to take of a machine.
    """

    def __init__(
        self, *, address: str | None, num_workers: int | None, device: str, resources: ResourcesSpec | None = None
    ) -> None:
        self._address = address
        self._num_workers = num_workers
        self._device = device
        self._asked = resources or ResourcesSpec()
        self._cluster = RayCluster(address, num_workers)
        self._fork_server: ForkServer | None = None
        self._factory: Any = None
        self._actor_class: Any = None
        self._handles: dict[int, Handle] = {}
        self._node_kinds: dict[str, str] = {}
        self._machines: dict[str, str] = {}
        self._answers: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._next_ask = 0.0
        self._next_look = 0.0
        self._capacity: CapacityChanged | None = None
        self._avoided: frozenset[str] = frozenset()
        self._most_workers = 0
        self._software: dict[str, str] = {}
        self._metrics = RayMetrics()

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

        is_own = self._address is None
        machines = self._cluster.machines()
        self._nodes = [machine.resources for machine in machines]
        # A number of workers asks the cluster for machines that it may not have yet.
        if (is_own or self._num_workers is None) and (problem := lacking(machines, self._asked)):
            wait = "" if is_own else ", or give --workers N to wait for such machines"
            raise JobError(f"runtime.resources.{problem}; leave it out{wait}")
        fitting = [machine.resources for machine in machines_for(machines, self._asked)]
        self._layout = divide(fitting, self._device, self._num_workers, num_shards, is_own=is_own, asked=self._asked)
        self._software = {} if is_own else software()
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
            "workers": max(self._most_workers, self._layout.num_workers),
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
        options = self._actor_class.options(
            max_restarts=0, max_task_retries=0, label_selector=self._labels() or None, **self._layout.resources
        )
        fork_server = self._fork_server.address if self._fork_server else ""
        actor = options.remote(worker, self._layout.threads, self._layout.workers_per_gpu, fork_server)
        self._handles[worker] = Handle(actor)
        self._most_workers = max(self._most_workers, len(self._handles))
        self._expect(worker, "where", actor.where.options(concurrency_group="side").remote(bool(self._software)))
        self._expect(worker, "output", actor.output.options(concurrency_group="side").remote())
        self._expect(worker, "event", actor.load.remote(self._factory))

    def _labels(self) -> dict[str, str]:
        """Labels that select the machines for a worker."""
        avoided = {NODE_LABEL: f"!in({', '.join(sorted(self._avoided))})"} if self._avoided else {}
        return avoided | self._asked.label_selector

    def avoid_nodes(self, nodes: Collection[str]) -> None:
        """Start no worker on these nodes."""
        self._avoided = frozenset(nodes)
        self._next_look = 0.0

    def node_name(self, node: str) -> str:
        """The host of a node."""
        return self._machines.get(node) or node

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
        events: list[ExecutorEvent] = list(self._look())
        for worker, kind, future in drain(self._answers, timeout_seconds):
            if worker in self._handles and (event := self._event(worker, kind, future)):
                events.append(event)
        return events + self._overdue(time.monotonic())

    def serve_metrics(self, port: int) -> None:
        """Export metrics at this port of the loopback address.

        Raises:
            JobError: a running cluster has its own ports, or the port is in use.
        """
        if self._address:
            raise JobError(
                "--metrics-port: is for Ray on this machine; a running cluster exports at the port of its"
                " `ray start --metrics-export-port`: omit it"
            )
        check_packages()
        check_port(port)
        self._cluster.metrics_port = port

    def publish_metrics(self, run: str, readings: list[Reading]) -> None:
        """Publish them through Ray's agents, where there are any."""
        self._metrics.publish(run, readings)

    def close(self) -> None:
        """Kill the actors and shut down or leave the cluster."""
        # References to Ray's objects go first, also those in cycles: Ray ends the process if one is released during
        # its shutdown.
        self._handles.clear()
        self._factory = self._actor_class = None
        self._answers = queue.SimpleQueue()
        self._metrics = RayMetrics()
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
        if handle.lost is not None:
            return self._with_output(worker, "" if error else future.result()) if kind == "tail" else None
        if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
            return self._lost(worker, error)
        answer = future.result()
        if kind == "sampled":
            return ShardSampled(worker, answer)
        if kind == "where":
            return self._placed(worker, handle, *answer)
        if kind == "memory":
            return self._measured(worker, *answer)
        if kind == "progress":
            return self._progress(worker, handle, answer)
        if kind == "output":
            handle.output = answer
            return None
        if kind == "shard":
            handle.num_queued -= 1
        event: ExecutorEvent = answer
        handle.is_ready |= isinstance(event, WorkerReady)
        return event

    def _look(self) -> list[CapacityChanged]:
        """How many workers the cluster has room for, if that has changed; asked every few seconds."""
        now = time.monotonic()
        if now < self._next_look or not (self._address or self._asked.num_gpus == "auto"):
            return []
        machines = machines_for(self._cluster.machines(), self._asked)
        self._next_look = now + max(LOOK_SECONDS, len(machines) / MAX_ASKS_PER_SECOND)
        room = {machine.node: self._layout.room(machine.resources) for machine in machines}
        num = sum(num for node, num in room.items() if node not in self._avoided)
        if self._layout.is_measuring:
            num = 1
        elif self._num_workers is not None:
            num = self._num_workers
        capacity = CapacityChanged(num, tuple(sorted(node for node, num in room.items() if num)))
        if capacity == self._capacity:
            return []
        self._capacity = capacity
        return [capacity]

    def _placed(self, worker: int, handle: Handle, node: str, there: dict[str, str]) -> WorkerPlaced | UserFault:
        handle.node = node
        kind = self._node_kind(node)
        if problem := software_problem(self._software, there, self.node_name(node)):
            return UserFault(problem)
        return WorkerPlaced(worker, kind, node, self._machines.get(node, ""))

    def _progress(self, worker: int, handle: Handle, answer: tuple[Progress | None, int]) -> ExecutorEvent | None:
        event = _progress_event(worker, handle, answer)
        if self._layout.is_measuring and isinstance(event, ShardProgress) and event.batch_seconds:
            self._expect(worker, "memory", handle.actor.memory.options(concurrency_group="side").remote())
        return event

    def _measured(self, worker: int, peak: int, total: int) -> WorkerLost | None:
        """The first batch is made: from now on workers take as much of a GPU as it needed.

        The worker that has a whole GPU to itself makes room for several, unless it needs that.
        """
        if not self._layout.is_measuring:
            return None
        num = workers_that_fit(peak, total)
        self._layout = self._layout.shared_by(num)
        self._next_look = 0.0
        if num == 1:
            return None
        self.stop_worker(worker)
        used = f"{peak / 2**30:.1f} of {total / 2**30:.0f} GiB"
        return WorkerLost(worker, node_lost=True, message=f"it used {used} of its GPU, which {num} workers share now")

    def _node_kind(self, node: str) -> str:
        """Type of a node, by which limits of batch sizes are remembered: its accelerators, and its memory in GB."""
        if node not in self._node_kinds:
            nodes = self._cluster.nodes()
            self._machines = machine_names(nodes)
            for listed in nodes:
                resources = listed["Resources"]
                names = sorted(name for name in resources if name.startswith("accelerator_type:"))
                memory = round(resources.get("memory", 0) / 2**30)
                self._node_kinds[listed["NodeID"]] = " ".join([*names, f"{memory} GB"])
        return self._node_kinds.get(node, "")

    def _lost(self, worker: int, error: Exception) -> WorkerLost | None:
        """An actor does not answer any more: it was lost with its node, or alone. Then its output is read first.

        An actor that is merely unreachable is killed and counts as lost with its node: nothing indicates that its
        shard is at fault.
        """
        import ray.exceptions

        node = self._handles[worker].node
        is_alive = {listed["NodeID"]: listed["Alive"] for listed in self._cluster.nodes()}
        is_unreachable = isinstance(error, ray.exceptions.ActorUnavailableError)
        node_lost = is_unreachable or (node != "" and not is_alive.get(node, False))
        what = "the worker's node was lost" if node_lost else "the worker's process died"
        lost = WorkerLost(worker, node_lost=node_lost, message=f"{what}: {error}")
        handle = self._handles[worker]
        if node_lost or not handle.output:
            self.stop_worker(worker)
            return lost
        handle.lost = lost
        if self._address is None:
            return self._with_output(worker, read_tails(handle.output))
        handle.wait_until = time.monotonic() + TAIL_SECONDS
        handle.tail = _tails_on(node, handle.output)
        self._expect(worker, "tail", handle.tail)
        return None

    def _with_output(self, worker: int, tail: str) -> WorkerLost:
        """The event of a lost worker, with its last output."""
        lost = self._handles[worker].lost
        assert lost is not None
        self.stop_worker(worker)
        return replace(lost, message=f"{lost.message}\n{tail}" if tail else lost.message)

    def _overdue(self, now: float) -> list[ExecutorEvent]:
        """The events of lost workers whose output does not come."""
        overdue = [worker for worker, handle in self._handles.items() if handle.lost and now >= handle.wait_until]
        return [self._with_output(worker, "") for worker in overdue]

    def _ask_progress(self) -> None:
        now = time.monotonic()
        if now < self._next_ask:
            return
        self._next_ask = now + max(ASK_SECONDS, len(self._handles) / MAX_ASKS_PER_SECOND)
        for worker, handle in self._handles.items():
            is_busy = handle.num_queued or (handle.node and not handle.is_ready)
            if is_busy and not handle.is_asked and handle.lost is None:
                handle.is_asked = True
                self._expect(worker, "progress", handle.actor.progress.options(concurrency_group="side").remote())


def _tails_on(node: str, files: tuple[str, ...]) -> Any:
    """Have the ends of files read on a node; a reference to the text."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(read_tails).options(scheduling_strategy=place).remote(files)


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

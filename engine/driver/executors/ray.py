"""Workers as Ray actors. The only module that imports Ray, and only where it is used.

Ray carries processes, placement and transport; it retries and restarts nothing, that is the scheduler's. A cluster of
our own is started and ended with the run, touches no file outside a temporary folder, and knows no other cluster.
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import queue
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from engine.driver.executors.base import ExecutorEvent, Host, WorkerFactory, drain
from engine.errors import EXIT_DRAINED, ClusterLostError, JobError, RiskforgeError, first_line
from engine.generation.messages import ShardProgress, ShardSampled, WorkerActive, WorkerLost, WorkerPlaced, WorkerReady
from engine.job.plan import ShardSpec

MAX_CPU_WORKERS_PER_NODE = 16
# What a worker with models is reckoned to need where nobody says how many there are to be.
CPU_WORKER_BYTES = 2 * 2**30
# The driver asks busy workers for their progress: twice a second, or so that it asks this many a second.
ASK_SECONDS = 0.5
MAX_ASKS_PER_SECOND = 200
# Messages between driver and actors pass through Ray's object store, no images. What `prepare` has seen may be more
# than this; Ray then puts it into a file in its temporary folder.
OBJECT_STORE_BYTES = 100 * 2**20
CLOSE_SECONDS = 15.0
CONNECT_SECONDS = 10.0
ACCEPT_SECONDS = 2.0
LOOPBACK = "127.0.0.1"
DEATH_REASON_MILLISECONDS = 10_000
# Ray ends the process, with a text of its own, when its head has not answered for 60 s or its own part of the driver's
# machine is gone for about 10 s. The run has to end in good order before that.
WATCH_SECONDS = 1.0
HEAD_LOST_SECONDS = 30.0
NODE_LOST_SECONDS = 4.0
# After that the driver has so long to leave the call of Ray that it may be waiting in.
LEAVE_SECONDS = 15.0
# Bytes of a socket's path that Linux takes, and those that Ray appends to its folder (session, time, process, socket).
MAX_SOCKET_BYTES = 107
RAY_SOCKET_BYTES = 66

Progress = tuple[int, int, float, int]


class RayHost:
    """The actor: a worker in a process of its own, which also tells where it is and how far.

    A plain class; `ray.remote` is where it is used. `progress` and `outcome` run beside `run_shard`, in other threads.
    """

    def __init__(self, number: int, threads: int) -> None:
        # Read by the numerical libraries when they are loaded, which the worker's factory does.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._num_active = 0
        self._host = Host(number, self._note_active)
        self._progress: Progress | None = None
        self._sampled: queue.SimpleQueue[Callable[[], ExecutorEvent]] = queue.SimpleQueue()

    def where(self) -> str:
        """Id of the node that the actor is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def load(self, factory: WorkerFactory) -> ExecutorEvent:
        """Build the worker."""
        return self._host.load(factory)

    def run_shard(self, shard: ShardSpec, attempt: int, batch_limit: int) -> int:
        """Make the samples of a shard and return its number; what comes of it is told by `outcome`."""
        self._report(shard.number, 0)
        self._sampled.put(self._host.sample_shard(shard, attempt, partial(self._report, shard.number), batch_limit))
        return shard.number

    def outcome(self) -> ExecutorEvent:
        """What came of the next shard, in the order of `run_shard`; waits for its commit."""
        return self._sampled.get()()

    def progress(self) -> tuple[Progress | None, int]:
        """The last shard that was reported on, its samples done, time of the last batch and limit of batches; and how
        often the worker was seen to get further.
        """
        return self._progress, self._num_active

    def _note_active(self) -> None:
        self._num_active += 1

    def _report(self, shard: int, num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0) -> None:
        self._progress = (shard, num_done, batch_seconds, batch_limit)


@dataclass(slots=True)
class Handle:
    """What the driver knows of an actor.

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
    num_active: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """How many workers, and what each is given."""

    num_workers: int
    threads: int
    resources: dict[str, float] = field(default_factory=dict)


class RayExecutor:
    """Runs every worker as an actor on a cluster of our own, or on the one at `address`.

    Args:
        address: a running cluster (`auto` or `host:port`), or None to start one here.
        num_workers: actors, or None for one a GPU, or one a CPU core, up to sixteen a node and one for
            2 GB of its memory.
        device: `auto`, `cpu` or `cuda`, as in the job.
    """

    def __init__(self, *, address: str | None, num_workers: int | None, device: str) -> None:
        if address and "://" in address:
            raise JobError(
                f"--address: '{address}' is not supported; run on a machine of the cluster with `--address auto`"
            )
        self._address = address
        self._num_workers = num_workers
        self._device = device
        self._folder = ""
        self._factory: Any = None
        self._actor_class: Any = None
        self._handles: dict[int, Handle] = {}
        self._node_kinds: dict[str, str] = {}
        self._answers: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._next_ask = 0.0
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)
        self._is_up = threading.Event()
        self._is_closed = threading.Event()
        self._failure: BaseException | None = None
        self._watch: _Watch | None = None
        self._is_lost = threading.Event()

    @property
    def opening(self) -> str:
        """What `open` waits for."""
        return f"joining Ray at {self._address}" if self._address else "starting Ray"

    def begin(self) -> None:
        """Load Ray and start or join the cluster, in the background; once."""
        if self._thread.ident is None:
            self._thread.start()

    def open(self, factory: WorkerFactory, num_shards: int) -> int:
        """Wait for the cluster and divide it into workers."""
        self.begin()
        self._is_up.wait()
        if self._failure is not None:
            raise self._failure
        import ray

        self._nodes = [node["Resources"] for node in self._list_nodes() if node["Alive"]]
        if not self._address:
            # Here Ray was told of slots for workers, not of cores.
            self._nodes[0]["CPU"] = usable_cores()
        self._layout = divide(self._nodes, self._device, self._num_workers, num_shards, is_own=self._address is None)
        self._factory = ray.put(factory)
        self._actor_class = ray.remote(concurrency_groups={"side": 1, "commits": 1})(RayHost)
        return self._layout.num_workers

    def describe(self) -> dict[str, Any]:
        """The cluster as it was at the beginning."""
        kinds = {
            name.partition(":")[2] for node in self._nodes for name in node if name.startswith("accelerator_type:")
        }
        return {
            "executor": "ray",
            "workers": self._layout.num_workers,
            "nodes": len(self._nodes),
            "cpu_cores": int(sum(node.get("CPU", 0) for node in self._nodes)),
            "gpus": int(sum(node.get("GPU", 0) for node in self._nodes)),
            "accelerators": ", ".join(kinds),
        }

    @property
    def num_unplaced(self) -> int:
        """Actors that no node has room for yet, or that just begin."""
        return sum(not handle.node for handle in self._handles.values())

    def start_worker(self, worker: int) -> None:
        """Create an actor and let it load its models."""
        self._await_head()
        options = self._actor_class.options(max_restarts=0, max_task_retries=0, **self._layout.resources)
        actor = options.remote(worker, self._layout.threads)
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
        """What happened since the last call.

        Raises:
            ClusterLostError: the cluster does not answer any more.
        """
        self._check_lost()
        self._ask_progress()
        events: list[ExecutorEvent] = []
        for worker, kind, future in drain(self._answers, timeout_seconds):
            if worker in self._handles and (event := self._event(worker, kind, future)):
                events.append(event)
        return events

    def close(self) -> None:
        """Kill the actors and end or leave the cluster."""
        # What refers to Ray's objects goes first, also from cycles: Ray ends the process where one is let go of during
        # its shutdown.
        self._handles.clear()
        self._factory = self._actor_class = None
        self._answers = queue.SimpleQueue()
        gc.collect()
        self._is_closed.set()
        # Also one that is still starting, which would otherwise make its folder anew.
        if self._thread.ident is not None:
            self._thread.join(CLOSE_SECONDS)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _live(self) -> None:
        """The cluster's life. Ray's processes die with the thread that started them, so it stays until the end."""
        try:
            if not self._connect():
                return
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._is_up.set()
        import ray

        if self._watch_cluster():
            ray.shutdown()
            return
        # Ray would wait for its head, and then end the process by itself.
        atexit.unregister(ray.shutdown)
        if not self._is_closed.wait(LEAVE_SECONDS):
            self._end_process()

    def _watch_cluster(self) -> bool:
        """Look after the cluster until the run is closed; False once it is lost."""
        assert self._watch is not None
        while not self._is_closed.wait(WATCH_SECONDS):
            if self._watch.find_lost(time.monotonic()):
                self._is_lost.set()
                return False
        return self._watch.answers()

    def _end_process(self) -> None:
        """End the process where the driver does not come back from a call of Ray."""
        print(f"error: {self._lost_error()}", file=sys.stderr, flush=True)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(EXIT_DRAINED)

    def _lost_error(self) -> ClusterLostError:
        assert self._watch is not None
        where = f"the Ray cluster at '{self._address}'" if self._address else "Ray on this machine"
        once = " once there is a cluster again" if self._address else ""
        return ClusterLostError(
            f"{where} was lost ({self._watch.lost}); what is committed is kept, and the same command continues{once}"
        )

    def _check_lost(self) -> None:
        if self._is_lost.is_set():
            raise self._lost_error()

    def _await_head(self) -> None:
        """Wait for the cluster's head before a call that would hang without it.

        Raises:
            ClusterLostError: it does not come back.
        """
        assert self._watch is not None
        while not self._watch.answers():
            self._is_lost.wait(WATCH_SECONDS)
            self._check_lost()

    def _list_nodes(self) -> list[dict[str, Any]]:
        import ray

        self._await_head()
        nodes: list[dict[str, Any]] = ray.nodes()
        return nodes

    def _connect(self) -> bool:
        """Load Ray, start or join a cluster; False if the run was closed meanwhile."""
        try:
            prepare_environment(is_own=self._address is None)
            import ray

            logging.getLogger("ray").setLevel(logging.CRITICAL)
            if self._is_closed.is_set():
                return False
            quiet = {"log_to_driver": False, "configure_logging": False}
            if self._address:
                check_reachable(self._address)
                ray.init(address=self._address, **quiet)
            else:
                self._start(quiet)
        except Exception as error:
            reason = first_line(error)
            if self._address:
                raise JobError(f"--address: no Ray cluster at '{self._address}' ({reason})") from error
            raise RiskforgeError(f"Ray does not start on this machine ({reason}); try --executor local") from error
        self._watch = _Watch(_addresses_to_watch())
        return True

    def _start(self, quiet: dict[str, Any]) -> None:
        """Start a cluster of our own."""
        import ray

        self._folder = tempfile.mkdtemp(prefix="rf-", dir=short_folder())
        # Ray opens its own folder to everybody, so it lies in one that is closed to others.
        inner = f"{self._folder}/r"
        if len(os.fsencode(inner)) + RAY_SOCKET_BYTES > MAX_SOCKET_BYTES:
            raise RiskforgeError(
                f"the path of {tempfile.gettempdir()} is too long for Ray's sockets; set a shorter TMPDIR"
            )
        ray.init(
            address="local",
            _node_ip_address=LOOPBACK,
            # Ray starts an idle process for each.
            num_cpus=self._num_workers or min(usable_cores(), MAX_CPU_WORKERS_PER_NODE),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=inner,
            **quiet,
        )

    def _expect(self, worker: int, kind: str, reference: Any) -> None:
        """Have the answer to a call put into the queue."""
        reference.future().add_done_callback(lambda future: self._answers.put((worker, kind, future)))

    def _event(self, worker: int, kind: str, future: Any) -> ExecutorEvent | None:
        """The event that an answer stands for, if it does."""
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
            return WorkerPlaced(worker, self._kind_of(answer))
        if kind == "progress":
            handle.is_asked = False
            progress, num_active = answer
            if progress != handle.progress:
                handle.progress = progress
                return ShardProgress(worker, *progress)
            is_active, handle.num_active = num_active != handle.num_active, num_active
            return WorkerActive(worker) if is_active else None
        if kind == "shard":
            handle.num_queued -= 1
        event: ExecutorEvent = answer
        handle.is_ready |= isinstance(event, WorkerReady)
        return event

    def _kind_of(self, node: str) -> str:
        """What a node is, for the memory of batches: its accelerators, and how much memory it has in GB."""
        if node not in self._node_kinds:
            for one in self._list_nodes():
                resources = one["Resources"]
                names = sorted(name for name in resources if name.startswith("accelerator_type:"))
                memory = round(resources.get("memory", 0) / 2**30)
                self._node_kinds[one["NodeID"]] = " ".join([*names, f"{memory} GB"])
        return self._node_kinds.get(node, "")

    def _lost(self, worker: int, error: Exception) -> WorkerLost:
        """An actor does not answer any more: with its node, or alone.

        One that merely cannot be reached is killed and counts as lost with its node: nothing says that its shard did
        it harm.
        """
        import ray.exceptions

        node = self._handles[worker].node
        is_alive = {one["NodeID"]: one["Alive"] for one in self._list_nodes()}
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


class _Watch:
    """Sees whether a cluster's head and its part of this machine still accept connections.

    Args:
        limits: by address, `HOST:PORT`, what is there in words and how long it may be away in seconds. The first is the
            head's.

    Attributes:
        lost: what is lost, in words; empty while nothing is.
    """

    def __init__(self, limits: dict[str, tuple[str, float]]) -> None:
        self._limits = limits
        self._seen = dict.fromkeys(limits, time.monotonic())
        self.lost = ""

    def answers(self) -> bool:
        """Whether the head accepts a connection now."""
        return _accepts(next(iter(self._limits)))

    def find_lost(self, now: float) -> str:
        """Look once; what is lost, in words."""
        for address, (what, seconds) in self._limits.items():
            if _accepts(address):
                self._seen[address] = now
            elif now - self._seen[address] >= seconds:
                self.lost = self.lost or f"{what} at {address} does not answer"
        return self.lost


def _addresses_to_watch() -> dict[str, tuple[str, float]]:
    """Of the cluster that this process has joined, see `_Watch`."""
    import ray

    context = ray.get_runtime_context()
    limits = {context.gcs_address: ("its head", HEAD_LOST_SECONDS)}
    for node in ray.nodes():
        if node["NodeID"] == context.get_node_id():
            address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
            limits[address] = ("its raylet on this machine", NODE_LOST_SECONDS)
    return limits


def _accepts(address: str) -> bool:
    try:
        check_reachable(address, ACCEPT_SECONDS)
    except OSError:
        return False
    return True


def prepare_environment(is_own: bool) -> None:
    """Settings that Ray reads from the environment when it is loaded; what the user has set stays.

    Side effects: sets environment variables of this process.
    """
    # Ray would otherwise have every worker started through `uv run`, which builds an environment for each.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would print a stack at SIGTERM, which ends a run in good order.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # How long the driver waits to hear why an actor does not answer. After the one second that is Ray's own, the loss
    # of a process on a busy machine would be taken for that of a node, and its shard not be blamed.
    os.environ.setdefault("RAY_timeout_ms_task_wait_for_death_info", str(DEATH_REASON_MILLISECONDS))
    # Ray prints its own account of dead workers to stdout; the run tells of them itself.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if is_own:
        # Without one, Ray writes a token into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray then takes the loopback address for that of the machine (as it does on Windows and macOS), and all of its
        # processes listen there alone. Any other way it would replace that address by one that others can reach.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def check_reachable(address: str, timeout_seconds: float = CONNECT_SECONDS) -> None:
    """Try the address of a cluster's head: Ray itself would knock for minutes.

    Raises:
        OSError: nobody answers.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_seconds).close()


def short_folder() -> str:
    """A folder for temporary files with a short path: Ray's sockets lie below it, and their paths are limited."""
    return "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()


def usable_cores() -> int:
    """CPU cores that this process may use: a container's share may be less than the machine has."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # Only Linux has it.
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def divide(
    nodes: list[dict[str, float]], device: str, num_workers: int | None, num_shards: int, *, is_own: bool
) -> Layout:
    """Divide the resources of a cluster's nodes among the workers.

    Args:
        num_workers: as asked for, or None.
        is_own: whether the cluster is this machine alone, where more workers than GPUs share them; another cluster
            may grow GPUs when they are asked for.

    Raises:
        JobError: a GPU is asked for and there is none.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes]
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if device == "cuda" and not num_gpus and is_own:
        raise JobError("runtime.device: 'cuda' but no GPU is visible here; use auto or cpu")
    if device == "cuda" or (device == "auto" and num_gpus):
        wanted = min(num_workers or max(num_gpus, 1), num_shards)
        threads = max(1, sum(cores) // max(num_gpus, wanted))
        share = 1 / math.ceil(wanted / num_gpus) if is_own else 1
        return Layout(num_workers=wanted, threads=threads, resources={"num_gpus": share, "num_cpus": 0})
    # With one thread each: the bytes of a sample must not depend on a machine's number of cores.
    wanted = min(num_workers or sum(map(_cpu_workers, nodes)) or 1, num_shards)
    return Layout(num_workers=wanted, threads=1, resources={"num_cpus": 1})


def _cpu_workers(node: dict[str, float]) -> int:
    """Workers for a node without a GPU: one a core, as far as its memory goes."""
    fitting = int(node.get("memory", MAX_CPU_WORKERS_PER_NODE * CPU_WORKER_BYTES) // CPU_WORKER_BYTES)
    return min(int(node.get("CPU", 0)), MAX_CPU_WORKERS_PER_NODE, max(1, fitting))

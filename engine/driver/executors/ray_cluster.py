"""A Ray cluster from start to shutdown: one of our own or a running one, and how its loss is detected.

A cluster of our own is started and shut down with the run, touches no file outside a temporary folder, and is isolated
from every other cluster.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from engine.driver.executors.ray_layout import MAX_CPU_WORKERS_PER_NODE, Machine, usable_cores
from engine.errors import EXIT_DRAINED, ClusterLostError, JobError, RiskforgeError, first_line

# Messages between driver and actors pass through Ray's object store; images do not. What `prepare` observes may be
# larger than this; Ray then spills it to a file in its temporary folder.
OBJECT_STORE_BYTES = 100 * 2**20
CLOSE_SECONDS = 15.0
CONNECT_SECONDS = 10.0
ACCEPT_SECONDS = 2.0
LOOPBACK = "127.0.0.1"
DEATH_REASON_MILLISECONDS = 10_000
# Ray ends the process, with a message of its own, when its head has not answered for 60 s or its raylet on the
# driver's machine is gone for about 10 s. The run has to end in an orderly way before that.
WATCH_SECONDS = 1.0
HEAD_LOST_SECONDS = 30.0
NODE_LOST_SECONDS = 4.0
# After that, how long the driver may take to return from the Ray call that it may be blocked in.
LEAVE_SECONDS = 15.0
# Ray waits 30 s for its own processes, and no setting changes that.
START_ATTEMPTS = 3
# On one machine nothing is cut off: processes of Ray that are late share it with others. Ray would declare the node
# dead after 15 s, or end it when its agent needs 30 s to start, and the driver's process with it.
PATIENCE = {
    "health_check_failure_threshold": "40",
    "agent_register_timeout_ms": "300000",
    "worker_register_timeout_seconds": "300",
}
# Longest path of a socket on Linux, and the bytes that Ray appends to its folder (session, time, process, socket).
MAX_SOCKET_BYTES = 107
RAY_SOCKET_BYTES = 66


class RayCluster:
    """A connection to a Ray cluster, held by a thread: Ray's processes die with the thread that started them.

    Args:
        address: a running cluster (`auto` or `host:port`), or None to start one here.
        num_workers: worker slots of a cluster of our own, or None for one per core.

    Attributes:
        metrics_port: where a cluster of our own exports metrics, on this machine alone; 0 for any port.

    Raises:
        JobError: the address is of another kind.
    """

    def __init__(self, address: str | None, num_workers: int | None) -> None:
        if address and "://" in address:
            raise JobError(
                f"--address: '{address}' is not supported; run on a machine of the cluster with `--address auto`"
            )
        self._address = address
        self._num_workers = num_workers
        self.metrics_port = 0
        self._folder = ""
        self._thread = threading.Thread(target=self._run, name="ray", daemon=True)
        self._is_up = threading.Event()
        self._is_closed = threading.Event()
        self._is_lost = threading.Event()
        self._failure: BaseException | None = None
        self._monitor: ClusterMonitor | None = None

    @property
    def opening(self) -> str:
        """What `wait` waits for, in words."""
        return f"joining Ray at {self._address}" if self._address else "starting Ray"

    def begin(self) -> None:
        """Load Ray and start or join the cluster, in the background; once."""
        if self._thread.ident is None:
            self._thread.start()

    def wait(self) -> None:
        """Wait until the cluster is up.

        Raises:
            RiskforgeError: Ray does not start on this machine.
            JobError: there is no cluster at the address.
        """
        self._is_up.wait()
        if self._failure is not None:
            raise self._failure

    def machines(self) -> list[Machine]:
        """The nodes that are alive."""
        nodes = [node for node in self.nodes() if node["Alive"]]
        # A cluster of our own was given slots for workers in place of cores.
        own = {} if self._address else {"CPU": usable_cores()}
        return [
            Machine(node["NodeID"], resources=node["Resources"] | own, labels=node.get("Labels", {})) for node in nodes
        ]

    def resources(self) -> list[Mapping[str, float]]:
        """What each node that is alive has, as Ray names it."""
        return [machine.resources for machine in self.machines()]

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes of the cluster, as Ray lists them.

        Raises:
            ClusterLostError: the cluster is lost.
        """
        import ray

        self.await_head()
        nodes: list[dict[str, Any]] = ray.nodes()
        return nodes

    def check(self) -> None:
        """Raise a `ClusterLostError` if the cluster is lost."""
        if self._is_lost.is_set():
            raise self._lost_error()

    def await_head(self) -> None:
        """Wait for the cluster's head before a call that would block without it.

        Raises:
            ClusterLostError: it does not come back.
        """
        assert self._monitor is not None
        while not self._monitor.answers():
            self._is_lost.wait(WATCH_SECONDS)
            self.check()

    def close(self) -> None:
        """Shut down or leave the cluster. No reference to a Ray object may be alive any more."""
        self._is_closed.set()
        # Also a cluster that is still starting, which would otherwise create its folder again.
        if self._thread.ident is not None:
            self._thread.join(CLOSE_SECONDS)
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self) -> None:
        """The thread of the cluster, until the run is closed or the cluster is lost."""
        try:
            if not self._connect():
                return
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._is_up.set()
        import ray

        if self._watch():
            ray.shutdown()
            return
        # Ray would wait for its head, and then end the process by itself.
        atexit.unregister(ray.shutdown)
        if not self._is_closed.wait(LEAVE_SECONDS):
            self._end_process()

    def _watch(self) -> bool:
        """Monitor the cluster until the run is closed; False once it is lost."""
        assert self._monitor is not None
        while not self._is_closed.wait(WATCH_SECONDS):
            if self._monitor.find_lost(time.monotonic()):
                self._is_lost.set()
                return False
        return self._monitor.answers()

    def _end_process(self) -> None:
        """End the process if the driver does not return from a call of Ray."""
        print(f"error: {self._lost_error()}", file=sys.stderr, flush=True)
        self._remove_folder()
        os._exit(EXIT_DRAINED)

    def _lost_error(self) -> ClusterLostError:
        assert self._monitor is not None
        where = f"the Ray cluster at '{self._address}'" if self._address else "Ray on this machine"
        once = " once there is a cluster again" if self._address else ""
        return ClusterLostError(
            f"{where} was lost ({self._monitor.lost}); what is committed is kept, and the same command continues{once}"
        )

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
        self._monitor = ClusterMonitor(_addresses_to_monitor())
        return True

    def _start(self, quiet: dict[str, Any]) -> None:
        """Start a cluster of our own; again where Ray gave up on processes that a busy machine kept waiting."""
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start_once(quiet)
                return
            except Exception as error:
                if "timed out" not in str(error) or attempt == START_ATTEMPTS or self._is_closed.is_set():
                    raise
            self._kill_processes()
            self._remove_folder()

    def _kill_processes(self) -> None:
        """Kill what Ray has started before it gave up; Ray itself would at the end of this process."""
        import psutil

        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if any(self._folder in word for word in process.cmdline()):
                    process.kill()

    def _start_once(self, quiet: dict[str, Any]) -> None:
        import ray

        self._folder = tempfile.mkdtemp(prefix="rf-", dir=short_folder())
        # Ray makes its own folder accessible to everybody, so it is created inside a private one.
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
            _metrics_export_port=self.metrics_port,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=inner,
            **quiet,
        )


class ClusterMonitor:
    """Checks whether a cluster's head and its raylet on this machine still accept connections.

    Args:
        limits: by address, `HOST:PORT`: what listens there, in words, and how long it may be unreachable in seconds.
            The first one is the head.

    Attributes:
        lost: what is lost, in words; empty while nothing is.
    """

    def __init__(self, limits: dict[str, tuple[str, float]]) -> None:
        self._limits = limits
        self._last_seen = dict.fromkeys(limits, time.monotonic())
        self.lost = ""

    def answers(self) -> bool:
        """Whether the head accepts a connection now."""
        return _accepts(next(iter(self._limits)))

    def find_lost(self, now: float) -> str:
        """Check every address once; what is lost, in words."""
        for address, (name, seconds) in self._limits.items():
            if _accepts(address):
                self._last_seen[address] = now
            elif now - self._last_seen[address] >= seconds:
                self.lost = self.lost or f"{name} at {address} does not answer"
        return self.lost


def _addresses_to_monitor() -> dict[str, tuple[str, float]]:
    """The limits of `ClusterMonitor` for the cluster that this process has joined."""
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
    """Set the variables that Ray reads from the environment when it is imported; the user's own values are kept.

    Side effects: sets environment variables of this process.
    """
    # Ray would otherwise start every worker through `uv run`, which builds an environment for each.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would print a stack trace at SIGTERM, which stops a run in an orderly way.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # How long the driver waits for the reason why an actor does not answer. With Ray's default of one second, the loss
    # of a process on a busy machine would be mistaken for that of a node, and its shard would get no strike.
    os.environ.setdefault("RAY_timeout_ms_task_wait_for_death_info", str(DEATH_REASON_MILLISECONDS))
    # Ray prints its own messages about dead workers to stdout; the run reports them itself.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if is_own:
        for name, value in PATIENCE.items():
            os.environ.setdefault(f"RAY_{name}", value)
        # Without a token, Ray writes one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray then takes the loopback address for the machine's address (as it does on Windows and macOS), and all of
        # its processes listen there alone. Otherwise it would replace it by an address that others can reach.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def check_reachable(address: str, timeout_seconds: float = CONNECT_SECONDS) -> None:
    """Connect to the head of a cluster; Ray itself would retry for minutes.

    Raises:
        OSError: nothing accepts the connection.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_seconds).close()


def short_folder() -> str:
    """A folder for temporary files with a short path, since Ray's sockets are below it and socket paths are limited."""
    return "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()

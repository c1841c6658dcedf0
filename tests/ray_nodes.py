"""A Ray cluster of several machines on one: `with Machines(folder) as machines: machines.start_node()`.

A machine is a set of Linux namespaces: it has a network card, a host name and process identifiers of its own, and
shares memory and files with the others. Its loss is the kernel's: every process of it is gone at once. Its network
cable can be pulled out and put back, all that runs on it can be stopped and go on. Needs root, `unshare`, `nsenter` and
`ip`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.sleepy import wait_until

ROOT = Path(__file__).parents[1]
NETWORK = "10.77.0"
PORT = 6379
PORTS = (
    "node-manager",
    "object-manager",
    "dashboard-agent-listen",
    "dashboard-agent-grpc",
    "runtime-env-agent",
    "metrics-export",
)
# Ray notices that a machine is gone in up to a minute; half a dozen seconds do here.
HEALTH = {"period": 500, "timeout": 1500, "initial_delay": 1000, "failure_threshold": 6}
WAIT_SECONDS = 120.0
STORE_BYTES = 80_000_000


@functools.cache
def missing() -> str:
    """What is missing here for machines, empty if nothing is."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    if absent := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]:
        return f"no {', '.join(absent)} here"
    try:
        with Machines(Path("/tmp")) as machines:
            machines.add()
    except (OSError, subprocess.SubprocessError) as error:
        return f"namespaces are not allowed here ({error})"
    return ""


class Machine:
    """A machine of the network; made by `Machines.add`.

    Args:
        number: last part of its address.
        switch: first process of the machine that the cables of all others lead to; None for that one itself.

    Attributes:
        address: of its network card.
        init: the first process, with which all others of the machine end.
    """

    def __init__(self, number: int, switch: Machine | None) -> None:
        self.number, self.address = number, f"{NETWORK}.{number}"
        self._cable, self._switch = f"cable{number}", switch
        self._programs: list[Program] = []
        flags = ("--net", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child")
        # It reads until the end of the file, which comes with the end of this process, however it ends.
        script = f"hostname machine-{number} && ip link set lo up && echo up && exec cat"
        self._unshare = subprocess.Popen(
            ["unshare", *flags, "sh", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != "up\n":
            self.kill()
            raise OSError("unshare failed")
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        self.init = int(children.read_text().split()[0])
        self._namespace = Path(f"/proc/{self.init}/ns/pid").readlink()
        if switch is None:
            self._net("link", "add", "eth0", "type", "bridge")
        else:
            ends = ("type", "veth", "peer", "name", "eth0", "netns", str(self.init))
            switch._net("link", "add", self._cable, *ends)
            switch._net("link", "set", self._cable, "master", "eth0", "up")
        self._net("address", "add", f"{self.address}/24", "dev", "eth0")
        self._net("link", "set", "eth0", "up")

    def _net(self, *arguments: str) -> None:
        """Change the network of this machine."""
        command = ["nsenter", "--net", "--target", str(self.init), "ip", *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def start(self, command: Sequence[str], environment: dict[str, str] | None = None, **options: Any) -> Program:
        """Start a program here, in the repository."""
        self._programs.append(Program(self, command, environment or {}, options))
        return self._programs[-1]

    def processes(self) -> dict[int, str]:
        """Command lines of the processes that run here, by their identifiers outside; without the first."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/pid").readlink() == self._namespace:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        found.pop(self.init, None)
        return found

    def named(self, name: str) -> list[int]:
        """Processes here whose program has this name, or whose title begins with it."""
        return [
            pid
            for pid, line in self.processes().items()
            if line.startswith(name) or line.partition(" ")[0].endswith(f"/{name}")
        ]

    @property
    def is_up(self) -> bool:
        """Whether it has not been killed."""
        return self._unshare.poll() is None

    def kill(self) -> None:
        """As a spot machine is lost: SIGKILL of all that runs here, at once."""
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.kill(self.init, signal.SIGKILL)
        for program in self._programs:
            program.leave()
        self._unshare.kill()
        self._unshare.communicate()

    def clear(self) -> None:
        """End all that runs here; the machine stays."""
        self._signal_until(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop all processes where they are; those that are started meanwhile as well."""
        self._signal_until(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the stopped ones go on."""
        self._signal_until(signal.SIGCONT)
        for program in self._programs:
            program.go_on()

    def _signal_until(self, number: int) -> None:
        done: set[int] = set()
        while new := self.processes().keys() - done:
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            done |= new

    def cut(self) -> None:
        """Pull out the network cable."""
        assert self._switch is not None
        self._switch._net("link", "set", self._cable, "down")

    def mend(self) -> None:
        """Put the cable back."""
        assert self._switch is not None
        self._switch._net("link", "set", self._cable, "up")


class Program:
    """A program on a machine, with its output in a file.

    Attributes:
        pid: its identifier outside of the machine.
    """

    def __init__(
        self, machine: Machine, command: Sequence[str], environment: dict[str, str], options: dict[str, Any]
    ) -> None:
        enter = ["nsenter", "--target", str(machine.init), "--net", "--pid", "--mount", "--uts", f"--wd={ROOT}"]
        values = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        self._nsenter = subprocess.Popen([*enter, *command], env=values, text=True, **options)
        children = Path(f"/proc/{self._nsenter.pid}/task/{self._nsenter.pid}/children")
        wait_until(lambda: self._nsenter.poll() is not None or children.read_text(), f"{command[0]} is started")
        self.pid = 0
        with contextlib.suppress(OSError, IndexError):
            self.pid = int(children.read_text().split()[0])

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._nsenter.poll()

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for its end and return its exit code."""
        return self._nsenter.wait(seconds)

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def go_on(self) -> None:
        """Continue `nsenter`, which stops when its child does."""
        self._nsenter.send_signal(signal.SIGCONT)

    def leave(self) -> None:
        """End `nsenter`, whose child ends with its machine; it may stand still, and the machine waits for it."""
        self.go_on()
        try:
            self._nsenter.wait(1.0)
        except subprocess.TimeoutExpired:
            self._nsenter.kill()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.send_signal(signal.SIGKILL)
        self._nsenter.wait(WAIT_SECONDS)


class Machines:
    """Machines on one network, and Ray on them.

    Args:
        folder: for the files of Ray; its path is short, since those of sockets are limited.

    Attributes:
        environment: variables of Ray and of drivers, besides those of this process.
        switch: connects them; it runs what is no part of the cluster, as an object store.
        nodes: machines of the cluster that were not killed, the head first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 1
        self.environment = {
            # Nobody else is on the network.
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            # Longer than the driver waits for a lost head before it ends the run itself, see `chaos_runs.LOST_SECONDS`.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
            **{f"RAY_health_check_{name}{'' if 'threshold' in name else '_ms'}": str(n) for name, n in HEALTH.items()},
        }
        self._rays: dict[Machine, Program] = {}
        self._num_cpus: dict[Machine, int] = {}
        self._head: Machine | None = None
        self.nodes: list[Machine] = []
        self.switch = Machine(1, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in [*self.nodes, self.switch]:
            machine.kill()

    def add(self) -> Machine:
        """Another machine, on which nothing runs."""
        self._number += 1
        machine = Machine(self._number, self.switch)
        self.nodes.append(machine)
        return machine

    @property
    def has_head(self) -> bool:
        """Whether the head was not lost since it was started."""
        return bool(self.nodes) and self.nodes[0] is self._head

    @property
    def head(self) -> Machine:
        """The machine with the head of the cluster.

        Raises:
            OSError: it was lost, and the others with it.
        """
        if self._head is None or not self.has_head:
            raise OSError("the head was lost")
        return self._head

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{self.head.address}:{PORT}"

    def start_node(self, *, num_cpus: int = 1) -> Machine:
        """Another machine with Ray; the first is the head. It need not be up yet, see `wait_for_nodes`."""
        machine = self.add()
        if len(self.nodes) == 1:
            self._head = machine
        self._num_cpus[machine] = num_cpus
        self._start_ray(machine)
        return machine

    def _start_ray(self, machine: Machine) -> None:
        place = ["--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor"]
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
            f"--node-ip-address={machine.address}", f"--num-cpus={self._num_cpus[machine]}",
            f"--object-store-memory={STORE_BYTES}", "--include-log-monitor=false",
            f"--temp-dir={self._folder}/{machine.number}",
            # The raylet need not wait for its agents to choose them, for which it has no patience.
            *(f"--{name}-port={7000 + number}" for number, name in enumerate(PORTS)),
            *(place if machine is self._head else [f"--address={self.address}"]),
        ]  # fmt: skip
        with self._log(machine).open("w") as log:
            self._rays[machine] = machine.start(command, self.environment, stdout=log, stderr=log)

    def _log(self, machine: Machine) -> Path:
        return self._folder / f"ray-{machine.number}.log"

    def wait_for_nodes(self) -> None:
        """Wait until Ray runs on all machines.

        Raises:
            TimeoutError: it does not.
        """
        for machine in list(self.nodes):
            wait_until(lambda machine=machine: self._is_up(machine), f"Ray runs, see {self._log(machine)}", 300.0)

    def _is_up(self, machine: Machine) -> bool:
        """Whether Ray runs on a machine; on a busy one a start takes longer than Ray waits for it, and is repeated."""
        if "Ray runtime started" in self._log(machine).read_text():
            return True
        if self._rays[machine].poll() is not None:
            machine.clear()
            self._start_ray(machine)
        return False

    def drive(self, machine: Machine, command: Sequence[str], **options: Any) -> Program:
        """Start a driver on a machine of the cluster; `command` follows the name of Python."""
        return machine.start([sys.executable, *command], self.environment, **options)

    def kill(self, machine: Machine) -> None:
        """Lose a machine."""
        machine.kill()
        self.nodes.remove(machine)
        if ray := self._rays.pop(machine, None):
            ray.wait()

    def kill_all(self) -> None:
        """Lose all machines of the cluster."""
        for machine in list(self.nodes):
            self.kill(machine)

    def kill_ended(self) -> None:
        """Remove machines on which Ray has ended, all of them where the head was lost."""
        for machine, ray in list(self._rays.items()):
            if ray.poll() is not None and self._is_up(machine):
                self.kill(machine)
        if not self.has_head:
            self.kill_all()

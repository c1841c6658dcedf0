"""How the resources of a Ray cluster are divided among workers. Pure: Ray is not needed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.job.resources import ResourcesSpec, selects
from engine.models.gpu_sharing import CONTEXT_BYTES

MAX_CPU_WORKERS_PER_NODE = 16
# Memory that a worker with its models is assumed to need if the number of workers is not given.
CPU_WORKER_BYTES = 2 * 2**30
# Workers that share a GPU by its measured memory: at most so many, each with this much more than was measured, because
# batches may grow.
MAX_WORKERS_PER_GPU = 16
MEMORY_MARGIN = 1.25
DEFAULT = ResourcesSpec()


@dataclass(frozen=True, slots=True)
class Machine:
    """A node of a cluster.

    Attributes:
        node: its id.
        resources: as Ray names them.
        labels: those that Ray sets, too.
    """

    node: str
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the resources of a cluster are divided.

    Attributes:
        num_workers: workers at a time.
        threads: of each worker; 0 for its part of the cores of the node that it will be on.
        resources: of each worker, as Ray names them.
        workers_per_gpu: workers that may share a GPU; 0 for workers without one.
        is_measuring: whether the number of workers a GPU follows from the memory that the first worker uses.
    """

    num_workers: int
    threads: int
    resources: dict[str, Any] = field(default_factory=dict)
    workers_per_gpu: int = 0
    is_measuring: bool = False

    def room(self, resources: Mapping[str, float]) -> int:
        """Workers that a machine with these resources has room for, whatever else it may be used for."""
        if self.workers_per_gpu:
            taken = self.resources["num_gpus"]
            fits = int(resources.get("GPU", 0)) * self.workers_per_gpu // math.ceil(taken)
        else:
            fits = _cpu_workers(resources)
        amounts = dict(self.custom)
        if cpus := self.resources.get("num_cpus", 0):
            amounts["CPU"] = cpus
        return min([fits, *(int(resources.get(name, 0) / amount + 1e-6) for name, amount in amounts.items())])

    @property
    def custom(self) -> Mapping[str, float]:
        """Resources of other names, of each worker."""
        custom: Mapping[str, float] = self.resources.get("resources", {})
        return custom

    def shared_by(self, num: int) -> Layout:
        """With so many workers a GPU, now that it is known how many."""
        return replace(self, resources=self.resources | {"num_gpus": 1 / num}, workers_per_gpu=num, is_measuring=False)


def divide(
    nodes: Sequence[Mapping[str, float]],
    device: str,
    num_workers: int | None,
    num_shards: int,
    *,
    is_own: bool,
    asked: ResourcesSpec = DEFAULT,
) -> Layout:
    """Divide the resources of a cluster's nodes among the workers.

    Args:
        nodes: Ray resources of each node.
        num_workers: as requested, or None.
        is_own: whether the cluster is this machine alone, where more workers than GPUs share them; another cluster
            may add GPUs when they are requested.
        asked: what the job wants each worker to take.

    Raises:
        JobError: a GPU is requested and there is none, or this machine has no room for so many workers.
    """
    if not asked.is_default:
        return _divide_as_asked(nodes, device, num_workers, num_shards, asked, is_own=is_own)
    # A worker of another cluster asks for a whole GPU, which parts on several nodes are not.
    num_gpus = _num_gpus(nodes)
    if device == "cuda" and not num_gpus and is_own:
        raise JobError("runtime.device: 'cuda' but no GPU is visible here; use auto or cpu")
    if device == "cuda" or (device == "auto" and num_gpus):
        wanted = min(num_workers or max(num_gpus, 1), num_shards)
        if not is_own:
            return Layout(wanted, threads=0, resources={"num_gpus": 1, "num_cpus": 0}, workers_per_gpu=1)
        shared_by = math.ceil(wanted / num_gpus)
        return Layout(
            wanted,
            threads=gpu_threads(nodes[0], shared_by),
            resources={"num_gpus": 1 / shared_by, "num_cpus": 0},
            workers_per_gpu=shared_by,
        )
    # One thread each: the bytes of a sample must not depend on a machine's number of cores.
    wanted = min(num_workers or sum(map(_cpu_workers, nodes)) or 1, num_shards)
    return Layout(num_workers=wanted, threads=1, resources={"num_cpus": 1})


def _divide_as_asked(
    nodes: Sequence[Mapping[str, float]],
    device: str,
    num_workers: int | None,
    num_shards: int,
    asked: ResourcesSpec,
    *,
    is_own: bool,
) -> Layout:
    """As `divide`, where the job says what a worker takes."""
    num_gpus = _num_gpus(nodes)
    on_gpu = device == "cuda" or asked.asks_for_gpu or (device == "auto" and num_gpus > 0 and asked.num_gpus is None)
    if on_gpu and is_own and not num_gpus:
        raise JobError("runtime.resources.num_gpus: no GPU is visible here; leave it out")
    resources: dict[str, Any] = {"num_cpus": 0 if on_gpu else 1}
    # A cluster of our own was given slots for workers in place of cores.
    if asked.num_cpus is not None and not is_own:
        resources["num_cpus"] = asked.num_cpus
    if asked.custom:
        resources["resources"] = dict(asked.custom)
    if not on_gpu:
        layout = Layout(0, threads=1, resources=resources)
    else:
        share = asked.num_gpus if isinstance(asked.num_gpus, float) else 1.0
        per_gpu = int(1 / share + 1e-6) if share < 1 else 1
        threads = int(asked.num_cpus or 0) or (gpu_threads(nodes[0], per_gpu) if is_own else 0)
        layout = Layout(0, threads, resources | {"num_gpus": share}, per_gpu, is_measuring=asked.num_gpus == "auto")
    room = sum(map(layout.room, nodes))
    if is_own and asked.num_cpus and not on_gpu:
        room = min(room, int(sum(node.get("CPU", 0) for node in nodes) / asked.num_cpus))
    if is_own and room < (num_workers or 1):
        raise JobError(
            f"runtime.resources: this machine has room for {room} workers that take {describe_asked(asked)}, and"
            f" {num_workers or 1} are wanted; ask for less, or for fewer workers"
        )
    wanted = 1 if layout.is_measuring else num_workers or max(room, 1)
    return replace(layout, num_workers=min(wanted, num_shards))


def _num_gpus(nodes: Sequence[Mapping[str, float]]) -> int:
    """Whole GPUs of all machines."""
    return sum(int(node.get("GPU", 0)) for node in nodes)


def machines_for(machines: list[Machine], asked: ResourcesSpec) -> list[Machine]:
    """The machines whose labels a job selects."""
    return [machine for machine in machines if selects(asked.label_selector, machine.labels)]


def lacking(machines: list[Machine], asked: ResourcesSpec) -> str:
    """Why no machine of a cluster has room for a worker, in words, with what there is; empty where one has.

    GPUs are left out: a cluster may start machines with GPUs for workers that wait for them.
    """
    for key in asked.label_selector:
        if not any(selects({key: asked.label_selector[key]}, machine.labels) for machine in machines):
            there = _shown({machine.labels[key] for machine in machines if key in machine.labels})
            return f"label_selector: no machine of the cluster has {key} {asked.label_selector[key]}; there is {there}"
    selected = machines_for(machines, asked)
    if not selected:
        return "label_selector: no machine of the cluster has all of these labels"
    amounts = {f"custom.{name}": (name, amount) for name, amount in asked.custom.items()}
    if asked.num_cpus:
        amounts["num_cpus"] = ("CPU", asked.num_cpus)
    for place, (name, amount) in amounts.items():
        most = max(machine.resources.get(name, 0) for machine in selected)
        if most < amount:
            others = {
                name
                for machine in selected
                for name in machine.resources
                if not name.startswith(("node:", "accelerator_type:")) and name not in _OF_RAY
            }
            return (
                f"{place}: no machine of the cluster has {amount:g}, the most is {most:g}; there is {_shown(others)}"
                if place.startswith("custom.")
                else f"{place}: no machine of the cluster has {amount:g} cores, the most is {most:g}"
            )
    return ""


_OF_RAY = ("memory", "object_store_memory")


def _shown(names: set[str]) -> str:
    """A few names of a cluster, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:10]) + (", ..." if len(listed) > 10 else "") if listed else "none"


def describe_asked(asked: ResourcesSpec) -> str:
    """What a worker takes, in words."""
    parts = [f"num_gpus {asked.num_gpus:g}" if isinstance(asked.num_gpus, float) else ""]
    parts += [f"num_cpus {asked.num_cpus:g}" if asked.num_cpus else ""]
    parts += [f"{name} {amount:g}" for name, amount in asked.custom.items()]
    return ", ".join(part for part in parts if part) or "a GPU"


def workers_that_fit(peak: int, total: int) -> int:
    """How many workers can share a GPU, each with a process of its own, by the memory that one of them used.

    Args:
        peak: bytes that torch's allocator has held for it.
        total: bytes of the GPU.
    """
    each = MEMORY_MARGIN * max(peak, 1) + CONTEXT_BYTES
    return max(1, min(MAX_WORKERS_PER_GPU, int(total / each)))


def gpu_threads(node: Mapping[str, float], workers_per_gpu: int) -> int:
    """Threads of a worker on a GPU: its part of the cores of its node, at least one.

    The node counts as full: however few workers a cluster of many nodes has, one node may get all that fit.

    Args:
        node: its Ray resources.
    """
    return max(1, int(node.get("CPU", 0)) // (max(1, int(node.get("GPU", 0))) * workers_per_gpu))


def _cpu_workers(node: Mapping[str, float]) -> int:
    """Workers for a node without a GPU: one per core, as far as its memory suffices."""
    fitting = int(node.get("memory", MAX_CPU_WORKERS_PER_NODE * CPU_WORKER_BYTES) // CPU_WORKER_BYTES)
    return min(int(node.get("CPU", 0)), MAX_CPU_WORKERS_PER_NODE, max(1, fitting))


def machine_names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names of a cluster's nodes for people, by id: their hosts, with a port where several are on one.

    Args:
        nodes: as Ray lists them.
    """
    hosts = {
        node["NodeID"]: str(node.get("NodeManagerHostname") or node.get("NodeManagerAddress") or "") for node in nodes
    }
    shared = {host for host, number in Counter(hosts.values()).items() if number > 1}
    ports = {node["NodeID"]: node.get("NodeManagerPort", "") for node in nodes}
    return {node: f"{host}:{ports[node]}" if host in shared else host for node, host in hosts.items()}


def usable_cores() -> int:
    """CPU cores that this process may use; a container's quota may be less than the machine has."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # Only Linux has it.
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores

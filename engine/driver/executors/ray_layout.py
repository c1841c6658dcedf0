"""How the resources of a Ray cluster are divided among workers. Pure: Ray is not needed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import JobError

MAX_CPU_WORKERS_PER_NODE = 16
# Memory that a worker with its models is assumed to need if the number of workers is not given.
CPU_WORKER_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Layout:
    """How the resources of a cluster are divided.

    Attributes:
        num_workers: workers at a time.
        threads: of each worker; 0 for its part of the cores of the node that it will be on.
        resources: of each worker, as Ray names them.
        workers_per_gpu: workers that may share a GPU; 0 for workers without one.
    """

    num_workers: int
    threads: int
    resources: dict[str, float] = field(default_factory=dict)
    workers_per_gpu: int = 0


def divide(
    nodes: list[dict[str, float]], device: str, num_workers: int | None, num_shards: int, *, is_own: bool
) -> Layout:
    """Divide the resources of a cluster's nodes among the workers.

    Args:
        nodes: Ray resources of each node.
        num_workers: as requested, or None.
        is_own: whether the cluster is this machine alone, where more workers than GPUs share them; another cluster
            may add GPUs when they are requested.

    Raises:
        JobError: a GPU is requested and there is none.
    """
    # A worker of another cluster asks for a whole GPU, which parts on several nodes are not.
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
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


def gpu_threads(node: Mapping[str, float], workers_per_gpu: int) -> int:
    """Threads of a worker on a GPU: its part of the cores of its node, at least one.

    The node counts as full: however few workers a cluster of many nodes has, one node may get all that fit.

    Args:
        node: its Ray resources.
    """
    return max(1, int(node.get("CPU", 0)) // (max(1, int(node.get("GPU", 0))) * workers_per_gpu))


def _cpu_workers(node: dict[str, float]) -> int:
    """Workers for a node without a GPU: one per core, as far as its memory suffices."""
    fitting = int(node.get("memory", MAX_CPU_WORKERS_PER_NODE * CPU_WORKER_BYTES) // CPU_WORKER_BYTES)
    return min(int(node.get("CPU", 0)), MAX_CPU_WORKERS_PER_NODE, max(1, fitting))


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

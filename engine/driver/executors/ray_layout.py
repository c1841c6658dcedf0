"""How the resources of a Ray cluster are divided among workers. Pure: Ray is not needed."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import JobError

MAX_CPU_WORKERS_PER_NODE = 16
# Memory that a worker with its models is assumed to need if the number of workers is not given.
CPU_WORKER_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Layout:
    """How many workers, and the threads and Ray resources of each."""

    num_workers: int
    threads: int
    resources: dict[str, float] = field(default_factory=dict)


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
    cores = [int(node.get("CPU", 0)) for node in nodes]
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if device == "cuda" and not num_gpus and is_own:
        raise JobError("runtime.device: 'cuda' but no GPU is visible here; use auto or cpu")
    if device == "cuda" or (device == "auto" and num_gpus):
        wanted = min(num_workers or max(num_gpus, 1), num_shards)
        threads = max(1, sum(cores) // max(num_gpus, wanted))
        share = 1 / math.ceil(wanted / num_gpus) if is_own else 1
        return Layout(num_workers=wanted, threads=threads, resources={"num_gpus": share, "num_cpus": 0})
    # One thread each: the bytes of a sample must not depend on a machine's number of cores.
    wanted = min(num_workers or sum(map(_cpu_workers, nodes)) or 1, num_shards)
    return Layout(num_workers=wanted, threads=1, resources={"num_cpus": 1})


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

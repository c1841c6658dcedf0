"""The Ray actor: a worker in a process of its own."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from functools import partial

from engine.driver.executors.base import ExecutorEvent, WorkerFactory, WorkerHost
from engine.driver.executors.forked_host import ForkedHost, request_worker
from engine.driver.executors.ray_layout import gpu_threads, usable_cores
from engine.driver.executors.software import software
from engine.driver.executors.worker_output import output_files, show_crashes
from engine.generation.usage import BatchUsage
from engine.job.plan import ShardSpec
from engine.models.gpu_sharing import GpuShare, sharing_gpu

# The shard last reported on, its samples done, and of the last batch the duration in seconds, the limit of batch sizes
# and what it used.
Progress = tuple[int, int, float, int, BatchUsage | None]


class RayHost:
    """The actor: runs a worker, and reports its node and its progress.

    A plain class; `ray.remote` is applied by the executor. `progress` and `outcome` run concurrently with `run_shard`,
    in other threads.

    Args:
        threads: of its numerical libraries; 0 for its part of the cores of the node that it is on.
        workers_per_gpu: workers that share its GPU; 0 if it has none.
        fork_server: address of a server that forks the worker's process; empty to build the worker in this one.

    Side effects: sets environment variables of this process, which libraries read when the factory imports them.
    """

    def __init__(self, number: int, threads: int, workers_per_gpu: int = 1, fork_server: str = "") -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads or _threads_here(workers_per_gpu))
        if not workers_per_gpu:
            # Ray does not hide the GPUs of a node from an actor that has asked for none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._share = GpuShare(memory=1 / max(1, workers_per_gpu), owns_process=True)
        self._num_heartbeats = 0
        self._number = number
        self._fork_server = fork_server
        self._own_host = WorkerHost(number, self._note_active)
        self._host: WorkerHost | ForkedHost = self._own_host
        self._progress: Progress | None = None
        self._sampled: queue.SimpleQueue[Callable[[], ExecutorEvent]] = queue.SimpleQueue()

    def where(self, with_software: bool = False) -> tuple[str, dict[str, str]]:
        """Id of the actor's node, and the versions of its software if asked for."""
        import ray

        return str(ray.get_runtime_context().get_node_id()), software() if with_software else {}

    def memory(self) -> tuple[int, int]:
        """Most bytes of its GPU that torch has held so far, and those that there are; zeros without a GPU."""
        import torch

        if not torch.cuda.is_initialized():
            return 0, 0
        return torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]

    def output(self) -> tuple[str, ...]:
        """The files with the output of this process, or of the one that works for it."""
        return output_files()

    def load(self, factory: WorkerFactory) -> ExecutorEvent:
        """Build the worker."""
        show_crashes()
        if self._fork_server and (connection := request_worker(self._fork_server, self._number)):
            from ray import cloudpickle

            self._own_host.close()
            self._host = ForkedHost(connection, self._note_active, cloudpickle.dumps)
        with sharing_gpu(self._share):
            return self._host.load(factory)

    def run_shard(self, shard: ShardSpec, attempt: int, batch_limit: int) -> int:
        """Make the samples of a shard and return its number; `outcome` returns the event."""
        self._report(shard.number, 0)
        self._sampled.put(self._host.sample_shard(shard, attempt, partial(self._report, shard.number), batch_limit))
        return shard.number

    def outcome(self) -> ExecutorEvent:
        """The event of the next shard, in the order of `run_shard`; waits for its commit."""
        return self._sampled.get()()

    def progress(self) -> tuple[Progress | None, int]:
        """The latest progress, and the number of heartbeats so far."""
        return self._progress, self._num_heartbeats

    def _note_active(self) -> None:
        self._num_heartbeats += 1

    def _report(self, shard: int, num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0) -> None:
        self._progress = (shard, num_done, batch_seconds, batch_limit, self._host.usage if num_done else None)


def _threads_here(workers_per_gpu: int) -> int:
    """Threads of a worker on a GPU of this node, which may be new to the cluster."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    [resources] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
    # Ray may have been given fewer cores than there are, also none, so that the node only takes work on its GPUs.
    cores = usable_cores()
    return gpu_threads(resources | {"CPU": min(cores, int(resources.get("CPU", 0)) or cores)}, workers_per_gpu)

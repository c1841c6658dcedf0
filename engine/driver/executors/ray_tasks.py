"""Tasks on Ray: a function in any process of a cluster. Ray neither retries nor restarts them."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
from pathlib import Path
from typing import Any

from engine.driver.executors.base import drain
from engine.driver.executors.ray_cluster import RayCluster
from engine.driver.executors.ray_layout import divide, usable_cores
from engine.driver.executors.tasks import TaskDone, TaskEvent, TaskFailed, TaskLost, call
from engine.models.factories import add_import_folders, import_folders


class RayTasks:
    """Runs tasks on a cluster of our own or on the one at `address`: one a GPU, or one a CPU core.

    Args:
        address: a running cluster (`auto` or `host:port`), or None to start one here.
        num_workers: tasks at a time, or None for as many as there are GPUs, or cores.
        device: `auto`, `cpu` or `cuda`.
    """

    is_here = False

    def __init__(self, *, address: str | None, num_workers: int | None, device: str) -> None:
        self._address = address
        self._num_workers = num_workers
        self._device = device
        self._cluster = RayCluster(address, num_workers)
        self._function: Any = None
        self._events: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._references: dict[int, Any] = {}

    @property
    def opening(self) -> str:
        """What `open` waits for."""
        return self._cluster.opening

    def open(self, num_tasks: int) -> int:
        """Start or join the cluster, and divide it."""
        self._cluster.begin()
        self._cluster.wait()
        import ray

        nodes = self._cluster.resources()
        num_gpus = sum(int(node.get("GPU", 0)) for node in nodes) if self._device != "cpu" else 0
        # A task trains, so that it has a GPU to itself.
        wanted = min(self._num_workers or num_gpus, num_gpus) if num_gpus else self._num_workers
        layout = divide(nodes, self._device, wanted, num_tasks, is_own=self._address is None)
        self._threads = layout.threads if layout.workers_per_gpu else 1
        self._has_gpu = bool(layout.workers_per_gpu)
        self._function = ray.remote(max_retries=0, **layout.resources)(run_task)
        return layout.num_workers

    def submit(self, number: int, function: str, *arguments: Any) -> None:
        """Queue a task on the cluster."""
        self._cluster.await_head()
        place = (self._threads, self._has_gpu, str(Path.cwd()), import_folders())
        reference = self._function.remote(place, number, function, arguments)
        # Ray cancels a task to whose result nothing refers.
        self._references[number] = reference
        reference.future().add_done_callback(lambda future: self._events.put((number, future)))

    def poll(self, timeout_seconds: float) -> list[TaskEvent]:
        """Events since the last call.

        Raises:
            ClusterLostError: the cluster does not answer any more.
        """
        self._cluster.check()
        return [self._event(number, future) for number, future in drain(self._events, timeout_seconds)]

    def close(self) -> None:
        """Stop the tasks and shut down or leave the cluster."""
        # References to Ray's objects go first, also those in cycles: Ray ends the process if one is released during
        # its shutdown.
        if self._references:
            self._cancel()
        self._references.clear()
        self._function = None
        self._events = queue.SimpleQueue()
        gc.collect()
        self._cluster.close()

    def _cancel(self) -> None:
        """End the processes of the tasks in flight, on a cluster that lives on."""
        import ray

        if self._address:
            for reference in self._references.values():
                with contextlib.suppress(Exception):
                    ray.cancel(reference, force=True)

    def _event(self, number: int, future: Any) -> TaskEvent:
        self._references.pop(number, None)
        error = future.exception()
        if error is not None:
            return TaskLost(number, f"the process died: {error}")
        answer: TaskDone | TaskFailed = future.result()
        return answer


def run_task(
    place: tuple[int, bool, str, tuple[str, ...]], number: int, function: str, arguments: tuple[Any, ...]
) -> TaskDone | TaskFailed:
    """Run a task in a process of Ray.

    Args:
        place: threads of numerical libraries, whether there is a GPU, the driver's working folder, and folders that
            factories are imported from.

    Side effects: sets environment variables of this process, which libraries read when the function imports them, and
    its working folder; adds to `sys.path`.
    """
    threads, has_gpu, folder, imports = place
    os.environ["OMP_NUM_THREADS"] = str(threads or usable_cores())
    if not has_gpu:
        # Ray does not hide the GPUs of a node from a task that has asked for none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    add_import_folders(imports)
    return call(number, function, arguments)

"""The registry of executors: one record each, which is all that the command line knows of them by name.

To add an executor, write a module next to this one and add a record to `EXECUTORS`. Addresses are strings: an executor
is imported when a command uses it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.driver.executors.base import Executor
    from engine.job.resources import ResourcesSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorRecord:
    """A kind of executor.

    Attributes:
        name: value of `--executor`.
        workers: what its workers are, in the help of that option.
        factory: `module:callable` that makes it, with the arguments of `make`.
        takes_address: whether it can join a cluster by `--address`.
        takes_resources: whether it can place workers by `runtime.resources`, which `factory` is given then.
    """

    name: str
    workers: str
    factory: str
    takes_address: bool = False
    takes_resources: bool = False

    def make(
        self, *, address: str | None, num_workers: int | None, device: str, resources: ResourcesSpec | None = None
    ) -> Executor:
        """Import and make the executor.

        Args:
            address: of the cluster to join; None for this machine.
            num_workers: workers at a time; None leaves the number to the executor.
            device: `auto`, `cpu` or `cuda`, as in the job.
            resources: as in the job; None if nothing is asked for.

        Raises:
            JobError: an argument is impossible with this executor.
        """
        module, _, name = self.factory.partition(":")
        asked = {"resources": resources} if self.takes_resources else {}
        executor: Executor = getattr(importlib.import_module(module), name)(
            address=address, num_workers=num_workers, device=device, **asked
        )
        return executor


# The first one is the default.
EXECUTORS: dict[str, ExecutorRecord] = {
    record.name: record
    for record in (
        ExecutorRecord(
            name="ray",
            workers="Ray actors",
            factory="engine.driver.executors.ray:RayExecutor",
            takes_address=True,
            takes_resources=True,
        ),
        ExecutorRecord(
            name="local",
            workers="threads of this process",
            factory="engine.driver.executors.local:make_local_executor",
        ),
    )
}
DEFAULT_EXECUTOR = next(iter(EXECUTORS))

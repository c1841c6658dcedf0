"""Tasks that several processes, or this one, work on: functions by address, called with picklable arguments.

An executor runs workers that hold models and make shards. A pool runs functions that are independent of one another,
such as the rounds of many loops; which process runs one does not matter.
"""

from __future__ import annotations

import importlib
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import EXIT_INCOMPLETE, RiskforgeError, fault


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A task's value."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A task raised an error: the user's (`RiskforgeError`), or a defect."""

    number: int
    message: str
    exit_code: int

    @property
    def error(self) -> RiskforgeError:
        """The error to raise in the driver."""
        return fault(self.message, self.exit_code)


@dataclass(frozen=True, slots=True)
class TaskLost:
    """The process of a task was lost."""

    number: int
    message: str


TaskEvent = TaskDone | TaskFailed | TaskLost


class TaskPool(Protocol):
    """Runs tasks.

    Attributes:
        is_here: whether they run in this process.
    """

    is_here: bool

    @property
    def opening(self) -> str:
        """What `open` waits for, in words."""
        ...

    def open(self, num_tasks: int) -> int:
        """Wait until tasks can run.

        Returns:
            How many run at a time.

        Raises:
            RiskforgeError: the requested resources do not exist.
        """
        ...

    def submit(self, number: int, function: str, *arguments: Any) -> None:
        """Run a function, `module:name`, in some process."""
        ...

    def poll(self, timeout_seconds: float) -> list[TaskEvent]:
        """Events since the last call; waits for the first one, up to the timeout."""
        ...

    def close(self) -> None:
        """Stop all tasks and release every resource. May be called twice."""
        ...


def call(number: int, function: str, arguments: tuple[Any, ...]) -> TaskDone | TaskFailed:
    """Call a function by its address; errors become events, since exceptions do not cross process boundaries."""
    try:
        return TaskDone(number, find_function(function)(*arguments))
    except RiskforgeError as error:
        return TaskFailed(number, str(error), error.exit_code)
    except Exception:
        return TaskFailed(number, traceback.format_exc(), EXIT_INCOMPLETE)


def find_function(address: str) -> Callable[..., Any]:
    """The function at `module:name`."""
    module, _, name = address.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


class LocalTasks:
    """Runs tasks in this process, one after another."""

    is_here = True
    opening = "starting"

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, str, tuple[Any, ...]]] = deque()

    def open(self, num_tasks: int) -> int:
        """Nothing to start; one at a time."""
        return 1

    def submit(self, number: int, function: str, *arguments: Any) -> None:
        """Queue a task."""
        self._waiting.append((number, function, arguments))

    def poll(self, timeout_seconds: float) -> list[TaskEvent]:
        """Run the next task."""
        return [call(*self._waiting.popleft())] if self._waiting else []

    def close(self) -> None:
        """Forget what is waiting."""
        self._waiting.clear()

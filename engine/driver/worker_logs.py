"""Logs of workers that were lost or replaced: why, and the last lines of their output where these are known."""

from __future__ import annotations

import contextlib

from engine.data.stores.base import STATE, Store
from engine.errors import OutputError
from engine.terminal import printable

LOGS = f"{STATE}/logs"
# A driver whose workers die by the hundred writes no more.
MAX_LOGS = 200
MAX_LOG_CHARS = 64_000


class WorkerLogs:
    """Writes `_state/logs/DRIVER-WORKER.txt`.

    Args:
        number: of the driver, as in its lease.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self._number = number
        self._num_left = MAX_LOGS

    def write(self, worker: int, message: str) -> str:
        """Write the whole message about a worker.

        Returns:
            The name of the file below the output; empty where there are many already, or the store refuses. A full
            disk is reported by other writers.
        """
        if self._num_left <= 0:
            return ""
        self._num_left -= 1
        name = f"{LOGS}/{self._number:06d}-{worker:06d}.txt"
        text = printable(message[:MAX_LOG_CHARS], keep="\n\t")
        with contextlib.suppress(OutputError):
            self._store.replace(name, f"{text}\n".encode())
            return name
        return ""

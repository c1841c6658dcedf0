"""Whether a worker gets further where no batch is done: its heartbeats, and the bytes that its process moves.

Models that are loaded and files that are downloaded make bytes move, whichever library does it; a process that waits
for a lock or for an answer moves none.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.methods.heartbeat import listening

LOOK_SECONDS = 5.0
# So much is moved by a journal or a log only in hours.
MIN_BYTES = 2**20
# Heartbeats come with every step of a small model.
MIN_PAUSE_SECONDS = 1.0
# Unit of `ru_maxrss`.
_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024


class Activity:
    """Reports now and then that the process gets further, from `begin` to `end`.

    Args:
        report: called from the worker's thread, and from one of its own.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report
        self._reported = -MIN_PAUSE_SECONDS
        self._is_over = threading.Event()

    def begin(self) -> None:
        """Look at the bytes that are moved, from now on."""
        threading.Thread(target=self._watch, name="activity", daemon=True).start()

    def end(self) -> None:
        """Look no longer."""
        self._is_over.set()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Report the heartbeats of the block."""
        with listening(self._beat):
            yield

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._reported >= MIN_PAUSE_SECONDS:
            self._reported = now
            self._report()

    def _watch(self) -> None:
        before = bytes_moved()
        while not self._is_over.wait(LOOK_SECONDS):
            moved = bytes_moved()
            if moved - before >= MIN_BYTES:
                before = moved
                self._beat()


def bytes_moved() -> int:
    """Bytes that this process has read, written and taken into memory so far, as far as the system counts them."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    moved = usage.ru_maxrss * _MEMORY_UNIT
    try:
        counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
        # What is mapped into memory is in the second alone.
        return moved + int(counted["rchar"]) + int(counted["read_bytes"]) + int(counted["wchar"])
    except (OSError, ValueError, KeyError):
        return moved + 512 * (usage.ru_inblock + usage.ru_oublock)

"""Heartbeats of a worker from work that no batch time measures: `beat` calls, and bytes that its process moves.

Loading models and downloading files moves bytes, whichever library does it; a process that waits for a lock or for a
response moves none.
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

CHECK_SECONDS = 5.0
# A journal or a log moves this much only in hours.
MIN_BYTES = 2**20
# Small models call `beat` with every step.
MIN_PAUSE_SECONDS = 1.0
# Unit of `ru_maxrss`, in bytes.
_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024


class Activity:
    """Reports heartbeats of this process, from `begin` to `end`.

    Args:
        report: called from the worker's thread, and from one of its own.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report
        self._reported = -MIN_PAUSE_SECONDS
        self._is_over = threading.Event()

    def begin(self) -> None:
        """Start to observe the bytes that are moved."""
        threading.Thread(target=self._watch, name="activity", daemon=True).start()

    def end(self) -> None:
        """Stop observing."""
        self._is_over.set()

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Report every `beat` in the block, at most once in `MIN_PAUSE_SECONDS`."""
        with listening(self._beat):
            yield

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._reported >= MIN_PAUSE_SECONDS:
            self._reported = now
            self._report()

    def _watch(self) -> None:
        before = bytes_moved()
        while not self._is_over.wait(CHECK_SECONDS):
            moved = bytes_moved()
            if moved - before >= MIN_BYTES:
                before = moved
                self._beat()


def bytes_moved() -> int:
    """Bytes that this process has read, written and allocated so far, as far as the system counts them."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    moved = usage.ru_maxrss * _MEMORY_UNIT
    try:
        counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
        # Memory-mapped files are counted in `read_bytes` only.
        return moved + int(counted["rchar"]) + int(counted["read_bytes"]) + int(counted["wchar"])
    except (OSError, ValueError, KeyError):
        return moved + 512 * (usage.ru_inblock + usage.ru_oublock)

"""Signals: the first requests an orderly stop, the second stops at once.

Job schedulers send SIGTERM to every process of a job, and wrapper scripts pass it on: one that follows another within a
second is the same request. SIGINT comes from a person, who may be quick.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """Whether the run was requested to stop.

    Attributes:
        signal_name: the signal that requested it; empty while none did.
    """

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextlib.contextmanager
def deferred_signals(clock: Callable[[], float] = time.monotonic) -> Iterator[StopRequest]:
    """Record the first SIGINT or SIGTERM instead of stopping; the second raises `KeyboardInterrupt`.

    A SIGTERM within a second of the first one, SIGTERM as well, is part of it.

    Outside the main thread, which alone receives signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    first_at = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        name = signal.Signals(number).name
        if not request:
            request.signal_name, first_at = name, clock()
        elif not (name == request.signal_name == "SIGTERM" and clock() - first_at < SAME_REQUEST_SECONDS):
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Heartbeats from deep inside a long call: a model is loaded, a step is done, an image is read.

The caller may set a listener; without one a heartbeat does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_LISTENER: ContextVar[Callable[[], None] | None] = ContextVar("listener", default=None)


def beat() -> None:
    """Report progress of the call of this thread."""
    if (listener := _LISTENER.get()) is not None:
        listener()


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Call a listener at every `beat` in the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)

"""Signs of progress from deep inside a long call: a model is loaded, a step is done, an image is read.

Whoever runs such a call listens; without a listener nothing happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_LISTENER: ContextVar[Callable[[], None] | None] = ContextVar("listener", default=None)


def beat() -> None:
    """Report that the call of this thread gets further."""
    if (listener := _LISTENER.get()) is not None:
        listener()


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Hear of every `beat` in the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)

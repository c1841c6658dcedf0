"""How a command stops at SIGINT or SIGTERM: with one line and exit code 75."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import typer

from engine.commands.output import complain
from engine.errors import EXIT_DRAINED

# Of commands that write their output at the end.
NOTHING_STORED = "stopped; nothing is stored, the same command starts again"


@contextlib.contextmanager
def stop_on_signals(message: str) -> Iterator[None]:
    """Exit with `EXIT_DRAINED` and a message when the block is interrupted.

    Side effects: from now on SIGTERM raises `KeyboardInterrupt`, like SIGINT.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        complain(message)
        raise typer.Exit(EXIT_DRAINED) from None

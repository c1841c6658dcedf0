"""What a worker's process prints: which files have it, and their ends, which say why a process died."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.terminal import redacted

MAX_TAIL_BYTES = 16_000
MAX_TAIL_LINES = 200
# A crash lists all modules in one line.
MAX_LINE_CHARS = 300
# Ray's own lines about a process, which it reads in these files.
_RAY_LINES = (":job_id:", ":actor_name:", ":task_name:")


def show_crashes() -> None:
    """Let this process print where it is when a signal such as SIGSEGV ends it, and lose no line that it has printed.

    Side effects: changes the handlers of these signals, and the buffers of standard output and error.
    """
    with contextlib.suppress(io.UnsupportedOperation, OSError, ValueError, AttributeError):
        # Ray shows the main thread alone, which waits for calls.
        faulthandler.enable(all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def output_files() -> tuple[str, ...]:
    """The files that standard output and error of this process go to; none on a terminal."""
    paths = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                paths.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    return tuple(dict.fromkeys(paths))


def read_tails(paths: Sequence[str]) -> str:
    """The last lines of files on this machine, each after a line with its path; empty without any."""
    parts = []
    for path in paths:
        lines = _tail(path)
        if lines:
            parts.append("\n".join([f"the end of {path}:", *lines]))
    return redacted("\n".join(parts))


def _tail(path: str) -> list[str]:
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line[:MAX_LINE_CHARS] for line in text.splitlines() if line.strip() and not line.startswith(_RAY_LINES)]
    return lines[-MAX_TAIL_LINES:]

"""Hits a command with a signal at a place of its work, not at a time: what is struck is in the middle on any machine.

`python -m tests.strike SIGTERM os.link '*.tar' 2 run JOB ...` is `riskforge run JOB ...` in this process; before the
second `os.link` with a path that ends so, it sends the signal to itself. Places are the audit events of Python.
"""

from __future__ import annotations

import fnmatch
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tests.conftest import REPOSITORY

# A fork of the test's own process, which has Arrow's and torch's threads, now and then waits for ever for a lock that
# one of them held; this server of forks has no threads.
FORKS = multiprocessing.get_context("forkserver")


def struck(number: signal.Signals, event: str, pattern: str, count: int, *arguments: object) -> subprocess.Popen[str]:
    """Start a command of `riskforge` that will be struck; its stderr can be read."""
    command = [sys.executable, "-m", "tests.strike", number.name, event, pattern, str(count), *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_at(event: str, pattern: str, count: int, work: Callable[[], object]) -> None:
    """Do some work, which can be pickled, in a process of its own that dies by SIGKILL on the way."""
    child = FORKS.Process(target=_arm_and_work, args=(event, pattern, count, work))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def _arm_and_work(event: str, pattern: str, count: int, work: Callable[[], object]) -> None:
    arm(signal.SIGKILL, event, pattern, count)
    work()


def arm(number: signal.Signals, event: str, pattern: str, count: int) -> None:
    """Send this process a signal at the `count`-th event about a path that matches."""
    seen = itertools.count(1)

    def hook(name: str, about: tuple[Any, ...]) -> None:
        if name != event:
            return
        paths = [os.fspath(one) for one in about if isinstance(one, (str, os.PathLike))]
        if any(fnmatch.fnmatch(path, pattern) for path in paths) and next(seen) == count:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


if __name__ == "__main__":
    from engine.cli import console

    arm(signal.Signals[sys.argv[1]], sys.argv[2], sys.argv[3], int(sys.argv[4]))
    sys.argv[:] = ["riskforge", *sys.argv[5:]]
    console()

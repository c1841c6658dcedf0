"""Hits a command with a signal at a place of its work, not at a time: what is struck is in the middle on any machine.

`struck(SIGTERM, "os.link", "*.tar", 2, "run", JOB, ...)` is `riskforge run JOB ...`; before the second `os.link` with a
path that ends so, the process sends the signal to itself. Places are the audit events of Python.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.commands import FORKS, REPOSITORY, Command, console


def struck(number: signal.Signals, event: str, pattern: str, count: int, *arguments: object) -> Command:
    """Start a command of `riskforge` that will be struck; its stderr can be read."""
    main = partial(_arm_and_work, event, pattern, count, console, number)
    return Command(main, ["riskforge", *arguments], Path(REPOSITORY), os.environ)


def kill_at(event: str, pattern: str, count: int, work: Callable[[], object]) -> None:
    """Do some work, which can be pickled, in a process of its own that dies by SIGKILL on the way."""
    child = FORKS.Process(target=_arm_and_work, args=(event, pattern, count, work))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def _arm_and_work(
    event: str, pattern: str, count: int, work: Callable[[], object], number: signal.Signals = signal.SIGKILL
) -> None:
    arm(number, event, pattern, count)
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

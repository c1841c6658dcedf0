"""Curated runs for tests: rewards, options and a process that is killed at a chosen write."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.data.run.companions import COMPANIONS
from engine.data.stores.folder import FolderStore
from engine.data.stores.opening import open_store
from engine.driver.progress import PlainDisplay
from engine.report.style import page_templates
from engine.studies.curate.candidates import Candidates
from engine.studies.curate.program import CuratedRun, SelectionOptions, SignalRecord, curate_run
from tests.commands import FORKS, LIBRARIES

# What every process of these tests needs, loaded once in the server of forks: torch, and the compiled page.
FORKS.set_forkserver_preload([*LIBRARIES, __name__])
page_templates().get_template("report.html.j2")


def by_class(candidates: Candidates) -> list[float]:
    """The reward of the paper's figures, up to a constant."""
    return [-float(index) for index in candidates.class_indices]


def curated(
    run: Path | str,
    output: Path | str,
    rewards: Callable[[Candidates], Any] = by_class,
    signal_record: SignalRecord | None = None,
    **options: Any,
) -> CuratedRun:
    """A curated run of a run."""
    choice = SelectionOptions(**options)
    return curate_run(open_store(str(run)), rewards, choice, str(output), signal_record, PlainDisplay(sys.stderr))


def files_of(run: Path) -> dict[str, bytes]:
    """What a curated run's bytes depend on, by name: shards, their rows, plan, records and what was drawn."""
    folders = ("shards", *COMPANIONS, "_state/plan", "_state/commits", "curation")
    paths = [path for folder in folders for path in sorted((run / folder).glob("*")) if path.is_file()]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def killed_at(run: Path, output: Path, number: int) -> bool:
    """Curate in a process of its own that is killed at its n-th write to a store; whether it came that far."""
    child = FORKS.Process(target=_curate_and_die, args=(run, output, number))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def _curate_and_die(run: Path, output: Path, number: int) -> None:
    _die_at(number)
    curated(run, output)


def _die_at(number: int) -> None:
    """Kill this process at its n-th write: before the file is visible where n is odd, after it where n is even."""
    num_writes = 0

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal num_writes
            num_writes += 1
            is_due = num_writes == number
            if is_due and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = write(*arguments)
            if is_due:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in ("publish", "replace"):
        setattr(FolderStore, name, dying(getattr(FolderStore, name)))

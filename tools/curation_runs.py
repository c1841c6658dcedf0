"""Studies of the loop on mixtures, over many seeds and in several processes, and their results in words."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from curation_mixtures.study import StudyOptions, Trajectory, simulate
from torch import Tensor

from engine.driver.executors.tasks import TaskDone, TaskPool
from engine.methods.intervals import wilson_interval
from engine.studies.intervals import mean_interval

# Seeds that are computed together: few enough to stay in the processor's cache. They share a source of random numbers,
# so that results depend on this number, and not on that of the processes.
PART = 50
KeyT = TypeVar("KeyT")


class Executor(Protocol):
    """Where parts of studies run."""

    def run(self, parts: Sequence[StudyOptions]) -> list[Trajectory]:
        """The trajectory of each part, in their order."""


class Studies:
    """Runs studies, each of them once.

    Args:
        executor: where.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._results: dict[StudyOptions, Trajectory] = {}

    def run(self, studies: Mapping[KeyT, StudyOptions]) -> dict[KeyT, Trajectory]:
        """All studies, by name."""
        parts = {options: _parts(options) for options in studies.values() if options not in self._results}
        results = iter(self._executor.run([part for group in parts.values() for part in group]))
        for options, group in parts.items():
            self._results[options] = _joined([next(results) for _ in group])
        return {key: self._results[options] for key, options in studies.items()}


@contextmanager
def open_executor(kind: str, num_processes: int) -> Iterator[Executor]:
    """Processes of this machine with one thread each (`local`), or of a Ray cluster that is started here (`ray`)."""
    if kind == "local":
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, context, torch.set_num_threads, (1,)) as pool:
            yield _Local(pool)
        return
    from engine.driver.executors.ray_tasks import RayTasks

    tasks = RayTasks(address=None, num_workers=num_processes, device="cpu")
    try:
        tasks.open(num_processes)
        yield _OnRay(tasks)
    finally:
        tasks.close()


@dataclass(frozen=True, slots=True)
class _Local:
    pool: ProcessPoolExecutor

    def run(self, parts: Sequence[StudyOptions]) -> list[Trajectory]:
        return list(self.pool.map(simulate, parts))


@dataclass(frozen=True, slots=True)
class _OnRay:
    tasks: TaskPool

    def run(self, parts: Sequence[StudyOptions]) -> list[Trajectory]:
        for number, part in enumerate(parts):
            self.tasks.submit(number, f"{simulate.__module__}:{simulate.__name__}", part)
        done: dict[int, Trajectory] = {}
        while len(done) < len(parts):
            for event in self.tasks.poll(1.0):
                if not isinstance(event, TaskDone):
                    raise RuntimeError(f"part {event.number}: {event.message}")
                done[event.number] = event.value
        return [done[number] for number in range(len(parts))]


def _parts(options: StudyOptions) -> list[StudyOptions]:
    starts = range(0, options.num_seeds, PART)
    return [
        replace(options, num_seeds=min(PART, options.num_seeds - start), seed=options.seed + start) for start in starts
    ]


def _joined(parts: Sequence[Trajectory]) -> Trajectory:
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts], -2 if name == "fixed_alarms" else 0)
        for name in ("rewards", "alarms", "fixed_alarms", "removed", "caught")
    }
    rounds = zip(*(part.measures for part in parts), strict=True)
    return Trajectory(measures=[_joined_round(same) for same in rounds], **joined)


def _joined_round(rounds: tuple[Any, ...]) -> Any:
    names = type(rounds[0]).__slots__
    return type(rounds[0])(*(torch.cat([getattr(part, name) for part in rounds]) for name in names))


def mean(values: Tensor, digits: int = 2) -> str:
    """A mean over seeds [S] with the half width of its t interval."""
    estimate = mean_interval(values.tolist())
    return f"{estimate.value:.{digits}f} ± {estimate.high - estimate.value:.{digits}f}"


def percent(values: Tensor, digits: int = 0) -> str:
    """A mean share over seeds [S], in per cent, with the half width of its t interval."""
    return f"{mean(100 * values, digits)} %"


def share(flags: Tensor) -> str:
    """A share of seeds [S] with its score interval."""
    estimate = wilson_interval(int(flags.sum()), len(flags))
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"

"""Studies of the loop on mixtures, over many seeds and in several processes, and their results in words."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.methods.curation.mixture_study import StudyOptions, Trajectory, simulate
from engine.methods.intervals import wilson_interval
from engine.studies.intervals import mean_interval

# Seeds that are computed together: few enough to stay in the processor's cache. They share a source of random numbers,
# so that results depend on this number, and not on that of the processes.
PART = 50
KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True)
class Processes:
    """Where studies run."""

    pool: ProcessPoolExecutor

    def run(self, studies: Mapping[KeyT, StudyOptions]) -> dict[KeyT, Trajectory]:
        """All studies, by name, part by part."""
        parts = {key: _parts(options) for key, options in studies.items()}
        results = iter(list(self.pool.map(simulate, [part for group in parts.values() for part in group])))
        return {key: _joined([next(results) for _ in group]) for key, group in parts.items()}


@contextmanager
def processes(count: int) -> Iterator[Processes]:
    """Processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) as pool:
        yield Processes(pool)


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

"""The pass over labelled images, divided among the workers of an executor by the scheduler of runs.

A part of the pass is a shard to scheduler and executor: number `start` of `stop` parts.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from engine.data.images import PART_ROWS, ImageSource
from engine.driver.executors.base import Executor, ExecutorEvent, ShardResult
from engine.driver.progress import Display
from engine.driver.scheduler_loop import SchedulerLoop, WorkersFailingError, brief_abort, main_line
from engine.driver.scheduling import scheduler
from engine.driver.scheduling.messages import (
    Quarantine,
    SchedulerLimits,
    ShardError,
    ShardProgress,
    WorkerLost,
    WorkerReady,
)
from engine.driver.scheduling.state import State
from engine.job.plan import ShardSpec
from engine.studies.prepare.observation import (
    Observations,
    Observer,
    PartObservations,
    merge_observations,
    progress_text,
)

# Workers that a part of the pass may lose while their machines live; the next one ends the pass.
MAX_LOSSES = 1
MIN_PART_BYTES = 2**20
_AGAIN = "nothing is stored, the same command begins again"


def observe_distributed(
    source: ImageSource, data: str, executor: Executor, factory: Callable[[], Observer], display: Display
) -> Observations:
    """Show every image to the models, a part of the images on each of the executor's workers.

    The result is that of one process, bit for bit where the workers run on CPUs. It is collected here: 4 (d + n) bytes
    an image for d entries of an embedding and n classes, twice that for a moment; 14 GB for 10^6 images of ImageNet's
    classes.

    Args:
        data: the address of the images, for messages.
        factory: loads an observer in its process. Picklable.

    Raises:
        RiskforgeError: a worker met a problem that only the user can fix, or no image can be used.
        WorkersFailingError: workers do not start, a part of the images lost its worker again after it was repeated, or
            a defect.
    """
    return merge_observations(_DistributedPass(source, executor, display).run(factory), source, data)


class _DistributedPass(SchedulerLoop):
    """The pass in as many parts as there are workers. A part whose worker is lost is repeated by another one."""

    def __init__(self, source: ImageSource, executor: Executor, display: Display) -> None:
        super().__init__(executor, display)
        self._source = source
        self._num_tried: Counter[int] = Counter()
        self._observed: dict[int, PartObservations] = {}
        self._started: float | None = None

    def run(self, factory: Callable[[], Observer]) -> list[PartObservations]:
        """What was observed, part by part."""
        self._display.phase(self._executor.opening)
        self._num_parts = self._executor.open(factory, _max_parts(self._source))
        self._display.phase(f"loading models ({self._num_parts} worker{'s' if self._num_parts > 1 else ''})")
        limits = _limits(self._num_parts)
        self._drive(*scheduler.start(bytes(self._num_parts), self._num_parts, limits=limits, now=time.monotonic()))
        return [self._observed[part] for part in range(self._num_parts)]

    def _shard(self, number: int) -> ShardSpec:
        return ShardSpec(number=number, request=0, start=number, stop=self._num_parts)

    def _note_event(self, event: ExecutorEvent, state: State) -> None:
        if isinstance(event, WorkerReady):
            self._started = self._started or time.monotonic()
        elif isinstance(event, ShardProgress):
            self._num_tried[event.shard] = event.num_done
        elif isinstance(event, ShardResult):
            observed: Any = event.outcome
            self._observed[event.shard], self._num_tried[event.shard] = observed, observed.num_tried
        elif isinstance(event, WorkerLost) and event.worker in state.workers:
            for part in state.workers[event.worker].queue:
                self._num_tried[part] = 0
            self._note_replaced(event.worker, event.message)
        elif isinstance(event, ShardError):
            raise WorkersFailingError(f"the pass over the images failed on a worker: {main_line(event.message)}")

    def _note_replaced(self, worker: int, message: str) -> None:
        self._display.notice(f"worker {worker} is replaced, its part of the images begins again: {main_line(message)}")

    def _quarantine(self, action: Quarantine) -> None:
        raise WorkersFailingError(
            f"{len(action.reasons)} workers were lost with the same part of the images, the last one:"
            f" {main_line(action.reasons[-1])}; {_AGAIN}"
        )

    def _workers_failing(self, message: str) -> WorkersFailingError:
        return WorkersFailingError(f"{brief_abort(message)}; {_AGAIN}")

    def _report_progress(self) -> None:
        if num_tried := self._num_tried.total():
            assert self._started is not None, "a worker that reports images was ready"
            seconds = time.monotonic() - self._started
            self._display.advance(progress_text(num_tried, self._source.num_images, seconds))


def _limits(num_parts: int) -> SchedulerLimits:
    """The limits of a pass, which is short in comparison with a run: fewer faults, and no liveness check.

    A worker may be silent for long, because it may have to read past the images of all other parts.
    """
    return SchedulerLimits(
        min_limit_seconds=math.inf,
        first_limit_seconds=math.inf,
        start_limit_seconds=math.inf,
        max_strikes=MAX_LOSSES + 1,
        # So many that one part at least would have lost more workers than it may.
        max_start_faults=MAX_LOSSES * num_parts + 1,
    )


def _max_parts(source: ImageSource) -> int:
    """The largest number of parts of which each has something to do."""
    if source.num_images is None:
        return 1 + source.num_bytes // MIN_PART_BYTES
    return max(1, -(-source.num_images // PART_ROWS))

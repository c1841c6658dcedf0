"""The loop between the scheduler and an executor, whatever the shards are: those of a run, or parts of a pass."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from engine.driver import scheduler
from engine.driver.executors.base import Executor, ExecutorEvent, ShardResult
from engine.driver.progress import Display
from engine.errors import EXIT_INCOMPLETE, MAX_REASON_CHARS, RiskforgeError, fault
from engine.generation.messages import (
    Abort,
    Action,
    Assign,
    Drain,
    Drained,
    Finished,
    PlanGrown,
    Quarantine,
    Replaced,
    ShardError,
    ShardProgress,
    StartWorker,
    StopWorker,
    Tick,
)
from engine.job.plan import ShardSpec

POLL_SECONDS = 0.25
# How long workers wait for a machine before the user is notified.
UNPLACED_SECONDS = 60.0


class WorkersFailingError(RiskforgeError):
    """Workers fail over and over and nothing gets done: a defect, of this program or of the machines."""

    exit_code = EXIT_INCOMPLETE


class SchedulerLoop(ABC):
    """Carries out the scheduler's actions on an executor and passes its events on, until the scheduler ends.

    Subclasses say what a shard is and what to report; all decisions are the scheduler's.
    """

    def __init__(self, executor: Executor, display: Display) -> None:
        self._executor = executor
        self._display = display
        self._unplaced_since: float | None = None
        self._has_reported_unplaced = False

    def _drive(self, state: scheduler.State, actions: list[Action]) -> Finished | Drained:
        """Run the loop from the scheduler's first step on.

        Returns:
            The action that ended it.

        Raises:
            RiskforgeError: a fault of the user, or workers that fail over and over.
        """
        while (end := self._carry_out(actions)) is None:
            state, actions = self._turn(state)
        return end

    @abstractmethod
    def _shard(self, number: int) -> ShardSpec:
        """The shard that a number stands for."""

    @abstractmethod
    def _quarantine(self, action: Quarantine) -> None:
        """A shard was at fault too often."""

    @abstractmethod
    def _workers_failing(self, message: str) -> WorkersFailingError:
        """The error to raise when the scheduler gives up because workers fail over and over."""

    @abstractmethod
    def _report_progress(self) -> None:
        """Show how far the work is, once a turn."""

    def _requests(self) -> list[Drain]:
        """Events that come from the user, not from a worker."""
        return []

    @abstractmethod
    def _note_event(self, event: ExecutorEvent, state: scheduler.State) -> None:
        """Note what concerns the user in an event that is current; `state` is that before it."""

    def _growth(self, event: ExecutorEvent | Tick | Drain, actions: list[Action]) -> PlanGrown | None:
        """Shards that are added because of what a step has settled."""
        return None

    def _error(self, action: Abort) -> RiskforgeError:
        """The error to raise when the scheduler gives up."""
        return fault(action.message, action.exit_code) if action.user_fault else self._workers_failing(action.message)

    @abstractmethod
    def _note_replaced(self, worker: int, message: str) -> None:
        """A worker does not respond and is replaced."""

    def _turn(self, state: scheduler.State) -> scheduler.Step:
        """Pass on to the scheduler what happened in a moment."""
        actions: list[Action] = []
        events: list[Any] = [Tick(time.monotonic()), *self._requests(), *self._executor.poll(POLL_SECONDS)]
        for event in events:
            if not isinstance(event, (Tick, Drain)):
                if _is_outdated(event, state):
                    continue
                self._note_event(event, state)
            state, more = scheduler.step(state, event)
            actions += more
            if growth := self._growth(event, more):
                state, more = scheduler.step(state, growth)
                actions += more
        self._report_unplaced(time.monotonic())
        self._report_progress()
        return state, actions

    def _carry_out(self, actions: Iterable[Action]) -> Finished | Drained | None:
        """Do what the scheduler decided; returns its last action when it has ended."""
        for action in actions:
            if isinstance(action, (Finished, Drained)):
                return action
            self._perform(action)
        return None

    def _perform(self, action: Action) -> None:
        """Do what an action asks for."""
        if isinstance(action, StartWorker):
            self._executor.start_worker(action.worker)
        elif isinstance(action, StopWorker):
            self._executor.stop_worker(action.worker)
        elif isinstance(action, Assign):
            self._executor.submit(action.worker, self._shard(action.shard), action.attempt, action.batch_limit)
        elif isinstance(action, Quarantine):
            self._quarantine(action)
        elif isinstance(action, Replaced):
            self._note_replaced(action.worker, action.message)
        elif isinstance(action, Abort):
            raise self._error(action)

    def _report_unplaced(self, now: float) -> None:
        """Notify the user once when workers wait long for a machine."""
        num = self._executor.num_unplaced
        if not num:
            self._unplaced_since = None
            return
        self._unplaced_since = now if self._unplaced_since is None else self._unplaced_since
        if now - self._unplaced_since >= UNPLACED_SECONDS and not self._has_reported_unplaced:
            self._has_reported_unplaced = True
            self._display.notice(f"{num} worker(s) still wait for room on the cluster; ask for fewer with --workers")


def _is_outdated(event: ExecutorEvent, state: scheduler.State) -> bool:
    """Whether an event about a shard is late or came twice: its worker does not have the shard any more."""
    if not isinstance(event, (ShardResult, ShardError, ShardProgress)):
        return False
    worker = state.workers.get(event.worker)
    return worker is None or event.shard not in worker.queue


def brief(message: str) -> str:
    """The most informative line of a message: the last of a traceback, the first of anything else."""
    lines = message.strip().splitlines() or ["no reason given"]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line[:MAX_REASON_CHARS]


def brief_abort(message: str) -> str:
    """The message of an `Abort`, whose reason may be a whole traceback, in one line."""
    head, mark, reason = message.partition("the last one: ")
    return f"{head}{mark}{brief(reason)}"

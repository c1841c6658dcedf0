"""The loop between the scheduler and an executor; a shard is one of a run, or a part of a pass over images."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from engine.driver.executors.base import Executor, ExecutorEvent, NodeChooser, ShardResult
from engine.driver.progress import Display
from engine.driver.scheduling import scheduler
from engine.driver.scheduling.messages import (
    Abort,
    Action,
    Assign,
    AvoidNodes,
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
from engine.driver.scheduling.state import State, Step
from engine.errors import EXIT_INCOMPLETE, MAX_REASON_CHARS, RiskforgeError, fault
from engine.job.plan import ShardSpec

POLL_SECONDS = 0.25
# The user is notified when workers have been waiting for a machine this long.
UNPLACED_SECONDS = 60.0


class WorkersFailingError(RiskforgeError):
    """Workers fail repeatedly and no shard is finished: a defect of this program or of the machines."""

    exit_code = EXIT_INCOMPLETE


class SchedulerLoop(ABC):
    """Executes the scheduler's actions on an executor and passes its events on, until the scheduler ends.

    Subclasses define what a shard is and what is reported; all decisions are the scheduler's.
    """

    def __init__(self, executor: Executor, display: Display) -> None:
        self._executor = executor
        self._display = display
        self._unplaced_since: float | None = None
        self._has_reported_unplaced = False

    def _drive(self, state: State, actions: list[Action]) -> Finished | Drained:
        """Run the loop, starting from the scheduler's first step.

        Returns:
            The action that ended it.

        Raises:
            WorkersFailingError: workers fail repeatedly.
            RiskforgeError: an error that the user has to fix.
        """
        while (end := self._execute(actions)) is None:
            state, actions = self._turn(state)
        return end

    @abstractmethod
    def _shard(self, number: int) -> ShardSpec:
        """The shard with this number."""

    @abstractmethod
    def _quarantine(self, action: Quarantine) -> None:
        """Handle a shard that reached the limit of strikes."""

    @abstractmethod
    def _workers_failing(self, message: str) -> WorkersFailingError:
        """The error to raise when the scheduler gives up because workers fail repeatedly."""

    @abstractmethod
    def _report_progress(self) -> None:
        """Report progress; called once a turn."""

    @abstractmethod
    def _note_event(self, event: ExecutorEvent, state: State) -> None:
        """Record an event that is not stale; `state` is the one before it."""

    @abstractmethod
    def _note_replaced(self, worker: int, message: str) -> None:
        """Record that a hanging worker is replaced."""

    def _requests(self) -> list[Drain]:
        """Events that come from the user in place of a worker."""
        return []

    def _growth(self, event: ExecutorEvent | Tick | Drain, actions: list[Action]) -> PlanGrown | None:
        """Shards to add after a step."""
        return None

    def _error(self, action: Abort) -> RiskforgeError:
        """The error to raise when the scheduler gives up."""
        return fault(action.message, action.exit_code) if action.user_fault else self._workers_failing(action.message)

    def _turn(self, state: State) -> Step:
        """Pass the events of one poll to the scheduler."""
        actions: list[Action] = []
        events: list[Any] = [Tick(time.monotonic()), *self._requests(), *self._executor.poll(POLL_SECONDS)]
        for event in events:
            if not isinstance(event, (Tick, Drain)):
                if _is_stale(event, state):
                    continue
                self._note_event(event, state)
            state, added = scheduler.step(state, event)
            actions += added
            if growth := self._growth(event, added):
                state, added = scheduler.step(state, growth)
                actions += added
        self._report_unplaced(time.monotonic())
        self._report_progress()
        return state, actions

    def _execute(self, actions: Iterable[Action]) -> Finished | Drained | None:
        """Execute the scheduler's actions; returns the last one if it ends the loop."""
        for action in actions:
            if isinstance(action, (Finished, Drained)):
                return action
            self._perform(action)
        return None

    def _perform(self, action: Action) -> None:
        """Execute one action."""
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
        elif isinstance(action, AvoidNodes):
            self._avoid(action)
        elif isinstance(action, Abort):
            raise self._error(action)

    def _avoid(self, action: AvoidNodes) -> None:
        """Have the executor avoid machines, and notify the user of one more."""
        assert isinstance(self._executor, NodeChooser), "machines were named by the executor"
        self._executor.avoid_nodes(action.nodes)
        if action.message:
            text = action.message
            for node in action.nodes:
                text = text.replace(node, self._executor.node_name(node))
            self._note_avoided(brief_abort(text))

    def _note_avoided(self, message: str) -> None:
        """Report that a machine is avoided from now on."""
        self._display.notice(f"{message}; no worker is started there any more")

    def _report_unplaced(self, now: float) -> None:
        """Notify the user once if workers wait long for a machine."""
        num = self._executor.num_unplaced
        if not num:
            self._unplaced_since = None
            return
        self._unplaced_since = now if self._unplaced_since is None else self._unplaced_since
        if now - self._unplaced_since >= UNPLACED_SECONDS and not self._has_reported_unplaced:
            self._has_reported_unplaced = True
            self._display.notice(f"{num} worker(s) still wait for cluster resources; ask for fewer with --workers")


def _is_stale(event: ExecutorEvent, state: State) -> bool:
    """Whether an event is late or a duplicate: its shard is not in the queue of its worker."""
    if not isinstance(event, (ShardResult, ShardError, ShardProgress)):
        return False
    worker = state.workers.get(event.worker)
    return worker is None or event.shard not in worker.queue


def main_line(message: str) -> str:
    """The most informative line of a message: the last line of a traceback, the first line of anything else."""
    lines = message.strip().splitlines() or ["no reason given"]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line[:MAX_REASON_CHARS]


def brief_abort(message: str) -> str:
    """The message of an `Abort`, whose reason may be a traceback, as one line."""
    head, mark, reason = message.partition("the last one: ")
    return f"{head}{mark}{main_line(reason)}"

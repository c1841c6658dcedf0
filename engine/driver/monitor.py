"""The monitor of a run: what workers do and how fast, as a small file for `riskforge status` and as metrics.

`_state/workers.json` is replaced every few seconds while a driver is at work, and removed at its end. However many
workers there are, it is as large as a hundred need. No decision depends on it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.data.stores.base import STATE, Store
from engine.driver.executors.base import Executor, ExecutorEvent, ShardResult
from engine.driver.metrics import (
    ALL,
    MAX_QUOTAS,
    MetricsPublisher,
    Reading,
    RunFacts,
    label_text,
    request_label,
    run_readings,
)
from engine.driver.progress import Tally
from engine.driver.scheduler_loop import main_line
from engine.driver.scheduling.messages import (
    ShardError,
    ShardProgress,
    ShardSampled,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.driver.workers import (
    DIED,
    NODE_LOST,
    RAISED,
    START_FAILED,
    Rates,
    RateValues,
    WorkerFault,
    WorkerRow,
    WorkerTable,
    count_states,
)
from engine.errors import OutputError
from engine.job.class_names import planned_names
from engine.job.plan import Plan
from engine.terminal import printable, redacted

WORKERS = f"{STATE}/workers.json"
VERSION = 1
WRITE_SECONDS = 5.0
# On an object store, where every request has its price.
WRITE_SECONDS_AWAY = 30.0
PUBLISH_SECONDS = 2.0
END_SECONDS = 20.0
# Of the file: workers that are listed, of more the slowest; and machines.
MAX_ROWS = 100
MAX_MACHINES = 100
MAX_NAME_CHARS = 80
# Observations of histograms between two publications.
MAX_OBSERVATIONS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCounts:
    """What the monitor is told of a run besides its events.

    Attributes:
        num_shards: in the plan.
        num_committed, num_quarantined: of those.
        sampling_share: None if unknown.
    """

    plan: Plan
    num_committed: int
    num_quarantined: int
    sampling_share: float | None


class Monitor:
    """Observes the events of a run loop.

    Args:
        driver: its token, as in its lease.
        tally: of the run loop.
    """

    def __init__(self, store: Store, driver: str, executor: Executor, tally: Tally) -> None:
        self._store = store
        self._driver = driver
        self._publisher = executor if isinstance(executor, MetricsPublisher) else None
        self._tally = tally
        self.table = WorkerTable()
        self._rates = Rates()
        self._failures: Counter[str] = Counter()
        self._num_earlier = tally.total.failed
        self._observations: list[Reading] = []
        self._writer = _Writer(store)
        self._next_publication = 0.0

    # Events --------------------------------------------------------------------------------------------------------

    def note(self, event: ExecutorEvent, plan: Plan) -> None:
        """Record an event that is not stale; faults are recorded by `fault`."""
        now = time.time()
        if isinstance(event, WorkerPlaced):
            self.table.place(event, now)
        elif isinstance(event, WorkerReady):
            self.table.ready(event.worker, now)
        elif isinstance(event, ShardProgress):
            self._note_progress(event, plan)
        elif isinstance(event, ShardSampled):
            self.table.sampled(event.worker, event.shard, now)
        elif isinstance(event, ShardResult):
            self._note_commit(event, plan, now)

    def fault(self, worker: int, message: str, *, kind: str, shard: int | None = None, log: str = "") -> None:
        """Record that a worker is lost or replaced."""
        self.table.stop(worker)
        fault = WorkerFault(
            worker=worker,
            machine=self.table.machines.get(worker, ""),
            kind=kind,
            time=time.time(),
            message=main_line(message),
            shard=shard,
            log=log,
        )
        self.table.add_fault(fault)

    def kind_of(self, event: WorkerLost | ShardError) -> str:
        """The kind of a fault; one of `FAULT_KINDS`."""
        if isinstance(event, ShardError):
            return RAISED
        if event.node_lost:
            return NODE_LOST
        row = self.table.rows.get(event.worker)
        return DIED if row is None or row.is_ready else START_FAILED

    def _note_progress(self, event: ShardProgress, plan: Plan) -> None:
        self.table.progress(event)
        if event.batch_seconds:
            self._observe("riskforge_batch_duration_seconds", event.batch_seconds, event.shard, plan)

    def _note_commit(self, event: ShardResult, plan: Plan, now: float) -> None:
        outcome = event.outcome
        self.table.commit(event.worker, event.shard, outcome.counts.attempted, now)
        self._failures.update(outcome.failures)
        if unknown := outcome.counts.failed - sum(outcome.failures.values()):
            self._failures["other"] += unknown
        self._observe("riskforge_shard_duration_seconds", outcome.total_seconds, event.shard, plan)

    def _observe(self, metric: str, value: float, shard: int, plan: Plan) -> None:
        if self._publisher and len(self._observations) < MAX_OBSERVATIONS:
            number = plan.shard(shard).request
            label = request_label(number, plan.requests[number].spec.name)
            self._observations.append(Reading(metric, value, (label,)))

    # Reports -------------------------------------------------------------------------------------------------------

    def report(self, counts: RunCounts) -> None:
        """Write the file and publish the metrics, whatever is due; called often, and does not wait."""
        now, total = time.monotonic(), self._tally.total
        if any(row.is_ready for row in self.table.rows.values()):
            self._rates.observe(now, total.num_done, total.accepted)
        if self._publisher and now >= self._next_publication:
            self._next_publication = now + PUBLISH_SECONDS
            self._publish(counts)
        self._writer.write_if_due(now, lambda: self._document(counts))

    def close(self, counts: RunCounts) -> None:
        """Publish the last values and remove the file."""
        if self._publisher:
            self._publish(counts)
        self._writer.close()

    def _values(self) -> RateValues:
        total = self._tally.total
        return self._rates.values(time.monotonic(), total.num_done, total.accepted)

    def _remaining_seconds(self, rates: RateValues) -> float | None:
        left = self._tally.total.total - self._tally.total.num_done
        rate = rates.now or rates.mean
        return max(0, left) / rate if rate else None

    def _shards(self, counts: RunCounts) -> dict[str, int]:
        in_flight = self.table.num_in_flight
        rest = counts.plan.num_shards - counts.num_committed - counts.num_quarantined - in_flight
        return {
            "committed": counts.num_committed,
            "in_flight": in_flight,
            "waiting": max(0, rest),
            "quarantined": counts.num_quarantined,
        }

    def _publish(self, counts: RunCounts) -> None:
        assert self._publisher
        rates = self._values()
        facts = RunFacts(
            requests=self._tally.requests,
            workers=list(self.table.rows.values()),
            failures=self._failures,
            num_earlier_failures=self._num_earlier,
            worker_faults=self.table.num_faults,
            missing=self._missing(counts.plan),
            rates=rates,
            sampling_share=counts.sampling_share,
            shards=self._shards(counts),
            remaining_seconds=self._remaining_seconds(rates),
        )
        readings, self._observations = [*run_readings(facts), *self._observations], []
        self._publisher.publish_metrics(label_text(printable(self._store.name)), readings)

    def _missing(self, plan: Plan) -> list[tuple[int, str, int]]:
        """What each quota lacks: number of the request, class, number; of many each request as a whole."""
        if sum(len(request.cells) for request in plan.requests if request.spec.has_quota) > MAX_QUOTAS:
            return [
                (number, ALL, row.wanted - row.counted) for number, row in enumerate(self._tally.requests) if row.wanted
            ]
        names = planned_names(plan)
        return [
            (request, " and ".join(names[index] for index in plan.requests[request].cells[cell].classes), missing)
            for request, cell, missing in self._tally.missing()
        ]

    def _document(self, counts: RunCounts) -> dict[str, Any]:
        """The content of the file."""
        rows = list(self.table.rows.values())
        rates = self._values()
        return {
            "version": VERSION,
            "driver": self._driver,
            "time": round(time.time(), 3),
            "num_workers": len(rows),
            "states": count_states(rows),
            "machines": _machines(rows),
            "workers": [_row_document(row) for row in listed_rows(rows)],
            "faults": [_fault_document(fault) for fault in self.table.faults],
            "num_faults": dict(self.table.num_faults),
            "rates": {
                "samples_per_second": rates.now,
                "mean_samples_per_second": rates.mean,
                "accepted_per_second": rates.accepted,
            },
            "remaining_seconds": self._remaining_seconds(rates),
            "sampling_share": counts.sampling_share,
            "shards": self._shards(counts),
            "missing": sum(row.wanted - row.counted for row in self._tally.requests),
        }


class _Writer:
    """Replaces the file in the background: the driver must not wait for a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._every = WRITE_SECONDS_AWAY if "://" in store.uri else WRITE_SECONDS
        self._next = 0.0
        self._thread: threading.Thread | None = None

    def write_if_due(self, now: float, document: Callable[[], dict[str, Any]]) -> None:
        """Write the document if it is time and the last write has ended."""
        if now < self._next or (self._thread and self._thread.is_alive()):
            return
        self._next = now + self._every
        text = json.dumps(document(), ensure_ascii=False)
        self._start(lambda: self._store.replace(WORKERS, text.encode()))

    def close(self) -> None:
        """Remove the file; with a broken network this does not wait for long."""
        deadline = time.monotonic() + END_SECONDS
        if self._thread:
            self._thread.join(END_SECONDS)
        self._start(lambda: self._store.remove(WORKERS))
        assert self._thread
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self, change: Callable[[], None]) -> None:
        def run() -> None:
            with contextlib.suppress(OutputError):
                change()

        self._thread = threading.Thread(target=run, name="workers-file", daemon=True)
        self._thread.start()


def listed_rows(rows: list[WorkerRow]) -> list[WorkerRow]:
    """The workers that are listed, by number: all, or of many the slowest."""
    slowest = sorted(rows, key=lambda row: (-row.sample_seconds, row.since))[:MAX_ROWS]
    return sorted(slowest, key=lambda row: row.number)


def _machines(rows: list[WorkerRow]) -> list[dict[str, Any]]:
    """The machines with the most workers, with what these do."""
    by_machine: dict[str, list[WorkerRow]] = {}
    for row in rows:
        by_machine.setdefault(row.machine, []).append(row)
    largest = sorted(by_machine.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_MACHINES]
    return [
        {
            "machine": machine[:MAX_NAME_CHARS],
            "num_workers": len(own),
            "states": {state: number for state, number in count_states(own).items() if number},
            "num_samples": sum(row.num_samples for row in own),
            "num_shards": sum(row.num_shards for row in own),
        }
        for machine, own in sorted(largest)
    ]


def _row_document(row: WorkerRow) -> dict[str, Any]:
    usage = row.usage
    return {
        "worker": row.number,
        "machine": row.machine[:MAX_NAME_CHARS],
        "state": row.state,
        "since": round(row.since, 3),
        "shard": row.shard,
        "num_done": row.num_done,
        "num_samples": row.num_samples,
        "batch_size": usage.size if usage else 0,
        "batch_seconds": round(row.batch_seconds, 3),
        "gpu_memory_peak_bytes": usage.peak_bytes if usage else 0,
        "gpu_memory_total_bytes": usage.total_bytes if usage else 0,
    }


def _fault_document(fault: WorkerFault) -> dict[str, Any]:
    return {
        "worker": fault.worker,
        "machine": fault.machine[:MAX_NAME_CHARS],
        "kind": fault.kind,
        "time": round(fault.time, 3),
        "shard": fault.shard,
        "message": redacted(fault.message),
        "log": fault.log,
    }

"""What each worker does, and how fast the run is: for `riskforge status` and for metrics. No decision depends on it.

Pure: the time is an argument.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.driver.scheduling.messages import ShardProgress, WorkerPlaced
from engine.generation.usage import BatchUsage

WAITING, LOADING, IDLE, SAMPLING, WRITING = STATES = ("waiting", "loading", "idle", "sampling", "writing")
NODE_LOST, DIED, HANGS, RAISED, START_FAILED = FAULT_KINDS = (
    "node_lost",
    "process_died",
    "hangs",
    "shard_raised",
    "start_failed",
)
MAX_FAULTS = 10
NOW_SECONDS = 60.0
# Shards are committed every few minutes: over a minute their rate would be zero or many.
ACCEPTED_SECONDS = 600.0


@dataclass(slots=True)
class WorkerRow:
    """A worker.

    Attributes:
        machine: its name; empty until it has one.
        since: time when its state, or its shard in flight, began.
        shards: assigned to it, the one in flight first.
        num_sampled: shards at the head that are only being written.
        num_done: samples done of the shard in flight.
        num_samples, num_shards: what it has committed.
        batch_seconds: duration of its last batch; 0 before the first.
        usage: of its last batch.
    """

    number: int
    since: float
    machine: str = ""
    is_placed: bool = False
    is_ready: bool = False
    shards: list[int] = field(default_factory=list)
    num_sampled: int = 0
    num_done: int = 0
    num_samples: int = 0
    num_shards: int = 0
    batch_seconds: float = 0.0
    usage: BatchUsage | None = None

    @property
    def state(self) -> str:
        """One of `STATES`."""
        if not self.is_ready:
            return LOADING if self.is_placed else WAITING
        if not self.shards:
            return IDLE
        return SAMPLING if self.num_sampled < len(self.shards) else WRITING

    @property
    def shard(self) -> int | None:
        """The shard in flight."""
        return self.shards[min(self.num_sampled, len(self.shards) - 1)] if self.shards else None

    def drop(self, shard: int, now: float) -> None:
        """Record that a shard of it is done with."""
        if shard == self.shard:
            self.since, self.num_done = now, 0
        self.num_sampled -= self.num_sampled > self.shards.index(shard)
        self.shards.remove(shard)

    @property
    def sample_seconds(self) -> float:
        """Time that a sample of the last batch took; 0 if unknown."""
        return self.batch_seconds / self.usage.size if self.usage and self.usage.size else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFault:
    """A worker that was lost or replaced.

    Attributes:
        kind: one of `FAULT_KINDS`.
        shard: that the fault is attributed to, None for none.
        log: file with its reason and its last output, below the output; empty without one.
    """

    worker: int
    machine: str
    kind: str
    time: float
    message: str
    shard: int | None = None
    log: str = ""


class WorkerTable:
    """The workers of a run, from what happens to them.

    Attributes:
        rows: by number.
        faults: the latest.
        machines: name of the machine of each worker so far, also of those that are gone.
        num_faults: by kind.
    """

    def __init__(self) -> None:
        self.rows: dict[int, WorkerRow] = {}
        self.machines: dict[int, str] = {}
        self.faults: deque[WorkerFault] = deque(maxlen=MAX_FAULTS)
        self.num_faults: Counter[str] = Counter()

    def start(self, worker: int, now: float) -> None:
        """Record that a worker was started."""
        self.rows[worker] = WorkerRow(worker, now)

    def place(self, event: WorkerPlaced, now: float) -> None:
        """Record that a worker has a machine."""
        if row := self.rows.get(event.worker):
            row.machine, row.is_placed, row.since = event.machine, True, now
            self.machines[event.worker] = event.machine

    def ready(self, worker: int, now: float) -> None:
        """Record that a worker has loaded its models."""
        if row := self.rows.get(worker):
            row.is_ready, row.since = True, now

    def assign(self, worker: int, shard: int, now: float) -> None:
        """Record that a shard was queued on a worker."""
        if row := self.rows.get(worker):
            row.shards.append(shard)
            if row.num_sampled == len(row.shards) - 1:
                row.since, row.num_done = now, 0

    def progress(self, event: ShardProgress) -> None:
        """Record progress of a shard in flight."""
        row = self.rows.get(event.worker)
        if row is None or event.shard != row.shard:
            return
        row.num_done = event.num_done
        if event.batch_seconds:
            row.batch_seconds, row.usage = event.batch_seconds, event.usage or row.usage

    def sampled(self, worker: int, shard: int, now: float) -> None:
        """Record that a worker begins with the next shard while it writes this one."""
        row = self.rows.get(worker)
        if row and shard in row.shards[row.num_sampled :]:
            row.num_sampled, row.since = row.shards.index(shard) + 1, now
            row.num_done = 0 if row.num_sampled < len(row.shards) else row.num_done

    def commit(self, worker: int, shard: int, num_samples: int, now: float) -> None:
        """Record that a shard was committed."""
        if row := self.rows.get(worker):
            row.num_samples += num_samples
            row.num_shards += 1
        # Another worker may have it, too.
        for other in self.rows.values():
            if shard in other.shards:
                other.drop(shard, now)

    def stop(self, worker: int) -> None:
        """Record that a worker is gone."""
        self.rows.pop(worker, None)

    def add_fault(self, fault: WorkerFault) -> None:
        """Record why a worker is gone."""
        self.faults.append(fault)
        self.num_faults[fault.kind] += 1

    @property
    def num_in_flight(self) -> int:
        """Shards that workers are sampling or writing."""
        return sum(min(len(row.shards), row.num_sampled + 1) for row in self.rows.values())


def count_states(rows: Iterable[WorkerRow]) -> dict[str, int]:
    """Workers in each state, in the order of `STATES`."""
    counts = Counter(row.state for row in rows)
    return {state: counts[state] for state in STATES}


@dataclass(frozen=True, slots=True, kw_only=True)
class RateValues:
    """Rates of a run; None where nothing is known yet.

    Attributes:
        now: samples per second in the last minute.
        mean: samples per second since the first worker was ready.
        accepted: accepted samples per second in the last ten minutes.
    """

    now: float | None = None
    mean: float | None = None
    accepted: float | None = None


class Rates:
    """Rates from counts that are observed again and again."""

    def __init__(self) -> None:
        # (time, samples done, accepted samples), the oldest first.
        self._points: deque[tuple[float, int, int]] = deque()
        self._first: tuple[float, int, int] | None = None

    def observe(self, now: float, num_done: int, num_accepted: int) -> None:
        """Record the counts of now; at most once a second is kept."""
        point = (now, num_done, num_accepted)
        self._first = self._first or point
        if self._points and now - self._points[-1][0] < 1.0:
            return
        self._points.append(point)
        while now - self._points[0][0] > ACCEPTED_SECONDS:
            self._points.popleft()

    def values(self, now: float, num_done: int, num_accepted: int) -> RateValues:
        """The rates up to now."""
        if self._first is None or now <= self._first[0]:
            return RateValues()
        recent = next((point for point in self._points if now - point[0] <= NOW_SECONDS), self._points[-1])
        oldest = self._points[0]
        return RateValues(
            now=_rate(num_done - recent[1], now - recent[0]),
            mean=_rate(num_done - self._first[1], now - self._first[0]),
            accepted=_rate(num_accepted - oldest[2], now - oldest[0]),
        )


def _rate(number: int, seconds: float) -> float | None:
    # Samples of a shard that failed are not done any more.
    return max(0, number) / seconds if seconds > 0 else None
